import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gpt2
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config

from finetune import checkpoint, plan
from finetune import recipe as recipes
from finetune.__main__ import main
from finetune.recipe import Recipe, RecipeError
from finetune.removal import fit, set_up
from finetune.removal_trainer import RemovalTrainer


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Recipe], dict[str, int]]:
    """Train, and return what was held, and the most that a step had at a time as torch's profiler has it."""

    def measure(recipe: Recipe) -> dict[str, int]:
        found: dict[str, int] = {}
        step, save = RemovalTrainer.training_step, RemovalTrainer._save_checkpoint

        def profiled(self: RemovalTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                loss = step(self, *args, **kwargs)
            now, peak = 0, 0
            for event in profiler.profiler.kineto_results.events():
                if event.name() == "[memory]":
                    peak = max(peak, now := now + event.nbytes())
            gradients = bytes_of(
                parameter.grad for parameter in self.sites.model.parameters() if parameter.grad is not None
            )
            found.update(gradients=gradients, activations=peak - gradients)
            return loss

        def noted(self: RemovalTrainer, *args: Any) -> None:
            states = self.optimizer.state_dict()["state"].values()
            found["weights"] = bytes_of(self.sites.model.parameters())
            found["optimizer"] = bytes_of(tensor for state in states for tensor in state.values())
            own = {parameter.data_ptr() for parameter in self.sites.model.parameters()}
            of_teacher = [] if self.teacher is None else self.teacher.parameters()
            found["teacher"] = bytes_of(parameter for parameter in of_teacher if parameter.data_ptr() not in own)
            save(self, *args)

        monkeypatch.setattr(RemovalTrainer, "training_step", profiled)
        monkeypatch.setattr(RemovalTrainer, "_save_checkpoint", noted)
        setup = set_up(recipe)
        fit(setup, tmp_path, "ln_free", setup.events)
        return found

    return measure


@pytest.mark.parametrize(
    "settings",
    [
        {"aux_weight": 0.1},
        {"kl_weight": 1.0, "match_weight": 10.0, "bf16": True},
        {"kl_weight": 1.0, "gradient_checkpointing": True},
        {"kl_weight": 1.0, "lora_rank": 4},
        {"kl_weight": 1.0, "lora_rank": 4, "bf16": True},
    ],
    ids=["text", "original in bf16", "recomputed", "low rank", "low rank in bf16"],
)
def test_memory_is_what_training_takes(settings: dict[str, Any], recipe: Recipe, tokenizer, measured, tmp_path: Path):
    model = tiny_gpt2(n_embd=64, n_layer=3, n_positions=64)
    checkpoint.save(model, tmp_path / "model", tokenizer)
    recipe = replace(recipe, model=str(tmp_path / "model"), batch=4, micro_batch=4, max_rise=float("inf"), **settings)

    planned, found = plan.plan(recipe), measured(recipe)

    for part in ("weights", "gradients", "optimizer", "teacher"):
        assert getattr(planned, part) == found[part], part
    assert planned.activations == pytest.approx(found["activations"], rel=0.25)
    assert planned.bytes == pytest.approx(sum(found.values()), rel=0.25)
    assert planned.parameters == (planned.trained if "lora_rank" not in settings else found["weights"] // 4)
    assert "lora_rank" in settings or planned.parameters == model.num_parameters()


def test_operations_are_those_of_products(recipe: Recipe, tmp_path: Path):
    """2 a weight and token forward, twice that backward; attention's pairs of tokens; the loss's unembedding too."""
    d, layers, context, vocabulary = 16, 2, 16, 4096
    GPT2Config(n_embd=d, n_layer=layers, n_head=2, n_positions=context, vocab_size=vocabulary).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"architectures": null', '"architectures": ["GPT2LMHeadModel"]'))
    planned = plan.plan(replace(recipe, model=str(tmp_path), kl_weight=1.0))  # no weights are there

    tokens = recipe.steps * recipe.batch * context
    blocks, attention = 2 * 12 * layers * d**2, 2 * 2 * layers * d * context
    head = 2 * d * vocabulary * (context - 1) / context  # the last token predicts none
    assert planned.tokens == tokens
    # Backward, attention's scores are taken once more.
    assert planned.control_flops == pytest.approx(tokens * (3 * blocks + 3.5 * attention + 3 * head), rel=1e-3)
    assert planned.flops == pytest.approx(tokens * (4 * blocks + 4.5 * attention + 4 * head), rel=1e-3)
    assert planned.hours(2e-3, 0.5) == pytest.approx((planned.flops + planned.control_flops) / 1e9 / 3600)


def test_processes_share_the_work(recipe: Recipe):
    one, two = (plan.plan(recipe, processes) for processes in (1, 2))
    assert (one.flops, one.bytes, one.tokens) == (two.flops, two.bytes, two.tokens)
    assert one.hours(1, 1) == 2 * two.hours(1, 1)
    with pytest.raises(RecipeError, match="cannot be shared by 3 processes"):
        plan.plan(recipe, 3)


def test_of_a_sharded_model_each_holds_a_part(recipe: Recipe):
    """And gathers embeddings, final norm and blocks, counted by hand."""
    planned = plan.plan(replace(recipe, kl_weight=1.0), 2)
    model = tiny_gpt2()
    block = sum(parameter.numel() for parameter in model.transformer.h[0].parameters())
    outside = model.num_parameters() - 2 * block
    whole, sharded = (planned.parts(shard) for shard in (False, True))
    assert sharded.pop("gathered") == 4 * (3 * outside + 3 * block)
    assert sharded.pop("activations") == whole.pop("activations")
    assert {name: 2 * size for name, size in sharded.items()} == whole


def test_a_plan_for_cuda_is_in_bf16(recipe: Recipe):
    assert plan.plan(replace(recipe, bf16=None, device="cuda")).recipe.bf16
    assert not plan.plan(replace(recipe, bf16=False, device="cuda")).recipe.bf16


def test_command(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "tiny.yaml").write_text(recipes.dump(recipe))
    main(["plan", str(tmp_path / "tiny.yaml"), "--processes", "2", "--steps", "32", "--tflops", "1e-3", "--no-control"])
    said = capsys.readouterr().out
    assert "each of 2 processes, with micro-batches of 2 × 16 tokens" in said
    assert f"{32 * 4 * 16:,} tokens" in said
    assert "hours" in said
    assert re.search(r"\nweights, GB( +\d\S+){4}\n", said)
    assert re.search(r"\ngathered, GB( +\d\S+){2}\n", said)
    assert "control" not in said
    assert max(map(len, said.splitlines()[1:])) <= 80
    header = " ".join(said.splitlines()[3].split())
    assert header == "all weights all weights, sharded rank 16 rank 16, sharded"
    main(["plan", str(tmp_path / "tiny.yaml"), "--lora-rank", "0", "--no-bf16"])
    said = capsys.readouterr().out
    assert said.splitlines()[3].split() == ["rank", "0", "all", "weights"]
    assert max(map(len, said.splitlines()[1:])) <= 80
    assert not (tmp_path / "runs").exists()
