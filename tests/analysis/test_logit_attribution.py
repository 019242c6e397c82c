from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from contract import TOKENS, assert_keeps_contract, assert_plots_by_model, assert_same, trio
from torch.nn import functional as F

from analysis import load_trio, logit_attribution
from finetune.checkpoint import load, load_tokenizer
from finetune.families import FAMILIES
from finetune.recipe import Gaps, Schedule
from finetune.schedule import resolve
from finetune.sites import Sites

FINAL = "blocks.1.hook_resid_post"
PAIR = (5, 17)


def doubles(make_gpt2):
    """An original and an LN-free model in float64."""
    return {
        name: model.to(torch.float64, print_details=False)
        for name, model in trio(make_gpt2).items()
        if name != "control"
    }


def parts(model, cache):
    """Every component's vectors by label, from the activations."""
    found = {"embed": cache["hook_embed"], "pos_embed": cache["hook_pos_embed"]}
    for layer in range(2):
        for head in range(3):
            z = cache[f"blocks.{layer}.attn.hook_z"][:, :, head]
            found[f"L{layer}H{head}"] = z @ model.W_O[layer, head]
        found[f"L{layer} b_O"] = model.b_O[layer].expand_as(found["embed"])
        found[f"L{layer} MLP"] = cache[f"blocks.{layer}.hook_mlp_out"]
        post = cache[f"blocks.{layer}.mlp.hook_post"]
        for neuron in (0, 13, 47):
            found[f"L{layer}N{neuron}"] = post[:, :, neuron, None] * model.W_out[layer, neuron]
    return found


def target(logits, pair, centre):
    """The number that effects are on, from all logits."""
    if pair is not None:
        return logits[..., pair[0]] - logits[..., pair[1]]
    logits = logits - logits.mean(-1, keepdim=True) if centre else logits
    return logits[:, :-1].gather(-1, TOKENS[:, 1:, None]).squeeze(-1)


def logits_at(model, residual):
    """The logits of a final residual stream, by running the model."""
    return model.run_with_hooks(TOKENS, fwd_hooks=[(FINAL, lambda activation, hook: residual)])


@torch.no_grad()
def by_brute_force(model, pair, centre):
    """Label -> (DLA, direct effect) of each token; the logit."""
    logits, cache = model.run_with_cache(TOKENS)
    final, logit = cache[FINAL], target(logits, pair, centre)
    scale = cache["ln_final.hook_scale"] if model.cfg.normalization_type else 1.0
    found = {}
    for label, c in parts(model, cache).items():
        centred = c - c.mean(-1, keepdim=True) if model.cfg.normalization_type else c
        dla = target(centred / scale @ model.W_U, pair, centre)
        found[label] = dla, logit - target(logits_at(model, final - c), pair, centre)
    found["b_U"] = (target(model.b_U.expand_as(logits), pair, centre),) * 2
    return found, logit


CASES = [(None, True), (None, False), (PAIR, True)]


@pytest.mark.parametrize(("pair", "centre"), CASES)
def test_components_by_brute_force(pair, centre, make_gpt2):
    models = doubles(make_gpt2)
    frame = logit_attribution.measure_components(
        models, TOKENS, pair=pair, centre_unembedding=centre, neurons=True, batch_size=3
    )
    for name, model in models.items():
        expected, logit = by_brute_force(model, pair, centre)
        rows = frame[frame["model"] == name].set_index("label")
        assert set(rows.index[rows["component"] != "neuron"]) == {x for x in expected if "N" not in x} | {
            "logit",
            "residue",
        }
        assert (rows["component"] == "neuron").sum() == 2 * 48
        for label, (dla, effect) in expected.items():
            row = rows.loc[label]
            error = (dla - effect).abs().mean()
            assert row["dla"] == pytest.approx(dla.mean().item(), abs=1e-9)
            assert row["dla_abs"] == pytest.approx(dla.abs().mean().item(), abs=1e-9)
            assert row["dla_max"] == pytest.approx(dla.abs().max().item(), abs=1e-9)
            assert row["direct_effect"] == pytest.approx(effect.mean().item(), abs=1e-9)
            assert row["direct_effect_abs"] == pytest.approx(effect.abs().mean().item(), abs=1e-9)
            assert row["direct_effect_max"] == pytest.approx(effect.abs().max().item(), abs=1e-9)
            assert row["nmae"] == pytest.approx((100 * error / effect.abs().mean()).item(), abs=1e-6)
        assert rows.loc["logit", "dla"] == pytest.approx(logit.mean().item())
        assert rows.loc["residue", "dla_max"] < 1e-9
        assert (rows["tokens"] == logit.numel()).all()
        heads = rows[rows["component"] == "head"]
        assert heads[["layer", "head"]].values.tolist() == [[layer, head] for layer in range(2) for head in range(3)]


