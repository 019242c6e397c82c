"""Any text source -> its documents: a data set on the Hub, local files, or a saved `datasets` directory."""

import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
from tqdm.auto import tqdm

from finetune.bundled import resolve_text
from finetune.errors import NolnError
from finetune.names import expanded
from finetune.recipe import Text
from finetune.text import columns, files
from finetune.text.files import COMPRESSIONS, FORMATS, TextError, format_of

_PARQUET = "refs/convert/parquet"
"""Where the Hub puts a data set's rows as Parquet, a folder a configuration."""
_STREAMED = datasets.Features({"text": datasets.Value("string")})

Passage = tuple[str, bool]
"""A document or a part of it, and whether it is its last."""


@dataclass(frozen=True)
class Source:
    """A source that was found, and which of its columns is the text."""

    name: str
    column: str
    files: tuple[Path, ...] = ()
    data: datasets.Dataset | datasets.IterableDataset | None = None
    """What is not in files of a known format: a saved `datasets` directory, or a data set on the Hub."""

    @property
    def fingerprint(self) -> str:
        """What says whether it has changed."""
        if self.data is not None:
            return str(self.data._fingerprint)
        stats = [(os.path.realpath(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in self.files]
        return hashlib.sha256(repr((stats, self.column)).encode()).hexdigest()

    def passages(self) -> Iterator[Passage]:
        """Yield the documents that are not empty, a long .txt in parts."""
        if self.data is not None:
            yield from ((document, True) for document in documents_of(self.data, self.column, self.name))
            return
        for file in self.files:
            with _reading(str(file)):
                if format_of(file) != "text":
                    documents = map(files.clean, files.column_of(file, self.column))
                    yield from ((document, True) for document in documents if document)
                    continue
                last = None
                for part in files.parts(file, files.PART_CHARACTERS):
                    if last is not None:
                        yield last, False
                    last = part
                if last is not None:
                    yield last, True

    def stream(self) -> tuple[datasets.IterableDataset, str]:
        """Return its documents as a stream, and the column that they are in."""
        if self.data is not None:
            streamed = isinstance(self.data, datasets.IterableDataset)
            return self.data if streamed else self.data.to_iterable_dataset(), self.column
        # The files are a list: DataLoader workers share them, and shuffling begins with their order.
        fields = {"paths": [*self.files], "column": self.column, "alone": len(self.files) == 1}
        return datasets.IterableDataset.from_generator(_rows, _STREAMED, fields), "text"


def _rows(paths: list[Path], column: str, alone: bool) -> Iterator[dict[str, str]]:
    """Yield the documents of files as rows; passages of a .txt that is long, or that is all there is."""
    for path in paths:
        with _reading(str(path)):
            if format_of(path) != "text":
                yield from ({"text": document} for document in map(files.clean, files.column_of(path, column)))
                continue
            first = [*itertools.islice(files.parts(path, files.PART_CHARACTERS), 2)]
            texts = files.parts(path, files.PASSAGE_CHARACTERS) if alone or len(first) == 2 else iter(first)
            yield from ({"text": text.removeprefix("\n")} for text in texts)


def open_sources(name: str, text: Text) -> list[Source]:
    """Find what a source names: one, or what is to train on and what is held out where a directory says so.

    Raises:
        TextError: nothing is there, of a known format, in it, or in a column of text.
    """
    path = path_of(name)
    if not path.exists():
        if format_of(path) or path.suffix == ".bin" or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
            raise TextError(f"{name}: no such file or directory.")
        return [_of_data(_open_hub(name, text), text, name)]
    if is_saved(path):
        with _reading(name):
            data = datasets.load_from_disk(path)
        if isinstance(data, datasets.DatasetDict):
            if text.split not in data:
                raise TextError(f"{name} has no split {text.split!r}; text.split can be {', '.join(data)}.")
            data = data[text.split]
        return [_of_data(data, text, name)]
    return [_of_files(part, text, name) for part in local_files(name, say=True)]


def _open_hub(name: str, text: Text) -> datasets.Dataset | datasets.IterableDataset:
    """Open a data set of the Hub, or what the Hub made of it where it is a loading script."""
    what = f"{name} is not a file or directory here, and as a data set of the Hub it"
    options = {"split": text.split, "streaming": text.streaming}
    with _reading(what):
        try:
            return datasets.load_dataset(name, text.subset, revision=text.revision, **options)
        except RuntimeError as error:
            if text.revision is not None or "scripts are no longer supported" not in str(error):
                raise
    with _reading(f"{what} is a loading script, which `datasets` does not run any more, and its revision {_PARQUET}"):
        return datasets.load_dataset(name, data_dir=text.subset, revision=_PARQUET, **options)


def local_files(name: str, say: bool = False) -> list[list[Path]]:
    """Return the files of a local source: all, or those to train on and those held out where a directory says so.

    Raises:
        TextError: none is of a known format, they are of several, or there are none to train on.
    """
    path = path_of(name)
    found = files.find(path)
    if not found or not all(format_of(file) and file.is_file() for file in found):
        raise TextError(
            f"{name}: no known format. Text is read from {', '.join(FORMATS)}, also with {', '.join(COMPRESSIONS)}; "
            "from directories of such files or saved by `datasets`; and, not streamed, from nanoGPT's .bin files."
        )
    split = files.split(found, path, name) if path.is_dir() else None
    parts = [found] if split is None else [split.train, split.held_out]
    if len({format_of(file) for part in parts for file in part}) > 1:
        raise TextError(f"{name} has files of several formats: name one, or a directory with one format.")
    if split is not None and say:
        unused = f", and not read is {_names(split.unused)}" if split.unused else ""
        _say(f"{name}: trained on is {_names(split.train)}, held out is {_names(split.held_out)}{unused}")
    return parts


def _names(paths: list[Path]) -> str:
    names = sorted({path.name for path in paths})
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _of_files(paths: list[Path], text: Text, name: str) -> Source:
    with _reading(name):
        kind = format_of(paths[0])
        filled = [path for path in paths if not files.is_empty(path)]
        if not filled:
            raise TextError(f"{name} is empty: it holds no documents.")
        if kind == "text":
            if text.column not in (None, "text"):
                raise TextError(f"{name}: a .txt does not have columns, so text.column has to be left out.")
            column, first = "text", None
        elif kind == "parquet":
            column, first = columns.choose(files.kinds_of(filled[0]), files.rows(filled[0]), text.column, name)
        else:
            rows = (row for path in filled for row in files.rows(path))
            column, first = columns.of_rows(rows, text.column, name)
    say_column(column, first, name)
    return Source(name, column, tuple(filled))


def _of_data(data: datasets.Dataset | datasets.IterableDataset, text: Text, name: str) -> Source:
    with _reading(name):
        features = data.features or datasets.Dataset.from_list(list(data.take(1))).features
        kinds = {key: getattr(feature, "dtype", type(feature).__name__) for key, feature in features.items()}
        # Nothing is decoded but strings and what is nested, which does not have a dtype.
        asked = [key for key, feature in features.items() if getattr(feature, "dtype", "string").endswith("string")]
        rows = (row for row in data.select_columns(asked).take(100))
        column, first = columns.choose(kinds, rows, text.column, name)
    say_column(column, first, name)
    return Source(name, column, data=data.select_columns(column))


def say_column(column: str, first: str | None, name: str) -> None:
    """Say which column the text is taken from, if its first words are given: what `columns.choose` returns."""
    if first is not None:
        _say(f"{name}: the text is taken from its column {column!r}, which begins {first!r}")


def _say(what: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(what)


def documents_of(data: datasets.Dataset | datasets.IterableDataset, column: str, name: str) -> Iterator[str]:
    """Yield the documents that are not empty."""
    with _reading(name):
        # Row by row from a stream: only so is it shared among DataLoader workers.
        batches = data.iter(100) if isinstance(data, datasets.Dataset) else ({column: [row[column]]} for row in data)
        for batch in batches:
            yield from filter(None, map(files.clean, filter(None, batch[column])))


def path_of(name: str) -> Path:
    """Return the path that a text's name is, or that of the bundled text called so."""
    return expanded(resolve_text(name))


def is_saved(path: Path) -> bool:
    """Return whether a path is a directory saved by `datasets`."""
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn whatever the libraries raise into a TextError that says what could not be read."""
    try:
        yield
    except NolnError:
        raise
    except UnicodeDecodeError as error:
        raise TextError(
            f"{what} cannot be read: it is not UTF-8 ({error}). Convert it, with `iconv -f ENCODING -t UTF-8` or in an "
            "editor."
        ) from error
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, NolnError):
            raise cause from error
        raise TextError(f"{what} cannot be read: {type(cause).__name__}: {cause}") from error
