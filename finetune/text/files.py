"""Local files: finding a source's files, sorting them into training and held-out files, and reading them.

pyarrow, fsspec and Python's codecs read files of any size in pieces.
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
"""A longer .txt is read in parts, because a tokenizer takes many times as much memory as its text."""
PASSAGE_CHARACTERS = 1 << 13
"""The length of the passages into which a stream divides a .txt that is long or the only file. Each is a document."""
CHUNK_CHARACTERS = 1 << 23
"""A .jsonl is read in chunks of this length, extended to the end of the line."""
LONGEST_LINE = 1 << 28
"""The maximum number of characters in a line of a .jsonl, or in a .json that is one list. Longer is not text."""
LARGEST_EXPANSION = 200
"""The maximum ratio of a text to its compressed file, if the text is longer than `_HARMLESS`."""
_HARMLESS = 1 << 28  # characters
_ROWS = 100  # of a .parquet, read at a time

_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


class TextError(NolnError):
    """A text cannot be read, or does not suit the model; the message says where and what to do."""


class Split(NamedTuple):
    """The files of a directory, sorted by what their names say that they are for."""

    train: list[Path]
    held_out: list[Path]
    unused: list[Path]


def format_of(path: Path) -> str | None:
    """Return which of the `FORMATS` a file's name indicates, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def find(path: Path) -> list[Path]:
    """Return a file, or all files of a known format in and below a directory, sorted. Hidden files are skipped.

    Links are followed, except into directories that have already been read.
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
    """Sort files by words such as train and validation in file and directory names. None if no file is held out.

    Validation files are held out or, if there are none, test files. Neither kind is trained on. If there are training
    files, files whose names contain no such word are not used.

    Raises:
        TextError: there are only validation and test files.
    """
    for anywhere in (True, False):
        kinds = {file: _kind(file.relative_to(directory), anywhere) for file in files}
        if "train" in kinds.values():  # otherwise a name may contain such a word by coincidence
            break
    by_kind = {kind: [file for file in files if kinds[file] == kind] for kind in (*SPLIT_KEYWORDS, None)}
    train, unsaid = by_kind["train"], by_kind[None]
    held_out = by_kind["validation"] or by_kind["test"]
    if not held_out or len(held_out) == len(files):
        return None
    if not (train or unsaid):
        raise TextError(f"{name} contains validation and test files, but no training files. Pass one of the files.")
    used = {*(train or unsaid), *held_out}
    return Split(train or unsaid, held_out, [file for file in files if file not in used])


def _kind(path: Path, anywhere: bool) -> str | None:
    """Return which split of `datasets` a path names, or None. The last part of the path that names a split decides.

    If `anywhere`, the split may be any word in a part, delimited by characters that are not letters. Otherwise it must
    be the last word of a part, which may be followed by numbers.
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
    """Return a file's name without the suffixes of its format and compression."""
    suffix = Path(name).suffix
    return _stem(Path(name).stem) if suffix.lower() in {*FORMATS, *COMPRESSIONS} else name


def parts(path: Path, characters: int) -> Iterator[str]:
    """Yield a .txt in parts of at most `characters` characters, cut before white space that follows a word.

    The cut is before a line break if there is one, because GPT-2's tokenizer always ends a token there.
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
    """Return the position of the last `space` that follows a visible character, or 0."""
    place = text.rfind(space)
    while place > 0 and text[place - 1].isspace():
        place = text.rfind(space, 0, place)
    return max(place, 0)


def is_empty(path: Path) -> bool:
    """Return whether a file of a known format is empty. A .json or .jsonl is empty if it has no bytes."""
    if not path.stat().st_size:
        return True
    if format_of(path) == "text":
        return not any(parts(path, 64))
    if format_of(path) == "json":
        return False
    with _opened(path) as file:
        return pyarrow.parquet.read_metadata(file).num_rows == 0


def kinds_of(path: Path) -> dict[str, str]:
    """Return the type of each column of a .parquet."""
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
        TextError: a row has no columns, or a line is too long.
    """
    if format_of(path) == "parquet":
        with _opened(path) as file:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(_ROWS):
                yield from batch.to_pylist()
        return
    for line, chunk in _chunks(path):
        yield from _json_rows(path, line, chunk)


def column_of(path: Path, column: str) -> Iterator[str]:
    """Yield the strings in a column of a file. Rows may lack a value. Other columns are not read.

    Raises:
        TextError: a value is not a string, or the column has no values.
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
        raise TextError(f"{path} has no values in column {column!r}. Set text.column to another column, or omit it.")


def clean(document: str) -> str:
    """Remove a leading byte order mark, and replace each lone surrogate by the replacement character."""
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
            raise TextError(f"{path} has no column {column!r}. Set text.column to another column, or remove the file.")
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
            # A list, strings, a lone surrogate, or invalid JSON: Python's parser reads it, or names the line.
            values = [row.get(column) for row in _json_rows(path, line, chunk)]
        yield values


def _chunks(path: Path) -> Iterator[tuple[int, str]]:
    """Yield chunks of lines of a .jsonl, or a .json that is one list, each with the number of its first line."""
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
                    f"{path}: line {line + chunk.count(chr(10)):,} is longer than {LONGEST_LINE:,} characters. Write "
                    "one document per line, as .jsonl."
                )
            if chunk.strip():
                yield line, chunk
            line += chunk.count("\n")


def _json_rows(path: Path, line: int, chunk: str) -> Iterator[dict[str, Any]]:
    """Yield the rows in lines of JSON, or in a JSON list."""
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
                raise TextError(f"{place} is {shown}, not an object with columns, such as {{'text': …}}.")
            yield {"text": entry} if isinstance(entry, str) else entry


def _open_text(path: Path) -> Any:
    """Open a text file as UTF-8, or in the encoding of its byte order mark, which is skipped.

    Raises:
        TextError: the file looks like UTF-16 without a byte order mark.
    """
    with _opened(path) as file:
        start = file.read(1024)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")
    if encoding == "utf-8" and start.count(0) > len(start) // 4:
        raise TextError(
            f"{path} has zeros between its bytes, like text in UTF-16. Convert it with `iconv -f UTF-16LE -t UTF-8` or "
            "in an editor."
        )
    return _opened(path, "r", encoding=encoding)


def _opened(path: Path, mode: str = "rb", **options: Any) -> Any:
    """Open a file, compressed or not."""
    if path.suffix.lower() == ".zst" and infer_compression("a.zst") is None:
        raise TextError(f"{path}: reading .zst requires the package zstandard. Install it, or unpack the file.")
    return LocalFileSystem().open(str(path.absolute()), mode, compression="infer", **options)


def _check_expansion(path: Path, characters: int) -> None:
    """Raise TextError if a compressed file has expanded to more characters than text would."""
    if characters > _HARMLESS and characters > LARGEST_EXPANSION * path.stat().st_size:
        raise TextError(
            f"{path} expands to more than {LARGEST_EXPANSION} times its size, which text does not. If it is text, "
            "unpack it."
        )
