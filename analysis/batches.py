"""Runs models over tokens batch by batch, keeping only the activations that an analysis asks for."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

_LOGITS_ON_CPU = 2**21
"""Numbers in one model's logits of one batch on a CPU: few enough for its caches, a third faster than whole batches."""


class Forward(NamedTuple):
    """What one model made of one batch."""

    logits: Float[Tensor, "batch pos vocab"]
    cache: Mapping[str, Tensor]
    """Activations by TransformerLens hook name."""


def forwards(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    hook_names: Sequence[str] = (),
    batch_size: int = 8,
    description: str = "Measuring",
) -> Iterator[tuple[Int[Tensor, "batch pos"], dict[str, Forward]]]:
    """Yield batch after batch of `tokens` with what every model, all on one device, makes of it.

    `models` are what `load_trio` or `load_hooked_blocks` returns. Memory does not grow with the number of tokens as
    long as the caller reduces each batch before it takes the next. On a CPU batches are smaller than `batch_size` where
    the logits are many.
    """
    cfg = next(iter(models.values())).cfg
    device = cfg.device
    if torch.device(device).type == "cpu":
        batch_size = min(batch_size, max(1, _LOGITS_ON_CPU // (tokens.shape[1] * cfg.d_vocab)))
    names = list(hook_names)
    for batch in tqdm(tokens.split(batch_size), desc=description, unit="batch", leave=False):
        batch = batch.to(device)
        with torch.inference_mode():
            outputs = {
                name: Forward(*model.run_with_cache(batch, names_filter=names, return_cache_object=False))
                for name, model in models.items()
            }
        yield batch, outputs
