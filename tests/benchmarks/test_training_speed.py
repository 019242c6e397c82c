"""Seconds a step, tokens a second, use of the machine's matrix rate and peak memory of fine-tuning, by what is trained.

Each variant runs in a process of its own, all of them in turn and then again. The seconds of a step are the median of
a process's steps, of the process that was fastest: what else a machine does only ever adds. On a CPU the model is
`micro`, in batches of 4; on CUDA a GPT-2 of random weights at context 1,024, in bfloat16. Sizes that are
called after a family are models of it of micro's size, of random weights. Tokens are random.

    products   the step's matrix products alone: what the machine could do (see machine.py)
    plain      transformers.Trainer on the untouched model, with the model's own loss
    bare       the same model in a loop of PyTorch alone: fused AdamW, F.cross_entropy, clipping, no log
    published  a re-implementation of the published step, from its description: see `_publish`
    live       our norms, nothing frozen yet: also what the control costs
    frozen     every site frozen, position 0 not merged yet
    constant   everything frozen and merged: the norms are constants
    kl         constant, with the recipe micro's objective: a teacher, its predictions and its residual stream
    low-rank   constant, with adapters of rank 16 that train in place of matrices: the recipe's `lora_rank`

CPU seconds are those that the process's threads computed, which can be compared where other processes use the cores as
well. MFU is the seconds that the step's products take alone over the seconds of the step; `kl` counts its teacher's
forward. `low-rank` takes fewer products, which are not counted.
On a card that `machine.PEAKS` has, "of peak" is the same of the rate that its maker publishes.

`--summary` is what a README needs, in at most eight minutes: on CUDA GPT-2 small, compiled, and XL, eager. What would
take longer is left out of its tables.
All but `published` have the activation function that a run puts in. No dropout anywhere. `published` is never compiled.

`python tests/benchmarks/test_training_speed.py --help` has sizes, variants and lengths to choose from.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from finetune import checkpoint, low_rank, objective, recipe, schedule, training
from finetune.families import FAMILIES
from finetune.removal_trainer import RemovalTrainer
from finetune.sites import Sites
from finetune.text import Blocks

VARIANTS = ("products", "plain", "bare", "published", "live", "frozen", "constant", "kl", "low-rank")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP = 6
RANK = 16
SUMMARY = {
    "cuda": {
        ("small", "compiled"): ("plain", "constant", "kl", "live", "bare", "products"),
        ("xl", "eager"): ("plain", "constant", "kl", "live", "bare", "products"),
    },
    "cpu": {("micro", "eager"): ("plain", "constant", "kl", "live", "bare", "products")},
}
"""By device the sizes and modes of the summary, and their variants, what matters most first."""
SUMMARY_SECONDS = 460


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, and how much of it is measured."""

    shape: dict[str, Any] | None
    """Of a model of random weights; None: the bundled model micro."""
    batch: int
    micro_batch: int
    """Sequences in a step, and in one forward."""
    steps: int = 10
    rounds: int = 3
    family: str = "gpt2"

    @property
    def config(self) -> Any:
        """The config of the model, without dropout."""
        if self.shape is None:
            return checkpoint.load_config("micro")
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0) if self.family == "gpt2" else {}
        return FAMILIES[self.family].model_class.config_class(**self.shape | no_dropout)

    @property
    def variants(self) -> tuple[str, ...]:
        """What is measured of it: the published code and the counted products are GPT-2's."""
        return tuple(v for v in VARIANTS if self.family == "gpt2" or v not in ("products", "published"))


_MICRO = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "intermediate_size": 768,
}
_GATED = _MICRO | {"intermediate_size": 512, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0}
_SHAPES = {
    "gpt_neox": _MICRO,
    "gpt_neo": {name: _MICRO[name] for name in ("vocab_size", "hidden_size", "max_position_embeddings")}
    | {"num_layers": 6, "num_heads": 6, "attention_types": [[["global", "local"], 3]]},
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma", "gemma2"), _GATED),
}
"""Models of the size of micro, by family."""

