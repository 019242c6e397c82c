"""Local files: which of them a source names, what their names say they are for, and what is in them.

pyarrow, fsspec and Python's own codecs read them, a piece at a time, whatever their size.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.json
import pyarrow.parquet
from datasets.data_files import SPLIT_KEYWORDS
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

from finetune.errors import NolnError

FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSIONS = ".gz", ".bz2", ".xz", ".zst"
PART_CHARACTERS = 1 << 22
"""A longer .txt is read in parts. Tokenizers take many times as much memory as their text."""
PASSAGE_CHARACTERS = 1 << 13
"""As long are the passages, documents each, that a stream makes of a .txt that is long or the only one."""
CHUNK_CHARACTERS = 1 << 23
"""Of a .jsonl, read in one go, up to the end of the line."""
LONGEST_LINE = 1 << 28
"""Characters of a line of a .jsonl, or of a .json that is one list: more would be no text."""
LARGEST_EXPANSION = 200
"""How many times as large as a compressed file its text may be, where it is longer than `_HARMLESS`."""
_HARMLESS = 1 << 28  # characters
_ROWS = 100  # of a .parquet, read in one go

_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


class TextError(NolnError):
    """A text that cannot be read or does not suit the model; the message says where and what to do."""


class Split(NamedTuple):
    """The files of a directory that say what they are for."""

    train: list[Path]
    held_out: list[Path]
    unused: list[Path]


def format_of(path: Path) -> str | None:
    """Return which of the `FORMATS` a file's name says that it has."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def find(path: Path) -> list[Path]:
    """Return a file, or all files of known format in and below a directory, sorted; hidden ones are passed over.

    Links are followed, but none into a directory that has been read already.
    """
    if not path.is_dir():
        return [path]
    files, read = [], set()
    for parent, folders, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(parent)) in read:
            folders.clear()
            continue
        read.add(real)
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if format_of(file) and file.is_file())


def split(files: list[Path], directory: Path, name: str) -> Split | None:
    """Sort files by what names of files and directories, such as train and validation, say; None if none holds out.

    Held out are files of validation or, where there are none, of testing. Neither is trained on, nor is a file that
    does not say what it is for where others say that they are for training.

    Raises:
        TextError: there are files of validation and of testing, and no others.
    """
    for anywhere in (True, False):
        kinds = {file: _kind(file.relative_to(directory), anywhere) for file in files}
        if "train" in kinds.values():  # or else a name may only happen to hold such a word
            break
    by_kind = {kind: [file for file in files if kinds[file] == kind] for kind in (*SPLIT_KEYWORDS, None)}
    train, unsaid = by_kind["train"], by_kind[None]
    held_out = by_kind["validation"] or by_kind["test"]
    if not held_out or len(held_out) == len(files):
        return None
    if not (train or unsaid):
        raise TextError(f"{name} holds files for validation and for testing, and none to train on: name one of them.")
    used = {*(train or unsaid), *held_out}
    return Split(train or unsaid, held_out, [file for file in files if file not in used])


def _kind(path: Path, anywhere: bool) -> str | None:
    """Return which of datasets' splits a path names, or None: of its parts the last that names one decides.

    It is a word `anywhere` in a part, between such characters as are not letters; or else the whole part, or its end,
    but for numbers.
    """
    numbers = r"([-._ ]?\d+([-._ ]of[-._ ]\d+)?)?"
    for part in (_stem(path.name), *reversed(path.parts[:-1])):
        for kind, words in SPLIT_KEYWORDS.items():
            word = rf"({'|'.join(words)})"
            pattern = rf"(.*[-._ \d])?{word}([-._ \d].*)?" if anywhere else rf"(.*[-._ ])?{word}{numbers}"
            if re.fullmatch(pattern, part.lower()):
                return str(kind)
    return None


def _stem(name: str) -> str:
    """Return a file's name without the endings that name its format and compression."""
    suffix = Path(name).suffix
    return _stem(Path(name).stem) if suffix.lower() in {*FORMATS, *COMPRESSIONS} else name


def parts(path: Path, characters: int) -> Iterator[str]:
    """Yield a .txt in parts of at most so many characters, cut before the white space that follows a word.

    It is a line break if there is one: there GPT-2's tokenizer parts two tokens in any case.
    """
    with _open_text(path) as file:
        rest, read = "", 0
        while chunk := file.read(characters - len(rest)):
            read += len(chunk)
            _check_expansion(path, read)
            text = rest + chunk
            if len(text) < characters:
                rest = text
                continue
            cut = _last_cut(text, "\n") or _last_cut(text, " ") or len(text)
            yield text[:cut]
            rest = text[cut:]
        if rest:
            yield rest


def _last_cut(text: str, space: str) -> int:
    """Return where the last `space` after a visible character is, or 0."""
    place = text.rfind(space)
    while place > 0 and text[place - 1].isspace():
        place = text.rfind(space, 0, place)
    return max(place, 0)


def is_empty(path: Path) -> bool:
    """Return whether a file of known format holds nothing: of a .json or .jsonl, whether it has no bytes."""
    if not path.stat().st_size:
        return True
    if format_of(path) == "text":
        return not any(parts(path, 64))
    if format_of(path) == "json":
        return False
    with _opened(path) as file:
        return pyarrow.parquet.read_metadata(file).num_rows == 0


def kinds_of(path: Path) -> dict[str, str]:
    """Return what each column of a .parquet holds."""
    with _opened(path) as file:
        schema = pyarrow.parquet.read_schema(file)
    return {field.name: _kind_of_type(field.type) for field in schema}


