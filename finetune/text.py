"""Any text source -> packed blocks of token ids.

1. Read the documents: a column of a Hub data set, of local files or of a saved `datasets` directory.
2. Tokenise each, nothing prepended, and put the end-of-text token after it (nothing, if a tokenizer has none).
3. Write the ids one after another to a flat file in the `datasets` cache, those held out to a second one.
   nanoGPT's .bin files are such files already. With `text.streaming`, 2 and 4 happen during training instead.
4. Cut the file in blocks of the context length, and drop the tail that does not fill one.
"""

import glob
import hashlib
import itertools
import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import torch
from datasets.utils import tqdm
from filelock import FileLock
from jaxtyping import Int, UInt
from transformers import PreTrainedTokenizerBase

from finetune.bundled import resolve_text
from finetune.errors import NolnError
from finetune.recipe import Text

FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COMPRESSIONS = ".gz", ".bz2", ".xz", ".zst"

BATCH_CHARACTERS = 1_000_000  # a call of the tokenizer
PIECE_CHARACTERS = 100_000  # longer documents are tokenised in pieces, in parallel
SHUFFLE_DOCUMENTS = 10_000  # what streaming shuffles among
RANDOM_TOKENS = "random-tokens"  # the name of the text that is none: tokens drawn uniformly
_RANDOM_BLOCKS = 240  # of it, unless it is said how many
_CHUNK = 4096  # blocks that are looked at in one go

Part = tuple[UInt[np.ndarray, " token"], Int[np.ndarray, " document"] | None]
"""Tokens, and the positions before which documents end (None: unknown but for their end-of-text tokens)."""


class TextError(NolnError):
    """A text that cannot be read or does not suit the model; the message says where and what to do."""


class Blocks(torch.utils.data.Dataset):
    """A stream of tokens cut in blocks of `context`, each `{"input_ids": Int64[context]}`.

    Nothing is copied before a block is asked for: `tokens` may be a memory-mapped file of any size.
    """

    def __init__(
        self,
        tokens: UInt[np.ndarray, " token"],
        context: int,
        eot: int | None = None,
        ends: Int[np.ndarray, " document"] | None = None,
    ) -> None:
        """Documents end with the token `eot` or, without one, before the positions `ends` of `tokens`."""
        self.blocks = tokens[: len(tokens) // context * context].reshape(-1, context)
        self.eot, self.ends = eot, ends

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(self.blocks[index].astype(np.int64))}

    def document_ids(self, rows: Int[np.ndarray, " row"] | None = None) -> Int[np.ndarray, "row context"]:
        """Return the number of each token's document, in all blocks or in those at `rows`.

        The document that the first block begins in is 0; an end-of-text token is in the document that it ends.
        """
        rows = np.arange(len(self)) if rows is None else rows
        context = self.blocks.shape[1]
        if self.eot is not None:
            # A chunk at a time: the tokens may be more than fit into memory.
            chunks = (self.blocks[start : start + _CHUNK] == self.eot for start in range(0, len(self), _CHUNK))
            ended_in = np.concatenate([chunk.sum(1) for chunk in chunks])
            ended = self.blocks[rows] == self.eot
            return (np.cumsum(ended_in) - ended_in)[rows, None] + np.cumsum(ended, 1) - ended
        ends = np.empty(0, np.int64) if self.ends is None else self.ends
        positions = rows[:, None] * context + np.arange(context)
        return np.searchsorted(ends, positions, side="right") - np.searchsorted(ends, 0, side="right")


