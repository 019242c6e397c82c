"""Recipes as YAML: loading shipped recipes, the user's and those of earlier runs; overriding fields; writing."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from finetune.names import expanded
from finetune.recipe.fields import Recipe, RecipeError, Text, Training, current_name
from finetune.recipe.pretraining import PretrainRecipe

_Kind = TypeVar("_Kind")
_Training = TypeVar("_Training", bound=Training)

RECIPES = Path(__file__).parents[1] / "recipes"
_FOLDERS: dict[type[Training], Path] = {Recipe: RECIPES, PretrainRecipe: RECIPES / "pretrain"}


def shipped(kind: type[Training] = Recipe) -> list[str]:
    """Return the names of the recipes of the given kind that ship with the package."""
    return sorted(path.stem for path in _FOLDERS[kind].glob("*.yaml"))


def about(name: str, kind: type[Training] = Recipe) -> str:
    """Return the first sentence of a shipped recipe's opening comment."""
    lines = (_FOLDERS[kind] / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("# ") for line in itertools.takewhile(lambda line: line[:1] == "#", lines))
    return re.split(r"(?<=\.) (?=[A-Z])", comment)[0]


def load(name_or_path: str | Path) -> Recipe:
    """Read a recipe, given a shipped name or a YAML file, such as a run's `recipe.yaml`.

    Raises:
        RecipeError: the recipe does not exist or is not YAML, a field is unknown or of the wrong type, or fields
            contradict each other.
    """
    return _load(name_or_path, Recipe)


def load_pretraining(name_or_path: str | Path) -> PretrainRecipe:
    """Read a pretraining recipe, as `load` does."""
    return _load(name_or_path, PretrainRecipe)


def load_run(directory: Path) -> Recipe | PretrainRecipe:
    """Read the recipe of a run of either kind.

    Raises:
        RecipeError: as in `load`, or `directory` is not a run directory.
    """
    path = directory / "recipe.yaml"
    if not path.is_file():
        raise RecipeError(f"{directory} is not a run directory: it does not contain recipe.yaml.")
    return load_pretraining(path) if "block" in read_yaml(path, "recipe") else load(path)


def _load(name_or_path: str | Path, kind: type[_Training]) -> _Training:
    names = shipped(kind)
    given = expanded(name_or_path)
    if str(name_or_path) not in names and not given.exists():
        other = PretrainRecipe if kind is Recipe else Recipe
        command = "pretrain" if kind is Recipe else "run"
        elsewhere = f" {name_or_path} is a recipe of `{command}`." if str(name_or_path) in shipped(other) else ""
        raise RecipeError(
            f"There is no recipe {name_or_path}: name a YAML file or one of {', '.join(names)}.{elsewhere}"
        )
    path = _FOLDERS[kind] / f"{name_or_path}.yaml" if str(name_or_path) in names else given
    content = {"name": path.stem, **read_yaml(path, "recipe")}
    content.pop("run", None)  # what `dump` records about a run: not part of the recipe
    if kind is Recipe and "block" in content:
        raise RecipeError(
            f"The recipe {path} trains a model from random weights. Run it with `python -m finetune pretrain`."
        )
    if kind is PretrainRecipe and "schedule" in content:
        raise RecipeError(f"The recipe {path} removes LayerNorm on a schedule. Run it with `python -m finetune run`.")
    return validate(kind, content, f"recipe {path}")


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read the fields of a YAML file, which error messages call `what`.

    Raises:
        RecipeError: the file cannot be read, or has no fields.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not text, or an invalid date
        raise RecipeError(f"The {what} {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"The {what} {path} has no fields.")
    return content


def validate(kind: type[_Kind], content: dict[str, Any], what: str) -> _Kind:
    """Return `content` as a validated `kind`.

    Raises:
        RecipeError: a field is unknown or of the wrong type, or fields contradict each other.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_python(content)
    except RecipeError as error:
        raise RecipeError(f"The {what} is invalid: {error}") from error
    except pydantic.ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise RecipeError(f"The {what} is invalid: {'; '.join(problems)}") from error


def with_text(recipe: _Training, text: str | Path | Text | None) -> _Training:
    """Return `recipe` with another text: a source, part of which is held out, or a `Text`. None: unchanged.

    A new source also resets the held-out source, column, subset, revision and split, which belong to the old source.
    """
    if isinstance(text, str | Path) and str(text) == recipe.text.source:
        text = None
    if isinstance(text, str | Path):
        text = dataclasses.replace(
            recipe.text, source=str(text), held_out=None, column=None, subset=None, revision=None, split=Text.split
        )
    return recipe if text is None else dataclasses.replace(recipe, text=text)


def override(recipe: Recipe, fields: Mapping[str, Any], what: str) -> Recipe:
    """Return `recipe` with some fields replaced: `fields` maps dotted names, such as `schedule.gap.v`, to YAML values.

    `steps` is applied first and scales the schedule, as `--steps` does.

    Raises:
        RecipeError: as in `validate`. The message calls the result `what`.
    """
    fields = {current_name(str(name)): value for name, value in fields.items()}
    if "steps" in fields:
        if not isinstance(steps := fields["steps"], int):
            raise RecipeError(f"The {what} is invalid: steps is {steps!r}, which is not a whole number.")
        recipe = recipe.scaled(steps)
    content = dataclasses.asdict(recipe)
    for name, value in fields.items():
        *parents, field = name.split(".")
        part: Any = content
        for parent in parents:
            part = part.get(parent) if isinstance(part, dict) else None
        if not isinstance(part, dict) or field not in part:
            raise RecipeError(f"The {what} is invalid: {name} is not a field of a recipe.")
        part[field] = value
    return validate(Recipe, content, what)


def changed_fields(recipe: Training) -> dict[str, Any]:
    """Return the fields of `recipe` that differ from their defaults, as JSON values."""
    return pydantic.TypeAdapter(type(recipe)).dump_python(recipe, mode="json", exclude_defaults=True)


said = changed_fields
"""Its former name."""


def dump(recipe: Training, run: dict[str, Any] | None = None) -> str:
    """Return `recipe` as YAML that `load` reads, with information about a run of it if given."""
    content = dataclasses.asdict(recipe) | ({} if run is None else {"run": run})
    return yaml.safe_dump(_plain(content), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Return `value` with tuples as lists, because YAML does not have tuples."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value
