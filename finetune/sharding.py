"""Sharding: of every weight, gradient and moment each process holds a part (torch's FSDP2), and gathers what it needs.

A block's weights are gathered when it is run, forward and backward, and given up after it; what is in no block
(embeddings, unembedding, final norm) stays gathered from a model's forward to the end of its backward. Gradients are
averaged over the processes and given out again after every micro-batch. All of this is the same on GPUs and on CPUs.

Checkpoints hold whole tensors, as those of other runs do, which go through the host of every process one by one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from finetune.families import family_of


def shard(model: PreTrainedModel, backend: str | None = None) -> None:
    """Have every process hold its part of `model`, on its device; forward and backward are for all of them at once.

    What is called has to be `model` itself. All processes give the same weights. With a `backend` of torch.compile each
    block is compiled.
    """
    state = PartialState()
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for block in model.get_submodule(family_of(model).blocks):  # type: ignore[attr-defined]
        if backend is not None:
            block.compile(backend=backend)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def whole(tensors: Any) -> Any:
    """Return tensors, in dictionaries and lists, whole and on the host of the main process; elsewhere None."""
    if isinstance(tensors, Tensor):
        full = tensors.full_tensor() if isinstance(tensors, DTensor) else tensors
        return full.detach().cpu() if PartialState().is_main_process else None
    if isinstance(tensors, Mapping):
        return {name: whole(tensor) for name, tensor in tensors.items()}
    return [whole(tensor) for tensor in tensors] if isinstance(tensors, list) else tensors


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's whole state dict, weights that are tied once, as `whole` does."""
    state, names = model.state_dict(), [dict(model.named_parameters(remove_duplicate=r)).keys() for r in (False, True)]
    return whole({name: tensor for name, tensor in state.items() if name not in names[0] - names[1]})


def like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """Return a whole tensor, which all processes give, as `sharded` is: its part, if it is."""
    if not isinstance(sharded, DTensor) or tensor.shape != sharded.shape:
        return tensor
    return distribute_tensor(tensor.to(sharded.device), sharded.device_mesh, sharded.placements)


def load(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Take in a whole state dict, of which all processes have the same; weights that are tied may be left out."""
    own = model.state_dict()
    model.load_state_dict({name: like(tensor, own[name]) for name, tensor in state.items()}, strict=False)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take in an optimizer's whole state dict."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: like(value, parameters[index]) for name, value in of_one.items()}
        for index, of_one in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": moments})
