"""Taking up a run of either kind where it was cut off."""

from pathlib import Path

from finetune import pretrain, removal
from finetune.names import expanded
from finetune.recipe import Recipe
from finetune.run_directory import Run, check_links, recipe_of


def resume(directory: str | Path, anyway: bool = False) -> Run:
    """Take up a run of either kind where its newest whole checkpoint is; a complete one is only measured again.

    Args:
        directory: the run directory.
        anyway: whether to go on with another recipe, model or text than the run was begun with, and from a checkpoint
            that lacks files if none is whole.

    Raises:
        RecipeError, CheckpointError, TextError, DivergedError: as `removal.remove_norms`; no checkpoint is whole.
        ChangedError: the recipe, the model or the text is not what the run was begun with.
        InUseError: it is still running.
    """
    directory = expanded(directory).absolute()
    check_links(directory)
    recipe = recipe_of(directory)
    if isinstance(recipe, Recipe):
        return removal.complete(removal.set_up(recipe), directory, anyway)
    return pretrain.complete(pretrain.set_up(recipe), directory, anyway)
