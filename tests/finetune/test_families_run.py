"""Runs of models of every family, with all that a recipe has switched on: teacher, cover, QK and V apart, and more."""

import dataclasses
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from helpers import finetune, kill_at, read_log, run_forked
from models import random_model
from safetensors.torch import load_file
from test_run import KILLED
from test_trainer import assert_close, in_two_processes
from transformers import AutoModelForCausalLM, TrainingArguments

from finetune import folding, remove_layernorm, remove_norms, sweep
from finetune import recipe as recipes
from finetune.errors import CheckpointError
from finetune.families import FAMILIES
from finetune.recipe import Gaps, Recipe, RecipeError, Schedule, Text
from finetune.removal import set_up

pytestmark = pytest.mark.slow
each_family = pytest.mark.parametrize("name", FAMILIES)
SOME = ["gpt_neox", "gpt_neo", "gemma2"]
"""Packed head by head and parallel; biases handed on; gated, with post-norms and soft-caps."""


def tiny(name: str, **config):
    positions = "n_positions" if name == "gpt2" else "max_position_embeddings"
    return random_model(name, std=0.2, **{"vocab_size": 4096, positions: 32} | config)


@pytest.fixture(scope="module")
def directory_of(tokenizer, tmp_path_factory):
    """Return the directory of a tiny model of a family, with the tokenizer of micro."""

    def make(name: str) -> Path:
        directory = tmp_path_factory.mktemp("families") / name
        tiny(name).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    made: dict[str, Path] = {}
    return lambda name: made.get(name) or made.setdefault(name, make(name))


@pytest.fixture
def recipe(text: Path) -> Recipe:
    gap = Gaps(mlp=0.5, qk=0.5, v=0.5, attn_out=0.5, mlp_out=0.5, final=1, eot=1)
    return Recipe(
        name="tiny",
        text=Text(source=str(text), held_out_fraction=0.1, prefix="bos"),
        context=16,
        steps=14,
        batch=4,
        micro_batch=2,
        lr=1e-3,
        min_lr=1e-4,
        warmup=2,
        schedule=Schedule(start=2, gap=gap, fade=2),
        kl_weight=0.5,
        match_weight=2.0,
        aux_weight=0.1,
        cover=0.25,
        max_rise=math.inf,  # random models may jump when they freeze
        save_every=4,
        log_every=4,
        device="cpu",
        bf16=False,
    )


@each_family
def test_a_run_leaves_a_norm_free_model_beside_its_control(name, recipe: Recipe, directory_of, tmp_path: Path):
    run = remove_norms(recipe=replace(recipe, model=str(directory_of(name))), out=tmp_path / "run")
    assert list(run.results["model"]) == ["original", "control", "ln_free"] * 2
    assert list(run.results["text"].unique()) == ["held-out", "random-tokens"]
    assert run.results["loss"].map(math.isfinite).all()
    assert folding.norm_state(run.load("ln_free")) == "frozen"
    assert folding.norm_state(run.load("control")) == "live"
    plain = AutoModelForCausalLM.from_pretrained(run.directory / "ln_free")
    assert type(plain).__name__ == FAMILIES[name].architecture
    log = read_log(run.directory, "ln_free")
    assert log[-1]["tokens"] == 14 * 4 * 16
    frozen = {site for line in log for site in line["frozen"]}
    assert {site.name for site in FAMILIES[name].sites_of(2)} <= frozen
    assert log[2]["distance"] > 0
    card = (run.directory / "ln_free/README.md").read_text()
    assert f"{len(FAMILIES[name].sites_of(2))} places" in card
    assert "context 16" in card
    norm, divisor = (
        ("LayerNorm", "standard deviation") if FAMILIES[name].style.centred else ("RMSNorm", "root mean square")
    )
    assert f" without {norm}\n" in card
    assert f"live {divisor} now" in card
    assert f"tags: [{name}, " in card
    assert "the token `bos` precedes each block" in card


