"""Any text source -> documents. A source is a data set on the Hub, local files, or a saved `datasets` directory."""

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
"""The revision in which the Hub keeps a data set's rows as Parquet, with one folder per configuration."""
_STREAMED = datasets.Features({"text": datasets.Value("string")})

Passage = tuple[str, bool]
"""A document or a part of one, and whether it is the document's last part."""


@dataclass(frozen=True)
class Source:
    """A text source, and the column that contains the text."""

    name: str
    column: str
    files: tuple[Path, ...] = ()
    data: datasets.Dataset | datasets.IterableDataset | None = None
    """A saved `datasets` directory, or a data set on the Hub; None for files."""

    @property
    def fingerprint(self) -> str:
        """A string that changes when the source changes."""
        if self.data is not None:
            return str(self.data._fingerprint)
        stats = [(os.path.realpath(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in self.files]
        return hashlib.sha256(repr((stats, self.column)).encode()).hexdigest()

    def passages(self) -> Iterator[Passage]:
        """Yield the documents that are not empty. A long .txt is yielded in parts."""
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
        """Return the documents as a stream, and the column that contains them."""
        if self.data is not None:
            streamed = isinstance(self.data, datasets.IterableDataset)
            return self.data if streamed else self.data.to_iterable_dataset(), self.column
        # The list of files is divided among DataLoader workers, and is shuffled first.
        fields = {"paths": [*self.files], "column": self.column, "alone": len(self.files) == 1}
        return datasets.IterableDataset.from_generator(_rows, _STREAMED, fields), "text"


def _rows(paths: list[Path], column: str, alone: bool) -> Iterator[dict[str, str]]:
    """Yield the documents of files as rows. A .txt that is long, or the only file, is divided into passages."""
    for path in paths:
        with _reading(str(path)):
            if format_of(path) != "text":
                yield from ({"text": document} for document in map(files.clean, files.column_of(path, column)))
                continue
            first = [*itertools.islice(files.parts(path, files.PART_CHARACTERS), 2)]
            texts = files.parts(path, files.PASSAGE_CHARACTERS) if alone or len(first) == 2 else iter(first)
            yield from ({"text": text.removeprefix("\n")} for text in texts)


def open_sources(name: str, text: Text) -> list[Source]:
    """Open a source. Return one, or two if a directory's file names distinguish training and held-out text.

    Raises:
        TextError: the source does not exist, is empty, of an unknown format, or without a column of text.
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
    """Open a data set of the Hub. If it is a loading script, open the Parquet files that the Hub made of it."""
    what = f"{name} is not a local file or directory, and as a data set on the Hub it"
    options = {"split": text.split, "streaming": text.streaming}
    with _reading(what):
        try:
            return datasets.load_dataset(name, text.subset, revision=text.revision, **options)
        except RuntimeError as error:
            if text.revision is not None or "scripts are no longer supported" not in str(error):
                raise
    with _reading(f"{what} is a loading script, which `datasets` no longer runs, and its revision {_PARQUET}"):
        return datasets.load_dataset(name, data_dir=text.subset, revision=_PARQUET, **options)


def local_files(name: str, say: bool = False) -> list[list[Path]]:
    """Return the files of a local source: one list, or the training and the held-out files if file names say so.

    If `say`, print which files are used for what.

    Raises:
        TextError: there are no files of a known format, files of several formats, or no files to train on.
    """
    path = path_of(name)
    found = files.find(path)
    if not found or not all(format_of(file) and file.is_file() for file in found):
        raise TextError(
            f"{name}: unknown format. Text is read from {', '.join(FORMATS)} files, also compressed as "
            f"{', '.join(COMPRESSIONS)}; from directories of such files; from directories saved by `datasets`; and, "
            "unless streamed, from nanoGPT's .bin files."
        )
    split = files.split(found, path, name) if path.is_dir() else None
    parts = [found] if split is None else [split.train, split.held_out]
    if len({format_of(file) for part in parts for file in part}) > 1:
        raise TextError(f"{name} has files of several formats. Pass one file, or a directory with one format.")
    if split is not None and say:
        unused = f"; ignoring {_names(split.unused)}" if split.unused else ""
        _say(f"{name}: training on {_names(split.train)}; holding out {_names(split.held_out)}{unused}")
    return parts


def _names(paths: list[Path]) -> str:
    names = sorted({path.name for path in paths})
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _of_files(paths: list[Path], text: Text, name: str) -> Source:
    with _reading(name):
        kind = format_of(paths[0])
        filled = [path for path in paths if not files.is_empty(path)]
        if not filled:
            raise TextError(f"{name} is empty: it contains no documents.")
        if kind == "text":
            if text.column not in (None, "text"):
                raise TextError(f"{name}: a .txt file does not have columns. Omit text.column.")
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
        # Only strings and nested columns, which have no dtype, are decoded.
        asked = [key for key, feature in features.items() if getattr(feature, "dtype", "string").endswith("string")]
        rows = (row for row in data.select_columns(asked).take(100))
        column, first = columns.choose(kinds, rows, text.column, name)
    say_column(column, first, name)
    return Source(name, column, data=data.select_columns(column))


def say_column(column: str, first: str | None, name: str) -> None:
    """Print which column contains the text, if `columns.choose` returned its first words (`first`)."""
    if first is not None:
        _say(f"{name}: reading the text from column {column!r}, which begins {first!r}")


def _say(what: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(what)


def documents_of(data: datasets.Dataset | datasets.IterableDataset, column: str, name: str) -> Iterator[str]:
    """Yield the documents that are not empty."""
    with _reading(name):
        # A stream is read row by row: otherwise it would not be divided among DataLoader workers.
        batches = data.iter(100) if isinstance(data, datasets.Dataset) else ({column: [row[column]]} for row in data)
        for batch in batches:
            yield from filter(None, map(files.clean, filter(None, batch[column])))


def path_of(name: str) -> Path:
    """Return the path of the bundled text called `name`, or `name` as a path."""
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
            f"{what} cannot be read: it is not UTF-8 ({error}). Convert it with `iconv -f ENCODING -t UTF-8` or in an "
            "editor."
        ) from error
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, NolnError):
            raise cause from error
        raise TextError(f"{what} cannot be read: {type(cause).__name__}: {cause}") from error
