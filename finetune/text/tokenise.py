"""Documents -> token ids, tokenised once and kept in the `datasets` cache."""

import hashlib
import itertools
import json
import math
import re
import warnings
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
from filelock import FileLock
from jaxtyping import Int, UInt
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from finetune.progress import progress
from finetune.recipe import Text
from finetune.text.bins import bin_files, read_bin
from finetune.text.sources import Passage, Source, TextError, open_sources

BATCH_CHARACTERS = 1_000_000  # per call of the tokenizer
PIECE_CHARACTERS = 100_000  # longer documents are tokenised in pieces, in parallel
_CACHE_VERSION = 2
_FEW_UNKNOWN, _MANY_UNKNOWN = 0.01, 0.5  # fractions of all tokens: a warning from the first, an error above the second

Part = tuple[UInt[np.ndarray, " token"], Int[np.ndarray, " document"] | None]
"""Tokens, and the positions before which documents end (None: only end-of-text tokens mark the ends)."""


def tokens_of(
    name: str,
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    fraction: float = 0.0,
    part: int | None = None,
) -> list[Part]:
    """Return all tokens of a source, in two parts if whole documents or files are held out.

    `part` selects one part, 0 or −1, of a source whose files are divided into training and held-out files.
    """
    if files := bin_files(name):
        dtype = text.token_dtype if text.token_dtype != "auto" else "uint16" if vocab_size <= 2**16 else "uint32"
        return [(read_bin(file, np.dtype(dtype), vocab_size), None) for file in files]
    sources = open_sources(name, text) if part is None else [open_sources(name, text)[part]]
    fraction = fraction if len(sources) == 1 else 0.0
    return [tokens for source in sources for tokens in _tokenise_once(source, tokenizer, fraction)]


def read_tokens(
    documents: Iterator[str], encoder: "Encoder", most: int
) -> tuple[list[str], UInt[np.ndarray, " token"], Int[np.ndarray, " document"]]:
    """Read documents until there are `most` tokens. Return the documents, all their tokens, and where each ends."""
    read, tokens, ends = [], array("q"), array("q")
    while len(tokens) < most and (document := next(documents, None)) is not None:
        read.append(document)
        tokens.extend(itertools.chain.from_iterable(ids for ids, _ in encoder.encode([(document, True)])))
        ends.append(len(tokens))
    return read, np.array(tokens, np.uint32), np.array(ends, np.int64)


def _tokenise_once(source: Source, tokenizer: PreTrainedTokenizerBase, fraction: float) -> list[Part]:
    """Return the training part and, if any document is held out, the held-out part. Tokenise only if not yet cached.

    The tokens are in a directory of the `datasets` cache. One process writes it while the others wait, and it is given
    its final name when it is complete.
    """
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)
    key = repr((source.fingerprint, fraction, tokenizer.eos_token_id, _fingerprint_of(tokenizer), _CACHE_VERSION))
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "noln"
    directory = cache / hashlib.sha256(key.encode()).hexdigest()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not directory.exists():
                with TemporaryDirectory(dir=cache) as temporary:
                    unfinished = Path(temporary) / "tokens"
                    unfinished.mkdir()
                    passages = progress(source.passages(), f"Tokenising {source.name}", unit=" documents")
                    encoder = Encoder(tokenizer, source.name)
                    _write_tokens(encoder.encode(passages), unfinished, dtype, fraction)
                    (unfinished / "unknown.json").write_text(json.dumps(asdict(encoder.unknown)))
                    unfinished.rename(directory)
        Unknown(**json.loads((directory / "unknown.json").read_text())).check(tokenizer, source.name)
    except OSError as error:
        raise TextError(f"{source.name}: its tokens cannot be written to {cache}: {error}.") from error
    parts: list[Part] = [
        (_memory_map(directory / f"{part}.bin", dtype), _memory_map(directory / f"{part}-ends.bin", np.dtype(np.int64)))
        for part in ("train", "held_out")
    ]
    return parts if len(parts[1][0]) else parts[:1]


def _write_tokens(encoded: Iterable[tuple[list[int], bool]], directory: Path, dtype: np.dtype, fraction: float) -> None:
    """Write the tokens of the training and held-out parts, and the positions before which their documents end."""
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


