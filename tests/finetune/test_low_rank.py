"""What trains at low rank, that it is the same function once it is merged, and runs of it."""

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from helpers import finetune, kill_at, read_log, run_forked
from models import random_model, tiny_gpt2
from safetensors.torch import load_file
from test_families_run import compile_quickly
from test_run import KILLED
from test_trainer import assert_close, in_two_processes
from torch import Tensor
from transformers import PreTrainedModel

from finetune import low_rank, objective, remove_norms
from finetune import recipe as recipes
from finetune.checkpoints import checkpoints
from finetune.families import FAMILIES
from finetune.recipe import Recipe, RecipeError
from finetune.removal import fit, set_up
from finetune.removal_trainer import RemovalTrainer
from finetune.sites import Sites

each_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def low(recipe: Recipe) -> Recipe:
    """Low rank, with a teacher."""
    return replace(recipe, lora_rank=2, kl_weight=0.5, match_weight=2.0, control=False)


def adapted(name: str, recipe: Recipe, moved: bool = True) -> tuple[PreTrainedModel, Sites]:
    """A random model and its sites, adapters among them, which are `moved` away from where they start."""
    model = random_model(name, std=0.1)
    sites = Sites(model, None, recipe.schedule.classes)
    low_rank.adapt(sites, recipe)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if moved and ".lora_B." in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, sites


def tokens() -> Tensor:
    return torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(0))


def freeze(sites: Sites, alpha: float | None) -> None:
    """Bring all sites to `alpha`; None: they are constants, and all classes of token merged."""
    for site in sites:
        sites[site].frozen.copy_(torch.tensor([0.9, 1.4, 1.1]))
        sites[site].alpha.fill_(1.0 if alpha is None else alpha)
        sites[site].merged.fill_(float(alpha is None))
    for norm in sites.norms:
        norm.constant = alpha is None and norm.has_readers
        norm.live = alpha == 0 and norm.has_readers


at_each_alpha = pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, None], ids=["live", "half", "frozen", "constant"])


@each_family
@at_each_alpha
def test_every_adapter_and_norm_has_a_gradient_and_nothing_else(name: str, alpha: float | None, low: Recipe):
    model, sites = adapted(name, low)
    freeze(sites, alpha)
    model(tokens()).logits.square().mean().backward()
    with_gradient = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    gains = {norm.weight.data_ptr() for norm in sites.norms} | {
        norm.bias.data_ptr() for norm in sites.norms if norm.bias is not None
    }
    modules = [norm.readers for norm in FAMILIES[name].norms_of(2) if norm.layer is not None]
    of_adapters = 2 * (sum(map(len, modules)) + 2 * len(FAMILIES[name].writers))
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, key
            assert ".lora_" in key or parameter.data_ptr() in gains, key
    assert len(with_gradient) == len(gains) + of_adapters


@each_family
@at_each_alpha
def test_trained_and_merged_are_the_same_function(name: str, alpha: float | None, low: Recipe):
    model, sites = adapted(name, low)
    freeze(sites, alpha)
    names = {key.replace(".base_layer.", ".") for key in model.state_dict() if ".lora_" not in key}
    untrained, its = adapted(name, low, moved=False)
    freeze(its, alpha)
    with torch.no_grad():
        before, trained = untrained(tokens()).logits, model.double()(tokens()).logits
        low_rank.merge(model)
        merged = model(tokens()).logits
    torch.testing.assert_close(merged, trained)
    assert (trained - before).abs().max() > 0.1
    assert {*model.state_dict()} == names


@each_family
def test_at_first_it_is_the_model_as_it_was(name: str, low: Recipe):
    model, sites = adapted(name, low, moved=False)
    freeze(sites, 0.0)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, random_model(name, std=0.1)(tokens()).logits)


