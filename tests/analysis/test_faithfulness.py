import numpy as np
import pandas as pd
import pytest
import torch
from contract import TOKENS, assert_keeps_contract, assert_plots_by_model, assert_same, trio
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy, spearmanr

from analysis import faithfulness, load_bridge, logit_attribution

BY_LAYER = [faithfulness.measure_layers, faithfulness.measure_heads, faithfulness.measure_neurons]


WHOLE = [faithfulness.measure, faithfulness.measure_tokens, faithfulness.measure_calibration]


@pytest.mark.parametrize("measure", [*WHOLE, *BY_LAYER])
def test_contract(measure, make_gpt2):
    assert_keeps_contract(measure, make_gpt2)


@pytest.fixture
def models(make_gpt2):
    return trio(make_gpt2)


@torch.no_grad()
def run(model):
    """Probabilities of tokens that have a next one, [token, vocab], and all activations, in float64."""
    logits, cache = model.run_with_cache(TOKENS)
    return logits[:, :-1].double().softmax(-1).flatten(0, 1).numpy(), {k: v.double().numpy() for k, v in cache.items()}


def test_predictions_against_scipy(models, monkeypatch):
    monkeypatch.setattr(faithfulness, "_TOP", 10)
    frame = faithfulness.measure(models, TOKENS, reference="control", batch_size=3).set_index("model")
    reference, targets = run(models["control"])[0], TOKENS[:, 1:].flatten().numpy()
    for name, model in models.items():
        probabilities, row = run(model)[0], frame.loc[name]
        pairs = list(zip(reference, probabilities, strict=True))
        kl = [entropy(p, q) for p, q in pairs]
        assert row["reference"] == "control"
        assert row["tokens"] == len(pairs) == 70
        jsd = [jensenshannon(p, q) ** 2 for p, q in pairs]
        for measure, values in (("jsd", jsd), ("kl", kl)):
            assert row[measure] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-7)
            for tail, share in (("median", 0.5), ("percentile_95", 0.95), ("percentile_99_9", 0.999), ("max", 1)):
                assert row[f"{measure}_{tail}"] == pytest.approx(np.quantile(values, share), rel=1e-4, abs=1e-6)
        assert row["entropy"] == pytest.approx(np.mean([entropy(q) for _, q in pairs]), rel=1e-5)
        assert row["agreement"] == pytest.approx(np.mean([p.argmax() == q.argmax() for p, q in pairs]))
        top = [np.argsort(p)[-10:] for p, _ in pairs]
        correlations = [spearmanr(p[i], q[i]).statistic for (p, q), i in zip(pairs, top, strict=True)]
        assert row["rank_correlation"] == pytest.approx(np.mean(correlations))
        assert row["accuracy"] == pytest.approx(np.mean(probabilities.argmax(-1) == targets))
        assert row["ece"] == pytest.approx(ece(probabilities, targets), rel=1e-5)


def ece(probabilities, targets):
    error = 0.0
    for i in range(10):
        confidences, rights = [], []
        for p, right in zip(probabilities, targets, strict=True):
            if i / 10 < p.max() <= (i + 1) / 10:
                confidences.append(p.max())
                rights.append(p.argmax() == right)
        if rights:
            error += len(rights) / len(targets) * abs(np.mean(rights) - np.mean(confidences))
    return error


def test_calibration(models):
    frame = faithfulness.measure_calibration(models, TOKENS)
    summary = faithfulness.measure(models, TOKENS).set_index("model")
    for name, bins in frame.groupby("model"):
        assert len(bins) == 10
        assert bins["tokens"].sum() == 70
        full = bins[bins["tokens"] > 0]
        assert ((full["bin_start"] < full["confidence"]) & (full["confidence"] <= full["bin_end"])).all()
        assert bins.loc[bins["tokens"] == 0, ["confidence", "accuracy"]].isna().all(axis=None)
        error = (full["tokens"] / 70 * (full["accuracy"] - full["confidence"]).abs()).sum()
        assert summary.loc[name, "ece"] == pytest.approx(error)
        assert summary.loc[name, "accuracy"] == pytest.approx((full["accuracy"] * full["tokens"]).sum() / 70)


