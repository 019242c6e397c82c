"""Text in memory -> a file beside a run's others, from which the run is resumed and replayed."""

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
"""What it is called in a run directory."""
_NAME = "the text in memory"
_SAMPLE = 1000

Kind = TypeVar("Kind", bound=Training)

Documents: TypeAlias = Iterable[str] | Iterable[Mapping[str, Any]] | datasets.Dataset | datasets.IterableDataset
"""Documents in memory: strings, or rows of which one column is the text."""


@contextmanager
def in_file(documents: Documents | None, directory: Path) -> Iterator[Path | None]:
    """Keep documents in a file beside a directory; at the end, remove it unless it has been moved. None: no file.

    Each process has a file of its own.

    Raises:
        TextError: as `write_documents`.
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
    """Move a file of `in_file` into the run directory, which is one for all processes, and return its place."""
    if file is None:
        return None
    if PartialState().is_main_process:
        file.rename(directory / FILE)
    return directory / FILE


def of_file(recipe: Kind, file: Path | None) -> Kind:
    """Return `recipe` with a file of `in_file` as its text; its own for None."""
    if file is None:
        return recipe
    text = dataclasses.replace(with_text(recipe, file).text, streaming=False)
    return dataclasses.replace(recipe, text=text)


def write_documents(documents: Documents, path: Path) -> None:
    """Write documents as .jsonl, one a line.

    Raises:
        TextError: they are not documents, there are none, or they cannot be written.
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
        raise TextError(f"The text is a {kind} of {', '.join(map(str, documents))}: pass one of these.")
    if isinstance(documents, bytes) or hasattr(documents, "columns") or not isinstance(documents, Iterable):
        raise TextError(f"The text is a {kind}: pass a list of strings, a column of it, or a data set of `datasets`.")
    rows = iter(documents)
    first = [*itertools.islice(rows, _SAMPLE)]
    column = None
    if first and all(isinstance(row, Mapping) for row in first):
        column, words = columns.of_rows(first, None, _NAME)
        say_column(column, words, _NAME)
    if first and all(isinstance(row, str) and _is_file(row) for row in first):
        raise TextError(f"The text is a list of names of files, such as {first[0]}: pass the name of their directory.")
    empty = True
    for number, row in enumerate(itertools.chain(first, rows)):
        document = row.get(column) if column is not None and isinstance(row, Mapping) else row
        if document is None or document == "":
            continue
        if not isinstance(document, str):
            raise TextError(f"The text holds a {type(document).__name__} at {number:,}, and not a string.")
        empty = False
        yield document
    if empty:
        raise TextError("The text in memory is empty: it holds no documents.")


def _is_file(name: str) -> bool:
    return len(name) < 1000 and format_of(Path(name)) is not None and os.path.isfile(os.path.expanduser(name))