class StreamedBlocks(torch.utils.data.IterableDataset):
    """Blocks that are read, shuffled, tokenised and packed on the fly, epoch after epoch without end.

    The order depends on the seed alone, and each iteration starts anew: skipping what was seen resumes a run.
    Of several DataLoader workers each takes its share of the source's files, and stops if there is none for it.
    An iteration is the same on every rank: `accelerate` reads on one and hands each rank its part.
    """

    def __init__(
        self,
        source: datasets.IterableDataset,
        column: str,
        held_out: frozenset[str],
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        vocab_size: int,
        name: str,
        seed: int,
    ) -> None:
        self.source = source.shuffle(seed=seed, buffer_size=SHUFFLE_DOCUMENTS)
        self.column, self.held_out, self.tokenizer = column, held_out, tokenizer
        self.context, self.vocab_size, self.name = context, vocab_size, name

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield blocks `{"input_ids": Int64[context]}`; raise TextError at an id beyond the vocabulary."""
        tokens: list[int] = []
        for ids, _ in _encode(self._documents(), self.tokenizer):
            _check_ids(max(ids, default=0), self.vocab_size, self.name)
            tokens += ids
            full = len(tokens) // self.context * self.context
            for start in range(0, full, self.context):
                yield {"input_ids": torch.tensor(tokens[start : start + self.context])}
            del tokens[:full]

    def _documents(self) -> Iterator[str]:
        for epoch in itertools.count():
            self.source.set_epoch(epoch)
            epoch_is_empty = True
            for document in _documents(self.source, self.column, self.name):
                # Left out by its text, not its place: workers and shuffled files see other places.
                if document not in self.held_out:
                    epoch_is_empty = False
                    yield document
            if epoch_is_empty:  # a worker without a file
                return


@dataclass(frozen=True)
class TextSplits:
    """What a run trains on and what it measures its loss on; no token is in both."""

    train: Blocks | StreamedBlocks
    held_out: Blocks


def load_text(
    text: Text, tokenizer: PreTrainedTokenizerBase, context: int, vocab_size: int, *, seed: int = 0
) -> TextSplits:
    """Read, tokenise and pack what `text` names into blocks of `context` tokens with ids below `vocab_size`.

    Held out are `text.held_out`; or else nanoGPT's val.bin; or else `text.held_out_fraction` of the documents,
    spread evenly through the source; or, where that gives none and for a .bin file, the same fraction of the
    tokens, but at least one block, at the end. A stream holds out its first documents. Of what is held out the
    first `text.held_out_blocks` blocks are returned. Empty documents are passed over. `seed` orders a stream;
    other blocks come in the order of the source.

    Raises:
        TextError: the source is missing, corrupt, of an unknown kind, without a column of text, or shorter than
            a block; or a token is beyond the vocabulary.
    """
    if text.held_out is not None:
        train_path = (_bin_files(text.source) or [_path(text.source)])[0].resolve()
        held_out_path = (_bin_files(text.held_out) or [_path(text.held_out)])[-1].resolve()
        if train_path in (held_out_path, *held_out_path.parents) or held_out_path in train_path.parents:
            raise TextError(
                f"text.held_out, {text.held_out}, and text.source, {text.source}, share text: name other files."
            )
    if text.streaming and not _bin_files(text.source):
        return _stream(text, tokenizer, context, vocab_size, seed)
    read = partial(_tokens_of, text=text, tokenizer=tokenizer, vocab_size=vocab_size)
    fraction = text.held_out_fraction
    if text.held_out is not None:
        parts = [read(text.source)[0], read(text.held_out)[-1]]
    elif len(parts := read(text.source, fraction=fraction)) == 1:
        tokens, ends = parts[0]
        cut = max(0, len(tokens) - max(context, int(len(tokens) * fraction)))
        parts = [(tokens[:cut], ends), (tokens[cut:], None if ends is None else ends - cut)]
    (train, train_ends), (held_out, held_out_ends) = parts

    _check_length(len(train), context, text.source, "to train on")
    _check_ids(train.max(), vocab_size, text.source)
    _check_length(len(held_out), context, text.held_out or text.source, "to hold out")
    _check_ids(held_out.max(), vocab_size, text.held_out or text.source)
    eot = tokenizer.eos_token_id
    blocks = Blocks(train, context, eot, train_ends)
    if text.train_blocks is not None and text.train_blocks < len(blocks):
        rows = np.linspace(0, len(blocks) - 1, text.train_blocks).round().astype(int)
        blocks = Blocks(blocks.blocks[rows].ravel(), context, eot)
    return TextSplits(
        blocks,
        Blocks(held_out[: text.held_out_blocks * context], context, eot, held_out_ends),
    )


def load_blocks(
    text: Text, tokenizer: PreTrainedTokenizerBase, context: int, vocab_size: int, *, most: int | None = None
) -> Blocks:
    """Read, tokenise and pack `text.source` as `load_text` does, with nothing held out.

    All of it, or its first blocks: `most` at the most, which are all that is read where `text.streaming`.
    Of a directory of nanoGPT's it is val.bin, where there is one. Of the source `random-tokens` it is `random_blocks`.

    Raises:
        TextError: as `load_text` does.
    """
    if text.source == RANDOM_TOKENS:
        return random_blocks(tokenizer, context, vocab_size, _RANDOM_BLOCKS if most is None else most)
    if text.streaming and most is not None and not _bin_files(text.source):
        documents = _documents(*_open_source(text.source, text), text.source)
        part: Part = _read_tokens(documents, tokenizer, most * context)[1:]
    else:
        part = _tokens_of(text.source, replace(text, streaming=False), tokenizer, vocab_size)[-1]
    tokens, ends = part
    _check_length(len(tokens), context, text.source)
    _check_ids(tokens.max(), vocab_size, text.source)
    return Blocks(tokens if most is None else tokens[: most * context], context, tokenizer.eos_token_id, ends)


def token_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Int[np.ndarray, " id"]:
    """Return the ids that a tokenizer has. A model's vocabulary may be larger: padded, with rows that mean nothing."""
    ids = np.unique(np.array([*tokenizer.get_vocab().values()], np.int64))
    return ids[ids < vocab_size]


