"""The memory, tokens and operations that a run will need, from its recipe and its model's config alone.

One micro-batch is run forward and backward through the training code, on tensors that have shapes but no values
(torch's fake tensors). Every tensor that would be alive, and every product, is counted. Only the config is downloaded.
"""

import dataclasses
import importlib.util
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from finetune import checkpoint, families, massive_writes, objective, removal
from finetune.processes import check_shares, decided
from finetune.recipe import Recipe
from finetune.sites import Sites
from finetune.training import cast_matrices, share_frozen

_RANK = 16
"""The low rank that is shown beside a plan that trains all weights."""
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}
"""Operations that torch's FlopCounterMode does not count."""


@dataclass(frozen=True)
class Plan:
    """What a run will need. Bytes are those of one process, while the LN-free model is trained."""

    recipe: Recipe
    """The recipe, with `bf16` decided."""
    context: int
    processes: int
    parameters: int
    """The number of parameters, including adapters."""
    trained: int
    """The number of trained parameters."""
    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments, and its step count of each parameter."""
    teacher: int
    """The original, or 0 if the model is not fitted to it. Weights shared with a model of low rank do not count."""
    gathered: int
    """The most that a process gathers of a sharded model, in addition to its own part: the weights outside the blocks,
    of the model (with their gradients) and of the original; and two blocks, with the gradient of one."""
    activations: int
    """The maximum of all other tensors that are alive in a forward and backward of a micro-batch. A compiled model may
    need less."""
    tokens: int
    """The tokens of each fit, over all processes."""
    flops: float
    """The operations of the LN-free model's fit: 2 for each product of two numbers, including the masked half of
    attention and what is recomputed (`gradient_checkpointing`)."""
    control_flops: float
    """The operations of the control's fit, or 0 without a control."""

    @property
    def bytes(self) -> int:
        """The total memory of one process, if the model is not sharded."""
        return sum(self.parts(shard=False).values())

    def parts(self, shard: bool) -> dict[str, int]:
        """Return the bytes that one process needs, by what they are used for."""
        held = {
            "weights": self.weights,
            "gradients": self.gradients,
            "AdamW's moments": self.optimizer,
            "the original": self.teacher,
        }
        if shard:
            held = {name: math.ceil(size / self.processes) for name, size in held.items()} | {"gathered": self.gathered}
        return held | {"activations": self.activations}

    def hours(self, tflops: float, mfu: float) -> float:
        """Return the hours that both fits take at a fraction `mfu` of `tflops`, 10¹² operations/s per process."""
        return (self.flops + self.control_flops) / (tflops * 1e12 * mfu * self.processes) / 3600


def plan(recipe: Recipe, processes: int = 1) -> Plan:
    """Return what a run of `recipe` will need.

    If the recipe's `bf16` is None, it is decided for this machine, or for CUDA if that is the recipe's device.

    Raises:
        RecipeError: the recipe does not fit the model, or `processes` processes cannot share its batch.
        CheckpointError: the config is not available, or of an unsupported architecture.
    """
    check_shares(recipe, processes)
    config = checkpoint.load_config(recipe.model, recipe.revision)
    context = removal.context_of(recipe, config)
    if recipe.micro_batch == "auto":
        recipe = dataclasses.replace(recipe, micro_batch=1)  # the minimum that a run needs
    on_cuda = recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())
    recipe = dataclasses.replace(recipe, bf16=True) if on_cuda and recipe.bf16 is None else decided(recipe)
    fit = _fit(recipe, config, context, "cuda" if on_cuda else "cpu", removes=True)
    assert recipe.micro_batch != "auto"
    micro_batches = recipe.steps * recipe.batch // recipe.micro_batch
    control_flops = 0.0
    if recipe.control and recipe.control_from is None:
        control_flops = float(_fit(recipe, config, context, "cuda" if on_cuda else "cpu", removes=False).pop("flops"))
    return Plan(
        recipe,
        context,
        processes,
        tokens=recipe.steps * recipe.batch * context,
        flops=float(fit.pop("flops") * micro_batches),
        control_flops=control_flops * micro_batches,
        **fit,
    )


def side_by_side(recipe: Recipe, processes: int = 1) -> dict[str, Plan]:
    """Return, by name, the plan of `recipe` and, if peft is installed, that with low rank instead of all weights.

    If the recipe trains at low rank, the second plan is that with all weights.

    Raises:
        RecipeError, CheckpointError: as in `plan`.
    """
    ranks = [recipe.lora_rank]
    if importlib.util.find_spec("peft") is not None:
        ranks.append(_RANK if recipe.lora_rank is None else None)
    return {
        "all weights" if rank is None else f"rank {rank}": plan(dataclasses.replace(recipe, lora_rank=rank), processes)
        for rank in ranks
    }