class Encoder:
    """Encodes documents as token ids, and counts how much of them the tokenizer does not know."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        """`name` is the text's name in messages."""
        self.tokenizer, self.name = tokenizer, name
        self.unknown = Unknown()
        state = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None
        self._can_be_cut = state is not None and _can_be_cut(state)
        self._drops = state is not None and _drops_characters(state)

    def encode(self, passages: Iterable[Passage]) -> Iterator[tuple[list[int], bool]]:
        """Yield the ids of each document, in one or more pieces, and whether a piece is the document's last.

        Raises:
            TextError: the tokenizer fails.
        """
        eot = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        for batch in _batches(_pieces(passages, self._can_be_cut)):
            pieces = [piece for piece, _ in batch]
            try:
                encoded = self.tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)
            except Exception as error:
                raise TextError(f"{self.name}: the tokenizer failed: {error}") from error
            for i, (ids, (piece, last)) in enumerate(zip(encoded["input_ids"], batch, strict=True)):
                dropped = _dropped(piece, encoded.encodings[i].offsets) if self._drops else 0
                self.unknown.add(piece, ids, self.tokenizer, dropped)
                yield ids + eot if last else ids, last

    def check(self) -> None:
        """Check how much of the encoded text the tokenizer knows. Warn if it does not know 1% or more.

        Raises:
            TextError: it knows less than half.
        """
        self.unknown.check(self.tokenizer, self.name)


@dataclass
class Unknown:
    """How much of a text a tokenizer does not know."""

    tokens: int = 0
    """The number of tokens of the text, plus that of characters that no token represents."""
    unknown: int = 0
    """How many of these are unknown tokens, or characters that no token represents."""
    example: str = ""
    """The first words of the first piece with an unknown token or character."""

    def add(self, piece: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, dropped: int) -> None:
        """Count the ids of a piece of text, of which `dropped` characters are in no token."""
        unknown = dropped
        if tokenizer.unk_token_id is not None and (found := ids.count(tokenizer.unk_token_id)):
            unknown += max(0, found - piece.count(tokenizer.unk_token))  # GPT-2's, <|endoftext|>, may be in the text
        self.tokens += len(ids) + dropped
        self.unknown += unknown
        if unknown and not self.example:
            self.example = " ".join(piece[:200].split())[:40]

    def check(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        """As `Encoder.check`."""
        part = self.unknown / max(1, self.tokens)
        if part < _FEW_UNKNOWN:
            return
        what = f"{tokenizer.unk_token!r}" if tokenizer.unk_token is not None else "dropped"
        problem = (
            f"{name}: the tokenizer does not know {part:.0%} of the text ({what}), for example in {self.example!r}. "
            "The tokenizer may have been made for another script or case."
        )
        if part > _MANY_UNKNOWN:
            raise TextError(f"{problem} Use another text or another model.")
        warnings.warn(problem, stacklevel=2)


def _can_be_cut(state: dict[str, Any]) -> bool:
    """Return whether a token always ends before a line break that follows a visible character.

    It does with GPT-2's pattern: only the alternative for white space matches a line break, and it matches no visible
    character; and with no normalizer, no prepended space, and no added token that contains a line break. Other patterns
    may match a visible character and a line break together.
    """
    before = state["pre_tokenizer"] or {}
    is_gpt2s = before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before["add_prefix_space"]
    return is_gpt2s and not state["normalizer"] and not any("\n" in added["content"] for added in state["added_tokens"])


def _drops_characters(state: dict[str, Any]) -> bool:
    """Return whether a tokenizer silently drops characters that it does not have, without an unknown token."""
    model = state["model"]
    if model["type"] != "BPE" or model.get("unk_token") or model.get("byte_fallback"):
        return False
    has_bytes = '"ByteLevel"' in json.dumps([state["pre_tokenizer"], state["normalizer"]])
    return not (has_bytes and all(byte in model["vocab"] for byte in ByteLevel.alphabet()))


def _dropped(piece: str, offsets: list[tuple[int, int]]) -> int:
    """Return the number of visible characters of a piece that are in no token."""
    covered = bytearray(len(piece))
    for start, end in offsets:
        covered[start:end] = b"\1" * (end - start)
    return sum(not there and not character.isspace() for there, character in zip(covered, piece, strict=True))


def _pieces(passages: Iterable[Passage], can_be_cut: bool) -> Iterator[Passage]:
    """Yield pieces of documents, and whether each is its document's last. Long documents are cut before line breaks.

    If a document cannot be cut safely (`_can_be_cut`), it is yielded whole.
    """
    cut = re.compile(r"(?<=\S)\n")
    for passage, last in passages:
        start = 0
        while can_be_cut and (place := cut.search(passage, start + PIECE_CHARACTERS)):
            yield passage[start : place.start()], False
            start = place.start()
        yield passage[start:], last


def _batches(pieces: Iterable[Passage]) -> Iterator[list[Passage]]:
    batch: list[Passage] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _fingerprint_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return everything in a tokenizer that ids depend on."""
    if not tokenizer.is_fast:
        with TemporaryDirectory() as saved:
            tokenizer.save_pretrained(saved)
            files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(saved).iterdir()}
        return repr((type(tokenizer), sorted(files.items())))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**state, "truncation": None, "padding": None})  # these are left over from the last call


def _memory_map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
