"""Progress: a bar on a terminal, lines where there is none."""

import os
import pty
import re
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest

from finetune import progress

LOOP = """
import sys, time
from finetune import progress
progress.EVERY = 0.2
for _ in progress.progress(range(10), "Working", unit="batch"):
    time.sleep(0.1)
"""
NOT_SILENT = {key: value for key, value in os.environ.items() if key != "TQDM_DISABLE"}


def test_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: seconds))
    for leave in (True, False):
        bar = progress._Lines(total=25, unit="batch", leave=leave, mininterval=0, disable=False)
        with bar:
            for _ in range(25):
                bar.set_description("Writing")
                seconds += 1
                bar.update()
                bar.write("said", file=sys.stderr)
    lines = capsys.readouterr().err.replace("said\n", "").splitlines()
    shown = [re.fullmatch(r"Writing: +(\d+)%\| (\d+)/25 \[\d\d:\d\d<.*batch/s\]", line) for line in lines]
    assert [found and found.groups() for found in shown] == [
        *[("40", "10"), ("80", "20"), ("100", "25")],
        *[("40", "10"), ("80", "20")],
    ]


def test_lines_in_a_file() -> None:
    done = subprocess.run([sys.executable, "-c", LOOP], env=NOT_SILENT, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert not re.search("[\r\x1b]|\n\n", done.stderr)
    assert done.stderr.endswith("\n")
    assert done.stderr.count("Working: ") == len(done.stderr.splitlines()) > 2


def test_can_be_silenced() -> None:
    silent = {**NOT_SILENT, "TQDM_DISABLE": "1"}
    loop = LOOP.replace('unit="batch"', "disable=False")
    done = subprocess.run([sys.executable, "-c", loop], env=silent, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_bar_on_a_terminal() -> None:
    ours, its = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    subprocess.run([sys.executable, "-c", LOOP], env=NOT_SILENT, stdout=its, stderr=its, check=True)
    os.close(its)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert shown.count("\r") > 5
    assert re.search(r"Working: +\d+%\|.*\| \d+/10 ", shown)
