"""A recipe: everything that a run needs, typed, validated, saved with the run and replayable from that file.

Nothing here imports torch, so that the command line answers at once.
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
