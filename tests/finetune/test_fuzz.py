"""Anything in a recipe: a plan of a run, or an error in a line. `make fuzz` tries ten times as much as the suite."""

import dataclasses
import math
from typing import Any

import pytest
import yaml
from fuzzing import FUZZ, anything
from hypothesis import given
from hypothesis import strategies as st
from models import random_model

from finetune import families, recipe, schedule
from finetune.errors import NolnError
from finetune.recipe import Recipe, RecipeError
from finetune.removal import context_of

MICRO = yaml.safe_load(recipe.dump(recipe.load("micro")))
FIELDS = sorted(field.name for field in dataclasses.fields(Recipe))
NESTED = {"text": recipe.Text, "schedule": recipe.Schedule}


@st.composite
def changes(draw) -> dict[str, Any]:
    """Up to three fields, some of them a level down, with values at and beyond their limits and of other types."""
    content = yaml.safe_load(yaml.safe_dump(MICRO))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([*FIELDS, *NESTED, "no such field"]))
        if name in NESTED and draw(st.booleans()):
            inner = draw(st.sampled_from([field.name for field in dataclasses.fields(NESTED[name])]))
            if isinstance(content.setdefault(name, {}), dict):
                content[name][inner] = draw(anything)
        else:
            content[name] = draw(anything)
    return content


@FUZZ
@given(changes())
def test_a_recipe_is_a_plan_or_an_error_in_a_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    config = random_model().config
    try:
        made = recipe.load(path)
        events = schedule.resolve(made.schedule, families.family_of(config).sites_of(2), made.steps)
        context = context_of(made, config)
    except NolnError:
        return
    assert 1 <= context <= 11
    assert all(0 <= event.step < made.steps for event in events)
    path.write_text(recipe.dump(made), encoding="utf-8")
    assert repr(recipe.load(path)) == repr(made), "a recipe replays"  # repr: NaN is NaN


@FUZZ
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_bytes_are_no_recipe(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError):
        recipe.load(path)


@pytest.mark.parametrize(
    "text", ["steps: 2000-99-99", "[" * 5000, "steps: *nothing", "? [a]\n: b", "a: !!python/name:os.system"]
)
def test_yaml_that_is_none(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"cannot be read|has no fields"):
        recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("schedule.start", value) for value in (math.inf, math.nan)),
        *(("schedule.gap.qk", value) for value in (math.inf, math.nan)),
        *(("betas", value) for value in ((0.9, 1.0), (-0.1, 0.9), (math.nan, 0.5))),
        *(("seed", value) for value in (-1, 2**32, 10**30)),
        *(("lr", math.inf), ("weight_decay", math.nan), ("schedule.max_gap", math.nan)),
    ],
)
def test_numbers_that_no_run_can_have(field, value):
    with pytest.raises(RecipeError, match=field):
        recipe.override(recipe.load("micro"), {field: value}, "recipe")
