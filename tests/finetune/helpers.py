"""Runs in processes that may be killed, forked from a server that has torch imported already."""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from finetune.__main__ import main
from finetune.families import FAMILIES, Site
from finetune.recipe import PretrainRecipe, Text

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["finetune.removal"])


def gpt2_sites(n_layer: int) -> list[Site]:
    """The sites of a GPT-2 of `n_layer` layers."""
    return FAMILIES["gpt2"].sites_of(n_layer)


def read_log(directory: Path, model: str | None = None) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if model in (None, line["model"])]


class Finished(NamedTuple):
    code: int
    """The exit code; the negative signal that ended it."""
    output: str
    """What it wrote to stdout and stderr."""


def run_forked(function: Callable[[], None], cwd: Path, environment: dict[str, str] | None = None) -> Finished:
    """Call `function`, which must be importable, in a process of its own."""
    return run_all_forked([(function, environment or {})], cwd)[0]


def run_all_forked(calls: Sequence[tuple[Callable[[], None], dict[str, str]]], cwd: Path) -> list[Finished]:
    """Call functions in processes of their own, all at once, each with its additions to the environment."""
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory) / str(i) for i in range(len(calls))]
        processes = [
            _context.Process(target=_call, args=(function, environment, cwd, output))
            for (function, environment), output in zip(calls, outputs, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=100)
            process.kill()
            process.join()
        return [Finished(p.exitcode, o.read_text()) for p, o in zip(processes, outputs, strict=True)]


def _call(function: Callable[[], None], environment: dict[str, str], cwd: Path, output: Path) -> None:
    os.chdir(cwd)
    os.environ |= environment
    torch.set_num_threads(1)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # What the interpreter does with a script's exit, but for the slow tidying up.
    try:
        function()
        code: Any = 0
    except SystemExit as error:
        code = error.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def keep_checkpoints() -> None:
    """Have the checkpoints of finished fits stay, for tests to see all of what training came to."""
    for module in ("removal", "pretrain"):
        mock.patch(f"finetune.{module}.discard").start()


def finetune(*arguments: Any, first: Callable[[], None] | None = None) -> None:
    """Do `first`, then what `python -m finetune ARGUMENTS` does, and keep the checkpoints."""
    keep_checkpoints()
    if first is not None:
        first()
    main([str(argument) for argument in arguments])


def kill_at(target: str, call: int, first: Callable[..., None] | None = None) -> None:
    """Have this process killed by its `call`-th call (from 1) of `target`, or after `first` with its arguments."""

    def kill(*args: Any, **kwargs: Any) -> None:
        if first is not None:
            first(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    at_call(target, call, kill)


def at_call(target: str, call: int, act: Callable[..., None]) -> None:
    """Have `act` called with the arguments of the `call`-th call (from 1) of `target`, before it."""
    calls = 0
    original: Callable[..., Any]

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            act(*args, **kwargs)
        return original(*args, **kwargs)

    patch = mock.patch(target, patched)
    original, _ = patch.get_original()
    patch.start()


def pretrain_recipe(text: Path) -> PretrainRecipe:
    """Twelve steps on twelve blocks of text, again and again, with checkpoints at 5, 10 and 12."""
    return PretrainRecipe(
        name="tiny",
        text=Text(source=str(text), held_out_fraction=0.1, train_blocks=12),
        steps=12,
        batch=4,
        micro_batch=2,
        lr=1e-2,
        min_lr=1e-3,
        warmup=2,
        n_layer=2,
        n_embd=16,
        n_head=2,
        n_positions=16,
        save_every=5,
        log_every=4,
        device="cpu",
        bf16=False,
    )