def _kind_of_type(kind: pyarrow.DataType) -> str:
    if pyarrow.types.is_dictionary(kind):
        return _kind_of_type(kind.value_type)
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind):
        return "string"
    return "list" if kind.num_fields == 1 else "struct" if kind.num_fields else str(kind)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .jsonl, .json or .parquet with all their columns.

    Raises:
        TextError: a row that has no columns, or a line that is too long.
    """
    if format_of(path) == "parquet":
        with _opened(path) as file:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(_ROWS):
                yield from batch.to_pylist()
        return
    for line, chunk in _chunks(path):
        yield from _json_rows(path, line, chunk)


def column_of(path: Path, column: str) -> Iterator[str]:
    """Yield the values of a column of a file, which must be text; rows may be without. Other columns are not read.

    Raises:
        TextError: a value is not text, or there is none.
    """
    number, found = 0, False
    for values in _parquet(path, column) if format_of(path) == "parquet" else _json(path, column):
        for value in values:
            number += 1
            if isinstance(value, str):
                found = True
                yield value
            elif value is not None:
                shown = json.dumps(value, default=str)[:40]
                raise TextError(f"{path}, row {number:,}: its {column} is {shown}, which is not a string.")
    if number and not found:
        raise TextError(f"{path} has nothing in a column {column!r}: name another as text.column, or omit it.")


def clean(document: str) -> str:
    """Return a document without a byte order mark before it, and with a sign for each half of a character in it."""
    document = document.removeprefix("\ufeff")
    try:
        document.encode()
    except UnicodeEncodeError:
        return document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return document


def _parquet(path: Path, column: str) -> Iterator[list[Any]]:
    with _opened(path) as file:
        table = pyarrow.parquet.ParquetFile(file)
        if column not in table.schema_arrow.names:
            raise TextError(f"{path} has no column {column!r}: name another as text.column, or leave the file out.")
        for batch in table.iter_batches(_ROWS, columns=[column]):
            yield batch[column].to_pylist()


def _json(path: Path, column: str) -> Iterator[list[Any]]:
    only = pyarrow.json.ParseOptions(
        explicit_schema=pyarrow.schema({column: pyarrow.large_string()}), unexpected_field_behavior="ignore"
    )
    for line, chunk in _chunks(path):
        try:
            content = chunk.encode()
            in_one_block = pyarrow.json.ReadOptions(use_threads=False, block_size=len(content) + 1)
            table = pyarrow.json.read_json(pyarrow.BufferReader(content), in_one_block, only)
            values = table[column].to_pylist()
        except (pyarrow.ArrowInvalid, ValueError):
            # A list, strings, half a character, or what cannot be read: then the line is known.
            values = [row.get(column) for row in _json_rows(path, line, chunk)]
        yield values


def _chunks(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a .jsonl, many at a time, or a .json that is one list, and the number of their first line."""
    with _open_text(path) as file:
        line, read = 1, 0
        while chunk := file.read(CHUNK_CHARACTERS):
            chunk += file.readline(LONGEST_LINE)
            if line == 1 and chunk.lstrip().startswith("["):
                chunk += file.read(LONGEST_LINE)
            read += len(chunk)
            _check_expansion(path, read)
            if len(chunk) > LONGEST_LINE:
                raise TextError(
                    f"{path}: line {line + chunk.count(chr(10)):,} is longer than {LONGEST_LINE:,} characters: write a "
                    "document a line, as .jsonl."
                )
            if chunk.strip():
                yield line, chunk
            line += chunk.count("\n")


def _json_rows(path: Path, line: int, chunk: str) -> Iterator[dict[str, Any]]:
    """Yield the rows in lines, or in a list, of JSON."""
    whole = line == 1 and re.match(r"\s*(\[|\{\s*\n)", chunk)
    for number, text in enumerate([chunk] if whole else chunk.split("\n"), line):
        place = f"{path}, line {number:,}"
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except ValueError as error:
            raise TextError(f"{place} cannot be read as JSON: {error}.") from error
        except RecursionError as error:
            raise TextError(f"{place} cannot be read: it is nested too deeply.") from error
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, str | dict):
                shown = json.dumps(entry)[:40]
                raise TextError(f"{place} holds {shown}, not an object with columns, such as {{'text': …}}.")
            yield {"text": entry} if isinstance(entry, str) else entry


def _open_text(path: Path) -> Any:
    """Open a file of text: UTF-8, or what its byte order mark says, which is not text.

    Raises:
        TextError: it looks like UTF-16, and has no such mark.
    """
    with _opened(path) as file:
        start = file.read(1024)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")
    if encoding == "utf-8" and start.count(0) > len(start) // 4:
        raise TextError(
            f"{path} has zeros between its bytes, as text in UTF-16 has: convert it, with "
            "`iconv -f UTF-16LE -t UTF-8` or in an editor."
        )
    return _opened(path, "r", encoding=encoding)


def _opened(path: Path, mode: str = "rb", **options: Any) -> Any:
    """Open a file, compressed or not."""
    if path.suffix.lower() == ".zst" and infer_compression("a.zst") is None:
        raise TextError(f"{path}: the package zstandard reads .zst: install it, or unpack the file.")
    return LocalFileSystem().open(str(path.absolute()), mode, compression="infer", **options)


def _check_expansion(path: Path, characters: int) -> None:
    """Raise TextError if a compressed file has given more characters than text could."""
    if characters > _HARMLESS and characters > LARGEST_EXPANSION * path.stat().st_size:
        raise TextError(
            f"{path} expands to more than {LARGEST_EXPANSION} times its size, as no text does: unpack it, if it is one."
        )
