"""Pre-training of transformers' own models, of every family."""

import re
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from helpers import finetune, kill_at, pretrain_recipe, read_log, run_forked
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from finetune import folding, remove_norms
from finetune import recipe as recipes
from finetune.families import FAMILIES
from finetune.pretrain import pretrain, set_up
from finetune.recipe import PretrainRecipe, Recipe, RecipeError

KNOBS = {
    "gpt2": {"n_inner": 24},
    "gpt_neo": {"intermediate_size": 24, "window_size": 8},
    "gpt_neox": {"intermediate_size": 24, "tie_word_embeddings": True},
    "gemma": {"head_dim": 6},
    "gemma2": {"head_dim": 6, "final_logit_softcapping": 5.0},
}
GATED = {"intermediate_size": 24, "num_key_value_heads": 1}
each_family = pytest.mark.parametrize("family", FAMILIES)


def of_family(recipe: PretrainRecipe, family: str) -> PretrainRecipe:
    knobs = KNOBS.get(family, {}) | ({} if family.startswith("gpt") else GATED)
    return replace(recipe, family=family, knobs=knobs)


@pytest.fixture(scope="module")
def recipe(text: Path) -> PretrainRecipe:
    return replace(pretrain_recipe(text), steps=24, save_every=8)


@each_family
def test_an_ordinary_model_of_its_family_learns(family: str, recipe: PretrainRecipe, tmp_path: Path):
    recipe = of_family(recipe, family)
    run = pretrain(recipe, out=tmp_path / "run")
    model, info = AutoModelForCausalLM.from_pretrained(run.directory / "model", output_loading_info=True)
    assert not any(info.values()), info
    config = model.config
    assert type(model).__name__ == FAMILIES[family].architecture
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 16, 2)
    assert (config.max_position_embeddings, config.vocab_size, config.use_cache) == (16, 4096, True)
    assert all(getattr(config, name) == value for name, value in recipe.knobs.items())
    assert not any(value for name, value in vars(config).items() if "drop" in name)
    ids = torch.from_numpy(set_up(recipe).text.held_out.blocks.astype("int64"))
    with torch.no_grad():
        loss = F.cross_entropy(model.eval()(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert run.results["loss"][0] == pytest.approx(loss, rel=1e-5)
    log = read_log(run.directory)
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    card = (run.directory / "model/README.md").read_text()
    assert f"# tiny: a `{FAMILIES[family].architecture}`\n" in card
    assert "removes its norms" in card


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_killed_and_resumed_equals_uninterrupted(family: str, recipe: PretrainRecipe, tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(recipes.dump(of_family(recipe, family)))
    whole = pretrain(of_family(recipe, family), out=tmp_path / "whole")
    killed = partial(kill_at, "finetune.pretrain.PretrainTrainer.compute_loss", 2 * 20 + 1)
    assert run_forked(partial(finetune, "pretrain", "tiny.yaml", "--out", "run", first=killed), tmp_path).code == (
        -signal.SIGKILL
    )
    resumed = run_forked(partial(finetune, "resume", "run"), tmp_path)
    assert resumed.code == 0, resumed.output
    ours, theirs = (load_file(run / "model/model.safetensors") for run in (tmp_path / "run", whole.directory))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_what_was_trained_loses_its_norms(recipe: PretrainRecipe, text: Path, tmp_path: Path):
    model = pretrain(of_family(recipe, "llama"), out=tmp_path / "pretrained").directory / "model"
    removal = replace(
        recipes.load("micro").scaled(20), bf16=False, control=False, batch=4, micro_batch=4, cover=0.0, text=recipe.text
    )
    run = remove_norms(model, recipe=removal, out=tmp_path / "run")
    assert isinstance(removal, Recipe)
    assert folding.norm_state(run.load("ln_free")) == "frozen"
    assert run.load("ln_free").config.use_cache


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "bert"}, "family is bert; it must be one of gpt2, "),
        ({"family": "llama", "block": "op"}, "family is llama, but block is op"),
        ({"family": "llama", "knobs": {"n_inner": 3}}, "knobs contains n_inner, which LlamaConfig does not have"),
        ({"family": "llama", "knobs": {"hidden_size": 32}}, r"knobs contains hidden_size\. Set n_layer, n_embd"),
        ({"family": "gpt2", "knobs": {"n_ctx": 32}}, "knobs contains n_ctx"),
        ({"family": "llama", "n_head": 3}, r"(?s)A LlamaConfig cannot be created from this recipe: .*multiple"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str, recipe: PretrainRecipe):
    with pytest.raises(RecipeError, match=message):
        set_up(replace(recipe, **change))


@pytest.mark.parametrize("name", ["micro-llama", "micro-neox"])
def test_shipped_recipes_have_the_shape_of_micro(name: str):
    recipe = recipes.load_pretraining(name)
    assert (recipe.n_layer, recipe.n_embd, recipe.n_positions, recipe.tokenizer) == (6, 192, 256, "micro")
    own = yaml.safe_load((Path(recipes.__file__).parents[1] / f"recipes/pretrain/{name}.yaml").read_text())
    assert re.fullmatch("llama|gpt_neox", own["family"])
    model = set_up(replace(recipe, text=replace(recipe.text, source="books-report", train_blocks=4))).model
    assert 3e6 < sum(parameter.numel() for parameter in model.parameters()) < 4.5e6
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name == "micro-llama")
