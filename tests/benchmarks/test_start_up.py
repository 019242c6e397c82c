"""Seconds from the start of a process: of the commands' help, of imports, and until a run's first step is done.

Everything is done in turn, and then again, after a first round that only warms up the file system. The runs are of
`micro`, on its own text, and are killed once their log has the step: `first run` tokenises the text, `second run` finds
its tokens in the cache, `resumed run` goes on from the checkpoint of step 2.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import machine
import pandas as pd
import torch

AIMS = {
    "python -m finetune --help": 1.5,
    "import analysis": 1.0,
    "second run": 10.0,
    "resumed run": 10.0,
}
"""Seconds, at the most."""
RUN = ("-m", "finetune", "run", "micro", "--log-every", "1", "--save-every", "2", "--out")
PATIENCE = 600
"""Seconds to wait for a step."""


def _command(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


@contextmanager
def _process(arguments: tuple[str, ...], cache: str) -> Iterator[subprocess.Popen]:
    """Run Python with `arguments` until it is left."""
    environment = os.environ | {"HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _until(done: Callable[[], bool], process: subprocess.Popen) -> float:
    start = time.perf_counter()
    while not done():
        if process.poll() is not None or time.perf_counter() - start > PATIENCE:
            raise RuntimeError(f"{process.args}: no step within {PATIENCE} s, or it ended with {process.returncode}.")
        time.sleep(0.005)
    return time.perf_counter() - start


def _lines(run: Path) -> int:
    log = run / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def _first_step(run: Path, cache: str) -> float:
    with _process((*RUN, str(run)), cache) as process:
        return _until(lambda: _lines(run) > 0, process)


def _resumed_step(run: Path, cache: str) -> float:
    """Take up a run that is killed after its checkpoint of step 2, with the log of just these steps."""
    with _process((*RUN, str(run)), cache) as process:
        _until((run / "checkpoints" / "ln_free" / "checkpoint-2").exists, process)
    log = run / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    with _process(("-m", "finetune", "resume", str(run)), cache) as process:
        return _until(lambda: _lines(run) > 2, process)


def _round() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        root, cache = Path(directory), str(Path(directory) / "cache")
        return {
            "python -m finetune --help": _command("-m", "finetune", "--help"),
            "import finetune": _command("-c", "import finetune"),
            "import analysis": _command("-c", "import analysis"),
            "import torch": _command("-c", "import torch"),
            "first run": _first_step(root / "first", cache),
            "second run": _first_step(root / "second", cache),
            "resumed run": _resumed_step(root / "resumed", cache),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="after the one that warms up; 0: that one alone")
    options = parser.parse_args()
    rounds = [_round() for _ in range(options.rounds + 1)]
    table = pd.DataFrame({"seconds": pd.DataFrame(rounds[bool(options.rounds) :]).median()})
    table["aim"] = pd.Series(AIMS)
    print(f"\n{machine.describe('cuda' if torch.cuda.is_available() else 'cpu')}\n{options.rounds} rounds")
    print(machine.markdown(table, "what"), flush=True)


def test_start_up() -> None:
    subprocess.run([sys.executable, __file__], check=True)


if __name__ == "__main__":
    main()
