"""The processes of a run: how many there are, on which device, and whether they can share a batch."""

import torch
from accelerate import PartialState

from finetune.recipe import RecipeError, Training


def processes(recipe: Training) -> PartialState:
    """Return the processes; without an accelerator they know of each other only if they are told that they are CPUs."""
    return PartialState(cpu=recipe.device == "cpu" or not torch.accelerator.is_available())


def check_processes(recipe: Training) -> None:
    """Check that the device is there, and that the processes can share a batch.

    Raises:
        RecipeError: it is not, or they cannot.
    """
    state = processes(recipe)
    if recipe.device not in ("auto", state.device.type):
        raise RecipeError(f"device is {recipe.device}, but what torch finds here is {state.device.type}.")
    if recipe.batch % (recipe.micro_batch * state.num_processes):
        fitting = [n for n in range(1, recipe.micro_batch + 1) if recipe.batch % (n * state.num_processes) == 0]
        remedy = f"micro_batch {fitting[-1]} would do" if fitting else "change batch or the number of processes"
        raise RecipeError(
            f"A batch of {recipe.batch} cannot be shared by {state.num_processes} processes in micro-batches of "
            f"{recipe.micro_batch}: {remedy}."
        )
