"""Runs models over tokens batch by batch, keeping only the activations that an analysis requests."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from finetune.evaluate import float32_logits
from finetune.progress import progress

_LOGITS_ON_CPU = 2**21
"""The maximum number of logits per model and batch on a CPU. They fit into its caches: this is a third faster."""
_LOGITS_ON_GPU = 2**28
"""The maximum number of logits per model and batch on a GPU: 1 GiB in float32."""
_LOGITS_IN_A_PIECE = 2**22
"""The maximum number of logits to process at once. A vocabulary may have 256,000 tokens, and a block 1,024."""


class Forward(NamedTuple):
    """The output of one model for one batch."""

    logits: Float[Tensor, "batch pos vocab"]
    cache: Mapping[str, Tensor]
    """Activations by TransformerLens hook name."""


def forwards(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    hook_names: Sequence[str] = (),
    batch_size: int = 8,
    description: str = "Measuring",
    float32: bool = False,
) -> Iterator[tuple[Int[Tensor, "batch pos"], dict[str, Forward]]]:
    """Yield each batch of `tokens` with the output of every model for it. All models must be on the same device.

    `models` come from `load_trio` or `load_hooked_blocks`. Memory does not grow with the number of tokens, as long as
    the caller reduces each batch before it requests the next. Batches are smaller than `batch_size` if there would be
    too many logits. Logits have the model's dtype or, if `float32`, at least float32.
    """
    cfg = next(iter(models.values())).cfg
    device = cfg.device
    most = _LOGITS_ON_CPU if torch.device(device).type == "cpu" else _LOGITS_ON_GPU
    batch_size = min(batch_size, max(1, most // (tokens.shape[1] * cfg.d_vocab)))
    names = list(hook_names)
    for batch in progress(tokens.split(batch_size), desc=description, unit="batch", leave=False):
        batch = batch.to(device)
        outputs = {}
        with torch.inference_mode():
            for name, model in models.items():
                with _float32_logits(model.unembed) if float32 else nullcontext():
                    outputs[name] = Forward(*model.run_with_cache(batch, names_filter=names, return_cache_object=False))
        yield batch, outputs
        outputs.clear()  # otherwise the caller keeps the logits of this batch while those of the next are computed


def _float32_logits(unembed: Any) -> AbstractContextManager[None]:
    """As `float32_logits`, for TransformerLens's unembeddings and for plain ones."""
    if isinstance(unembed, nn.Linear):
        return float32_logits(unembed, unembed.weight, unembed.bias)
    return float32_logits(unembed, unembed.W_U.T, unembed.b_U)


def predictions(
    models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], batch_size: int = 8
) -> Iterator[tuple[Int[Tensor, " token"], dict[str, Float[Tensor, "token vocab"]]]]:
    """Yield, in order, the tokens that follow another token, and each model's log-probabilities for their positions.

    Log-probabilities are in float32. They are yielded one piece of a block at a time, because the temporaries of whole
    batches fit neither into a CPU's cache nor, with a large vocabulary, into its memory.
    """
    batches = forwards(models, tokens, batch_size=batch_size, description="Comparing predictions", float32=True)
    for batch, outputs in batches:
        for i, block in enumerate(batch):
            for piece in pieces(len(block) - 1, next(iter(models.values())).cfg.d_vocab):
                yield (
                    block[1:][piece],
                    {name: output.logits[i, piece].float().log_softmax(-1) for name, output in outputs.items()},
                )


def pieces(count: int, vocabulary: int, most: int = _LOGITS_IN_A_PIECE) -> Iterator[slice]:
    """Yield consecutive slices of `count` tokens, each small enough to have at most `most` logits."""
    size = max(1, most // vocabulary)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
