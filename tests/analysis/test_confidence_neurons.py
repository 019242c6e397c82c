from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from contract import EOT, TL4, TOKENS, TOOLS, Peak, assert_keeps_contract, assert_plots_by_model, assert_same, trio
from scipy.stats import entropy

from analysis import confidence_neurons, load_bridge, load_trio
from finetune.errors import NolnError
from finetune.families import FAMILIES
from finetune.recipe import Gaps, Schedule
from finetune.schedule import resolve
from finetune.sites import Sites

NEURONS = [7, 0, 31]
NULL = torch.tensor([1.0, -1.0] + [0.0] * 10) * 5
"""A direction that the unembedding of `with_confidence_neuron` does not see."""


def remove_layernorm(model):
    """Return `model` with every norm frozen, at the stds that it has on `TOKENS`."""
    sites = Sites(model, EOT)
    events = resolve(Schedule(start=2, gap=Gaps()), FAMILIES["gpt2"].sites_of(model.config.n_layer), steps=4)
    for step in range(4):
        sites.advance(events, step)
        model(TOKENS)
        sites.observe()
        sites.update(0.9)
    return sites.to_plain()


def with_confidence_neuron(model, neuron):
    model.transformer.ln_f.weight.data[:2] = 1
    model.lm_head.weight.data[:, 1] = model.lm_head.weight.data[:, 0]
    model.transformer.h[-1].mlp.c_proj.weight.data[neuron] = NULL
    return model


def test_contract(make_gpt2):
    assert_keeps_contract(partial(confidence_neurons.measure, neurons=NEURONS), make_gpt2)


@pytest.mark.parametrize("measure", [confidence_neurons.measure_neurons, confidence_neurons.measure_spectrum])
def test_contract_of_weights(measure, make_gpt2):
    models = trio(make_gpt2)
    frame = measure(models, NEURONS)
    assert list(frame["model"].unique()) == list(models)
    assert_same(measure({"ln_free": models["ln_free"]}, NEURONS), frame[frame["model"] == "ln_free"])
    if not TL4:
        assert_same(measure(trio(make_gpt2, "hooked"), NEURONS), frame)


def test_neurons_against_a_loop(make_gpt2):
    model = load_bridge(make_gpt2())
    frame = confidence_neurons.measure_neurons({"m": model}, NEURONS)
    W_out, W_U = (x.detach().double().numpy() for x in (model.blocks[-1].mlp.W_out, model.W_U))
    for i, row in enumerate(frame.itertuples()):
        norm = np.sqrt(sum(w**2 for w in W_out[i]))
        cosines = [W_U[:, v] @ W_out[i] / np.sqrt(sum(W_U[:, v] ** 2)) / norm for v in range(W_U.shape[1])]
        assert row.neuron == i
        assert row.candidate == (i in NEURONS)
        assert row.norm == pytest.approx(norm, rel=1e-12)
        assert row.logit_var == pytest.approx(np.var(cosines), rel=1e-10)


@pytest.mark.parametrize("tool", TOOLS)
def test_ablation_against_a_forward_by_hand(make_gpt2, tool):
    plain = make_gpt2(dtype=torch.float64)
    models = load_trio(plain, None, remove_layernorm(make_gpt2(dtype=torch.float64)), tool=tool)
    frame = confidence_neurons.measure({"m": models["original"]}, TOKENS, NEURONS, batch_size=2)
    means, scales = {}, None

    def edit(_, inputs, neurons):
        activation = inputs[0].clone()
        for neuron in neurons:
            means.setdefault(neuron, activation[..., neuron].mean())
            activation[..., neuron] = means[neuron]
        return (activation,)

    def keep_scale(norm, inputs, output):
        nonlocal scales
        scales = (inputs[0].var(-1, keepdim=True, correction=0) + norm.eps).sqrt()

    def freeze_scale(norm, inputs, output):
        return (inputs[0] - inputs[0].mean(-1, keepdim=True)) / scales * norm.weight + norm.bias

    def forward(neurons=(), norm_hook=None):
        c_proj = plain.transformer.h[-1].mlp.c_proj
        handles = [c_proj.register_forward_pre_hook(lambda *args: edit(*args, neurons))]
        if norm_hook is not None:
            handles.append(plain.transformer.ln_f.register_forward_hook(norm_hook))
        with torch.no_grad():
            probabilities = plain(TOKENS).logits.softmax(-1).numpy()[:, :-1]
        for handle in handles:
            handle.remove()
        of_next = np.take_along_axis(probabilities, TOKENS[:, 1:, None].numpy(), -1)
        return {"entropy": entropy(probabilities, axis=-1).mean(), "loss": -np.log(of_next).mean()}

    clean = forward(norm_hook=keep_scale)
    assert frame["ablated"].tolist() == [1, 1] * 3 + [1, 1, 2, 2, 3, 3]
    assert frame["neuron"].tolist() == [7, 7, 0, 0, 31, 31] * 2
    for row in frame.itertuples():
        neurons = NEURONS[: row.ablated] if row.ablation == "together" else [row.neuron]
        total, direct = forward(neurons)[row.measure], forward(neurons, freeze_scale)[row.measure]
        assert row.clean == pytest.approx(clean[row.measure], rel=1e-6)
        assert row.total == pytest.approx(total - clean[row.measure], abs=1e-6)
        assert row.direct == pytest.approx(direct - clean[row.measure], abs=1e-6)
        assert row.through_ln == pytest.approx(total - direct, abs=1e-6)
    assert frame[["total", "direct", "through_ln"]].abs().min().min() > 1e-5


