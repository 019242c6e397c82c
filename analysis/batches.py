"""Runs models over tokens batch by batch, keeping only the activations that an analysis asks for."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm


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

    `models` are `HookedTransformer`s or `TransformerBridge`s, as `load_trio` returns them. Memory does not grow with
    the number of tokens as long as the caller reduces each batch before it takes the next.
    """
    device = next(iter(models.values())).cfg.device
    names = list(hook_names)
    for batch in tqdm(tokens.split(batch_size), desc=description, unit="batch", leave=False):
        batch = batch.to(device)
        with torch.inference_mode():
            outputs = {
                name: Forward(*model.run_with_cache(batch, names_filter=names, return_cache_object=False))
                for name, model in models.items()
            }
        yield batch, outputs
