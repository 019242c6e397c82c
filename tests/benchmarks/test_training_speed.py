"""Seconds a step and peak memory of fine-tuning with our norms, against the same Trainer on the untouched model.

Each variant runs in a process of its own, all of them in turn and then again, so that drift of the machine falls on
all alike. On a CPU the model is `micro`; on CUDA it is a GPT-2 small of random weights at context 1,024, in bfloat16.

    plain      transformers.Trainer on the untouched model
    live       our norms, nothing frozen yet: also what the control costs
    frozen     every site frozen, position 0 not merged yet
    constant   everything frozen and merged: the norms are constants
"""

import dataclasses
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback

from finetune import checkpoint, objective, recipe, schedule, trainer
from finetune.sites import Sites
from finetune.text import Blocks

VARIANTS = ("plain", "live", "frozen", "constant")
WARM_UP, STEPS, ROUNDS = 6, 10, 3


class _PlainTrainer(Trainer):
    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        return model(input_ids=inputs["input_ids"], labels=inputs["input_ids"], use_cache=False).loss


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def _events(variant: str, n_layer: int, steps: int) -> list[schedule.Event]:
    """Return a schedule that is over before the warm-up is, but for what the variant leaves out."""
    begin = recipe.Schedule(start=1, gap=recipe.Gaps())
    events = schedule.resolve(begin, n_layer, steps)
    if variant == "frozen":
        return [*events[:-1], dataclasses.replace(events[-1], step=steps)]
    return events if variant == "constant" else []


def _measure(variant: str, compile: bool) -> dict[str, float]:
    """Return the median seconds of a step, tokens a second, peak memory in MiB, and how many graphs were compiled."""
    cuda = torch.cuda.is_available()
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)) if cuda else checkpoint.load("micro")
    config = model.config
    settings = dataclasses.replace(
        recipe.load("micro"), steps=WARM_UP + STEPS, warmup=0, compile=compile, save_every=10**6, device="auto"
    )
    ids = np.random.default_rng(0).integers(config.vocab_size, size=settings.batch * config.n_positions * 4)
    text = Blocks(ids.astype(np.uint16), config.n_positions)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as directory:
        if variant == "plain":
            train: Trainer = _PlainTrainer(
                model=model,
                args=trainer._arguments(settings, Path(directory)),
                train_dataset=trainer._in_order(text, settings),
            )
            train.model_accepts_loss_kwargs = False
            train.remove_callback(PrinterCallback)
        else:
            events = _events(variant, config.n_layer, settings.steps)
            log = Path(directory) / "log.jsonl"
            train = trainer.RemovalTrainer(Sites(model, 0), settings, events, text, Path(directory), log, variant)
        train.add_callback(clock)
        train.train()
    seconds = statistics.median(np.diff(clock.times)[WARM_UP:])
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:  # not ru_maxrss, which a process inherits from the one that started it
        peak = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 2**10
    return {
        "seconds a step": seconds,
        "tokens a second": settings.batch * config.n_positions / seconds,
        "peak MiB": peak,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_training_speed(compile: bool) -> None:
    command = [sys.executable, __file__, str(int(compile))]
    rows = []
    for _ in range(ROUNDS):
        for variant in VARIANTS:
            done = subprocess.run([*command, variant], stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"variant": variant} | json.loads(done.stdout.splitlines()[-1]))
    table = pd.DataFrame(rows).groupby("variant", sort=False).median()
    table.insert(1, "ratio", table["seconds a step"] / table["seconds a step"]["plain"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{'compiled' if compile else 'eager'}, {device}, torch {torch.__version__}, median of {ROUNDS} rounds")
    print(table.to_string(float_format=lambda number: f"{number:.3f}"))
    assert list(table.index) == list(VARIANTS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_no_step_waits_for_the_device() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).cuda()
    sites, events = Sites(model, 0), _events("constant", n_layer=2, steps=9)
    sites.defer_unembedding()
    input_ids = torch.randint(1000, (2, 32)).cuda()
    try:
        for step in range(9):
            sites.advance(events, step)
            head = objective.Head(model(input_ids=input_ids, use_cache=False).logits, model.lm_head.weight)
            objective.next_token_loss(head, input_ids).total.backward()
            sites.observe()
            sites.update(0.9)
            torch.cuda.set_sync_debug_mode("error")  # not in the first step, which loads the kernels
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[2], compile=bool(int(sys.argv[1])))))
