"""Taking up a run of either kind where it was cut off."""

from pathlib import Path

from finetune import pretrain, removal
from finetune.recipe import Recipe
from finetune.run_directory import Run, recipe_of


def resume(directory: str | Path) -> Run:
    """Take up a run of either kind where its newest complete checkpoint is; a complete one is only measured again.

    Raises:
        RecipeError, CheckpointError, TextError, DivergedError: as `removal.remove_layernorm`.
        InUseError: it is still running.
    """
    directory = Path(directory).absolute()
    recipe = recipe_of(directory)
    if isinstance(recipe, Recipe):
        return removal.complete(removal.set_up(recipe), directory)
    return pretrain.complete(pretrain.set_up(recipe), directory)
