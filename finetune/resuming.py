"""Resuming an interrupted run of either kind."""

from pathlib import Path

from finetune import pretrain, removal
from finetune.names import expanded
from finetune.recipe import Recipe
from finetune.run_directory import Run, check_links, recipe_of


def resume(directory: str | Path, anyway: bool = False) -> Run:
    """Resume a run of either kind from its newest intact checkpoint. A complete run is only measured again.

    Args:
        directory: the run directory.
        anyway: whether to continue even if the recipe, model or text has changed since the run was started and, if no
            checkpoint is intact, from one that lacks files.

    Raises:
        RecipeError, CheckpointError, TextError, DivergedError: as in `removal.remove_norms`; or no checkpoint is
            intact.
        ChangedError: the recipe, model or text has changed since the run was started.
        InUseError: the run is still running.
    """
    directory = expanded(directory).absolute()
    check_links(directory)
    recipe = recipe_of(directory)
    if isinstance(recipe, Recipe):
        return removal.complete(removal.set_up(recipe), directory, anyway)
    return pretrain.complete(pretrain.set_up(recipe), directory, anyway)
