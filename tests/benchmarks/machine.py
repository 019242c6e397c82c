"""What the benchmarks share: what the machine is, what a process held at its peak, and what matrix products alone take.

Floating-point operations that a training step needs, as `flops_per_token` counts them: 6 · N a token, and
6 · layers · width · context for its attention. N = 12 · layers · width² + vocabulary · width counts the weights of the
linear maps and of the unembedding: each is multiplied once forward and twice backward, and a multiplication comes with
an addition. A token attends to half of the context in the mean, in two products of 2 · width · context / 2 each, once
forward and twice backward. Embeddings, norms, activations, softmax and the optimizer count nothing.
"""

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import GPT2Config

ROOT = Path(__file__).parents[2]
REPEATS = 5
PEAKS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "RTX 4090": 165,
}
"""TFLOP/s of a card in bfloat16, not sparse, as its maker publishes them; the first name that a device's contains."""


def describe(device: str, threads: int | None = None) -> str:
    """Return a line with the device, versions and the commit; `threads` of torch, None: as many as it has here."""
    if device == "cuda":
        hardware = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    else:
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
        threads = torch.get_num_threads() if threads is None else threads
        hardware = f"{model[1] if model else platform.processor()}, threads: {threads}, cores: {os.cpu_count()}"
    packages = ("torch", "transformers", "accelerate", "tokenizers", "datasets")
    versions = ", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return f"{hardware}; {versions}; commit {commit}"


def peak(device: str) -> float:
    """Return the most memory that was held, in MiB: by tensors on CUDA, by this process on a CPU (NaN where unknown).

    Not ru_maxrss, which a process inherits from the one that started it.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) / 2**10 if status.exists() else math.nan


def published_peak(device: str) -> float:
    """Return the FLOP/s that the card's maker publishes for bfloat16; NaN where this file does not know them."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((1e12 * peak for card, peak in PEAKS.items() if card in name), math.nan)


def alone(*command: str | Path, timeout: float | None = None, **environment: str) -> Any:
    """Run Python with `command` in a process of its own; return what the last line of its output is as JSON.

    Raises:
        subprocess.TimeoutExpired: it takes longer than so many seconds.
    """
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=timeout,
        env=os.environ | environment,
    )
    return json.loads(done.stdout.splitlines()[-1])


def markdown(table: pd.DataFrame, index: str) -> str:
    """Return a table as the README of the benchmarks has it, four digits a number."""

    def cell(value: Any) -> str:
        if isinstance(value, str):
            return value
        return "–" if math.isnan(value) else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    rows = [[index, *table.columns], ["---"] * (len(table.columns) + 1)]
    rows += [[str(name), *map(cell, row)] for name, row in zip(table.index, table.to_numpy().tolist(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class Clock:
    """Seconds from mark to mark; on CUDA by the device's own clock, so that nothing waits for the device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.marks: list[Any] = []
        self.used: list[float] = []

    def mark(self) -> None:
        self.used.append(time.process_time())
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds between marks, in order."""
        if not self.cuda:
            return [end - begin for begin, end in zip(self.marks, self.marks[1:], strict=False)]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in zip(self.marks, self.marks[1:], strict=False)]

    def cpu_seconds(self) -> list[float]:
        """Return the seconds that this process's threads computed between marks, however busy the machine is."""
        return [end - begin for begin, end in zip(self.used, self.used[1:], strict=False)]


def flops_per_token(config: GPT2Config, passes: int = 3) -> float:
    """Return the operations a token needs: see above. A forward is 1 pass, a backward 2 more."""
    d, layers = config.n_embd, config.n_layer
    weights = 12 * layers * d**2 + config.vocab_size * d
    return 2 * passes * (weights + layers * d * config.n_positions)


def product_seconds(config: GPT2Config, sequences: int, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Return the seconds of the matrix products of one micro-batch, and nothing else: forward and backward.

    They are those that `flops_per_token` counts: of each layer on operands of its own, as in training, and written to
    memory that is there already. Attention's are batched products with half of the keys, as many as causality leaves.
    """
    d, context, heads = config.n_embd, config.n_positions, config.n_head
    tokens, width = sequences * context, d // heads
    forward, backward = [], []

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    def linear(n_in: int, n_out: int) -> None:
        x, weight, gradient = random(tokens, n_in), random(n_in, n_out), random(tokens, n_out)
        forward.append((x, weight))
        backward.extend([(gradient, weight.T), (x.T, gradient)])

    scores = random(sequences * heads, context, context // 2)
    for _ in range(config.n_layer):
        for n_in, n_out in ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)):
            linear(n_in, n_out)
        queries, gradient = (random(sequences * heads, context, width) for _ in range(2))
        keys, values = (random(sequences * heads, context // 2, width) for _ in range(2))
        forward += [(queries, keys.mT), (scores, values)]
        backward += [(gradient, values.mT), (scores.mT, gradient), (scores, keys), (scores.mT, queries)]
    linear(d, config.vocab_size)
    results: dict[tuple[int, ...], Tensor] = {}
    for one, other in (*forward, *backward):
        shape = (*one.shape[:-1], other.shape[-1])
        if shape not in results:
            results[shape] = random(*shape)

    def seconds(products: list[tuple[Tensor, Tensor]]) -> float:
        clock = Clock(device)
        for _ in range(REPEATS + 2):  # the first two intervals warm up
            clock.mark()
            for one, other in products:
                torch.matmul(one, other, out=results[*one.shape[:-1], other.shape[-1]])
        clock.mark()
        return statistics.median(clock.seconds()[2:])

    return seconds(forward), seconds(backward)
