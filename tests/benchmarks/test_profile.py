"""Where the time of a training step goes, by torch.profiler: shares by group, and the operators that take most.

Time is an operator's own (on CUDA that of the kernels it starts), of some eager steps of `constant` and `kl` of
test_training_speed.py, each in a process of its own. A backward operator is in the group of its forward.

    matmul          products of linear maps, of the unembedding and of their gradients
    attention       scaled_dot_product_attention
    activation      the MLPs' activation function
    softmax + loss  the rest of the loss: softmax, cross-entropy, KL, the distance of residual streams
    optimizer       AdamW, and clipping
    norms           the rest of our norms: statistics, and what folds them into the weights
    other           residual sums, embeddings, copies, logging
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import machine
import pandas as pd
import torch
from test_training_speed import DEVICE, SIZES, WARM_UP, make_recipe, make_trainer
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from finetune import objective
from finetune.fake_norm import FakeNorm, NormedReader

VARIANTS = ("constant", "kl")
TOP = 15
GROUPS = (
    ("attention", r"scaled_dot_product|flash_attention|efficient_attention"),
    ("optimizer", r"Optimizer|_foreach_|_fused_adam"),
    ("norms", r"_Normalise"),
    ("matmul", r"^aten::(mm|addmm|bmm|baddbmm)/"),
    ("activation", r"^aten::gelu"),
    ("softmax + loss", r"our loss|_NextTokenLoss"),
    ("norms", r"our norms"),
    ("other", ""),
)
"""The first whose pattern is found in an operator's name, followed by those of what called it."""


class _Window(TrainerCallback):
    """Profiles the steps after the warm-up."""

    def __init__(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
        self.profiler = profile(activities=activities)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM_UP:
            self.profiler.start()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.profiler.stop()


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return call


def _profile(variant: str, size: str, steps: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds a step by group and by operator."""
    window = _Window()
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.multiple(
            objective,
            next_token_loss=_named("our loss", objective.next_token_loss),
            residual_distance=_named("our loss", objective.residual_distance),
        ),
    ):
        train = make_trainer(variant, SIZES[size], make_recipe(SIZES[size], steps), Path(directory))
        for module in train.model.modules():
            if isinstance(module, FakeNorm | NormedReader):
                module.forward = _named("our norms", module.forward)
        train.add_callback(window)
        train.train()

    events = [event for event in window.profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
    forwards = {e.sequence_nr: e for e in events if e.sequence_nr >= 0 and "Backward" not in _callers(e, {})}
    groups: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    for event in events:
        spent = (event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total) / 1000 / steps
        callers = _callers(event, forwards)
        groups[next(group for group, pattern in GROUPS if re.search(pattern, callers))] += spent
        operators[event.name] += spent
    return {"groups": dict(groups), "operators": dict(operators.most_common(TOP))}


def _callers(event: Any, forwards: dict[int, Any]) -> str:
    """Return the names of an operator and of what called it; of a backward operator those of its forward, too."""
    names = ""
    while event is not None:
        names += f"{event.name}/"
        if event.name.startswith("autograd::engine") and event.sequence_nr in forwards:
            return names + _callers(forwards[event.sequence_nr], {})
        event = event.cpu_parent
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="micro" if DEVICE == "cpu" else "small")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--alone", choices=VARIANTS, help="profile one variant in this process, and print JSON")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(_profile(options.alone, options.size, options.steps)))
        return
    command = [__file__, "--size", options.size, "--steps", str(options.steps)]
    found = {variant: machine.alone(*command, "--alone", variant) for variant in VARIANTS}
    table = pd.DataFrame({variant: one["groups"] for variant, one in found.items()}).fillna(0.0)
    table = table.reindex(dict.fromkeys(group for group, _ in GROUPS), fill_value=0.0)
    shares = 100 * table / table.sum()
    print(f"\n{machine.describe(DEVICE)}\n{options.size}, eager, {options.steps} steps")
    table = table.add_suffix(", ms a step").join(shares.add_suffix(", %"))
    print(machine.markdown(table, "group"))
    for variant, one in found.items():
        operators = pd.DataFrame({"ms a step": one["operators"]})
        operators["%"] = 100 * operators["ms a step"] / sum(one["groups"].values())
        print(f"\n{machine.markdown(operators, f'operators of {variant}')}", flush=True)


def test_profile() -> None:
    subprocess.run([sys.executable, __file__], check=True)


if __name__ == "__main__":
    main()
