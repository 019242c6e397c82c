"""Low rank: each matrix W stays fixed, and a low-rank product that is added to it is trained.

Following Hu et al. 2021 (LoRA, arXiv 2106.09685), a module's weight is

    W + (lora_alpha / lora_rank) · B·A,  A of shape [rank, d_in], B of shape [d_out, rank], initially 0

The adapters are peft's. For modules that write to the residual stream, peft adds the output of the product to that of
the module. A `NormedReader` multiplies its norm into its weight, so the product itself is added to the weight first.
Gains and biases of norms are trained in full. Nothing else is trained, unless the recipe names the embeddings. `merge`
restores the ordinary modules, with merged weights.
"""

from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune import folding
from finetune.errors import CheckpointError
from finetune.fake_norm import NormedReader
from finetune.families import family_of
from finetune.recipe import Recipe
from finetune.sites import Sites

_ADAPTER = "default"


class _LowRank(lora.Linear):
    """An adapter that is not moved to another device: tensors without values (`plan`) cannot be moved."""

    def _move_adapter_to_device_of_base_layer(self, *_: Any, **__: Any) -> None:
        pass


class _LowRankReader(_LowRank):
    """An adapter of a `NormedReader`, which adds the product to its weight."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        d_out, d_in = module.matrix.shape
        return d_in, d_out

    def forward(self, y: Float[Tensor, "batch pos d"], *_: Any, **__: Any) -> Float[Tensor, "batch pos out"]:
        """Return the output of the reader with the adapter's product added to its weight."""
        with torch.autocast(y.device.type, enabled=False):  # autocast would round the product
            delta = self.get_delta_weight(_ADAPTER)
        return self.base_layer(y, delta)


def adapt(sites: Sites, recipe: Recipe) -> None:
    """Add adapters of the recipe's `lora_rank` to the model of `sites`, and freeze everything else but the norms.

    At rank 0 there are no adapters, and only the parameters of norms are trained. The initial A depends only on the
    recipe's seed.
    """
    model, rank = sites.model, recipe.lora_rank
    assert rank is not None
    family = family_of(model)
    writers = family.writers_of(model.config.num_hidden_layers)
    paths = []
    if "readers" in recipe.lora_targets:
        paths += [reader.path for norm in folding.norms_of(model) if norm.layer is not None for reader in norm.readers]
    if "writers" in recipe.lora_targets:
        paths += [path for layer, _, path in writers if layer is not None]
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        for path in paths if rank else ():
            module: Any = model.get_submodule(path)
            is_linear = module.is_linear if isinstance(module, NormedReader) else not isinstance(module, Conv1D)
            config = LoraConfig(r=rank, lora_alpha=recipe.lora_alpha, fan_in_fan_out=not is_linear)
            kind = _LowRankReader if isinstance(module, NormedReader) else _LowRank
            adapter = kind(module, _ADAPTER, config=config, r=rank, lora_alpha=recipe.lora_alpha)
            model.set_submodule(path, adapter)
    trained: list[nn.Module] = [*sites.norms]
    if "embeddings" in recipe.lora_targets:
        trained += [model.get_submodule(path) for layer, _, path in writers if layer is None]
        trained.append(model.get_output_embeddings())
    for part in trained:
        for parameter in part.parameters(recurse=False):
            parameter.requires_grad_(True)


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Add every adapter's product to its weight, and restore the original modules, in place.

    The merged weights are new tensors, so that other models that share the old ones are not affected.

    Raises:
        CheckpointError: a merged weight is not finite.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, lora.Linear):
            try:
                module.merge(safe_merge=True)
            except ValueError as error:
                raise CheckpointError(f"The low-rank product of {path} cannot be merged: {error}") from error
            model.set_submodule(path, module.get_base_layer())
