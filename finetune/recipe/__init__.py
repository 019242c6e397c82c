"""Recipes. A recipe is everything that a run needs, typed and validated. It is saved with the run, to be replayed.

Nothing here imports torch, so the command line responds at once.
"""

from finetune.recipe.fields import (
    Direction,
    Gaps,
    Layers,
    Phase,
    Recipe,
    RecipeError,
    Schedule,
    SiteKind,
    StdMean,
    Text,
    TokenClass,
    Training,
    current_name,
)
from finetune.recipe.files import (
    about,
    changed_fields,
    dump,
    load,
    load_pretraining,
    load_run,
    override,
    read_yaml,
    said,
    shipped,
    validate,
    with_text,
)
from finetune.recipe.pretraining import Block, PretrainRecipe

__all__ = [
    "Block",
    "Direction",
    "Gaps",
    "Layers",
    "Phase",
    "PretrainRecipe",
    "Recipe",
    "RecipeError",
    "Schedule",
    "SiteKind",
    "StdMean",
    "Text",
    "TokenClass",
    "Training",
    "about",
    "changed_fields",
    "current_name",
    "dump",
    "load",
    "load_pretraining",
    "load_run",
    "override",
    "read_yaml",
    "said",
    "shipped",
    "validate",
    "with_text",
]
