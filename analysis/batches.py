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
_LOGITS_IN_A_PIECE = 2**18
"""The maximum number of logits to process at once on a CPU: 1 MiB in float32. Temporaries of this size stay in a
core's cache, and their memory is reused: mapping new memory for larger ones takes longer than the computation."""
_LOGITS_IN_A_PIECE_ON_GPU = 2**22
"""The maximum number of logits to process at once on a GPU. A vocabulary may have 256,000 tokens, and a block 1,024."""


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
    unembed: bool = True,
) -> Iterator[tuple[Int[Tensor, "batch pos"], dict[str, Forward]]]:
    """Yield each batch of `tokens` with the output of every model for it. All models must be on the same device.

    `models` come from `load_trio` or `load_hooked_blocks`. Memory does not grow with the number of tokens, as long as
    the caller reduces each batch before it requests the next. Batches are smaller than `batch_size` if there would be
    too many logits. Logits have the model's dtype or, if `float32`, at least float32. Without `unembed`, which is a
    fifth of the operations of a small model, logits are not computed, and `pos` is 0.
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
                with _unembedding(model.unembed, float32, unembed):
                    outputs[name] = Forward(*model.run_with_cache(batch, names_filter=names, return_cache_object=False))
        yield batch, outputs
        outputs.clear()  # otherwise the caller keeps the logits of this batch while those of the next are computed


def _unembedding(module: Any, float32: bool, unembed: bool) -> AbstractContextManager[Any]:
    """Return a context in which an unembedding, TransformerLens's or plain, returns the logits of `forwards`."""
    if not unembed:
        return module.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :0],))
    if not float32:
        return nullcontext()
    if isinstance(module, nn.Linear):
        return float32_logits(module, module.weight, module.bias)
    return float32_logits(module, module.W_U.T, module.b_U)


def predictions(
    models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], batch_size: int = 8
) -> Iterator[tuple[Int[Tensor, " token"], dict[str, Float[Tensor, "token vocab"]]]]:
    """Yield, in order, the tokens that follow another token, and each model's log-probabilities for their positions.

    Log-probabilities are in float32. They are yielded one piece of a block at a time, because the temporaries of whole
    batches fit neither into a CPU's cache nor, with a large vocabulary, into its memory.
    """
    batches = forwards(models, tokens, batch_size=batch_size, description="Comparing predictions", float32=True)
    for batch, outputs in batches:
        yield from predictions_of(batch, outputs)


def predictions_of(
    batch: Int[Tensor, "batch pos"], outputs: Mapping[str, Forward]
) -> Iterator[tuple[Int[Tensor, " token"], dict[str, Float[Tensor, "token vocab"]]]]:
    """Yield the `predictions` of one batch, from the output of `forwards` with `float32`."""
    vocabulary = next(iter(outputs.values())).logits.shape[-1]
    for i, block in enumerate(batch):
        for piece in pieces(len(block) - 1, vocabulary, batch.device):
            yield (
                block[1:][piece],
                {name: output.logits[i, piece].float().log_softmax(-1) for name, output in outputs.items()},
            )


def pieces(count: int, vocabulary: int, device: str | torch.device = "cpu", most: int | None = None) -> Iterator[slice]:
    """Yield consecutive slices of `count` tokens, each with at most `most` logits (None: what is fast on `device`)."""
    if most is None:
        most = _LOGITS_IN_A_PIECE if torch.device(device).type == "cpu" else _LOGITS_IN_A_PIECE_ON_GPU
    size = max(1, most // vocabulary)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