SIZES = {
    "micro": Size(None, batch=4, micro_batch=4, steps=20, rounds=5),
    "small": Size({"n_embd": 768, "n_layer": 12, "n_head": 12}, batch=64, micro_batch=16),
    "medium": Size({"n_embd": 1024, "n_layer": 24, "n_head": 16}, batch=64, micro_batch=16),
    "xl": Size({"n_embd": 1600, "n_layer": 48, "n_head": 25}, batch=32, micro_batch=4, steps=4, rounds=1),
} | {name: Size(shape, batch=4, micro_batch=4, steps=20, family=name) for name, shape in _SHAPES.items()}


class _PlainTrainer(Trainer):
    published: "_PublishedNorm | None" = None

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        input_ids = inputs["input_ids"]
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        if self.published is None:
            return loss
        special = (input_ids == 0).long()
        special[:, 0] = 1
        return loss + 0.1 * objective.auxiliary_loss(self.published.std.squeeze(-1), special)


class _PublishedNorm(nn.Module):
    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.running = norm.weight, norm.bias, norm.eps, 0.0
        self.std: Tensor

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        self.std = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        self.running = 0.9 * self.running + 0.1 * self.std.mean().item()
        return centred / self.std * self.weight + self.bias


class _PublishedQKV(nn.Module):
    def __init__(self, norm: nn.LayerNorm, c_attn: nn.Module) -> None:
        super().__init__()
        self.qk, self.v, self.c_attn = _PublishedNorm(norm), _PublishedNorm(norm), c_attn

    def forward(self, x: Tensor) -> Tensor:
        qk, v = self.c_attn(self.qk(x)), self.c_attn(self.v(x))
        return torch.cat([qk[..., : 2 * x.shape[-1]], v[..., 2 * x.shape[-1] :]], dim=-1)


def _publish(model: GPT2LMHeadModel) -> "_PublishedNorm":
    """Put in what the published code is said to do at each step before the first freeze; return the last norm.

    Every norm is a module of torch operations that keeps a running mean of its std, read on the host at each forward;
    the QKV product is taken twice, once for each path of `ln_1`; the loss is the model's own, of all logits, and the
    auxiliary loss. Attention itself stays torch's.
    """
    block: Any
    for block in model.transformer.h:
        block.attn.c_attn, block.ln_1 = _PublishedQKV(block.ln_1, block.attn.c_attn), nn.Identity()
        block.ln_2 = _PublishedNorm(block.ln_2)
    last = _PublishedNorm(model.transformer.ln_f)
    model.transformer.ln_f = last  # type: ignore[assignment]
    return last


class Marks(TrainerCallback):
    """Marks the end of every step."""

    def __init__(self, clock: machine.Clock) -> None:
        self.clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.mark()


def make_model(size: Size, fused: bool = True) -> GPT2LMHeadModel:
    """Return the untouched model, without dropout and with the activation function in one kernel, if `fused`."""
    if size.shape is None:
        model = checkpoint.load("micro")
    else:
        with torch.device(DEVICE):
            model = FAMILIES[size.family].model_class(size.config)
        if size.family != "gpt2":
            # Long embeddings give all tokens about one RMS: a random gated model explodes when its norms are constants.
            model.get_input_embeddings().weight.data.normal_()
    model.config.use_cache = False
    if fused:
        training.fuse_gelu(model)
        training.attend_without_masks(model, model.config.max_position_embeddings)
    return model


def make_recipe(size: Size, steps: int, compile: bool = False) -> recipe.Recipe:
    """Return the recipe micro for `steps` steps and a warm-up, without cover: it costs no time."""
    return dataclasses.replace(
        recipe.load("micro"),
        steps=WARM_UP + steps,
        batch=size.batch,
        micro_batch=size.micro_batch,
        warmup=0,
        max_rise=math.inf,
        cover=0.0,
        compile=compile,
    )


def make_text(config: Any, batch: int) -> Blocks:
    """Return random tokens, enough for four steps."""
    context = config.max_position_embeddings
    ids = np.random.default_rng(0).integers(config.vocab_size, size=4 * batch * context)
    return Blocks(ids.astype(np.uint16), context)


def make_events(variant: str, n_layer: int, steps: int, family: str = "gpt2") -> list[schedule.Event]:
    """Return a schedule that is over before the warm-up is, but for what the variant leaves out."""
    begin = recipe.Schedule(start=1, gap=recipe.Gaps())
    events = schedule.resolve(begin, FAMILIES[family].sites_of(n_layer), steps)
    if variant == "frozen":
        return [*events[:-1], dataclasses.replace(events[-1], step=steps)]
    return events if variant in ("constant", "kl", "low-rank") else []


