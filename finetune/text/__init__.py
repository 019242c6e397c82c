"""Any text source -> packed blocks of token ids.

1. `sources` finds the documents: a column of a Hub data set, of local `files` or of a saved `datasets` directory.
   `columns` says which. Documents in memory become a file first (`in_memory`).
2. `tokenise` tokenises each, nothing prepended, and puts the end-of-text token after it (nothing, if a tokenizer has
   none), and writes the ids one after another to a flat file in the `datasets` cache, those held out to a second one.
   nanoGPT's .bin files are such files already. With `text.streaming` this happens during training instead.
3. `packing` cuts the ids in blocks of the context length, each behind `text.prefix` if there is one.
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
"""Tokens of a block, unless it is said otherwise: more positions than that cost time and teach little here."""
RANDOM_TOKENS = "random-tokens"
"""The source that is not text: tokens drawn uniformly."""
_RANDOM_BLOCKS = 240  # of it, unless it is said how many


@dataclass(frozen=True)
class TextSplits:
    """What a run trains on and what it measures its loss on; no token is in both."""

    train: Blocks | StreamedBlocks
    held_out: Blocks


def load_text(
    text: Text, tokenizer: PreTrainedTokenizerBase, context: int, vocab_size: int, *, seed: int = 0
) -> TextSplits:
    """Read, tokenise and pack what `text` names into blocks of `context` tokens with ids below `vocab_size`.

    Held out are `text.held_out`; or else nanoGPT's val.bin, or the files that a directory calls validation or else
    test; or else `text.held_out_fraction` of the documents, spread evenly through the source; or, where that gives
    none and for a .bin file, the same fraction of the tokens, but at least one block, at the end. A stream holds out
    its first documents. Of what is held out the first `text.held_out_blocks` blocks are returned. Empty documents are
    passed over. `seed` orders a stream; other blocks come in the order of the source.

    Raises:
        TextError: the source is missing, corrupt, of an unknown kind, without a column of text, or shorter than
            a block; or a token is beyond the vocabulary; or the tokenizer does not know half of the text.
    """
    if text.held_out is not None:
        files = _files(text.source, 0), _files(text.held_out, -1)
        if any(not others.isdisjoint([file, *file.parents]) for some, others in (files, files[::-1]) for file in some):
            raise TextError(
                f"text.held_out, {text.held_out}, and text.source, {text.source}, share text: name other files."
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
    """Read, tokenise and pack `text.source` as `load_text` does, with nothing held out.

    All of it, or its first blocks: `most` at the most, which are all that is read where `text.streaming`.
    Of a directory it is val.bin of nanoGPT's, or the files that it calls validation or test, where there are any. Of
    the source `random-tokens` it is `random_blocks`.

    Raises:
        TextError: as `load_text` does.
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
    """Return the ids that a tokenizer has. A model's vocabulary may be larger: padded, with rows that mean nothing."""
    ids = np.unique(np.array([*tokenizer.get_vocab().values()], np.int64))
    return ids[ids < vocab_size]


def random_blocks(
    tokenizer: PreTrainedTokenizerBase, context: int, vocab_size: int, count: int, prefix: int | None = None
) -> Blocks:
    """Return blocks of tokens drawn uniformly from those that the tokenizer has, always the same; each a document."""
    taken = stride(context, prefix)
    drawn = np.random.default_rng(0).choice(token_ids(tokenizer, vocab_size), count * taken)
    return Blocks(drawn.astype(np.uint32), context, ends=np.arange(1, count + 1) * taken, prefix=prefix)


def prefix_of(text: Text, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token that `text.prefix` names, or None.

    Raises:
        TextError: the tokenizer does not have it.
    """
    if text.prefix is None:
        return None
    token = tokenizer.bos_token if text.prefix == "bos" else text.prefix
    found = None if token is None else tokenizer.get_vocab().get(token)
    if found is None:
        what = "a beginning-of-sequence token" if text.prefix == "bos" else f"the token {text.prefix!r}"
        raise TextError(f"text.prefix is {text.prefix}, but the tokenizer does not have {what}: name one that it has.")
    return found


def _stream(text: Text, tokenizer: PreTrainedTokenizerBase, context: int, vocab_size: int, seed: int) -> TextSplits:
    """Hold out the first documents, enough for the blocks wanted, and stream the rest."""
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
    """Return the files, or the directory, that the first or the last part of a source is."""
    path = path_of(name)
    if bins := bin_files(name):
        found = [bins[part]]
    else:
        found = local_files(name)[part] if path.exists() and not is_saved(path) else [path]
    return {Path(realpath(file)) for file in found}


def _check_length(tokens: int, context: int, name: str, purpose: str = "") -> None:
    if tokens < context:
        remedy = "a shorter context, or another text.held_out_fraction" if purpose else "or a shorter context"
        raise TextError(
            f"{name}: {tokens:,} tokens{purpose and f' {purpose}'}, fewer than a block of {context:,}. "
            f"Give more text, {remedy}."
        )
