"""The processes of a run: how many there are, on which device, and whether they can share a batch."""

import dataclasses
import os
from pathlib import Path
from typing import TypeVar

import datasets
import torch
from accelerate import PartialState

from finetune.errors import NolnError
from finetune.recipe import RecipeError, Training
from finetune.text.bins import bin_files

Trains = TypeVar("Trains", bound=Training)


def processes(recipe: Training) -> PartialState:
    """Return the processes; without an accelerator they know of each other only if they are told that they are CPUs."""
    return PartialState(cpu=recipe.device == "cpu" or not torch.accelerator.is_available())


def decided(recipe: Trains) -> Trains:
    """Return `recipe` with `bf16`, which it may leave to the machine, decided for this one."""
    if recipe.bf16 is not None:
        return recipe
    accelerator = torch.accelerator.current_accelerator(check_available=True) if recipe.device != "cpu" else None
    return dataclasses.replace(recipe, bf16=has_bf16("cpu" if accelerator is None else accelerator.type))


def has_bf16(device: str, instructions: tuple[str, ...] = ("amx_bf16", "avx512_bf16")) -> bool:
    """Whether a device is made for matrix products in bfloat16: of CPUs, those with any of these instructions."""
    if device == "cpu":
        # Older versions of torch do not tell.
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(capabilities.get(name) for name in instructions)
    return device == "cuda" and torch.cuda.is_bf16_supported()


def check_processes(recipe: Training) -> None:
    """Check that the device is there, and that the processes can share a batch.

    Raises:
        RecipeError: it is not, or they cannot.
    """
    state = processes(recipe)
    if recipe.device not in ("auto", state.device.type):
        raise RecipeError(f"device is {recipe.device}, but what torch finds here is {state.device.type}.")
    check_shares(recipe, state.num_processes)


def check_shares(recipe: Training, processes: int) -> None:
    """Check that so many processes can share the batch.

    Raises:
        RecipeError: they cannot.
    """
    if processes < 1:
        raise RecipeError(f"{processes} processes cannot run anything: at least 1 is needed.")
    if recipe.batch % (recipe.micro_batch * processes):
        fitting = [n for n in range(1, recipe.micro_batch + 1) if recipe.batch % (n * processes) == 0]
        remedy = f"micro_batch {fitting[-1]} would do" if fitting else "change batch or the number of processes"
        raise RecipeError(
            f"A batch of {recipe.batch} cannot be shared by {processes} processes in micro-batches of "
            f"{recipe.micro_batch}: {remedy}."
        )


def check_cache(recipe: Training) -> None:
    """Check that the text's tokens can be cached, unless they are streamed or in nanoGPT's files already.

    Raises:
        NolnError: the cache cannot be made or written to.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        if not recipe.text.streaming and not bin_files(recipe.text.source):
            cache.mkdir(parents=True, exist_ok=True)
            if not os.access(cache, os.W_OK):
                raise PermissionError("no permission to write")
    except OSError as error:
        raise NolnError(
            f"The cache {cache} cannot be written to: {error}. Set HF_DATASETS_CACHE to a directory that can."
        ) from error
