"""The processes of a run: their number and device, and checks that they can share a batch."""

import dataclasses
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import find_executable_batch_size, gather_object
from accelerate.utils.memory import clear_device_cache

from finetune.errors import NolnError
from finetune.recipe import Recipe, RecipeError, Training
from finetune.text.bins import bin_files

Trains = TypeVar("Trains", bound=Training)

_FSDP = "ACCELERATE_USE_FSDP"
"""The variable that `accelerate launch` sets for a process whose model is to be sharded."""
_PATIENCE = timedelta(hours=4)
"""How long processes wait for each other. One process alone exports and measures the models; NCCL's default is ten
minutes."""


def processes(recipe: Training) -> PartialState:
    """Return the processes of a run. Without an accelerator, they find each other only if told that they use CPUs."""
    on_cpu = recipe.device == "cpu" or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=_PATIENCE)


def decided(recipe: Trains) -> Trains:
    """Return `recipe` with the settings that depend on the machine filled in: bf16, and FSDP of `accelerate`."""
    if isinstance(recipe, Recipe) and os.environ.get(_FSDP, "false").lower() == "true":
        recipe = dataclasses.replace(recipe, shard=True)
    if recipe.bf16 is not None:
        return recipe
    accelerator = torch.accelerator.current_accelerator(check_available=True) if recipe.device != "cpu" else None
    return dataclasses.replace(recipe, bf16=has_bf16("cpu" if accelerator is None else accelerator.type))


def has_bf16(device: str, instructions: tuple[str, ...] = ("amx_bf16", "avx512_bf16")) -> bool:
    """Return whether a device supports matrix products in bfloat16. A CPU needs at least one of these instructions."""
    if device == "cpu":
        # Older versions of torch lack get_capabilities.
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(capabilities.get(name) for name in instructions)
    return device == "cuda" and torch.cuda.is_bf16_supported()


def check_processes(recipe: Training) -> None:
    """Check that the device is available, and that the processes can share a batch.

    Raises:
        RecipeError: the device is not available, or the batch cannot be shared.
    """
    state = processes(recipe)
    os.environ.pop(_FSDP, None)  # accelerate itself would shard differently on GPUs, and not at all on CPUs
    if recipe.device not in ("auto", state.device.type):
        raise RecipeError(f"device is {recipe.device}, but torch finds only {state.device.type} here.")
    check_shares(recipe, state.num_processes)


def check_shares(recipe: Training, processes: int) -> None:
    """Check that this number of processes can share the batch.

    Raises:
        RecipeError: they cannot.
    """
    if processes < 1:
        raise RecipeError(f"The number of processes is {processes}; at least 1 is needed.")
    size = 1 if recipe.micro_batch == "auto" else recipe.micro_batch
    if recipe.batch % (size * processes):
        fitting = [n for n in range(1, size + 1) if recipe.batch % (n * processes) == 0]
        remedy = f"Set micro_batch to {fitting[-1]}" if fitting else "Change batch or the number of processes"
        raise RecipeError(
            f"A batch of {recipe.batch} cannot be shared by {processes} processes in micro-batches of "
            f"{recipe.micro_batch}. {remedy}."
        )


def with_micro_batch(recipe: Trains, attempt: Callable[[int], None]) -> Trains:
    """Return `recipe` with a micro-batch of "auto" replaced by the largest that fits into every process's memory.

    `attempt` takes two steps with a given number of sequences, in this process alone. It may run out of memory.

    Raises:
        RecipeError: not even one sequence fits.
    """
    if recipe.micro_batch != "auto":
        return recipe
    share = recipe.batch // processes(recipe).num_processes
    sizes = iter([size for size in range(share, 0, -1) if share % size == 0] + [0])

    @find_executable_batch_size(starting_batch_size=next(sizes), reduce_batch_size_fn=lambda: next(sizes))
    def largest(size: int) -> int:
        clear_device_cache(garbage_collection=True)  # frees what the error of the last attempt refers to
        attempt(size)
        return size

    try:
        fits = largest()
    except RuntimeError as error:
        if "reached zero" not in str(error):
            raise
        fits = 0
    clear_device_cache(garbage_collection=True)
    if not (fits := min(gather_object([fits]))):
        raise RecipeError(
            "Not even one sequence fits into memory. Set gradient_checkpointing, a smaller context or lora_rank."
        )
    return dataclasses.replace(recipe, micro_batch=fits)


def check_cache(recipe: Training) -> None:
    """Check that the text's tokens can be cached, unless they are streamed or already in nanoGPT's files.

    Raises:
        NolnError: the cache cannot be created or written to.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        if not recipe.text.streaming and not bin_files(recipe.text.source):
            cache.mkdir(parents=True, exist_ok=True)
            if not os.access(cache, os.W_OK):
                raise PermissionError("no permission to write")
    except OSError as error:
        raise NolnError(
            f"The cache {cache} cannot be written to: {error}. Set HF_DATASETS_CACHE to a writable directory."
        ) from error