def cka(x, y):
    """From the kernels of the tokens, as in the paper: HSIC(K, L) / √(HSIC(K, K) HSIC(L, L))."""
    centring = np.eye(len(x)) - 1 / len(x)
    k, l = (centring @ vectors @ vectors.T @ centring for vectors in (x, y))  # noqa: E741
    return np.sum(k * l) / np.sqrt(np.sum(k * k) * np.sum(l * l))


def test_residual_streams_against_whole_data(models):
    frame = faithfulness.measure_layers(models, TOKENS, batch_size=3).set_index(["model", "positions", "layer"])
    caches = {name: run(model)[1] for name, model in models.items()}
    for name in models:
        for layer, point in enumerate(["0.hook_resid_pre", "0.hook_resid_post", "1.hook_resid_post"]):
            for positions, start in {"all": 0, "after 0": 1}.items():
                x, y = (caches[model][f"blocks.{point}"][:, start:].reshape(-1, 12) for model in ("original", name))
                cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, y, strict=True)]
                row = frame.loc[name, positions, layer]
                assert row["cosine"] == pytest.approx(np.mean(cosines))
                assert row["cka"] == pytest.approx(cka(x, y))


def test_cka_sees_neither_rotation_nor_scale(make_gpt2):
    plain, rotated = make_gpt2(), make_gpt2()
    ones = torch.ones(12, 1)
    basis = torch.linalg.qr(torch.cat([ones, torch.randn(12, 11, generator=torch.Generator().manual_seed(0))], 1))[0]
    turn = torch.linalg.qr(torch.randn(11, 11, generator=torch.Generator().manual_seed(1)))[0]
    # Of what is centred, which it stays: loading takes out the mean.
    rotation = basis @ torch.block_diag(torch.ones(1, 1), turn) @ basis.T
    for embedding in (rotated.transformer.wte, rotated.transformer.wpe):
        embedding.weight.data = 3 * embedding.weight.data @ rotation + basis[:, 1]
    models = {"original": load_bridge(plain), "rotated": load_bridge(rotated), "other": load_bridge(make_gpt2(seed=1))}
    frame = faithfulness.measure_layers(models, TOKENS, batch_size=3).set_index(["model", "positions", "layer"])
    assert frame.loc[("rotated", "all", 0), "cka"] == pytest.approx(1, abs=1e-5)
    assert abs(frame.loc[("rotated", "all", 0), "cosine"]) < 0.5
    assert frame.loc[("other", "all", 0), "cka"] < 0.5


def test_heads_against_loops(models):
    frame = faithfulness.measure_heads(models, TOKENS, batch_size=3).set_index(["model", "layer", "head"])
    caches = {name: run(model)[1] for name, model in models.items()}
    prompts = [logit_attribution.measure_prompt(models, block).set_index(["model", "label"])["dla"] for block in TOKENS]
    assert len(frame) == 3 * 2 * 3
    for (name, layer, head), row in frame.iterrows():
        x, y = (caches[model][f"blocks.{layer}.attn.hook_pattern"][:, head] for model in ("original", name))
        distances = [abs(p - q).sum() / 2 for a, b in zip(x, y, strict=True) for p, q in zip(a[1:], b[1:], strict=True)]
        assert row["attention_distance"] == pytest.approx(np.mean(distances), abs=1e-7)
        dla = [np.concatenate([dla.loc[model, f"L{layer}H{head}"] for dla in prompts]) for model in ("original", name)]
        assert row["dla_correlation"] == pytest.approx(np.corrcoef(*dla)[0, 1], abs=1e-6)


def test_heads_do_not_depend_on_how_many_patterns_fit(models, monkeypatch):
    frame = faithfulness.measure_heads(models, TOKENS)
    monkeypatch.setattr(faithfulness, "_PATTERNS_AT_ONCE", 1)
    np.testing.assert_allclose(
        faithfulness.measure_heads(models, TOKENS).select_dtypes(float), frame.select_dtypes(float), atol=1e-6
    )


