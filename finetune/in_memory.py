"""A model in memory, possibly wrapped -> a plain model of a supported family."""

import copy
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel

from finetune import families
from finetune.blocks import BlocksForCausalLM
from finetune.errors import CheckpointError


def unwrapped(model: Any) -> Any:
    """Return the model of a supported family, or of `finetune.blocks`, that `model` is or wraps. It is not changed.

    The wrappers of `torch.compile` and of data parallelism are removed.

    Raises:
        CheckpointError: `model` is something else. The message says what it is, and what to pass instead.
    """
    inner = model
    while isinstance(inner, nn.Module):
        within = (
            None if isinstance(inner, FullyShardedDataParallel) else extract_model_from_parallel(inner, True, False)
        )
        if within is None or within is inner:
            break
        inner = within
    kind = type(inner).__name__
    if not isinstance(inner, nn.Module):
        raise CheckpointError(f"The model is a {kind}. Pass a name, a directory, or a model of transformers.")
    if isinstance(inner, FullyShardedDataParallel):
        raise CheckpointError("The model is sharded over processes (FSDP). Save it, and pass its directory.")
    if hasattr(inner, "merge_and_unload"):
        raise CheckpointError(f"The model is a {kind} with adapters. Pass what its merge_and_unload() returns.")
    family = families.FAMILIES.get(getattr(getattr(inner, "config", None), "model_type", ""))
    if family is not None and isinstance(inner, PreTrainedModel) and type(inner) is family.base_class:
        raise CheckpointError(
            f"The model is a {kind}, which has no unembedding. Pass the {family.architecture} that it belongs to."
        )
    if not isinstance(inner, BlocksForCausalLM):
        families.family_of(inner, "The model")
    if any(parameter.is_meta for parameter in inner.parameters()):
        raise CheckpointError("The model has weights on the meta device, which stores no values. Load them first.")
    return inner


@torch.no_grad()
def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model of a supported family, in float32, as an instance of the family's own class.

    Raises:
        CheckpointError: the model's weights differ from those of that class, or it computes something else.
    """
    family = families.family_of(model)
    with torch.device("meta"):
        expected = family.model_class(copy.deepcopy(model.config)).state_dict()
    found = model.state_dict()
    reshaped = {name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape}
    if others := sorted(reshaped | (expected.keys() ^ found.keys())):
        raise CheckpointError(
            f"The model differs from a {family.architecture} with its config in {len(others)} weights, "
            f"{', '.join(others[:3])}…. Merge adapters, and undo quantisation and pruning, first."
        )
    unembedding: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if model.config.tie_word_embeddings and not torch.equal(unembedding.weight, embedding.weight):
        raise CheckpointError(
            "The model's unembedding differs from its embedding, although tie_word_embeddings in its config is True. "
            "Set model.config.tie_word_embeddings to False."
        )
    made: Any = copy.deepcopy(model)
    changed = type(model) is not family.model_class or "forward" in vars(model)
    made.__class__ = family.model_class
    vars(made).pop("forward", None)
    if changed and not _same_logits(model, made):
        raise CheckpointError(
            f"The {type(model).__name__} does not compute the same as a {family.architecture} with its weights. Norms "
            f"can only be removed from the latter. Pass a {family.architecture}."
        )
    return made.float()


def _same_logits(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Return whether two models have the same logits for a few tokens."""
    length = min(16, model.config.max_position_embeddings)
    tokens = torch.linspace(0, model.config.vocab_size - 1, length, device=model.device).long()[None]
    training = model.training
    expected, found = (each.eval()(tokens).logits.float() for each in (model, other))
    for each in (model, other):
        each.train(training)
    tolerance = 1e-3 * expected.abs().max().item()
    return expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-3, atol=tolerance)
