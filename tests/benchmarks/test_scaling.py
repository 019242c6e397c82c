"""Tokens a second of one training step shared by several processes (started by torchrun): by DDP, or sharded.

With several CUDA devices: the same step on 1, 2, 4, … of them, a process each. Otherwise: on the CPU by gloo, two
processes of one thread against one process of one thread and one of two; that says nothing about GPUs. The step is that
of `constant` in test_training_speed.py, its batch shared by the processes; each row is run in turn, and then again. CPU
seconds and MiB held, of weights and moments, are the first process's.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import machine
import pandas as pd
import torch
from accelerate import PartialState
from test_training_speed import SIZES, WARM_UP, Marks, Size, make_recipe, make_trainer
from torch.distributed.tensor import DTensor
from transformers import Trainer

DEVICES = torch.cuda.device_count()
DEVICE = "cuda" if DEVICES > 1 else "cpu"


def _layouts() -> list[tuple[int, int, bool]]:
    """Return the rows: processes, threads of each on a CPU, and whether the model is sharded."""
    if DEVICE == "cpu":
        return [(1, 1, False), (1, 2, False), (2, 1, False), (2, 1, True)]
    return [(2**i, 1, shard) for i in range(DEVICES.bit_length()) for shard in (False, True)[: i + 1]]


def _shared(size: Size) -> Size:
    """Return the size with a micro-batch for each of the most processes."""
    return dataclasses.replace(size, batch=size.micro_batch * max(processes for processes, *_ in _layouts()))


def _work(size: Size, shard: bool) -> None:
    """Train as one of the processes; the first prints tokens a second, its CPU seconds of a step, and what it holds."""
    state, clock = PartialState(cpu=DEVICE == "cpu"), machine.Clock(DEVICE)
    with tempfile.TemporaryDirectory() as directory:
        settings = dataclasses.replace(make_recipe(size, size.steps), shard=shard)
        train = make_trainer("constant", size, settings, Path(directory))
        train.add_callback(Marks(clock))
        train.train()
        tokens = size.batch * train.model.config.max_position_embeddings
        state.wait_for_everyone()
    if state.is_main_process:
        seconds, used = (statistics.median(each[WARM_UP - 1 :]) for each in (clock.seconds(), clock.cpu_seconds()))
        found = {"tokens a second": tokens / seconds, "CPU seconds a step": used, "MiB held": _held(train)}
        print(json.dumps(found), flush=True)
    state.destroy_process_group()


def _held(train: Trainer) -> float:
    """Return the MiB of weights and moments in this process, of tensors that are sharded its part."""
    moments = [value for of_one in train.optimizer.state.values() for value in of_one.values()]
    tensors = [
        tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in (*train.model.parameters(), *moments)
    ]
    return sum(tensor.nbytes for tensor in tensors) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="micro" if DEVICE == "cpu" else "small")
    parser.add_argument("--steps", type=int, help="in place of the size's own")
    parser.add_argument("--rounds", type=int, help="in place of the size's own")
    parser.add_argument("--work", action="store_true", help="be one of the processes")
    parser.add_argument("--shard", action="store_true", help="with --work: hold a part of the model")
    options = parser.parse_args()
    changed = {name: value for name in ("steps", "rounds") if (value := getattr(options, name)) is not None}
    size = _shared(dataclasses.replace(SIZES[options.size], **changed))
    if options.work:
        _work(size, options.shard)
        return
    worker = [__file__, "--work", "--size", options.size, "--steps", str(size.steps)]
    rounds = []
    for _ in range(size.rounds):
        found = {}
        for processes, threads, shard in _layouts():
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            row = f"{processes} × {threads}{', sharded' if shard else ''}"
            sharded = ["--shard"] * shard
            found[row] = machine.alone(*torchrun, *worker, *sharded, OMP_NUM_THREADS=str(threads))
        table = pd.DataFrame(found).T
        table["over the first"] = table["tokens a second"] / table["tokens a second"].iloc[0]
        rounds.append(table)
    print(f"\n{machine.describe(DEVICE, threads=2)}")
    if DEVICE == "cpu":
        print(f"Scaling over GPUs was not measured: {DEVICES or 'no'} CUDA device{'' if DEVICES == 1 else 's'} here.")
    print(f"{options.size}, eager, batch {size.batch}, {size.steps} steps, {size.rounds} rounds")
    table = pd.concat(rounds).groupby(level=0, sort=False).median()
    print(machine.markdown(table, "processes × threads"), flush=True)


def test_scaling() -> None:
    subprocess.run([sys.executable, __file__], check=True)


if __name__ == "__main__":
    main()
