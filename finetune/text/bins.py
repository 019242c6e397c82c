"""nanoGPT's files of token ids: finding them, checking the type of their numbers, and memory-mapping them."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt

from finetune.text.sources import TextError, path_of

HELD_OUT = ("val.bin", "valid.bin", "validation.bin", "dev.bin", "test.bin", "eval.bin")
"""Names of the held-out file beside train.bin. The first that exists is used."""
_SAMPLE = 1 << 16  # bytes, at the beginning, in the middle and at the end of a file
_HEADER = (
    1024  # bytes: 256 int32 numbers; in llm.c's and modded-nanogpt's files the first identifies the type of the rest
)
_LLM_C = {20240520: "uint16", 20240801: "uint32"}
_MAGIC = {
    b"\x93NUMPY": "a .npy file of NumPy; write its array with `.tofile`",
    b"PAR1": "a Parquet file; rename it to .parquet",
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it",
    b"MMIDIDX": "an index of Megatron; pass the .bin beside it",
}


def bin_files(name: str) -> list[Path]:
    """Return the .bin files of a source: the file itself or, of a directory, train.bin and the held-out file if any."""
    path = path_of(name)
    if not path.is_dir():
        return [path] if path.suffix == ".bin" and path.is_file() else []
    held_out = [path / name for name in HELD_OUT if (path / name).is_file()]
    return [file for file in (path / "train.bin", *held_out[:1]) if file.is_file()]


def read_bin(path: Path, dtype: np.dtype, vocab_size: int) -> UInt[np.ndarray, " token"]:
    """Memory-map a file of token ids.

    Raises:
        TextError: the file is empty, or does not look like token ids of this type.
    """
    size = path.stat().st_size
    if size == 0:
        raise TextError(f"{path} is empty.")
    sample = _sample(path, size)
    problem = _not_numbers(sample, path) or _other_type(sample, dtype, vocab_size, path)
    if problem is None and size % dtype.itemsize:
        problem = f"its size is not a multiple of {dtype}'s; it is corrupt, or text.token_dtype is wrong."
    if problem is not None:
        raise TextError(f"{path}: {problem}")
    return np.memmap(path, dtype, "r")


def _sample(path: Path, size: int) -> bytes:
    """Return bytes from the beginning, the middle and the end, each starting at a multiple of 8."""
    starts = dict.fromkeys(start // 8 * 8 for start in (0, size // 2, max(0, size - _SAMPLE)))
    with path.open("rb") as file:
        return b"".join(file.read(_SAMPLE // 8 * 8) for start in starts if file.seek(start) == start)


def _not_numbers(sample: bytes, path: Path) -> str | None:
    for magic, what in _MAGIC.items():
        if sample.startswith(magic):
            return f"it is {what}."
    first = int.from_bytes(sample[:4], "little")
    if first in _LLM_C and len(sample) >= _HEADER:
        kind = _LLM_C[first]
        skip = _HEADER // np.dtype(kind).itemsize
        return (
            f"it begins with the {_HEADER}-byte header of llm.c's files of {kind}. Cut it off: "
            f"`np.memmap({path.name!r}, np.{kind})[{skip}:].tofile('tokens.bin')`."
        )
    if len(sample) >= 64 and not sample.strip(b"\t\n\r" + bytes(range(32, 127))):
        return "it looks like text, not token ids: rename it to .txt or .jsonl."
    if not any(sample):
        return "its beginning, middle and end are all zeros: it was never filled."
    return None


def _other_type(sample: bytes, dtype: np.dtype, vocab_size: int, path: Path) -> str | None:
    """Return what is wrong and what to do if the numbers look like those of another type, else None.

    If the numbers are read as too narrow a type, there are zeros between them. If they are read as too wide a type,
    they exceed every token id. So the right type is the widest one for which every number is a token id.
    """
    sample = sample[: len(sample) // 8 * 8]
    if len(sample) < 64:
        return None
    signed = np.frombuffer(sample, "<i4")
    if dtype.itemsize == 4 and -(2**15) < signed.min() < 0 <= signed.max() < vocab_size:
        return f"it contains negative numbers, such as {signed.min()}, which are not token ids: remove them."
    largest = {kind: int(np.frombuffer(sample, kind).max()) for kind in ("<u8", "<u4", "<u2", "u1")}
    looks = next((kind for kind in largest if largest[kind] < vocab_size), None)
    swapped = next((kind for kind in (">u8", ">u4", ">u2") if np.frombuffer(sample, kind).max() < vocab_size), None)
    if looks is not None and swapped is not None and np.dtype(swapped).itemsize > np.dtype(looks).itemsize:
        looks = swapped
    looks = looks or swapped
    kind = None if looks is None else np.dtype(looks)
    if kind is None or kind == dtype:
        return None
    any_passes = vocab_size >= 2 ** (8 * kind.itemsize)
    if kind.itemsize < dtype.itemsize and any_passes and (kind.itemsize == 1 or largest[f"<u{dtype.itemsize}"] < 2**20):
        return None  # the type is right, but some ids are beyond the vocabulary
    name = kind.name.replace("uint64", "int64")
    if kind.itemsize > dtype.itemsize:
        between = f"every {('second', 'fourth', 'eighth')[kind.itemsize // dtype.itemsize // 4]} number"
        seen = f"{between} is 0" if kind.itemsize == 2 * dtype.itemsize else f"only {between} is not 0"
    else:
        seen = f"its largest number as {dtype} is {np.frombuffer(sample, dtype).max():,}"
    if kind.byteorder != ">" and name in ("uint16", "uint32"):
        return f"{seen}, as in a file of {name}. Set text.token_dtype to {name}."
    order = ", big-endian" if kind.byteorder == ">" else ""
    target = "uint16" if vocab_size <= 2**16 else "uint32"
    return (
        f"{seen}, as in a file of {name}{order}, which is not supported. Convert it: "
        f"`np.fromfile({path.name!r}, {looks!r}).astype(np.{target}).tofile('tokens.bin')`, "
        "and leave text.token_dtype at auto."
    )
