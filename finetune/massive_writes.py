"""Scaling down the neurons that write massive activations, and unusually long embeddings, before training.

A few neurons of trained transformers write vectors hundreds of times as long as the residual stream, mostly at position
0 (massive activations: Sun et al. 2024, arXiv 2402.17762; super weights: Yu et al. 2024, arXiv 2411.07191). Live norms
hide the lengths of these vectors, but constants do not: divided by a constant, such a token leaves the norm hundreds of
times too long, and a gated MLP squares this factor. Training takes hundreds of steps to shorten the vectors. Scaling
down a neuron's output weights takes no steps, costs little while norms are live, and training repairs the rest.

The embeddings of rare tokens may be more than twice as long as those of common ones. The live norms of the first block
hide these lengths too, and training hardly sees these tokens. With a constant, the first MLP writes several times too
much at such a token, and the next blocks multiply this excess until the model overflows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.families import family_of
from finetune.recipe import RecipeError


class MassiveWrite(NamedTuple):
    """A neuron that was scaled down."""

    layer: int
    neuron: int
    write: float
    """The RMS of the longest vector that it wrote, divided by the median RMS of the stream after its block."""
    factor: float
    """The factor by which its output weights were multiplied."""


@torch.no_grad()
def scale_down(model: PreTrainedModel, input_ids: Int[Tensor, "batch pos"], longest: float) -> list[MassiveWrite]:
    """Scale down the output weights of MLP neurons in place, so that no write on these tokens is too long.

    Args:
        model: a model of a supported family with live norms.
        input_ids: tokens to measure on. Massive activations are found at position 0 of each sequence.
        longest: the maximum RMS that a neuron may write, divided by the median RMS of the stream after its block. A
            neuron that writes more is scaled down to this. Layers are processed in order, so that later neurons are
            measured on the changed stream.

    Raises:
        RecipeError: the outputs of MLPs pass through a norm before they are added to the stream (Gemma 2).
    """
    family = family_of(model)
    layers = model.config.num_hidden_layers
    if any(norm.writer is not None for norm in family.norms):
        raise RecipeError(
            f"longest_write is set, but in a {family.architecture} a norm follows each MLP, so the scale of its output "
            "weights does not matter. Set longest_write to None."
        )
    medians: dict[int, Float[Tensor, ""]] = {}
    found: list[MassiveWrite] = []

    def measure(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            stream = output[0] if isinstance(output, tuple) else output
            medians[layer] = stream.float().square().mean(-1).sqrt().median()

        return hook

    def scale(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Float[Tensor, "batch pos d_mlp"]]) -> None:
            weight: Any = module.weight
            by_neuron = weight if isinstance(module, Conv1D) else weight.T  # [d_mlp d_model]
            lengths = args[0].float().abs().amax((0, 1)) * by_neuron.float().square().mean(-1).sqrt()
            over = lengths / medians[layer]
            for neuron in (over > longest).nonzero().flatten().tolist():
                write = over[neuron].item()
                by_neuron[neuron] *= longest / write
                found.append(MassiveWrite(layer, neuron, write, longest / write))

        return hook

    _forward(model, input_ids, [(f"{family.blocks}.{i}", "forward_hook", measure(i)) for i in range(layers)])
    mlps = [path for _, written, path in family.writers_of(layers) if written == "out"]  # one per layer
    _forward(model, input_ids, [(path, "forward_pre_hook", scale(layer)) for layer, path in enumerate(mlps)])
    return found


def untie(model: PreTrainedModel) -> None:
    """Give the unembedding of `model` its own copy of the embedding, in place, if the two are tied."""
    embedding, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    if unembedding.weight is embedding.weight:
        unembedding.weight = nn.Parameter(embedding.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}


@torch.no_grad()
def scale_down_embeddings(model: PreTrainedModel, input_ids: Int[Tensor, "batch pos"], longest: float) -> int:
    """Scale down the embeddings of tokens in place, so that none is too long. Return how many were scaled down.

    A tied unembedding is untied first, because scaling it would change the predictions.

    Args:
        model: a model of a supported family with live norms.
        input_ids: tokens of text.
        longest: the maximum RMS of a token's embedding, divided by the median over `input_ids`.
    """
    untie(model)
    weight: Any = model.get_input_embeddings().weight
    rms = weight.float().square().mean(-1).sqrt()
    limit = longest * rms[input_ids].median()
    weight *= (limit / rms).clamp(max=1).unsqueeze(-1).to(weight)
    return int((rms > limit).sum())


def _forward(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch pos"], hooks: Sequence[tuple[str, str, Callable[..., None]]]
) -> None:
    """Run `model` with hooks, each given as (path of a module, kind of hook, hook), then remove them."""
    handles = [getattr(model.get_submodule(path), f"register_{kind}")(hook) for path, kind, hook in hooks]
    try:
        model.base_model(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
