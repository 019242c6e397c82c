"""Token ids -> packed blocks: concatenated documents are cut into blocks, and an incomplete last block is dropped."""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import torch
from jaxtyping import Int, UInt
from transformers import PreTrainedTokenizerBase

from finetune.text.sources import TextError, documents_of
from finetune.text.tokenise import Encoder

SHUFFLE_DOCUMENTS = 10_000  # the size of a stream's shuffle buffer
_ENOUGH_TOKENS = 1 << 20  # after so many tokens of a stream, the fraction of unknown ones is checked
_CHUNK = 4096  # blocks that are processed at a time


def stride(context: int, prefix: int | None) -> int:
    """Return how many tokens of text a block contains: all but the prefix."""
    return context - (prefix is not None)


def with_prefix(
    block: UInt[np.ndarray, " pos"] | Int[np.ndarray, " pos"], prefix: int | None
) -> Int[np.ndarray, " context"]:
    """Return a block's tokens as int64, preceded by its prefix if it has one."""
    block = block.astype(np.int64)
    return block if prefix is None else np.concatenate([[prefix], block])


class Blocks(torch.utils.data.Dataset):
    """A sequence of tokens cut into blocks of `context`, each `{"input_ids": Int64[context]}`.

    With a `prefix`, each block begins with that token and contains one token fewer of the sequence. Nothing is copied
    until a block is requested, so `tokens` may be a memory-mapped file of any size.
    """

    def __init__(
        self,
        tokens: UInt[np.ndarray, " token"],
        context: int,
        eot: int | None = None,
        ends: Int[np.ndarray, " document"] | None = None,
        prefix: int | None = None,
    ) -> None:
        """Documents end with the token `eot` or, if that is None, before the positions `ends` of `tokens`."""
        taken = stride(context, prefix)
        self.blocks = tokens[: len(tokens) // taken * taken].reshape(-1, taken)
        """The tokens of each block, without the prefix."""
        self.context, self.eot, self.ends, self.prefix = context, eot, ends, prefix

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(with_prefix(self.blocks[index], self.prefix))}

    def document_ids(self, rows: Int[np.ndarray, " row"] | None = None) -> Int[np.ndarray, "row context"]:
        """Return the index of each token's document, in all blocks or in the blocks `rows`.

        The document in which the first block begins has index 0. An end-of-text token belongs to the document that it
        ends, and a prefix to the document of the token after it.
        """
        rows = np.arange(len(self)) if rows is None else rows
        ids = self._document_ids(rows)
        return ids if self.prefix is None else np.concatenate([ids[:, :1], ids], axis=1)

    def _document_ids(self, rows: Int[np.ndarray, " row"]) -> Int[np.ndarray, "row taken"]:
        taken = self.blocks.shape[1]
        if self.eot is not None:
            # In chunks: the tokens may not fit into memory.
            chunks = (self.blocks[start : start + _CHUNK] == self.eot for start in range(0, len(self), _CHUNK))
            ended_in = np.concatenate([chunk.sum(1) for chunk in chunks])
            ended = self.blocks[rows] == self.eot
            return (np.cumsum(ended_in) - ended_in)[rows, None] + np.cumsum(ended, 1) - ended
        ends = np.empty(0, np.int64) if self.ends is None else self.ends
        positions = rows[:, None] * taken + np.arange(taken)
        return np.searchsorted(ends, positions, side="right") - np.searchsorted(ends, 0, side="right")


class StreamedBlocks(torch.utils.data.IterableDataset):
    """Blocks that are read, shuffled, tokenised and packed on the fly, epoch after epoch without end.

    The order depends only on the seed, and each iteration starts from the beginning, so a run is resumed by skipping
    the blocks that it has seen. Each DataLoader worker reads its share of the source's files, and stops if it has none.
    The iteration is the same on every rank: `accelerate` reads on one rank and sends each rank its part.
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
        prefix: int | None = None,
    ) -> None:
        self.source = source.shuffle(seed=seed, buffer_size=SHUFFLE_DOCUMENTS)
        self.column, self.held_out, self.tokenizer = column, held_out, tokenizer
        self.context, self.vocab_size, self.name, self.prefix = context, vocab_size, name, prefix

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield blocks `{"input_ids": Int64[context]}`.

        Raises:
            TextError: a token id is beyond the vocabulary, or the tokenizer does not know half of the text.
        """
        tokens: list[int] = []
        taken = stride(self.context, self.prefix)
        encoder, is_checked = Encoder(self.tokenizer, self.name), False
        for epoch in itertools.count():
            self.source.set_epoch(epoch)
            epoch_is_empty = True
            # Encode each epoch separately: otherwise a small source is read many times to fill one tokenizer batch.
            for ids, _ in encoder.encode((document, True) for document in self._documents()):
                epoch_is_empty = False
                check_ids(max(ids, default=0), self.vocab_size, self.name)
                tokens += ids
                full = len(tokens) // taken * taken
                for start in range(0, full, taken):
                    block = np.array(tokens[start : start + taken])
                    yield {"input_ids": torch.from_numpy(with_prefix(block, self.prefix))}
                del tokens[:full]
                if not is_checked and encoder.unknown.tokens > _ENOUGH_TOKENS:
                    encoder.check()
                    is_checked = True
            if not is_checked:
                encoder.check()
                is_checked = True
            if epoch_is_empty:  # this worker has no files
                return

    def _documents(self) -> Iterator[str]:
        # Exclude held-out documents by text, not by index: workers and shuffled files number documents differently.
        documents = documents_of(self.source, self.column, self.name)
        return (document for document in documents if document not in self.held_out)


class ReadAhead(torch.utils.data.IterableDataset):
    """The blocks of a stream, in order, read ahead by a thread while earlier blocks are trained on.

    A thread suffices because tokenizers release the interpreter lock. A DataLoader worker is a forked process, in which
    a tokenizer could not use all cores.
    """

    def __init__(
        self, blocks: torch.utils.data.IterableDataset[dict[str, torch.Tensor]], size: int, chunks: int
    ) -> None:
        """Keep `chunks` chunks of `size` blocks ready."""
        self.blocks, self.size, self.chunks = blocks, size, chunks

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the blocks. Errors of reading them are raised here."""
        blocks = iter(self.blocks)

        def read() -> list[dict[str, torch.Tensor]]:
            return list(itertools.islice(blocks, self.size))

        reader = ThreadPoolExecutor(1)
        try:
            waiting = deque(reader.submit(read) for _ in range(self.chunks))
            while chunk := waiting.popleft().result():
                waiting.append(reader.submit(read))
                yield from chunk
        finally:
            reader.shutdown(cancel_futures=True)


def check_ids(largest: int, vocab_size: int, name: str) -> None:
    """Raise TextError if the largest token id of the text `name` is beyond the model's vocabulary."""
    if largest >= vocab_size:
        raise TextError(
            f"{name}: token id {largest} is beyond the model's vocabulary of {vocab_size}. The tokenizer must be "
            "the model's own and, for a .bin file, text.token_dtype must be the type that it was written in."
        )
