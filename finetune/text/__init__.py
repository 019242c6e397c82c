"""Any text source -> packed blocks of token ids.

1. `sources` finds the documents: a column of a Hub data set, of local `files` or of a saved `datasets` directory.
   `columns` chooses the column. Documents in memory are written to a file first (`in_memory`).
2. `tokenise` tokenises each document. It prepends nothing, and appends the end-of-text token if the tokenizer has one.
   It writes the ids one after another to a flat file in the `datasets` cache, and those held out to a second file.
   nanoGPT's .bin files are already such files. With `text.streaming` this happens during training instead.
3. `packing` cuts the ids into blocks of the context length. Each block begins with `text.prefix` if that is set.
"""

from dataclasses import dataclass, replace
from functools import partial
from os.path import realpath
from pathlib import Path

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from finetune.recipe import Text
from finetune.text.bins import bin_files
from finetune.text.packing import Blocks, ReadAhead, StreamedBlocks, check_ids, stride
from finetune.text.sources import TextError, documents_of, is_saved, local_files, open_sources, path_of
from finetune.text.tokenise import Encoder, Part, read_tokens, tokens_of

__all__ = [
    "LONGEST_CONTEXT",
    "RANDOM_TOKENS",
    "Blocks",
    "ReadAhead",
    "StreamedBlocks",
    "TextError",
    "TextSplits",
    "load_blocks",
    "load_text",
    "prefix_of",
    "random_blocks",
    "token_ids",
]

LONGEST_CONTEXT = 1024
"""The longest default block, in tokens: longer blocks take more time and teach little here."""
RANDOM_TOKENS = "random-tokens"
"""The name of the source that is not text: tokens drawn uniformly."""
_RANDOM_BLOCKS = 240  # the default number of blocks of random tokens


@dataclass(frozen=True)
class TextSplits:
    """The blocks that a run trains on and the blocks that it measures its loss on. They share no token."""

    train: Blocks | StreamedBlocks
    held_out: Blocks


def load_text(
    text: Text, tokenizer: PreTrainedTokenizerBase, context: int, vocab_size: int, *, seed: int = 0
) -> TextSplits:
    """Read, tokenise and pack the source that `text` names into blocks of `context` tokens with ids below `vocab_size`.

    The held-out text is the first of these that exists:

    1. `text.held_out`;
    2. nanoGPT's val.bin, or a directory's files named validation or, failing that, test;
    3. `text.held_out_fraction` of the documents, spread evenly through the source;
    4. the same fraction of the tokens, at the end, but at least one block. It is used for a .bin file, and where 3
       selects no document.

    A stream holds out its first documents instead of 3 and 4. The first `text.held_out_blocks` blocks of the held-out
    text are returned. Empty documents are skipped. `seed` determines the order of a stream; other blocks keep the order
    of the source.

    Raises:
        TextError: the source is missing, corrupt, of an unknown format, without a column of text, or shorter than
            a block; or a token is beyond the vocabulary; or the tokenizer does not know half of the text.
    """
    if text.held_out is not None:
        files = _files(text.source, 0), _files(text.held_out, -1)
        if any(not others.isdisjoint([file, *file.parents]) for some, others in (files, files[::-1]) for file in some):
            raise TextError(
                f"text.held_out, {text.held_out}, and text.source, {text.source}, share files: choose other files."
            )
    prefix = prefix_of(text, tokenizer)
    if text.streaming and not bin_files(text.source):
        return _stream(text, tokenizer, context, vocab_size, seed)
    taken = stride(context, prefix)
    read = partial(tokens_of, text=text, tokenizer=tokenizer, vocab_size=vocab_size)
    fraction = text.held_out_fraction
    if text.held_out is not None:
        parts = [read(text.source, part=0)[0], read(text.held_out, part=-1)[-1]]
    elif len(parts := read(text.source, fraction=fraction)) == 1:
        tokens, ends = parts[0]
        cut = max(0, len(tokens) - max(taken, int(len(tokens) * fraction)))
        parts = [(tokens[:cut], ends), (tokens[cut:], None if ends is None else ends - cut)]
    (train, train_ends), (held_out, held_out_ends) = parts

    _check_length(len(train), taken, text.source, "to train on")
    check_ids(train.max(), vocab_size, text.source)
    _check_length(len(held_out), taken, text.held_out or text.source, "to hold out")
    check_ids(held_out.max(), vocab_size, text.held_out or text.source)
    eot = tokenizer.eos_token_id
    blocks = Blocks(train, context, eot, train_ends, prefix)
    if text.train_blocks is not None and text.train_blocks < len(blocks):
        rows = np.linspace(0, len(blocks) - 1, text.train_blocks).round().astype(int)
        blocks = Blocks(blocks.blocks[rows].ravel(), context, eot, prefix=prefix)
    return TextSplits(
        blocks,
        Blocks(held_out[: text.held_out_blocks * taken], context, eot, held_out_ends, prefix),
    )


