"""Any text source -> its documents: a data set on the Hub, local files, or a saved `datasets` directory."""

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

from finetune.bundled import resolve_text
from finetune.errors import NolnError
from finetune.recipe import Text

FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_PARQUET = "refs/convert/parquet"
"""Where the Hub puts a data set's rows as Parquet, a folder a configuration."""
COMPRESSIONS = ".gz", ".bz2", ".xz", ".zst"


class TextError(NolnError):
    """A text that cannot be read or does not suit the model; the message says where and what to do."""


def open_source(name: str, text: Text) -> tuple[datasets.Dataset | datasets.IterableDataset, str]:
    """Return the data set that a source is, and which of its columns is the text."""
    path = path_of(name)
    if not path.exists():
        if _format(path) or path.suffix == ".bin" or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
            raise TextError(f"{name}: no such file or directory.")
        data = _open_hub(name, text)
    elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        with _reading(name):
            data = datasets.load_from_disk(path)
        if isinstance(data, datasets.DatasetDict):
            if text.split not in data:
                raise TextError(f"{name} has no split {text.split!r}; text.split can be {', '.join(data)}.")
            data = data[text.split]
        data = data.to_iterable_dataset() if text.streaming else data
    else:
        data = _open_files(path, name, text.streaming)
    column = _text_column(data, text.column, name)
    return data.select_columns(column), column


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


def _open_files(path: Path, name: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    """Open a file, or all files of known format in and below a directory; hidden ones are passed over."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _format(file))
        files = [file for file in files if "/." not in f"/{file.relative_to(path).as_posix()}"]
    formats = {_format(file) for file in files}
    if len(formats) > 1:
        raise TextError(f"{name} has files of several formats: name one, or a directory with one format.")
    # These readers, unlike load_dataset, do not call on the Hub. They take patterns for names.
    patterns = [glob.escape(str(file.absolute())) for file in files]
    with _reading(name):
        match formats.pop() if formats else None:
            case "text":
                return datasets.Dataset.from_text(patterns, streaming=streaming, sample_by="document")
            case "json":
                return datasets.Dataset.from_json(patterns, streaming=streaming)
            case "parquet":
                return datasets.Dataset.from_parquet(patterns, streaming=streaming)
    raise TextError(
        f"{name}: no known format. Text is read from {', '.join(FORMATS)}, also with {', '.join(COMPRESSIONS)}; "
        "from directories of such files or saved by `datasets`; and, not streamed, from nanoGPT's .bin files."
    )


def _text_column(data: datasets.Dataset | datasets.IterableDataset, column: str | None, name: str) -> str:
    """Return `column`, or the one called text, or else the only one of strings."""
    with _reading(name):
        features = data.features or datasets.Dataset.from_list(list(data.take(1))).features
    dtypes = {key: getattr(feature, "dtype", type(feature).__name__) for key, feature in features.items()}
    strings = [key for key, dtype in dtypes.items() if dtype in ("string", "large_string")]
    if column is None:
        column = "text" if "text" in dtypes else strings[0] if len(strings) == 1 else None
    if column is None or column not in strings:
        problem = "which column is the text?" if column is None else f"there is no column {column!r} of strings."
        columns = ", ".join(f"{key} ({dtype})" for key, dtype in dtypes.items())
        raise TextError(f"{name}: {problem} Its columns are {columns}; name one of strings as text.column.")
    return column


def documents_of(data: datasets.Dataset | datasets.IterableDataset, column: str, name: str) -> Iterator[str]:
    """Yield the documents that are not empty."""
    with _reading(name):
        # Row by row from a stream: only so is it shared among DataLoader workers.
        batches = data.iter(100) if isinstance(data, datasets.Dataset) else ({column: [row[column]]} for row in data)
        for batch in batches:
            yield from filter(None, batch[column])


def path_of(name: str) -> Path:
    """Return the path that a text's name is, or that of the bundled text called so."""
    return Path(resolve_text(name)).expanduser()


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn whatever the libraries raise into a TextError that says what could not be read."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise TextError(f"{what} cannot be read: {type(cause).__name__}: {cause}") from error
