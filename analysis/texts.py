"""Texts to compare models on: blocks packed as in training, spread evenly over each text."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from finetune.recipe import Text
from finetune.text import LONGEST_CONTEXT, TextError, load_blocks
from finetune.text.in_memory import Documents, write_documents
from finetune.text.sources import path_of


class Sample(NamedTuple):
    """Blocks of a text, packed as in training."""

    tokens: Int[Tensor, "block pos"]
    documents: Int[np.ndarray, "block pos"]
    """The index of each token's document."""
    description: str


def read_text(
    name: str | Documents, model: Any, tokens: int = 8_192, *, context: int | None = None, prefix: str | None = None
) -> Sample:
    """Pack a text for `model` as in training, and return blocks that are spread evenly over it.

    From a Hub data set, which may be larger than the disk, only the first blocks are read.

    Args:
        name: a source as in a recipe: a bundled name, a file, a directory, or a Hub data set; or documents in memory,
            strings or a data set of `datasets`.
        model: what `load_bridge` or `load_hooked` returns, with a tokenizer.
        tokens: the maximum number of tokens, in whole blocks.
        context: tokens per block. None: the model's context, at most 1,024.
        prefix: a token to prepend to each block, as `text.prefix` in a recipe: "bos", or the text of a token. It is at
            position 0, whose attention sinks and norms the analyses report separately. None: no prefix.

    Raises:
        TextError: the model has no tokenizer or fewer positions than `context`, the tokenizer does not have `prefix`,
            or the text cannot be read, is shorter than a block, or has tokens beyond the vocabulary.
    """
    if not isinstance(name, str):
        with TemporaryDirectory() as directory:
            write_documents(name, file := Path(directory) / "text.jsonl")
            sample = read_text(str(file), model, tokens, context=context, prefix=prefix)
        return sample._replace(description=sample.description.replace(str(file), "text in memory", 1))
    if model.tokenizer is None:
        raise TextError("The original model's directory has no tokenizer. Put its tokenizer.json there.")
    context = context or min(model.cfg.n_ctx, LONGEST_CONTEXT)
    if not 2 <= context <= model.cfg.n_ctx:
        raise TextError(f"The context is {context}; it must be from 2 to {model.cfg.n_ctx} tokens for this model.")
    wanted, from_hub = max(1, tokens // context), not path_of(name).exists()
    text = Text(name, streaming=from_hub, prefix=prefix)
    packed = load_blocks(text, model.tokenizer, context, model.cfg.d_vocab, most=wanted if from_hub else None)
    chosen = np.linspace(0, len(packed) - 1, min(len(packed), wanted)).astype(int)
    documents = packed.document_ids(chosen)
    taken = f"its first {documents.size:,}" if from_hub else f"{documents.size:,} of {packed.blocks.size:,}"
    return Sample(
        torch.stack([packed[i]["input_ids"] for i in chosen]),
        documents,
        f"{name}: {taken} tokens, from {len(np.unique(documents)):,} documents",
    )