def test_numbers_and_memory_do_not_depend_on_what_is_held(make_gpt2, monkeypatch):
    models, tokens = {"m": load_bridge(make_gpt2(seed=1))}, TOKENS.repeat(8, 1)
    frame = confidence_neurons.measure(models, TOKENS, NEURONS)
    peaks = {}
    for held in (0, 500, 10**6):  # nothing, some blocks, all
        monkeypatch.setattr(confidence_neurons, "_HELD", held)
        assert_same(confidence_neurons.measure(models, TOKENS, NEURONS, batch_size=2), frame)
        for blocks in (7, 56):
            with Peak() as peak:
                confidence_neurons.measure(models, tokens[:blocks], NEURONS, batch_size=1)
            peaks[held, blocks] = peak.bytes
    assert peaks[0, 56] < 1.02 * peaks[0, 7]
    assert peaks[500, 56] < 1.02 * peaks[500, 7]
    assert peaks[10**6, 56] > 2 * peaks[10**6, 7], "this can see memory grow"


def test_nothing_goes_through_the_ln_of_an_ln_free_model(make_gpt2):
    models = load_trio(make_gpt2(seed=1), None, remove_layernorm(make_gpt2(seed=1)))
    table = confidence_neurons.measure(models, TOKENS, NEURONS)
    frame = table.set_index("model")
    assert np.allclose(frame["total"], frame["direct"] + frame["through_ln"], rtol=0, atol=1e-12)
    assert (frame.loc["ln_free", "through_ln"] == 0).all()
    assert frame.loc["ln_free", "direct"].abs().max() > 1e-3
    assert frame.loc["original", "through_ln"].abs().max() > 1e-3
    said = confidence_neurons.describe(table)
    of_single = frame.loc["original"].query("ablation == 'alone' and measure == 'entropy'")
    assert f"original: {of_single['through_ln'].abs().max():.2g} of {of_single['clean'].iloc[0]:.3g} (" in said
    assert "; ln_free: 0 of " in said


def test_a_planted_confidence_neuron_is_found_and_acts_through_ln_alone(make_gpt2):
    model = load_bridge(with_confidence_neuron(make_gpt2(), neuron=13))
    assert confidence_neurons.candidates(model)[0] == 13
    frame = confidence_neurons.measure({"m": model}, TOKENS, [13])
    assert frame["direct"].abs().max() < 1e-6
    assert frame["through_ln"].abs().max() > 1e-3
    (in_null, _) = confidence_neurons.measure_spectrum({"m": model}, [13]).groupby("neurons", sort=False)
    assert in_null[1]["cumulative"].iloc[-3] == pytest.approx(0, abs=1e-12)


def test_padding_of_the_vocabulary_has_no_direction(make_gpt2):
    model = trio(make_gpt2)["original"]
    padded = SimpleNamespace(blocks=model.blocks, cfg=model.cfg, W_U=torch.nn.functional.pad(model.W_U, (0, 3)))
    table = confidence_neurons.measure_neurons({"original": model, "padded": padded}, NEURONS)
    found = [frame["logit_var"].to_numpy() for _, frame in table.groupby("model", sort=False)]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-10)


def test_candidates_have_a_large_norm_and_the_smallest_logit_var(make_gpt2):
    model = load_bridge(make_gpt2())
    frame = confidence_neurons.measure_neurons({"m": model}, [])
    large = frame.nlargest(5, "norm")
    assert confidence_neurons.candidates(model, 3) == large.nsmallest(3, "logit_var")["neuron"].tolist()


def test_spectrum_against_the_svd(make_gpt2):
    model = load_bridge(make_gpt2())
    frame = confidence_neurons.measure_spectrum({"m": model}, NEURONS)
    W_out, W_U = (x.detach().double().numpy() for x in (model.blocks[-1].mlp.W_out, model.W_U))
    directions, values, _ = np.linalg.svd(W_U, full_matrices=False)
    for neurons, group in frame.groupby("neurons"):
        members = W_out[NEURONS] if neurons == "candidates" else W_out
        shares = np.mean([(w @ directions) ** 2 / (w @ w) for w in members], axis=0)
        assert list(group["direction"]) == list(range(1, 13))
        assert np.allclose(group["singular_value"], values, atol=1e-6)
        assert np.allclose(group["share"], shares)
        assert np.allclose(group["cumulative"], np.cumsum(shares))
        assert group["cumulative"].iloc[-1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("neurons", "message"), [([3, 48], r"ln_free has no neurons \[48\].* 0 to 47"), ([3, 3], "twice")]
)
def test_neurons_that_there_are_not(make_gpt2, neurons, message):
    models = {"ln_free": load_bridge(make_gpt2())}
    for measure in (confidence_neurons.measure_neurons, confidence_neurons.measure_spectrum):
        with pytest.raises(NolnError, match=message):
            measure(models, neurons)
    with pytest.raises(NolnError, match=message):
        confidence_neurons.measure(models, TOKENS, neurons)


def test_plots(make_gpt2):
    models = trio(make_gpt2)
    frame = confidence_neurons.measure(models, TOKENS, NEURONS)
    figure = confidence_neurons.plot(frame)
    assert_plots_by_model(figure, list(models))
    assert list(figure.data[0].x) == ["7", "0", "31"]
    figure = confidence_neurons.plot_cumulative(frame)
    assert_plots_by_model(figure, list(models))
    assert list(figure.data[0].x) == [1, 2, 3]
    figure = confidence_neurons.plot_spectrum(confidence_neurons.measure_spectrum(models, NEURONS))
    assert_plots_by_model(figure, list(models))
    figure = confidence_neurons.plot_neurons(confidence_neurons.measure_neurons(models, NEURONS))
    assert sum(len(trace.x) for trace in figure.data) == 3 * 48
    assert [annotation.text for annotation in figure.layout.annotations] == list(models)