def _fit(recipe: Recipe, config: Any, context: int, device: str, removes: bool) -> dict[str, int]:
    """Count the operations and bytes of one micro-batch of a fit: the removal's or the control's."""
    assert recipe.micro_batch != "auto"
    kind: Any = families.family_of(config, recipe.model).model_class
    dtype = torch.bfloat16 if recipe.bf16 else None
    fitted = removes and (recipe.kl_weight or recipe.match_weight)
    matches = bool(removes and recipe.match_weight) and config.num_hidden_layers > 1
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        model, teacher = (removal.ready(kind(config).train(), context) for _ in range(2))
        if dtype is not None:
            cast_matrices(teacher.requires_grad_(False), dtype)
        if recipe.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if removes and recipe.longest_embedding is not None:
            massive_writes.untie(model)
        sites = Sites(model, None, recipe.schedule.classes, recipe.std_mean)
        if recipe.lora_rank is not None:
            from finetune import low_rank

            low_rank.adapt(sites, recipe)
        share_frozen(teacher, model)
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        objective.defer_unembedding(model)
        softcap = objective.softcap_of(model)
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as flops, _Alive() as alive:
            input_ids = torch.zeros(recipe.micro_batch, context, dtype=torch.long)
            own = model(input_ids=input_ids, use_cache=False, output_hidden_states=matches)
            head, original = objective.head_of(model, own.logits), None
            distance = auxiliary = own.logits.new_zeros(())
            if fitted:
                with torch.no_grad():
                    theirs = teacher.base_model(input_ids=input_ids, use_cache=False, output_hidden_states=matches)
                original = objective.head_of(teacher, theirs.last_hidden_state)
                if matches:
                    streams = own.hidden_states[1:-1], theirs.hidden_states[1:-1]
                    distance = objective.residual_distance(*streams, centred=sites.norms[-1].style.centred)
            with torch.autocast("cpu", enabled=False):
                loss = objective.next_token_loss(
                    *(head, input_ids, original, recipe.kl_weight if fitted else 0.0, dtype, None, softcap),
                    at_once=objective.logits_at_once(device, config.vocab_size),
                )
            if removes and recipe.aux_weight:
                auxiliary = objective.auxiliary_loss(sites.norms[-1].live_std, sites.classes.index)
            (loss.total + distance + auxiliary).backward()
    counted = {"flops": flops.get_total_flops()}
    if not removes:
        return counted
    count, trained_count = (sum(parameter.numel() for parameter in those) for those in (parameters, trained))
    own = {_Alive.key(parameter) for parameter in parameters}
    of_teacher = [parameter for parameter in teacher.parameters() if fitted and _Alive.key(parameter) not in own]
    blocks = model.get_submodule(families.family_of(config, recipe.model).blocks).children()
    of_blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    outside = count - sum(of_blocks)
    return counted | {
        "parameters": count,
        "trained": trained_count,
        "weights": 4 * count,
        "gradients": 4 * trained_count,
        "optimizer": 8 * trained_count + 4 * len(trained),
        "teacher": sum(parameter.numel() * parameter.element_size() for parameter in of_teacher),
        "gathered": (12 if fitted else 8) * outside + 12 * max(of_blocks),
        "activations": alive.peak,
    }


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are created in its context, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, and count the tensors that it returns, except for views and tensors that existed before."""
        given = {self.key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and (key := self.key(leaf)) not in given | self._counted:
                storage = leaf.untyped_storage()
                self._counted.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    @staticmethod
    def key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _forget(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.now -= size


def describe(plans: Mapping[str, Plan], tflops: float | None = None, mfu: float = 0.4) -> str:
    """Return a table of plans of one run, with one column per plan. The recipe's own plan comes first.

    For several processes, each plan has two columns, unsharded and sharded. If `tflops` is given, 10¹² operations per
    second and process, the table includes hours.
    """
    first = next(iter(plans.values()))
    columns = {}
    for name, plan in plans.items():
        for shard in [False, True] if plan.processes > 1 else [False]:
            parts = plan.parts(shard)
            parts["total"] = sum(parts.values())
            column = {"trained parameters": f"{plan.trained:,}"}
            column |= {f"{part}, GB": f"{size / 1e9:.3g}" for part, size in parts.items()}
            column |= {"operations": f"{plan.flops:.3g}", "control operations": f"{plan.control_flops:.3g}"}
            if tflops is not None:
                column["hours of training"] = f"{plan.hours(tflops, mfu):.3g}"
            columns[f"{name}, sharded" if shard else name] = column
    table = pd.DataFrame(columns, index=max((list(column) for column in columns.values()), key=len)).fillna("")
    table = table[~table.isin(["0", ""]).all(axis=1)]  # omits the original or the control if there is none
    processes = f"each of {first.processes} processes" if first.processes > 1 else "one process"
    lines = [
        f"{first.recipe.model}: {first.tokens:,} tokens, matrix products in "
        f"{'bfloat16' if first.recipe.bf16 else 'float32'}.",
        f"Memory is that of {processes}, with micro-batches of {first.recipe.micro_batch} × {first.context:,} tokens.",
        "",
        table.to_string(),
        "",
    ]
    others = [plan.recipe.lora_rank for plan in plans.values() if plan is not first]
    lines += [f"Rank {rank} is the same run with --lora-rank {rank}." for rank in others if rank is not None]
    if tflops is None:
        lines.append("For the hours of training, add the speed of a device: --tflops 989 for an H100.")
    else:
        lines.append(f"The hours assume {mfu:.0%} of {tflops:g} TFLOP/s for {processes}.")
    return "\n".join(lines)
