"""Text in memory -> a file in the run directory, from which the run can be resumed and replayed."""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import datasets
from accelerate import PartialState

from finetune.recipe import Training, with_text
from finetune.text import columns
from finetune.text.files import TextError, clean, format_of
from finetune.text.sources import say_column

FILE = "text.jsonl"
"""The file's name in a run directory."""
_NAME = "the text in memory"
_SAMPLE = 1000

Kind = TypeVar("Kind", bound=Training)

Documents: TypeAlias = Iterable[str] | Iterable[Mapping[str, Any]] | datasets.Dataset | datasets.IterableDataset
"""Documents in memory: strings, or rows with a column of text."""


@contextmanager
def in_file(documents: Documents | None, directory: Path) -> Iterator[Path | None]:
    """Write documents to a file beside `directory`. On exit, delete the file unless it has been moved.

    Yields the file's path, or None if there are no documents. Each process writes its own file.

    Raises:
        TextError: as in `write_documents`.
    """
    if documents is None:
        yield None
        return
    path = directory.with_name(f".{directory.name}-{PartialState().process_index}-{FILE}")
    try:
        write_documents(documents, path)
        yield path
    except TextError as error:
        raise TextError(str(error).replace(str(path), _NAME)) from error
    finally:
        path.unlink(missing_ok=True)


def take_in(file: Path | None, directory: Path) -> Path | None:
    """Move the file of `in_file` into the run directory, which all processes share, and return its new path."""
    if file is None:
        return None
    if PartialState().is_main_process:
        file.rename(directory / FILE)
    return directory / FILE


def of_file(recipe: Kind, file: Path | None) -> Kind:
    """Return `recipe` with the file of `in_file` as its text, or as it is without a file."""
    if file is None:
        return recipe
    text = dataclasses.replace(with_text(recipe, file).text, streaming=False)
    return dataclasses.replace(recipe, text=text)


def write_documents(documents: Documents, path: Path) -> None:
    """Write documents as .jsonl, one per line.

    Raises:
        TextError: there are no documents, something is not a document, or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": clean(document)}) + "\n" for document in _strings(documents))
    except OSError as error:
        raise TextError(f"The text in memory cannot be written to {path.parent}: {error}.") from error


def _strings(documents: Documents) -> Iterator[str]:
    kind = type(documents).__name__
    if isinstance(documents, Mapping):
        raise TextError(f"The text is a {kind} of {', '.join(map(str, documents))}. Pass one of these.")
    if isinstance(documents, bytes) or hasattr(documents, "columns") or not isinstance(documents, Iterable):
        raise TextError(f"The text is a {kind}. Pass a list of strings, a column of it, or a data set of `datasets`.")
    rows = iter(documents)
    first = [*itertools.islice(rows, _SAMPLE)]
    column = None
    if first and all(isinstance(row, Mapping) for row in first):
        column, words = columns.of_rows(first, None, _NAME)
        say_column(column, words, _NAME)
    if first and all(isinstance(row, str) and _is_file(row) for row in first):
        raise TextError(f"The text is a list of file names, such as {first[0]}. Pass the name of their directory.")
    empty = True
    for number, row in enumerate(itertools.chain(first, rows)):
        document = row.get(column) if column is not None and isinstance(row, Mapping) else row
        if document is None or document == "":
            continue
        if not isinstance(document, str):
            raise TextError(f"Document {number:,} of the text is not a string but a {type(document).__name__}.")
        empty = False
        yield document
    if empty:
        raise TextError("The text in memory is empty: it contains no documents.")


def _is_file(name: str) -> bool:
    return len(name) < 1000 and format_of(Path(name)) is not None and os.path.isfile(os.path.expanduser(name))