def test_neurons_against_whole_data(models):
    frame = faithfulness.measure_neurons(models, TOKENS, batch_size=3).set_index(["model", "layer", "neuron"])
    caches = {name: run(model)[1] for name, model in models.items()}
    assert len(frame) == 3 * 2 * 48
    for (name, layer, neuron), row in frame.iterrows():
        x, y = (caches[model][f"blocks.{layer}.mlp.hook_post"][..., neuron].ravel() for model in ("original", name))
        assert row["correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)


def test_a_model_is_faithful_to_itself(models):
    twins = {"original": models["original"], "twin": models["original"]}
    twin = faithfulness.measure(twins, TOKENS).set_index("model").loc["twin"]
    assert twin[["jsd", "kl", "kl_max"]].abs().max() < 1e-6
    assert twin[["agreement", "rank_correlation"]].tolist() == pytest.approx([1, 1], abs=1e-12)
    for measure, columns in zip(BY_LAYER, (["cosine", "cka"], ["dla_correlation"], ["correlation"]), strict=True):
        frame = measure(twins, TOKENS)
        np.testing.assert_allclose(frame[columns], 1, atol=1e-9)
        if "attention_distance" in frame:
            assert (frame["attention_distance"] == 0).all()


def test_calibration_of_certain_and_of_tied_predictions():
    tokens = pd.DataFrame({"model": "m", "confidence": [1.0, 0.5, 0.9, 0.90001], "correct": [True, True, False, False]})
    bins = faithfulness.calibrate(tokens)
    assert bins["tokens"].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 1, 2]
    assert bins["confidence"].dropna().tolist() == pytest.approx([0.5, 0.9, (1 + 0.90001) / 2])
    assert bins["accuracy"].dropna().tolist() == [1, 0, 0.5]


def test_calibration_of_a_single_model(models):
    alone = faithfulness.measure_calibration({"ln_free": models["ln_free"]}, TOKENS)
    together = faithfulness.measure_calibration(models, TOKENS)
    assert_same(alone, together[together["model"] == "ln_free"])


def test_all_is_what_one_by_one_is_from_fewer_forwards(models):
    run: list[str] = []
    for name, model in models.items():
        model.unembed.register_forward_hook(lambda *_, name=name: run.append(name))
    found = faithfulness.measure_all(models, TOKENS, reference="control", batch_size=3)
    assert run == list(models) * 3
    for key, measure in zip(found, (faithfulness.measure_tokens, *BY_LAYER), strict=True):
        assert f"measure_{key}s" == measure.__name__
        pd.testing.assert_frame_equal(found[key], measure(models, TOKENS, reference="control", batch_size=3))


@pytest.mark.parametrize("measure", [faithfulness.measure, faithfulness.measure_all, *BY_LAYER])
def test_nothing_to_compare_with(measure, models):
    with pytest.raises(ValueError, match="'nobody' and at least one other model"):
        measure(models, TOKENS, reference="nobody")
    with pytest.raises(ValueError, match="'original' and at least one other model"):
        measure({"original": models["original"]}, TOKENS)


def test_plots(models):
    compared = ["control", "ln_free"]
    figure = faithfulness.plot(faithfulness.measure(models, TOKENS))
    assert [list(trace.x) for trace in figure.data] == [list(models)] * 6
    assert_plots_by_model(faithfulness.plot_tails(faithfulness.measure(models, TOKENS)), compared)
    assert_plots_by_model(faithfulness.plot_calibration(faithfulness.measure_calibration(models, TOKENS)), list(models))
    for measure, plot in (
        (faithfulness.measure_layers, faithfulness.plot_layers),
        (faithfulness.measure_neurons, faithfulness.plot_neurons),
    ):
        assert_plots_by_model(plot(measure(models, TOKENS)), compared)
    heads = faithfulness.plot_heads(faithfulness.measure_heads(models, TOKENS))
    assert [annotation.text for annotation in heads.layout.annotations] == compared
    assert heads.data[0].z.shape == (2, 3)


def test_correlations_with_what_is_constant_are_nan(make_gpt2):
    models = {}
    for name, seed, constant in (("original", 0, 1), ("other", 1, 2)):
        plain = make_gpt2(seed=seed)
        mlp = plain.transformer.h[0].mlp.c_fc
        mlp.weight.data[:, constant], mlp.bias.data[constant] = 0, 7.3
        models[name] = load_bridge(plain)
    tokens = TOKENS.repeat(100, 1)  # many, for rounding to add up
    frame = faithfulness.measure_neurons(models, tokens, batch_size=100).set_index(["model", "layer", "neuron"])
    assert frame.loc[("other", 0), "correlation"].isna().to_dict() == {i: i in (1, 2) for i in range(48)}
