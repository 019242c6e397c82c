"""Documents -> token ids, tokenised once and kept in the `datasets` cache."""

import hashlib
import itertools
import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
from datasets.utils import tqdm
from filelock import FileLock
from jaxtyping import Int, UInt
from transformers import PreTrainedTokenizerBase

from finetune.recipe import Text
from finetune.text.bins import bin_files, read_bin
from finetune.text.sources import TextError, documents_of, open_source

BATCH_CHARACTERS = 1_000_000  # a call of the tokenizer
PIECE_CHARACTERS = 100_000  # longer documents are tokenised in pieces, in parallel

Part = tuple[UInt[np.ndarray, " token"], Int[np.ndarray, " document"] | None]
"""Tokens, and the positions before which documents end (None: unknown but for their end-of-text tokens)."""


def tokens_of(
    name: str, text: Text, tokenizer: PreTrainedTokenizerBase, vocab_size: int, fraction: float = 0.0
) -> list[Part]:
    """Return all tokens of a source, in two parts if whole documents or a val.bin are held out."""
    if files := bin_files(name):
        dtype = text.token_dtype if text.token_dtype != "auto" else "uint16" if vocab_size <= 2**16 else "uint32"
        return [(read_bin(file, np.dtype(dtype), vocab_size), None) for file in files]
    return _tokenise_once(*open_source(name, text), name, tokenizer, fraction)


def read_tokens(
    documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, most: int
) -> tuple[list[str], UInt[np.ndarray, " token"], Int[np.ndarray, " document"]]:
    """Read on until there are `most` tokens; return the documents read, all their tokens, and where each ends."""
    read, tokens, ends = [], array("q"), array("q")
    while len(tokens) < most and (document := next(documents, None)) is not None:
        read.append(document)
        tokens.extend(itertools.chain.from_iterable(ids for ids, _ in encode([document], tokenizer)))
        ends.append(len(tokens))
    return read, np.array(tokens, np.uint32), np.array(ends, np.int64)


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
                    documents = tqdm(
                        documents_of(data, column, name), f"tokenising {name}", len(data), unit=" documents"
                    )
                    _write_tokens(encode(documents, tokenizer), unfinished, dtype, fraction)
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


def encode(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], bool]]:
    """Yield the ids of each document, in one or several pieces, and whether a piece is its last."""
    eot = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in _batches(_pieces(documents, _can_be_cut(tokenizer))):
        encoded = tokenizer(
            [piece for piece, _ in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )
        for ids, (_, last) in zip(encoded["input_ids"], batch, strict=True):
            yield ids + eot if last else ids, last


def _can_be_cut(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer is sure to part two tokens before a line break that follows a visible character.

    GPT-2's pattern is: of its alternatives only white space takes a line break, and none takes a visible character with
    it; nothing is normalised, prepended or added that holds a line break. Other patterns take them together.
    """
    if not tokenizer.is_fast:
        return False
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    before = state["pre_tokenizer"] or {}
    is_gpt2s = before.get("type") == "ByteLevel" and before.get("use_regex", True) and not before["add_prefix_space"]
    return is_gpt2s and not state["normalizer"] and not any("\n" in added["content"] for added in state["added_tokens"])


def _pieces(documents: Iterable[str], can_be_cut: bool) -> Iterator[tuple[str, bool]]:
    """Yield documents, long ones cut before line breaks if they can be, and whether a piece is its document's last."""
    cut = re.compile(r"(?<=\S)\n")
    for document in documents:
        start = 0
        while can_be_cut and (place := cut.search(document, start + PIECE_CHARACTERS)):
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


def _memory_map(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