def make_trainer(variant: str, size: Size, settings: recipe.Recipe, directory: Path) -> Trainer:
    """Return what trains a variant, of those that a Trainer trains."""
    model = make_model(size, fused=variant != "published")
    text = make_text(model.config, settings.batch)
    if variant in ("plain", "published"):
        settings = dataclasses.replace(settings, compile=settings.compile and variant == "plain")
        last = _publish(model) if variant == "published" else None
        train: Any = _PlainTrainer(
            model=model,
            args=training.training_arguments(settings, directory),
            train_dataset=training.in_order(text, settings),
        )
        train.published = last
        train.model_accepts_loss_kwargs = False
        train.remove_callback(PrinterCallback)
    else:
        events = make_events(variant, model.config.num_hidden_layers, settings.steps, size.family)
        teacher = make_model(size) if variant == "kl" else None
        sites, log = Sites(model, 0), directory / "log.jsonl"
        if variant == "low-rank":
            settings = dataclasses.replace(settings, lora_rank=RANK)
            low_rank.adapt(sites, settings)
        train = RemovalTrainer(sites, settings, events, text, directory, log, variant, teacher)
    train.args.save_strategy = SaveStrategy.NO
    return train


def _train_bare(size: Size, settings: recipe.Recipe, bf16: bool, clock: machine.Clock) -> None:
    model: Any = make_model(size).to(DEVICE).train()
    text = make_text(model.config, settings.batch)
    blocks = torch.from_numpy(text.blocks.astype(np.int64)).to(DEVICE).split(settings.micro_batch)
    accumulated = settings.batch // settings.micro_batch
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, settings.lr, settings.betas, fused=True)
    if settings.compile:
        model = torch.compile(model)
    for step in range(settings.steps):
        for i in range(accumulated):
            input_ids = blocks[(step * accumulated + i) % len(blocks)]
            with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
                logits = model(input_ids=input_ids, use_cache=False).logits
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
            (loss / accumulated).backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        clock.mark()


