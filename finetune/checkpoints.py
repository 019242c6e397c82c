"""The checkpoints of a fit: finding the newest intact one, and recovering the log from its copies in checkpoints.

checkpoint-STEP/files.json   the digest of every other file
checkpoint-STEP/log.jsonl    the run's log up to STEP
checkpoint-STEP/…            the files from which `transformers.Trainer` resumes
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from finetune.errors import CheckpointError

_FILES = "files.json"
_STATE, _WEIGHTS = "trainer_state.json", "model.safetensors"
_NEEDED = (_WEIGHTS, _STATE, "optimizer.pt", "scheduler.pt")


def checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints in `directory`, oldest first. They may be damaged, but partly removed ones are omitted."""
    return [path for path in _begun(directory) if (path / _STATE).exists()]


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def _begun(directory: Path) -> list[Path]:
    found = (path for path in directory.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal())
    return sorted(found, key=step_of)


def seal(checkpoint: Path, log: Path) -> None:
    """Add a copy of the log and the digests of all files to a checkpoint, and flush everything to disk."""
    shutil.copyfile(log, checkpoint / log.name)
    digests = {path.name: _digest(path) for path in sorted(checkpoint.iterdir())}
    (checkpoint / _FILES).write_text(json.dumps(digests))
    for path in (*checkpoint.iterdir(), checkpoint):
        to_disk(path)


def discard(directory: Path) -> None:
    """Remove the checkpoints of a fit whose model has been exported, except for the newest copy of the log.

    They take three to four times the space of the model, and are no longer needed.
    """
    logs = (log for checkpoint in reversed(_begun(directory)) for log in checkpoint.glob("*.jsonl"))
    if (newest := next(logs, None)) is not None:
        newest.replace(directory / newest.name)
    for path in (*_begun(directory), directory / "partial"):
        shutil.rmtree(path, ignore_errors=True)


def to_disk(path: Path) -> None:
    """Flush a file, or a directory's entries, to disk, so that they survive a power failure."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open directories
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_whole(directory: Path, anyway: bool = False) -> Path | None:
    """Return the newest intact checkpoint, or None if there are no checkpoints. Warn about newer, damaged ones.

    If none is intact and `anyway` is True, return the newest that lacks only files that training can do without, or
    None.

    Raises:
        CheckpointError: there are checkpoints, but none is intact, and `anyway` is False.
    """
    broken: dict[Path, dict[str, str]] = {}
    taken = None
    for checkpoint in reversed(_begun(directory)):
        if not (faults := _faults(checkpoint)):
            taken = checkpoint
            break
        broken[checkpoint] = faults
    if not broken:
        return taken
    what = "; ".join(
        f"{checkpoint.name}: {', '.join(f'{file} is {fault}' for file, fault in faults.items())}"
        for checkpoint, faults in broken.items()
    )
    if taken is None and not anyway:
        raise CheckpointError(
            f"No checkpoint in {directory} is intact ({what}). Restore one, or pass --anyway (in Python, anyway=True) "
            "to continue from what is left, or from the first step if nothing is."
        )
    if taken is None:
        usable = (
            checkpoint
            for checkpoint, faults in broken.items()
            if not {_WEIGHTS, _STATE} & faults.keys() and set(faults.values()) == {"missing"}
        )
        taken = next(usable, None)
    if PartialState().is_main_process:
        start = "the first step" if taken is None else taken.name
        tqdm.write(f"warning: some checkpoints in {directory} are damaged ({what}). Training continues from {start}.")
    return taken


def _faults(checkpoint: Path) -> dict[str, str]:
    """Return which files of a checkpoint are missing or damaged."""
    try:
        digests = json.loads((checkpoint / _FILES).read_text())
        assert isinstance(digests, dict)
    except FileNotFoundError:
        digests = {}  # the checkpoint of an earlier version
    except (ValueError, AssertionError):
        return {_FILES: "damaged"}
    faults = {}
    for name in dict.fromkeys((*_NEEDED, *digests)):
        path = checkpoint / name
        if not path.is_file():
            faults[name] = "missing"
        elif _digest(path) != digests[name] if name in digests else not _opens(path):
            faults[name] = "damaged"
    return faults


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _opens(path: Path) -> bool:
    """Return whether a file without a known digest can be opened in its format."""
    try:
        if path.suffix == ".json":
            return isinstance(json.loads(path.read_text()), dict)
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return True
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (ValueError, SafetensorError, zipfile.BadZipFile):
        return False


def read_log(path: Path, checkpoint: Path | None = None) -> list[dict[str, Any]]:
    """Return the lines of a run's log, or of its copy in `checkpoint` if given. If the log is damaged, use a copy.

    A partial last line, left by a killed process, does not count as damage. Any other damage is reported.
    """
    written = path.read_bytes() if path.exists() else b""
    copy = None if checkpoint is None else checkpoint / path.name
    if copy is not None and copy.exists():
        lines = list(_lines(copy.read_bytes()))
        if not written.startswith(copy.read_bytes()):
            _say(f"{path} is damaged. Its copy in {copy.parent.name} is used")
        return lines
    lines = list(_lines(written))
    if len(lines) == written.count(b"\n"):
        return lines
    copies = (path.parent / "checkpoints").rglob(path.name)
    if copy := max(copies, key=lambda copy: copy.stat().st_size, default=None):
        _say(f"{path} is damaged. Its copy in {copy.parent.relative_to(path.parent).as_posix()} is used")
        return list(_lines(copy.read_bytes()))
    _say(f"{path} is damaged. {written.count(bytes([10])) - len(lines)} of its lines are skipped")
    return lines


def _say(what: str) -> None:
    if PartialState().is_main_process:
        tqdm.write(f"warning: {what}.")


def _lines(log: bytes) -> Iterator[dict[str, Any]]:
    """Yield the intact lines."""
    for line in log.splitlines(keepends=True):
        try:
            content = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            continue
        if isinstance(content, dict) and {"model", "step"} <= content.keys():
            yield content
