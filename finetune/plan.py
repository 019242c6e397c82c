"""What a run will take, from its recipe and its model's config alone: memory, tokens, operations.

One micro-batch is run forward and backward on a model of shapes without numbers (torch's fake tensors), through the
code that trains: every tensor that would be alive is counted, and every product. Nothing is fetched but the config.
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

from finetune import checkpoint, families, objective, removal
from finetune.processes import check_shares, decided
from finetune.recipe import Recipe
from finetune.sites import Sites
from finetune.training import cast_matrices, share_frozen

_RANK = 16
"""The rank that a plan is beside which trains all weights."""
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}
"""What torch's counter of operations does not know."""


@dataclass(frozen=True)
class Plan:
    """What a run will take. Bytes are those of one process, while the LN-free model is trained."""

    recipe: Recipe
    """With `bf16` decided."""
    context: int
    processes: int
    parameters: int
    """Adapters among them."""
    trained: int
    """The parameters that train."""
    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments and, of each parameter, the count of its steps."""
    teacher: int
    """The original, which the model is fitted to; 0 where it is not. Less what it shares with a model of low rank."""
    gathered: int
    """What a process gathers of a sharded model beside its own part, at most: what is in no block, with its gradient,
    and the original's; and two blocks, with the gradient of one."""
    activations: int
    """What else is alive at most in a forward and backward of a micro-batch, compiled or not: a compiled model may take
    less."""
    tokens: int
    """Of each fit, all processes together."""
    flops: float
    """Of the LN-free model's fit: 2 for each product of two numbers, attention's masked half and what is recomputed
    (`gradient_checkpointing`) too."""
    control_flops: float
    """Of the control's fit, 0 without one."""

    @property
    def bytes(self) -> int:
        """All that one process holds, if the model is not sharded."""
        return sum(self.parts(shard=False).values())

    def parts(self, shard: bool) -> dict[str, int]:
        """Return the bytes that one process holds, by what they are of."""
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
        """Return how long both fits take, at `mfu` of `tflops`, 10¹² operations a second of one process."""
        return (self.flops + self.control_flops) / (tflops * 1e12 * mfu * self.processes) / 3600


def plan(recipe: Recipe, processes: int = 1) -> Plan:
    """Return what a run of `recipe` will take.

    A `bf16` that is left to the machine is decided for this one, or for CUDA where the recipe's device is that.

    Raises:
        RecipeError: the recipe does not do for the model, or `processes` cannot share its batch.
        CheckpointError: the config is not available, or of another architecture.
    """
    check_shares(recipe, processes)
    config = checkpoint.load_config(recipe.model, recipe.revision)
    context = removal.context_of(recipe, config)
    if recipe.micro_batch == "auto":
        recipe = dataclasses.replace(recipe, micro_batch=1)  # the least that a run can do with
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
    """Return by name the plan of `recipe`, and beside it those of ways to train the same in less memory, or in more.

    Raises:
        RecipeError, CheckpointError: as `plan`.
    """
    ranks = [recipe.lora_rank]
    if importlib.util.find_spec("peft") is not None:
        ranks.append(_RANK if recipe.lora_rank is None else None)
    return {
        "all weights" if rank is None else f"rank {rank}": plan(dataclasses.replace(recipe, lora_rank=rank), processes)
        for rank in ranks
    }


def _fit(recipe: Recipe, config: Any, context: int, device: str, removes: bool) -> dict[str, int]:
    """Count one micro-batch of a fit, the removal's or the control's."""
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
    """Counts the bytes of tensors that are made while it is on, and are alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, and count what it returns but for views and what was there before."""
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
    """Return plans of one run as a table, the recipe's own first, by the names that they have in `plans`.

    Of several processes, each plan is there twice, whole and sharded. A rate, 10¹² operations a second of one process,
    gives hours too.
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
    table = table[~table.isin(["0", ""]).all(axis=1)]  # without the original or a control, if there is none
    processes = f"each of {first.processes} processes" if first.processes > 1 else "one process"
    lines = [
        f"{first.recipe.model}: {first.tokens:,} tokens, matrix products in "
        f"{'bfloat16' if first.recipe.bf16 else 'float32'}.",
        f"Memory is that of {processes}, in micro-batches of {first.recipe.micro_batch} × {first.context:,} tokens.",
        "",
        table.to_string(),
        "",
    ]
    others = [plan.recipe.lora_rank for plan in plans.values() if plan is not first]
    lines += [f"Rank {rank} is the same run with --lora-rank {rank}." for rank in others if rank is not None]
    if tflops is None:
        lines.append("For the hours of training, give the speed of a device: --tflops 989 for an H100.")
    else:
        lines.append(f"Hours are at {mfu:.0%} of {tflops:g} TFLOP/s of {processes}.")
    return "\n".join(lines)