def _measure(variant: str, size: Size, compile: bool) -> dict[str, float]:
    """Return seconds a step (the median), peak MiB, and how many graphs were compiled; of products a forward's, too."""
    settings, clock = make_recipe(size, size.steps, compile), machine.Clock(DEVICE)
    with tempfile.TemporaryDirectory() as directory:
        bf16 = training.training_arguments(settings, Path(directory)).bf16
        if variant == "products":
            dtype = torch.bfloat16 if bf16 else torch.float32
            forward, backward = machine.product_seconds(size.config, size.micro_batch, dtype, DEVICE)
            accumulated = size.batch // size.micro_batch
            return {"seconds a step": accumulated * (forward + backward), "forward": accumulated * forward}
        if variant == "bare":
            _train_bare(size, settings, bf16, clock)
        else:
            train = make_trainer(variant, size, settings, Path(directory))
            train.add_callback(Marks(clock))
            train.train()
    return {
        "seconds a step": statistics.median(clock.seconds()[WARM_UP - 1 :]),
        "CPU seconds": statistics.median(clock.cpu_seconds()[WARM_UP - 1 :]),
        "peak MiB": machine.peak(DEVICE),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def _round(command: list[str], variants: Sequence[str], until: float = math.inf) -> pd.DataFrame:
    """Measure every variant once; return a row for each that is measured by `until`, on the monotonic clock."""
    found = {}
    for variant in variants:
        left = until - time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            if left > 0:
                timeout = None if math.isinf(left) else left
                found[variant] = machine.alone(*command, "--alone", variant, timeout=timeout)
    return pd.DataFrame(found).T


def _summarise() -> None:
    """Print the tables of the summary; each half of it has its share of the time."""
    began = time.monotonic()
    for i, ((name, mode), variants) in enumerate(SUMMARY[DEVICE].items(), start=1):
        size = dataclasses.replace(SIZES[name], steps=6, rounds=1)
        command = [__file__, "--size", name, "--mode", mode, "--steps", str(size.steps)]
        found = _round(command, variants, began + SUMMARY_SECONDS * i / len(SUMMARY[DEVICE]))
        _print(found, size, name, mode)


def _print(found: pd.DataFrame, size: Size, name: str, mode: str) -> None:
    print(f"\n{machine.describe(DEVICE)}")
    print(
        f"{name}, {mode}, batch {size.batch}, micro-batch {size.micro_batch}, {size.steps} steps, rounds: {size.rounds}"
    )
    print(machine.markdown(_compare(found, size), "variant") if len(found) else "Nothing was done in time.", flush=True)


def _compare(rounds: pd.DataFrame, size: Size) -> pd.DataFrame:
    """Return the table of what the rounds measured, a row a variant."""
    table = rounds.groupby(level=0, sort=False).min()
    seconds = table["seconds a step"]
    tokens = size.batch * size.config.max_position_embeddings
    found = pd.DataFrame({"seconds a step": seconds})
    for other in ("plain", "bare"):
        found[f"over {other}"] = seconds / seconds.get(other, math.nan)
    if DEVICE == "cpu" and "CPU seconds" in table:
        found["CPU seconds"] = table["CPU seconds"]
        found["over plain, CPU"] = found["CPU seconds"] / found["CPU seconds"].get("plain", math.nan)
    found["tokens a second"] = tokens / seconds
    passes = pd.Series(3.0, found.index).where(found.index != "kl", 4.0).mask(found.index == "low-rank")
    if size.family == "gpt2":
        found["GFLOP/s"] = passes * machine.flops_per_token(size.config, passes=1) * tokens / seconds / 1e9
    if "products" in table.index:
        alone = pd.Series(seconds["products"], found.index)
        found["MFU"] = (alone + table.loc["products", "forward"] * (passes - 3)) / seconds
    if DEVICE == "cuda" and size.family == "gpt2":
        found["of peak"] = found["GFLOP/s"] * 1e9 / machine.published_peak(DEVICE)
    return found.join(table.reindex(columns=["peak MiB", "graphs"]))


def main() -> None:
    usual = ["micro"] if DEVICE == "cpu" else ["small", "medium", "xl"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=usual)
    parser.add_argument("--mode", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    for field in ("batch", "micro_batch", "steps", "rounds"):
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, help="in place of the size's own")
    parser.add_argument("--alone", choices=VARIANTS, help="measure one variant in this process, and print JSON")
    parser.add_argument("--summary", action="store_true", help="what a README needs, in eight minutes")
    options = parser.parse_args()
    if options.summary:
        _summarise()
        return
    own = {name: getattr(options, name) for name in ("batch", "micro_batch", "steps", "rounds")}
    changed = {name: value for name, value in own.items() if value is not None}
    for name in options.size:
        size = dataclasses.replace(SIZES[name], **changed)
        for mode in options.mode:
            if options.alone:
                print(json.dumps(_measure(options.alone, size, mode == "compiled")))
                continue
            numbers = [part for key, value in changed.items() for part in (f"--{key.replace('_', '-')}", str(value))]
            command = [__file__, "--size", name, "--mode", mode, *numbers]
            variants = [variant for variant in options.variant if variant in size.variants]
            _print(pd.concat([_round(command, variants) for _ in range(size.rounds)]), size, name, mode)


def test_training_speed() -> None:
    subprocess.run([sys.executable, __file__], check=True)


def test_the_products_are_the_operations_that_are_counted() -> None:
    """By torch's own count: of the products, and of a model's step, whose attention it counts without causality."""
    config = GPT2Config(n_embd=24, n_layer=2, n_head=3, n_positions=16, vocab_size=50, attn_implementation="eager")
    expected, attention = 2 * 16 * machine.flops_per_token(config), 2 * 16 * 6 * 2 * 24 * 16
    with FlopCounterMode(display=False) as counted:
        machine.product_seconds(config, 2, torch.float32, "cpu")
    assert counted.get_total_flops() == expected * (machine.REPEATS + 2)
    model, input_ids = GPT2LMHeadModel(config), torch.zeros(2, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counted:
        model(input_ids=input_ids).logits.sum().backward()
    assert counted.get_total_flops() == expected + attention


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_no_step_waits_for_the_device() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).cuda()
    training.attend_without_masks(model, 32)  # transformers asks the device whether it may leave a mask away
    sites, events = Sites(model, 0), make_events("constant", n_layer=2, steps=9)
    objective.defer_unembedding(model)
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
    main()
