"""Neurons that write massive activations and long embeddings are scaled down, and no others."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from models import random_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from finetune import checkpoint, families, massive_writes
from finetune.plan import plan
from finetune.recipe import Recipe, RecipeError
from finetune.removal import fit, set_up

TOKENS = torch.arange(22).view(2, 11) % 23
LAYERS = 2


def planted(family: str, layer: int, neuron: int, times: float) -> nn.Module:
    """A random model in which one neuron writes `times` as much as it did."""
    model = random_model(family)
    output_weights(model, layer)[neuron] *= times
    return model


def mlp_output(model: nn.Module, layer: int) -> nn.Module:
    """The Linear or Conv1D with which the MLP of a layer writes to the stream."""
    writers = families.family_of(model).writers_of(model.config.num_hidden_layers)
    return model.get_submodule(next(path for at, written, path in writers if (at, written) == (layer, "out")))


def output_weights(model: nn.Module, layer: int) -> torch.Tensor:
    """[d_mlp d_model], a view."""
    paths = [
        path for at, written, path in families.family_of(model).writers_of(LAYERS) if (at, written) == (layer, "out")
    ]
    module = model.get_submodule(paths[0])
    return module.weight.detach() if isinstance(module, Conv1D) else module.weight.detach().T


@torch.no_grad()
def longest_writes(model: nn.Module, layer: int) -> list[float]:
    """The RMS of each neuron's longest write: what the MLP's output changes by when that neuron is silenced."""
    paths = [
        path for at, written, path in families.family_of(model).writers_of(LAYERS) if (at, written) == (layer, "out")
    ]
    seen: dict[str, torch.Tensor] = {}
    module = model.get_submodule(paths[0])
    handle = module.register_forward_hook(lambda _, args, output: seen.update(input=args[0], output=output))
    model.base_model(input_ids=TOKENS, use_cache=False)
    handle.remove()
    found = []
    for neuron in range(seen["input"].shape[-1]):
        silenced = seen["input"].clone()
        silenced[..., neuron] = 0
        found.append((seen["output"] - module(silenced)).square().mean(-1).sqrt().max().item())
    return found


@torch.no_grad()
def median_rms(model: nn.Module, layer: int) -> float:
    """The lower median, over tokens, of the RMS of what a block returns."""
    seen = []
    block = model.get_submodule(f"{families.family_of(model).blocks}.{layer}")
    handle = block.register_forward_hook(
        lambda _, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    model.base_model(input_ids=TOKENS, use_cache=False)
    handle.remove()
    rms = seen[0].square().mean(-1).sqrt().flatten().tolist()
    return sorted(rms)[(len(rms) - 1) // 2]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_neo", "llama", "gemma"])
def test_a_planted_neuron_is_found_and_scaled_to_so_many_medians_of_the_stream(family: str):
    model = planted(family, 1, 7, 1e4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    writes = [longest_writes(model, layer) for layer in range(LAYERS)]
    over_median = writes[1][7] / median_rms(model, 1)
    (found,) = massive_writes.scale_down(model, TOKENS, longest=over_median / 2)
    assert (found.layer, found.neuron) == (1, 7)
    assert found.write == pytest.approx(over_median, rel=1e-3)
    assert found.factor == pytest.approx(0.5, rel=1e-3)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) == 1
    assert longest_writes(model, 0) == writes[0]
    assert longest_writes(model, 1)[7] == pytest.approx(writes[1][7] / 2, rel=1e-3)
    output_weights(model, 1)[7] /= found.factor
    assert all(torch.allclose(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_later_neurons_are_judged_by_the_stream_as_it_becomes():
    model = planted("llama", 0, 3, 1e4)
    output_weights(model, 1)[5] *= 1e4
    behind = median_rms(model, 1)
    found = massive_writes.scale_down(model, TOKENS, longest=0.2)
    assert {(layer, neuron) for layer, neuron, *_ in found} >= {(0, 3), (1, 5)}
    assert longest_writes(model, 1)[5] == pytest.approx(0.2 * behind, rel=1e-3)


def test_a_model_without_massive_writes_stays_as_it_is():
    model = random_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert massive_writes.scale_down(model, TOKENS, longest=1e6) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_post_norms_are_refused():
    with pytest.raises(RecipeError, match="a norm follows each MLP"):
        massive_writes.scale_down(random_model("gemma2"), TOKENS, longest=2.0)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma"])
def test_long_embeddings_are_scaled_to_so_many_medians_of_text(family: str):
    model = random_model(family)
    embedding, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.weight.data[TOKENS[0, 3]] *= 10
    embedding.weight.data[-1] *= 20  # not in the text
    before, unembedded = embedding.weight.detach().clone(), unembedding.weight.detach().clone()
    rms = before.square().mean(-1).sqrt()
    of_text = sorted(rms[TOKENS].flatten().tolist())
    limit = 1.5 * of_text[(len(of_text) - 1) // 2]
    count = massive_writes.scale_down_embeddings(model, TOKENS, longest=1.5)
    after = model.get_input_embeddings().weight.detach()
    scaled = rms > limit
    assert count == scaled.sum() >= 2
    assert after.square().mean(-1).sqrt()[scaled].tolist() == pytest.approx([limit] * count)
    assert torch.equal(after[~scaled], before[~scaled])
    assert torch.cosine_similarity(after, before).min() > 1 - 1e-6
    assert torch.equal(model.get_output_embeddings().weight, unembedded)


@pytest.mark.parametrize("field", ["longest_write", "longest_embedding"])
@pytest.mark.parametrize("longest", [0.0, -1.0, float("inf")])
def test_a_limit_is_a_positive_number(field: str, longest: float, recipe: Recipe):
    with pytest.raises(RecipeError, match=f"{field} is"):
        replace(recipe, **{field: longest})


def test_a_run_unties_scaled_embeddings_in_what_it_trains_alone(recipe: Recipe, tmp_path: Path):
    recipe = replace(recipe, kl_weight=1.0, longest_embedding=0.5, lr=1e-6, min_lr=0.0)
    setup = set_up(recipe)
    assert setup.model.config.tie_word_embeddings
    before = setup.model.get_input_embeddings().weight.detach().clone()
    for name, events in (("control", []), ("ln_free", setup.events)):
        fit(setup, tmp_path, name, events)
    assert torch.equal(setup.model.get_output_embeddings().weight, before)
    control, ln_free = (checkpoint.load(tmp_path / name) for name in ("control", "ln_free"))
    assert control.config.tie_word_embeddings
    assert not ln_free.config.tie_word_embeddings
    assert torch.allclose(control.get_input_embeddings().weight, before, atol=1e-4)
    assert torch.allclose(ln_free.get_output_embeddings().weight, before, atol=1e-4)
    lengths = ln_free.get_input_embeddings().weight.norm(dim=-1) / before.norm(dim=-1)
    assert lengths.median() < 0.7
    assert plan(recipe).parameters == sum(parameter.numel() for parameter in ln_free.parameters())


def test_writes_are_also_measured_behind_special_tokens(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    setup = set_up(replace(recipe, kl_weight=1.0, longest_write=1.0))
    seen = []
    monkeypatch.setattr(massive_writes, "scale_down", lambda model, input_ids, longest: seen.append(input_ids) or [])
    setup.tokenizer.bos_token, setup.tokenizer.eos_token = setup.tokenizer.convert_ids_to_tokens([7, 5])
    fit(setup, tmp_path, "ln_free", setup.events)
    plain, behind_eos, behind_bos = seen[0].chunk(3)
    assert (behind_eos[:, 0] == 5).all()
    assert (behind_bos[:, 0] == 7).all()
    assert torch.equal(behind_eos[:, 1:], plain[:, :-1])
    assert torch.equal(behind_bos[:, 1:], plain[:, :-1])


def test_a_run_says_what_it_scaled_and_leaves_the_original_alone(recipe: Recipe, tmp_path: Path):
    short = replace(recipe, control=False, kl_weight=1.0, longest_write=1e-3)
    setup = set_up(short)
    before = output_weights(setup.model, 0).clone()
    fit(setup, tmp_path, "ln_free", setup.events)
    table = pd.read_csv(tmp_path / "massive_writes.csv")
    assert (table.columns == ["layer", "neuron", "write", "factor"]).all()
    assert len(table) > 10
    assert (table["write"] * table["factor"]).to_numpy() == pytest.approx(1e-3)
    assert torch.equal(output_weights(setup.model, 0), before)
    trained = checkpoint.load(tmp_path / "ln_free")
    assert output_weights(trained, 0).norm() < 0.5 * before.norm()