def test_a_readers_product_is_not_rounded_in_bf16(low: Recipe):
    model, sites = adapted("llama", replace(low, lora_targets=("readers",)))
    freeze(sites, 0.5)
    logits = []
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits.append(model(tokens()).logits)
        low_rank.merge(model)
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"lora_rank": 0}, {"ln_1", "ln_2", "ln_f"}),
        ({"lora_targets": ("readers",)}, {"ln_1", "ln_2", "ln_f", "c_attn", "c_fc"}),
        ({"lora_targets": ("writers",)}, {"ln_1", "ln_2", "ln_f", "c_proj"}),
        ({"lora_rank": 0, "lora_targets": ("embeddings",)}, {"ln_1", "ln_2", "ln_f", "wte", "wpe"}),
    ],
)
def test_what_trains(settings: dict, trained: set[str], low: Recipe):
    model, _ = adapted("gpt2", replace(low, **settings))
    names = (key.split(".lora_")[0] for key, parameter in model.named_parameters() if parameter.requires_grad)
    parts = {part for name in names for part in name.split(".")}
    assert parts & {"ln_1", "ln_2", "ln_f", "c_attn", "c_fc", "c_proj", "wte", "wpe"} == trained


def test_an_unembedding_of_its_own_trains_with_the_embeddings(low: Recipe):
    model = random_model("llama", tie_word_embeddings=False)
    low_rank.adapt(Sites(model, None), replace(low, lora_rank=0, lora_targets=("embeddings",)))
    assert model.lm_head.weight.requires_grad
    assert model.model.embed_tokens.weight.requires_grad


def test_where_adapters_start_depends_on_the_seed_alone(low: Recipe):
    states = [adapted("gpt2", replace(low, seed=seed), moved=False)[0].state_dict() for seed in (0, 0, 1)]
    (first, again, other) = ([value for key, value in state.items() if ".lora_A." in key] for state in states)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


