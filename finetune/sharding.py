"""Sharding: each process holds a part of every weight, gradient and moment (torch's FSDP2) and gathers what it needs.

A block's weights are gathered for its forward and for its backward, and freed after each. Weights outside the blocks
(embeddings, unembedding, final norm) stay gathered from the model's forward to the end of its backward. After every
micro-batch, gradients are averaged over the processes and sharded again. GPUs and CPUs behave the same.

Checkpoints contain whole tensors, as in runs without sharding. The tensors pass through each host one at a time.
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
    """Shard `model` over all processes, each part on its process's device. All processes run it together.

    Call `model` itself, not a submodule. All processes must pass the same weights. If `backend` is given, each block
    is compiled with that backend of torch.compile.
    """
    state = PartialState()
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for block in model.get_submodule(family_of(model).blocks):  # type: ignore[attr-defined]
        if backend is not None:
            block.compile(backend=backend)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def whole(tensors: Any) -> Any:
    """Gather tensors, nested in dictionaries and lists, on the main process's CPU. Elsewhere each becomes None."""
    if isinstance(tensors, Tensor):
        full = tensors.full_tensor() if isinstance(tensors, DTensor) else tensors
        return full.detach().cpu() if PartialState().is_main_process else None
    if isinstance(tensors, Mapping):
        return {name: whole(tensor) for name, tensor in tensors.items()}
    return [whole(tensor) for tensor in tensors] if isinstance(tensors, list) else tensors


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's state dict, gathered by `whole`, with each tied weight once."""
    state, names = model.state_dict(), [dict(model.named_parameters(remove_duplicate=r)).keys() for r in (False, True)]
    return whole({name: tensor for name, tensor in state.items() if name not in names[0] - names[1]})


def like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """Shard a whole tensor, which all processes pass, as `sharded` is. Return it as is if `sharded` is not sharded."""
    if not isinstance(sharded, DTensor) or tensor.shape != sharded.shape:
        return tensor
    return distribute_tensor(tensor.to(sharded.device), sharded.device_mesh, sharded.placements)


def load(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Load a whole state dict, which all processes pass. Tied weights may be missing from it."""
    own = model.state_dict()
    model.load_state_dict({name: like(tensor, own[name]) for name, tensor in state.items()}, strict=False)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's whole state dict."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: like(value, parameters[index]) for name, value in of_one.items()}
        for index, of_one in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": moments})
