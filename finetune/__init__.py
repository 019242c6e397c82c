"""Fine-tune the norms out of a model, or train one without them from the start.

`remove_norms` fine-tunes a model as a `Recipe` specifies, and returns a `Run`. The submodules: `recipe` reads and
writes recipes, `text` packs any text, `checkpoint` reads and writes LN-free models, `evaluate` measures models on
held-out text, `sweep` does many runs, `blocks` contains models that need no norms, and `pretrain` trains them:
`pretrain.pretrain` runs a `PretrainRecipe`. Errors that a user can fix are raised as a `NolnError`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.errors import NolnError
    from finetune.recipe import Gaps, Layers, PretrainRecipe, Recipe, Schedule, Text
    from finetune.removal import remove_layernorm, remove_norms
    from finetune.resuming import resume
    from finetune.run_directory import Run

__all__ = [
    "Gaps",
    "Layers",
    "NolnError",
    "PretrainRecipe",
    "Recipe",
    "Run",
    "Schedule",
    "Text",
    "remove_layernorm",
    "remove_norms",
    "resume",
]

_HOMES = dict.fromkeys(("Gaps", "Layers", "PretrainRecipe", "Recipe", "Schedule", "Text"), "recipe") | {
    "NolnError": "errors",
    "Run": "run_directory",
    "remove_layernorm": "removal",
    "remove_norms": "removal",
    "resume": "resuming",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package does not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"finetune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List public names that are not imported yet, too, so that `python -m pydoc finetune` shows them."""
    return sorted({*globals(), *__all__})