class TestFit:
    def test_the_optimizer_holds_only_what_trains_and_the_original_stays_as_it_was(
        self, low: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        trainers: list[RemovalTrainer] = []
        made = RemovalTrainer.__init__

        def noted(self: RemovalTrainer, *args, **kwargs) -> None:
            made(self, *args, **kwargs)
            trainers.append(self)

        monkeypatch.setattr(RemovalTrainer, "__init__", noted)
        setup = set_up(low)
        fit(setup, tmp_path, "ln_free", setup.events)

        (trainer,) = trainers
        held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
        moments = trainer.optimizer.state_dict()["state"].values()
        layers, width, rank = 2, 16, low.lora_rank
        matrices = layers * sum(rank * (width + d) for d in (3 * width, width, 4 * width, 4 * width))
        gains = 2 * width * (2 * layers + 1)
        assert sum(state["exp_avg"].numel() for state in moments) == matrices + gains
        assert len(held) == 8 * layers + 2 * (2 * layers + 1)
        blocks = setup.text.held_out[0]["input_ids"][None]
        with torch.no_grad():
            original = objective.head_of(trainer.teacher, trainer.teacher.eval()(blocks).logits)
            logits = original.residual @ original.unembedding.T
            torch.testing.assert_close(logits, setup.model(blocks).logits)

    def test_the_original_shares_what_does_not_train(self, low: Recipe, tmp_path: Path):
        from finetune.removal import _trainer

        setup = set_up(low)
        trainer = _trainer(setup, tmp_path, "ln_free", setup.events)
        own = {parameter.data_ptr() for parameter in trainer.model.parameters()}
        alone = {key for key, parameter in trainer.teacher.named_parameters() if parameter.data_ptr() not in own}
        assert alone == {key for key, _ in trainer.teacher.named_parameters() if ".ln_" in key}

    def test_the_original_keeps_the_writes_that_are_scaled_down(self, low: Recipe, tmp_path: Path):
        from finetune.removal import _trainer

        setup = set_up(replace(low, longest_write=1e-3))
        trainer = _trainer(setup, tmp_path, "ln_free", setup.events)
        writes = {name: weight for name, weight in setup.model.named_parameters() if name.endswith("mlp.c_proj.weight")}
        assert writes
        scaled = {name.replace(".base_layer.", "."): weight for name, weight in trainer.model.named_parameters()}
        for name, weight in trainer.teacher.named_parameters():
            if name in writes:
                assert torch.equal(weight, writes[name])
                assert scaled[name].norm() < 0.5 * weight.norm()

    def test_a_control_differs_from_the_original_by_products_of_that_rank(self, low: Recipe, tmp_path: Path):
        setup = set_up(replace(low, control=True))
        fit(setup, tmp_path, "control", [])
        control, original = load_file(tmp_path / "control/model.safetensors"), setup.model.state_dict()
        for key, weight in control.items():
            change = (weight - original[key]).double()
            if weight.dim() == 2 and ".h." in key:
                singular = torch.linalg.svdvals(change)
                assert singular[low.lora_rank - 1] > 1e-4, key
                assert singular[low.lora_rank] < 1e-6, key
            else:
                assert (change.abs().max() > 0) == (".ln_" in key), key

    @pytest.mark.slow
    def test_killed_and_resumed_equals_uninterrupted(self, low: Recipe, tmp_path: Path):
        whole = remove_norms(recipe=low, out=tmp_path / "whole")
        (tmp_path / "tiny.yaml").write_text(recipes.dump(low))
        killed = partial(kill_at, "finetune.sites.Sites.advance", 13)
        assert run_forked(partial(finetune, "tiny.yaml", "--out", "run", first=killed), tmp_path).code == KILLED
        resumed = run_forked(partial(finetune, "resume", "run"), tmp_path)
        assert resumed.code == 0, resumed.output
        ours, theirs = (load_file(path / "ln_free/model.safetensors") for path in (tmp_path / "run", whole.directory))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    @pytest.mark.slow
    def test_two_processes_equal_one(self, low: Recipe, tmp_path: Path):
        setup = set_up(low)
        fit(setup, tmp_path / "alone", "ln_free", setup.events)
        (tmp_path / "tiny.yaml").write_text(recipes.dump(low))
        ends = in_two_processes(partial(finetune, "tiny.yaml", "--out", "two"), tmp_path)
        assert [end.code for end in ends] == [0, 0], ends
        last = [checkpoints(tmp_path / run / "checkpoints/ln_free")[-1] for run in ("two", "alone")]
        assert_close(*(load_file(path / "model.safetensors") for path in last), 1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("setting", ["gradient_checkpointing", "compile"])
    def test_compiled_and_checkpointed_equal_eager(self, setting: str, low: Recipe, tmp_path: Path):
        low = replace(low, match_weight=0.0)  # hidden states are collected by hooks: more graphs, which take long
        setup = set_up(low)
        fit(setup, tmp_path / "plain", "ln_free", setup.events)
        (tmp_path / "tiny.yaml").write_text(recipes.dump(replace(low, **{setting: True})))
        other = run_forked(partial(finetune, "tiny.yaml", "--out", "other", first=compile_quickly), tmp_path)
        assert other.code == 0, other.output
        for ours, theirs in zip(read_log(tmp_path / "other"), read_log(tmp_path / "plain"), strict=True):
            for part in ("loss", "kl"):
                assert ours[part] == pytest.approx(theirs[part], rel=1e-3, abs=1e-6), (ours["step"], part)


@pytest.mark.slow
def test_a_model_in_memory_and_its_card_say_so(low: Recipe, tokenizer, tmp_path: Path):
    low = replace(low, bf16=True, lora_alpha=3.0, lora_targets=("readers", "embeddings"))
    run = remove_norms(tiny_gpt2(), tokenizer, recipe=low, out=tmp_path / "run")
    card = " ".join((run.directory / "ln_free/README.md").read_text().split())
    assert "products of rank 2, scaled by 1.5, that were added to the weights of readers of the residual stream" in card
    assert "merged with them here, and the embeddings in full - Objective" in card
    assert recipes.load(run.directory / "recipe.yaml").lora_rank == 2


@pytest.mark.slow
def test_command(recipe: Recipe, tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(recipes.dump(recipe))
    flags = ["--lora-rank", "0", "--lora-alpha", "8", "--steps", "12", "--out", "run"]
    end = run_forked(partial(finetune, "run", "tiny.yaml", *flags), tmp_path)
    assert end.code == 0, end.output
    written = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert (written["lora_rank"], written["lora_alpha"]) == (0, 8.0)
    for name in ("ln_free", "control"):
        card = (tmp_path / f"run/{name}/README.md").read_text()
        assert "- Low rank: training changed the norms' gains and biases\n" in card


def test_what_is_missing_is_said_before_anything_is_loaded(low: Recipe, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(RecipeError, match=r"requires peft\. Install it with `pip install 'noln\[lora\]'`"):
        set_up(replace(low, model="not/there"))


def test_a_product_that_is_not_finite_is_not_merged(low: Recipe):
    model, _ = adapted("gpt2", low)
    model.transformer.h[0].mlp.c_fc.lora_B.default.weight.data[0, 0] = torch.inf
    with pytest.raises(low_rank.CheckpointError, match=r"h\.0\.mlp\.c_fc cannot be merged"):
        low_rank.merge(model)