def random_blocks(tokenizer: PreTrainedTokenizerBase, context: int, vocab_size: int, count: int) -> Blocks:
    """Return blocks of tokens drawn uniformly from those that the tokenizer has, always the same; each a document."""
    drawn = np.random.default_rng(0).choice(token_ids(tokenizer, vocab_size), count * context)
    return Blocks(drawn.astype(np.uint32), context, ends=np.arange(1, count + 1) * context)


def _stream(text: Text, tokenizer: PreTrainedTokenizerBase, context: int, vocab_size: int, seed: int) -> TextSplits:
    """Hold out the first documents, enough for the blocks wanted, and stream the rest."""
    source, column = _open_source(text.source, text)
    documents = _documents(source, column, text.source)
    first = documents if text.held_out is None else _documents(*_open_source(text.held_out, text), text.held_out)

    stop = text.held_out_blocks * context
    held_out, tokens, ends = _read_tokens(first, tokenizer, stop)
    _check_length(len(tokens), context, text.held_out or text.source, "to hold out")
    _check_ids(tokens.max(), vocab_size, text.held_out or text.source)

    left = 0
    while left < context and (document := next(documents, None)) is not None:
        left += sum(len(ids) for ids, _ in _encode([document], tokenizer)) if document not in held_out else 0
    _check_length(left, context, text.source, "to train on")

    stream = StreamedBlocks(source, column, frozenset(held_out), tokenizer, context, vocab_size, text.source, seed)
    return TextSplits(stream, Blocks(tokens[:stop], context, tokenizer.eos_token_id, ends))


def _read_tokens(
    documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, most: int
) -> tuple[list[str], UInt[np.ndarray, " token"], Int[np.ndarray, " document"]]:
    """Read on until there are `most` tokens; return the documents read, all their tokens, and where each ends."""
    read, tokens, ends = [], array("q"), array("q")
    while len(tokens) < most and (document := next(documents, None)) is not None:
        read.append(document)
        tokens.extend(itertools.chain.from_iterable(ids for ids, _ in _encode([document], tokenizer)))
        ends.append(len(tokens))
    return read, np.array(tokens, np.uint32), np.array(ends, np.int64)


def _tokens_of(
    name: str, text: Text, tokenizer: PreTrainedTokenizerBase, vocab_size: int, fraction: float = 0.0
) -> list[Part]:
    """Return all tokens of a source, in two parts if whole documents or a val.bin are held out."""
    if files := _bin_files(name):
        dtype = text.token_dtype if text.token_dtype != "auto" else "uint16" if vocab_size <= 2**16 else "uint32"
        return [(_read_bin(file, np.dtype(dtype)), None) for file in files]
    return _tokenise_once(*_open_source(name, text), name, tokenizer, fraction)


def _read_bin(path: Path, dtype: np.dtype) -> UInt[np.ndarray, " token"]:
    """Map nanoGPT's file of token ids, nothing copied."""
    if path.stat().st_size % dtype.itemsize:
        raise TextError(f"{path}: its size is no multiple of {dtype}'s; it is corrupt, or text.token_dtype is wrong.")
    tokens = _memory_map(path, dtype)
    if dtype == np.uint16 and len(tokens) and not tokens[1:1000:2].any():
        raise TextError(f"{path}: every second number is 0, as in a file of uint32. Set text.token_dtype to uint32.")
    return tokens


def _open_source(name: str, text: Text) -> tuple[datasets.Dataset | datasets.IterableDataset, str]:
    """Return the data set that a source is, and which of its columns is the text."""
    path = _path(name)
    if not path.exists():
        if _format(path) or path.suffix == ".bin" or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
            raise TextError(f"{name}: no such file or directory.")
        with _reading(f"{name} is no file or directory here, and as a data set of the Hub it"):
            data = datasets.load_dataset(name, text.subset, split=text.split, streaming=text.streaming)
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


