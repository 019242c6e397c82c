"""Fine-tune the LayerNorm out of a GPT-2-type model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.recipe import Recipe, Schedule, Text
    from finetune.run import Run, remove_layernorm, resume

__all__ = ["NolnError", "Recipe", "Run", "Schedule", "Text", "remove_layernorm", "resume"]

_HOMES = {"Recipe": "recipe", "Schedule": "recipe", "Text": "recipe"} | dict.fromkeys(
    ("Run", "remove_layernorm", "resume"), "run"
)


class NolnError(Exception):
    """Something that the user can mend: the message says what is wrong, where, and what to do."""


def __getattr__(name: str) -> Any:
    """Import public names when they are asked for: importing the package loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"finetune.{_HOMES[name]}"), name)