def load_blocks(
    text: Text, tokenizer: PreTrainedTokenizerBase, context: int, vocab_size: int, *, most: int | None = None
) -> Blocks:
    """Read, tokenise and pack `text.source` as `load_text` does, but hold nothing out.

    Returns all blocks, or the first `most`; with `text.streaming`, no more than these are read. If the source is a
    directory with nanoGPT's val.bin, or with files named validation or test, only these are used. For the source
    `random-tokens`, returns `random_blocks`.

    Raises:
        TextError: as in `load_text`.
    """
    prefix = prefix_of(text, tokenizer)
    taken = stride(context, prefix)
    if text.source == RANDOM_TOKENS:
        return random_blocks(tokenizer, context, vocab_size, _RANDOM_BLOCKS if most is None else most, prefix)
    if text.streaming and most is not None and not bin_files(text.source):
        documents = documents_of(*open_sources(text.source, text)[-1].stream(), text.source)
        encoder = Encoder(tokenizer, text.source)
        part: Part = read_tokens(documents, encoder, most * taken)[1:]
        encoder.check()
    else:
        part = tokens_of(text.source, replace(text, streaming=False), tokenizer, vocab_size, part=-1)[-1]
    tokens, ends = part
    _check_length(len(tokens), taken, text.source)
    check_ids(tokens.max(), vocab_size, text.source)
    return Blocks(tokens if most is None else tokens[: most * taken], context, tokenizer.eos_token_id, ends, prefix)


def token_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Int[np.ndarray, " id"]:
    """Return the ids that a tokenizer has. A model's vocabulary may be larger, padded with rows that are never used."""
    ids = np.unique(np.array([*tokenizer.get_vocab().values()], np.int64))
    return ids[ids < vocab_size]


def random_blocks(
    tokenizer: PreTrainedTokenizerBase, context: int, vocab_size: int, count: int, prefix: int | None = None
) -> Blocks:
    """Return blocks of tokens drawn uniformly from the tokenizer's, always the same. Each block is one document."""
    taken = stride(context, prefix)
    drawn = np.random.default_rng(0).choice(token_ids(tokenizer, vocab_size), count * taken)
    return Blocks(drawn.astype(np.uint32), context, ends=np.arange(1, count + 1) * taken, prefix=prefix)


def prefix_of(text: Text, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token that `text.prefix` names, or None if it is not set.

    Raises:
        TextError: the tokenizer does not have that token.
    """
    if text.prefix is None:
        return None
    token = tokenizer.bos_token if text.prefix == "bos" else text.prefix
    found = None if token is None else tokenizer.get_vocab().get(token)
    if found is None:
        what = "a beginning-of-sequence token" if text.prefix == "bos" else f"the token {text.prefix!r}"
        raise TextError(f"text.prefix is {text.prefix}, but the tokenizer does not have {what}. Name one that it has.")
    return found


def _stream(text: Text, tokenizer: PreTrainedTokenizerBase, context: int, vocab_size: int, seed: int) -> TextSplits:
    """Hold out enough of the first documents for `text.held_out_blocks`, and stream the rest."""
    sources = open_sources(text.source, text)
    source, column = sources[0].stream()
    documents = first = documents_of(source, column, text.source)
    if text.held_out is not None:
        sources = open_sources(text.held_out, text)
    if text.held_out is not None or len(sources) == 2:
        first = documents_of(*sources[-1].stream(), sources[-1].name)

    prefix = prefix_of(text, tokenizer)
    taken = stride(context, prefix)
    stop = text.held_out_blocks * taken
    encoder = Encoder(tokenizer, text.held_out or text.source)
    held_out, tokens, ends = read_tokens(first, encoder, stop)
    encoder.check()
    _check_length(len(tokens), taken, text.held_out or text.source, "to hold out")
    check_ids(tokens.max(), vocab_size, text.held_out or text.source)

    left, encoder = 0, Encoder(tokenizer, text.source)
    while left < taken and (document := next(documents, None)) is not None:
        left += sum(len(ids) for ids, _ in encoder.encode([(document, True)])) if document not in held_out else 0
    encoder.check()
    _check_length(left, taken, text.source, "to train on")

    name, left_out = text.source, frozenset(held_out)
    stream = StreamedBlocks(source, column, left_out, tokenizer, context, vocab_size, name, seed, prefix)
    return TextSplits(stream, Blocks(tokens[:stop], context, tokenizer.eos_token_id, ends, prefix))


def _files(name: str, part: int) -> set[Path]:
    """Return the files, or the directory, of part 0 (the first) or −1 (the last) of a source."""
    path = path_of(name)
    if bins := bin_files(name):
        found = [bins[part]]
    else:
        found = local_files(name)[part] if path.exists() and not is_saved(path) else [path]
    return {Path(realpath(file)) for file in found}


def _check_length(tokens: int, context: int, name: str, purpose: str = "") -> None:
    if tokens < context:
        remedy = ", a shorter context, or another text.held_out_fraction" if purpose else " or a shorter context"
        raise TextError(
            f"{name} has only {tokens:,} tokens{purpose and f' {purpose}'}, fewer than a block of {context:,}. "
            f"Use more text{remedy}."
        )
