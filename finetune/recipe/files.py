"""Recipes as YAML: those that ship, those of the user, and those of earlier runs; with other fields, and written."""

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
    """Return the names of the recipes of a kind that ship with the package."""
    return sorted(path.stem for path in _FOLDERS[kind].glob("*.yaml"))


def about(name: str, kind: type[Training] = Recipe) -> str:
    """Return the first sentence of the comment that a shipped recipe begins with."""
    lines = (_FOLDERS[kind] / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("# ") for line in itertools.takewhile(lambda line: line[:1] == "#", lines))
    return re.split(r"(?<=\.) (?=[A-Z])", comment)[0]


def load(name_or_path: str | Path) -> Recipe:
    """Read a recipe: a shipped name or a YAML file, a run's `recipe.yaml` among them.

    Raises:
        RecipeError: there is none, it is no YAML, a field is unknown or of the wrong type, or fields contradict.
    """
    return _load(name_or_path, Recipe)


def load_pretraining(name_or_path: str | Path) -> PretrainRecipe:
    """Read a recipe of pretraining, as `load` does."""
    return _load(name_or_path, PretrainRecipe)


def load_run(directory: Path) -> Recipe | PretrainRecipe:
    """Read the recipe of a run, of whichever kind it is.

    Raises:
        RecipeError: as `load`, or `directory` is no run directory.
    """
    path = directory / "recipe.yaml"
    if not path.is_file():
        raise RecipeError(f"{directory} is no run directory: it holds no recipe.yaml.")
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
    content.pop("run", None)  # what `dump` says of a run, which changes nothing
    if kind is Recipe and "block" in content:
        raise RecipeError(
            f"The recipe {path} trains a block from random weights: `python -m finetune pretrain` takes it."
        )
    if kind is PretrainRecipe and "schedule" in content:
        raise RecipeError(f"The recipe {path} removes LayerNorm on a schedule: `python -m finetune run` takes it.")
    return validate(kind, content, f"recipe {path}")


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read the fields in a YAML file, which the message of an error calls `what`.

    Raises:
        RecipeError: it cannot be read, or holds no fields.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: bytes, or no such date
        raise RecipeError(f"The {what} {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"The {what} {path} holds no fields.")
    return content


def validate(kind: type[_Kind], content: dict[str, Any], what: str) -> _Kind:
    """Return `content` as a `kind`, all fields checked.

    Raises:
        RecipeError: a field is unknown or of the wrong type, or fields contradict.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_python(content)
    except RecipeError as error:
        raise RecipeError(f"The {what} is invalid: {error}") from error
    except pydantic.ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise RecipeError(f"The {what} is invalid: {'; '.join(problems)}") from error


def with_text(recipe: _Training, text: str | Path | Text | None) -> _Training:
    """Return `recipe` with another text: a source, of which a part is held out, or a whole `Text`. None: its own.

    What a recipe holds out, and the column and split to read, go with the source that it names.
    """
    if isinstance(text, str | Path) and str(text) == recipe.text.source:
        text = None
    if isinstance(text, str | Path):
        text = dataclasses.replace(
            recipe.text, source=str(text), held_out=None, column=None, subset=None, revision=None, split=Text.split
        )
    return recipe if text is None else dataclasses.replace(recipe, text=text)


def override(recipe: Recipe, fields: Mapping[str, Any], what: str) -> Recipe:
    """Return `recipe` with `fields` in place of its own: dotted names, `schedule.gap.v`, and values as in YAML.

    `steps` comes first and scales the schedule, as `--steps` does.

    Raises:
        RecipeError: as `validate` does; `what` is what the message calls the result.
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
    """Return the fields in which `recipe` is not what a recipe is by default, as JSON has them."""
    return pydantic.TypeAdapter(type(recipe)).dump_python(recipe, mode="json", exclude_defaults=True)


said = changed_fields
"""Its former name."""


def dump(recipe: Training, run: dict[str, Any] | None = None) -> str:
    """Return `recipe` as YAML that `load` reads, with what there is to say of a run of it."""
    content = dataclasses.asdict(recipe) | ({} if run is None else {"run": run})
    return yaml.safe_dump(_plain(content), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Return `value` with tuples, which YAML lacks, as lists."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value