@each_family
def test_killed_and_resumed_equals_uninterrupted(name, recipe: Recipe, directory_of, tmp_path: Path):
    recipe = replace(recipe, model=str(directory_of(name)), control=False)
    whole = remove_norms(recipe=recipe, out=tmp_path / "whole")
    (tmp_path / "tiny.yaml").write_text(recipes.dump(recipe))
    killed = partial(kill_at, "finetune.sites.Sites.advance", 10)
    assert run_forked(partial(finetune, "tiny.yaml", "--out", "run", first=killed), tmp_path).code == KILLED
    resumed = run_forked(partial(finetune, "resume", "run"), tmp_path)
    assert resumed.code == 0, resumed.output
    ours, theirs = (load_file(path / "ln_free/model.safetensors") for path in (tmp_path / "run", whole.directory))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in FAMILIES),
        *((name, {"shard": True}) for name in ("gpt_neox", "gemma2")),
        ("gpt2", {"shard": True, "compile": True, "kl_weight": 1.0}),
        *(
            (name, {"shard": True, "gradient_checkpointing": True, "bf16": True, "kl_weight": 1.0})
            for name in ("llama",)
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_two_processes_equal_one(name, settings: dict[str, Any], recipe: Recipe, directory_of, tmp_path: Path):
    recipe = replace(recipe, model=str(directory_of(name)), control=False, **settings)
    alone = remove_norms(recipe=replace(recipe, compile=False), out=tmp_path / "alone")
    (tmp_path / "tiny.yaml").write_text(recipes.dump(recipe))
    first = compile_quickly if recipe.compile else None
    ends = in_two_processes(partial(finetune, "tiny.yaml", "--out", "two", first=first), tmp_path)
    assert [end.code for end in ends] == [0, 0], ends
    ours, theirs = (load_file(path / "ln_free/model.safetensors") for path in (tmp_path / "two", alone.directory))
    assert_close(ours, theirs, 1e-3 if recipe.compile else 1e-5)


def compile_quickly() -> None:
    quickly = partial(TrainingArguments, torch_compile_backend="aot_eager")
    mock.patch("finetune.training.TrainingArguments", quickly).start()


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("setting", ["gradient_checkpointing", "compile"])
def test_compiled_and_checkpointed_equal_eager(name, setting, recipe: Recipe, directory_of, tmp_path: Path):
    recipe = replace(recipe, model=str(directory_of(name)), control=False)
    plain = remove_norms(recipe=recipe, out=tmp_path / "plain")
    (tmp_path / "tiny.yaml").write_text(recipes.dump(replace(recipe, **{setting: True})))
    other = run_forked(partial(finetune, "tiny.yaml", "--out", "other", first=compile_quickly), tmp_path)
    assert other.code == 0, other.output
    # The losses, not the weights: where a gradient is rounding alone Adam makes whole steps of it.
    for ours, theirs in zip(read_log(tmp_path / "other"), read_log(plain.directory), strict=True):
        for part in ("loss", "kl", "cover_kl", "distance", "aux"):
            assert ours[part] == pytest.approx(theirs[part], rel=1e-3, abs=1e-6), (ours["step"], part)


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
def test_a_model_in_memory_of_any_family(name, recipe: Recipe, tokenizer, tmp_path: Path):
    assert remove_layernorm is remove_norms
    model = tiny(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    run = remove_norms(model, tokenizer, recipe=replace(recipe, control=False), out=tmp_path / "run")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert type(run.load("ln_free")) is type(model)


@pytest.mark.parametrize("name", ["gemma2"])
def test_soft_caps_and_dropout_are_as_they_were_in_what_is_exported(name, recipe: Recipe, tokenizer, tmp_path: Path):
    model = tiny(name, attention_dropout=0.3)
    run = remove_norms(model, tokenizer, recipe=replace(recipe, control=False), out=tmp_path / "run")
    config = run.load("ln_free").config
    assert config.final_logit_softcapping == model.config.final_logit_softcapping == 30.0
    assert config.attn_logit_softcapping == 50.0
    assert config.attention_dropout == 0.3
    assert read_log(run.directory)[0]["kl"] == pytest.approx(0, abs=1e-5)  # no dropout in training


@pytest.mark.parametrize("name", SOME)
def test_a_sweep_is_scored_on_texts_with_the_prefix(name, recipe: Recipe, directory_of, text: Path, tmp_path: Path):
    base = tmp_path / "base.yaml"
    base.write_text(recipes.dump(replace(recipe, model=str(directory_of(name)), control=False)))
    file = tmp_path / "sweep.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "recipe": str(base),
                "seeds": [0],
                "set": {"text.held_out_blocks": 3},
                "grid": {"cover": [0.0, 0.5]},
                "texts": {"same": str(text), "random": "random-tokens"},
            }
        )
    )
    table = sweep.run(file, tmp_path / "out")
    assert len(table) == 2
    losses = table[["loss_ln_free_same", "loss_ln_free_random"]]
    assert losses.map(math.isfinite).all(axis=None)
    assert losses.nunique().gt(1).all()  # cover changes what is trained


def test_context(recipe: Recipe, directory_of):
    recipe = replace(recipe, model=str(directory_of("llama")))
    assert set_up(replace(recipe, context=None)).text.train.context == 32
    with pytest.raises(RecipeError, match="context is 33, but the model has only 32 positions"):
        set_up(replace(recipe, context=33))
    with pytest.raises(RecipeError, match="context is 1; at least 2"):
        replace(recipe, context=1)


def test_a_format_that_a_family_cannot_have_is_refused_before_anything_is_trained(recipe: Recipe, directory_of):
    with pytest.raises(CheckpointError, match=r"q_proj has no bias.*Use b25"):
        set_up(replace(recipe, model=str(directory_of("gpt_neo")), export_format="h24"))


def test_shipped_recipes_of_families_leave_the_context_to_the_model():
    """A recipe that names its model may set a context. SmolLM2's is 8,192, which no laptop trains on."""
    left = {name: recipes.load(name).context for name in recipes.shipped() if name != "smollm2-135m"}
    assert set(left.values()) == {None}


def test_a_stream_too_long_for_the_frozen_form_is_refused_by_its_site(recipe: Recipe, tokenizer, tmp_path: Path):
    """The embeddings alone are some 2e4 long: √(σ² + 1e12) would be 2e-4 off the constant."""
    model = tiny("llama")
    model.get_input_embeddings().weight.data *= 1e5
    recipe = replace(recipe, control=False, kl_weight=1.0, match_weight=0.0, aux_weight=0.0, lr=1e-9, min_lr=0.0)
    with pytest.raises(CheckpointError, match=r"At h\.0\.qk a live std or RMS is .*e\+04. This is too close"):
        remove_norms(model, tokenizer, recipe=recipe, out=tmp_path / "run")
    assert not (tmp_path / "run/ln_free").exists()


def test_every_field_of_the_fixture_is_on(recipe: Recipe):
    """Nothing that a family has to support is at the value that switches it off."""
    off = {field.name for field in dataclasses.fields(recipe) if getattr(recipe, field.name) == 0.0}
    assert not off & {"kl_weight", "match_weight", "aux_weight", "cover"}