@pytest.mark.parametrize(("pair", "centre"), CASES)
def test_a_prompt_by_brute_force(pair, centre, make_gpt2):
    models = doubles(make_gpt2)
    frame = logit_attribution.measure_prompt(
        models, TOKENS[4], pair=pair, centre_unembedding=centre, neurons=True
    ).set_index(["model", "label"])
    for name, model in models.items():
        for label, (dla, effect) in by_brute_force(model, pair, centre)[0].items():
            rows = frame.loc[name, label]
            np.testing.assert_allclose(rows["dla"], dla[4], atol=1e-9)
            np.testing.assert_allclose(rows["direct_effect"], effect[4], atol=1e-9)
            assert rows["position"].tolist() == list(range(len(rows)))
            assert rows["token"].tolist() == [str(token) for token in TOKENS[4].tolist()][: len(rows)]
            expected = [str(token) for token in TOKENS[4, 1:].tolist()] if pair is None else ["5 − 17"] * 11
            assert rows["target"].tolist() == expected


def test_a_pair_does_not_depend_on_centring(make_gpt2):
    models = doubles(make_gpt2)
    one, other = (
        logit_attribution.measure_components(models, TOKENS, pair=PAIR, centre_unembedding=centre)["direct_effect"]
        for centre in (True, False)
    )
    np.testing.assert_allclose(one, other, atol=1e-12)


def test_only_in_the_ln_free_model_attribution_is_exact(make_gpt2):
    frame = logit_attribution.measure(trio(make_gpt2), TOKENS).set_index("model")
    assert (frame["residue_relative"] < 1e-4).all()
    assert frame.loc["ln_free", ["nmae", "nmae_pooled"]].max() < 1e-4
    assert frame.loc["ln_free", "effect_residue_relative"] < 1e-4
    for name in ("original", "control"):
        assert frame.loc[name, ["nmae", "nmae_pooled"]].min() > 0.1
        assert frame.loc[name, "effect_residue_relative"] > 1e-3


def test_the_two_ratios(make_gpt2):
    components = logit_attribution.measure_components(trio(make_gpt2), TOKENS)
    summary = logit_attribution.summarise(components).set_index("model")
    for name, row in summary.iterrows():
        heads = components[(components["model"] == name) & (components["component"] == "head")]
        errors, effects = heads["error_abs"].to_numpy(), heads["direct_effect_abs"].to_numpy()
        assert row["nmae"] == pytest.approx(np.mean([100 * a / b for a, b in zip(errors, effects, strict=True)]))
        assert row["nmae_pooled"] == pytest.approx(100 * errors.mean() / effects.mean())


@torch.no_grad()
def test_micro_and_micro_without_ln():
    micro, tokenizer = load("micro"), load_tokenizer("micro")
    text = "It was the best of times, it was the worst of times, and she said that she would go to the house. " * 30
    tokens = torch.tensor(tokenizer.encode(text))[: 2 * 256].view(2, 256)
    sites = Sites(load("micro"), tokenizer.eos_token_id)
    sites.model(tokens)
    sites.observe()
    sites.update(0.9)
    events = resolve(Schedule(start=1, gap=Gaps()), FAMILIES["gpt2"].sites_of(micro.config.n_layer), steps=2)
    sites.advance(events, 1)
    frame = logit_attribution.measure(load_trio(micro, None, sites.to_plain(), tokenizer), tokens).set_index("model")
    assert frame.loc["original", "nmae"] > 10
    assert frame.loc["ln_free", "nmae"] < 1e-4
    assert (frame["residue_relative"] < 1e-5).all()


