"""A model in memory -> the plain model of a supported family that it is, or that its wrappers hold."""

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
    """Return the model of a supported family, or of `finetune.blocks`, that `model` is or wraps; it stays as it is.

    Wrappers are those of `torch.compile` and of data parallelism.

    Raises:
        CheckpointError: `model` is something else; the message says what, and what to pass instead.
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
        raise CheckpointError(f"The model is a {kind}: pass a name, a directory, or a model of transformers.")
    if isinstance(inner, FullyShardedDataParallel):
        raise CheckpointError("The model is sharded over processes (FSDP): save it, and pass its directory.")
    if hasattr(inner, "merge_and_unload"):
        raise CheckpointError(f"The model is a {kind} with adapters: pass what its merge_and_unload() returns.")
    family = families.FAMILIES.get(getattr(getattr(inner, "config", None), "model_type", ""))
    if family is not None and isinstance(inner, PreTrainedModel) and type(inner) is family.base_class:
        raise CheckpointError(
            f"The model is a {kind}, which has no unembedding: pass the {family.architecture} that it belongs to."
        )
    if not isinstance(inner, BlocksForCausalLM):
        families.family_of(inner, "The model")
    if any(parameter.is_meta for parameter in inner.parameters()):
        raise CheckpointError("The model has weights on the device meta, which holds none: load them first.")
    return inner


@torch.no_grad()
def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model of a supported family, in float32 and of the class that its checkpoints are read as.

    Raises:
        CheckpointError: the model has other weights than that class, or computes something else.
    """
    family = families.family_of(model)
    with torch.device("meta"):
        expected = family.model_class(copy.deepcopy(model.config)).state_dict()
    found = model.state_dict()
    reshaped = {name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape}
    if others := sorted(reshaped | (expected.keys() ^ found.keys())):
        raise CheckpointError(
            f"The model differs from a {family.architecture} of its config in {len(others)} weights, "
            f"{', '.join(others[:3])}…: merge adapters, and undo quantisation and pruning, first."
        )
    unembedding: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if model.config.tie_word_embeddings and not torch.equal(unembedding.weight, embedding.weight):
        raise CheckpointError(
            "The model's unembedding is not its embedding, which tie_word_embeddings in its config says that it is: "
            "set model.config.tie_word_embeddings to False."
        )
    made: Any = copy.deepcopy(model)
    changed = type(model) is not family.model_class or "forward" in vars(model)
    made.__class__ = family.model_class
    vars(made).pop("forward", None)
    if changed and not _same_logits(model, made):
        raise CheckpointError(
            f"The {type(model).__name__} does not compute what a {family.architecture} with its weights does, and its "
            f"norms can only be removed there: pass a {family.architecture}."
        )
    return made.float()


def _same_logits(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two models have the same logits for a few tokens."""
    length = min(16, model.config.max_position_embeddings)
    tokens = torch.linspace(0, model.config.vocab_size - 1, length, device=model.device).long()[None]
    training = model.training
    expected, found = (each.eval()(tokens).logits.float() for each in (model, other))
    for each in (model, other):
        each.train(training)
    tolerance = 1e-3 * expected.abs().max().item()
    return expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-3, atol=tolerance)
