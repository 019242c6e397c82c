"""What a run will take, from its recipe and its model's config alone: memory, tokens, operations.

One micro-batch is run forward and backward on a model of shapes without numbers (torch's fake tensors), through the
code that trains: every tensor that would be alive is counted, and every product. Nothing is fetched but the config.
"""

import dataclasses
import math
import weakref
from dataclasses import dataclass
from typing import Any

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
from finetune.training import cast_matrices

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
    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments and, of each parameter, the count of its steps."""
    teacher: int
    """The original, which the model is fitted to; 0 where it is not."""
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
    on_cuda = recipe.device == "cuda" or (recipe.device == "auto" and torch.cuda.is_available())
    recipe = dataclasses.replace(recipe, bf16=True) if on_cuda and recipe.bf16 is None else decided(recipe)
    fit = _fit(recipe, config, context, "cuda" if on_cuda else "cpu", removes=True)
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


def _fit(recipe: Recipe, config: Any, context: int, device: str, removes: bool) -> dict[str, int]:
    """Count one micro-batch of a fit, the removal's or the control's."""
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
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        sites = Sites(model, None, recipe.schedule.classes, recipe.std_mean)
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
    count = sum(parameter.numel() for parameter in parameters)
    blocks = model.get_submodule(families.family_of(config, recipe.model).blocks).children()
    of_blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    outside = count - sum(of_blocks)
    return counted | {
        "parameters": count,
        "weights": 4 * count,
        "gradients": 4 * count,
        "optimizer": 8 * count + 4 * len(parameters),
        "teacher": sum(p.numel() * p.element_size() for p in teacher.parameters()) if fitted else 0,
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
        given = {self._key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and (key := self._key(leaf)) not in given | self._counted:
                storage = leaf.untyped_storage()
                self._counted.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _forget(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.now -= size


def describe(plan: Plan, tflops: float | None = None, mfu: float = 0.4) -> str:
    """Return a plan as it is printed: a rate, 10¹² operations a second of one process, gives hours too."""
    recipe, each = plan.recipe, f"{plan.processes} processes" if plan.processes > 1 else "one process"
    columns = {"": plan.parts(shard=False)} | ({"sharded": plan.parts(shard=True)} if plan.processes > 1 else {})
    for parts in columns.values():
        parts["together"] = sum(parts.values())
    names = [name for name, size in [*columns.values()][-1].items() if size]
    rows = {
        name: [f"{size / 1e9:.3g}" if (size := parts.get(name)) else "" for parts in columns.values()] for name in names
    }
    width = max(map(len, rows))
    lines = [
        f"{recipe.model}: {plan.parameters:,} parameters, products in {'bfloat16' if recipe.bf16 else 'float32'}.",
        f"Memory of {'each of ' if plan.processes > 1 else ''}{each}, in micro-batches of {recipe.micro_batch} × "
        f"{plan.context:,} tokens, GB:",
        *([f"  {'':{width}}  {'whole':>7}  sharded"] if plan.processes > 1 else []),
        *(f"  {name:{width}}  {'  '.join(f'{cell:>7}' for cell in row)}".rstrip() for name, row in rows.items()),
        f"The LN-free model: {plan.tokens:,} tokens, {plan.flops:.3g} operations.",
    ]
    if plan.control_flops:
        lines.append(f"The control: {plan.tokens:,} tokens, {plan.control_flops:.3g} operations.")
    if tflops is not None:
        hours = plan.hours(tflops, mfu)
        lines.append(f"At {mfu:.0%} of {tflops:g} TFLOP/s, {each}: {hours:.3g} hours of training.")
    return "\n".join(lines)