def _documents(data: datasets.Dataset | datasets.IterableDataset, column: str, name: str) -> Iterator[str]:
    """Yield the documents that are not empty."""
    with _reading(name):
        # Row by row from a stream: only so is it shared among DataLoader workers.
        batches = data.iter(100) if isinstance(data, datasets.Dataset) else ({column: [row[column]]} for row in data)
        for batch in batches:
            yield from filter(None, batch[column])


def _tokenise_once(
    data: datasets.Dataset, column: str, name: str, tokenizer: PreTrainedTokenizerBase, fraction: float
) -> list[Part]:
    """Return the training part and, if any document is held out, the held-out one, tokenised once for all.

    They are in a directory of the `datasets` cache: one process writes it while others wait, and it gets its
    name when it is complete.
    """
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)
    key = repr((data._fingerprint, fraction, tokenizer.eos_token_id, _fingerprint_of(tokenizer)))
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "noln"
    directory = cache / hashlib.sha256(key.encode()).hexdigest()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not directory.exists():
                with TemporaryDirectory(dir=cache) as temporary:
                    unfinished = Path(temporary) / "tokens"
                    unfinished.mkdir()
                    documents = tqdm(_documents(data, column, name), f"tokenising {name}", len(data), unit=" documents")
                    _write_tokens(_encode(documents, tokenizer), unfinished, dtype, fraction)
                    unfinished.rename(directory)
    except OSError as error:
        raise TextError(f"{name}: its tokens cannot be written to {cache}: {error}.") from error
    parts: list[Part] = [
        (_memory_map(directory / f"{part}.bin", dtype), _memory_map(directory / f"{part}-ends.bin", np.dtype(np.int64)))
        for part in ("train", "held_out")
    ]
    return parts if len(parts[1][0]) else parts[:1]


def _write_tokens(encoded: Iterable[tuple[list[int], bool]], directory: Path, dtype: np.dtype, fraction: float) -> None:
    """Write the tokens, and after which of them documents end, of the training and of the held-out part."""
    names = ("train", "held_out")
    ends = array("q"), array("q")
    with ExitStack() as stack:
        files = [stack.enter_context(open(directory / f"{name}.bin", "wb")) for name in names]
        document = 0
        for ids, last in encoded:
            part = math.floor((document + 1) * fraction) > math.floor(document * fraction)
            files[part].write(np.array(ids, dtype).data)
            if last:
                ends[part].append(files[part].tell() // dtype.itemsize)
                document += 1
    for name, positions in zip(names, ends, strict=True):
        (directory / f"{name}-ends.bin").write_bytes(positions)


def _encode(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], bool]]:
    """Yield the ids of each document, in one or several pieces, and whether a piece is its last."""
    eot = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in _batches(_pieces(documents)):
        encoded = tokenizer(
            [piece for piece, _ in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )
        for ids, (_, last) in zip(encoded["input_ids"], batch, strict=True):
            yield ids + eot if last else ids, last


def _pieces(documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Cut long documents where GPT-2's tokenizer parts two tokens anyway: before line breaks."""
    cut = re.compile(r"(?<=\S)\n")
    for document in documents:
        start = 0
        while place := cut.search(document, start + PIECE_CHARACTERS):
            yield document[start : place.start()], False
            start = place.start()
        yield document[start:], True


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _fingerprint_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything in a tokenizer that ids depend on."""
    if not tokenizer.is_fast:
        return repr((type(tokenizer), sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**state, "truncation": None, "padding": None})  # what the last call left there


def _check_length(tokens: int, context: int, name: str, purpose: str = "") -> None:
    if tokens < context:
        remedy = "a shorter context, or another text.held_out_fraction" if purpose else "or a shorter context"
        raise TextError(
            f"{name}: {tokens:,} tokens{purpose and f' {purpose}'}, fewer than a block of {context:,}. "
            f"Give more text, {remedy}."
        )


def _check_ids(largest: int, vocab_size: int, name: str) -> None:
    if largest >= vocab_size:
        raise TextError(
            f"{name}: token id {largest} is beyond the model's vocabulary of {vocab_size}. The tokenizer must be "
            "the model's own and, for a .bin file, text.token_dtype the type that it was written in."
        )


def _memory_map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _path(name: str) -> Path:
    return Path(resolve_text(name)).expanduser()


def _bin_files(name: str) -> list[Path]:
    """Return nanoGPT's files that a source is: one, or train.bin and, if it is there, val.bin."""
    path = _path(name)
    files = [path / "train.bin", path / "val.bin"] if path.is_dir() else [path]
    return [file for file in files if file.suffix == ".bin" and file.is_file()]


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