@pytest.mark.parametrize("pair", [None, PAIR])
@torch.no_grad()
def test_the_lens_by_brute_force(pair, make_gpt2):
    models = doubles(make_gpt2)
    frame = logit_attribution.measure_lens(models, TOKENS, pair=pair, batch_size=3).set_index(["model", "layer"])
    for name, model in models.items():
        logits, cache = model.run_with_cache(TOKENS)
        streams = [cache["hook_embed"] + cache["hook_pos_embed"], cache["blocks.0.hook_resid_post"], cache[FINAL]]
        assert len(frame.loc[name]) == len(streams)
        for layer, stream in enumerate(streams):
            row, lens = frame.loc[name, layer], logits_at(model, stream)
            loss = F.cross_entropy(lens[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).item()
            assert row["loss"] == pytest.approx(loss, rel=1e-5)
            assert row["logit"] == pytest.approx(target(lens, pair, True).mean().item(), rel=1e-9)
            same = (lens.argmax(-1) == logits.argmax(-1))[:, :-1].double().mean().item()
            assert row["agreement"] == pytest.approx(same)
            variance = stream.var(-1, correction=0) + model.cfg.eps
            scale = variance.sqrt().mean().item() if model.cfg.normalization_type else 1
            assert row["scale"] == pytest.approx(scale)
        assert frame.loc[(name, 2), "agreement"] == 1


@pytest.mark.parametrize(
    "measure",
    [
        logit_attribution.measure,
        partial(logit_attribution.measure_components, neurons=True),
        partial(logit_attribution.measure_components, pair=PAIR),
        logit_attribution.measure_lens,
    ],
    ids=["measure", "components", "pair", "lens"],
)
def test_contract(measure, make_gpt2):
    assert_keeps_contract(measure, make_gpt2)


def test_plots(make_gpt2):
    models = trio(make_gpt2)
    components = logit_attribution.measure_components(models, TOKENS)
    for figure in (
        logit_attribution.plot(logit_attribution.summarise(components)),
        logit_attribution.plot_components(components),
        logit_attribution.plot_lens(logit_attribution.measure_lens(models, TOKENS)),
    ):
        assert_plots_by_model(figure, list(models))
    heads = logit_attribution.plot_heads(components)
    assert [annotation.text for annotation in heads.layout.annotations] == list(models)
    assert heads.data[0].z.shape == (2, 3)


def test_the_residue_in_words():
    frame = pd.DataFrame({"model": ["a", "b"], "residue": [2e-6, 1.0], "effect_residue": [0.34, 3e-9]})
    text = logit_attribution.describe_residue(frame)
    assert "a: 2e-06 by DLA, 0.34 by direct effect; b: 1 by DLA, 3e-09 by direct effect." in text


def test_the_largest_of_a_prompt_come_first(make_gpt2):
    models = trio(make_gpt2)
    frame = logit_attribution.measure_prompt(models, TOKENS[0])
    ordered = logit_attribution.largest_first(frame)
    assert_same(ordered.sort_values(list(ordered.columns)), frame.sort_values(list(frame.columns)))
    assert ordered["position"].is_monotonic_decreasing
    last = ordered[ordered["position"] == 9]
    assert list(last["model"][:3]) == list(models)
    largest = last.groupby("label", sort=False)["dla"].agg(lambda dla: dla.abs().max())
    assert largest.is_monotonic_decreasing
    tokens = " ".join(str(token) for token in TOKENS[0, :-1].tolist())
    assert logit_attribution.describe_prompt(ordered).endswith(f"token: {tokens}; the target: {TOKENS[0, -1]}.")


def test_the_bars_of_a_prompt(make_gpt2):
    models = trio(make_gpt2)
    frame = logit_attribution.measure_prompt(models, TOKENS[0])
    frame["target"] = "</script><b>"
    figure = logit_attribution.plot_prompt(frame)
    assert_plots_by_model(figure, list(models))
    for trace in figure.data:
        logit, *bars = trace.y
        assert logit == pytest.approx(sum(bars), abs=1e-4), "all components are shown, and add up"
    assert "<b>" not in figure.layout.yaxis.title.text
    neurons = logit_attribution.plot_prompt(logit_attribution.measure_prompt(models, TOKENS[0], neurons=True))
    assert len(neurons.data[0].x) == 25
