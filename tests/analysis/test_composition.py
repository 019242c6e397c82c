"""Virtual weights are held to activations of plain transformers, and scores to products that are multiplied out."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from contract import TOKENS, assert_keeps_contract, assert_plots_by_model, trio
from models import random_model
from scipy.linalg import subspace_angles
from scipy.stats import spearmanr
from test_edges import POSITION, PROMPT, Plain
from test_tools_on_families import each_state, loaded, make, plain_activations

from analysis import composition, edges, load_bridge, load_hooked_blocks
from analysis.stream import Stream
from finetune.errors import NolnError
from finetune.folding import norms_of

three_families = pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
SCORED = TOKENS[:2, :5]


@three_families
@each_state
@torch.no_grad()
def test_virtual_weights_times_activations_are_contributions(name, frozen):
    model, made = make(name, frozen=frozen), loaded(name, frozen=frozen)
    found = plain_activations(model, TOKENS[:2])
    plain = Plain(model, found)
    norm = next(norm for norm in norms_of(model) if norm.layer == 1 and any("q" in r.parts for r in norm.readers))
    x, _ = plain.before(norm)
    divisor = 1.0
    if not frozen:
        x = x[POSITION].double()
        divisor = float(((x - x.mean() if name != "llama" else x).square().mean() + made.cfg.eps).sqrt())
        x = plain.before(norm)[0]
    tokens = torch.eye(23, dtype=torch.float64)[PROMPT[POSITION]]
    activations = {"embed": tokens, "L0H1": found["blocks.0.attn.hook_z"][1, POSITION, 1].double()}
    activations["L0 MLP"] = found["blocks.0.mlp.hook_post"][1, POSITION].double()
    for writer, a in activations.items():
        c = plain.parts[writer][1]
        if writer == "L0 MLP" and getattr(made.blocks[0].mlp, "b_out", None) is not None:
            c = c - made.blocks[0].mlp.b_out
        expected = plain.contribution(norm, plain.before(norm)[0], c)
        for reader in ("L1H0 query", "L1H1 key", "L1H0 value"):
            units = expected.loc[reader]
            virtual = composition.virtual_weights(made, writer, reader)
            predicted = (a @ virtual.AB / divisor).numpy()
            np.testing.assert_allclose(predicted, units, atol=1e-4 * np.abs(expected).max())
    neuron = composition.virtual_weights(made, "L0N3", "L1N2").AB
    whole = composition.virtual_weights(made, "L0 MLP", "L1 MLP").AB
    torch.testing.assert_close(neuron, whole[3:4, 2:3])
    logits = composition.virtual_weights(made, "L1H0", "logit").AB
    W_O = made.blocks[1].attn.W_O[0].double()
    torch.testing.assert_close(logits, Stream(made).centre(W_O) @ made.W_U.double())


def factors(made, centres):
    """W_V W_O and what reads, multiplied out, by label: of writers and of readers."""
    d = made.cfg.d_model
    C = torch.eye(d, dtype=torch.float64) - centres / d
    writers, readers = {"embed": Stream(made).model.W_E.double() @ C}, {}
    for layer, block in enumerate(made.blocks):
        heads = made.cfg.n_heads
        W = {part: getattr(block.attn, f"W_{part}").double() for part in "QKVO"}
        W |= {part: W[part].repeat_interleave(heads // len(W[part]), dim=0) for part in "KV"}
        keys = getattr(made.cfg, "n_key_value_heads", None) or heads
        for head in range(heads):
            writers[f"L{layer}H{head}"] = C @ W["V"][head] @ W["O"][head] @ C
            readers[f"L{layer}H{head} query"] = C @ W["Q"][head] @ W["K"][head].T @ C
        for key in range(keys):
            its = range(key * heads // keys, (key + 1) * heads // keys)
            readers[f"L{layer}H{key} key"] = torch.cat([C @ W["K"][i] @ W["Q"][i].T @ C for i in its], dim=1)
            readers[f"L{layer}H{key} value"] = torch.cat([C @ W["V"][i] @ W["O"][i] @ C for i in its], dim=1)
        writers[f"L{layer} MLP"] = block.mlp.W_out.double() @ C
        readers[f"L{layer} MLP"] = C @ block.mlp.W_in.double()
        if getattr(block.mlp, "W_gate", None) is not None:
            readers[f"L{layer} MLP gate"] = C @ block.mlp.W_gate.double()
    W_U = made.W_U.double()
    readers["logit"] = C @ (W_U - W_U.mean(-1, keepdim=True))
    return writers, readers


@three_families
@each_state
@torch.no_grad()
def test_scores_against_products_multiplied_out(name, frozen):
    made = loaded(name, frozen=frozen)
    centres = not frozen and name != "llama"
    writers, readers = factors(made, centres)
    frame = composition.measure_weights({"m": made}, draws=1)
    own = frame[frame["draw"].isna()].set_index(["writer", "reader"])
    assert len(own) == len(frame) / 2
    components = edges.measure_prompt({"m": made}, PROMPT, position=0)
    is_edge = components["component"].isin(composition.WRITERS)
    expected = {*components.loc[is_edge, ["label", "reader"]].itertuples(index=False, name=None)}
    assert {*own.index} == expected
    for (writer, reader), row in own.iterrows():
        if writer not in writers:
            assert writer == "pos_embed"
            continue
        A, B = writers[writer], readers[reader]
        size = float((A @ B).norm() / B.norm())
        assert row["strength"] == pytest.approx(size, rel=1e-6)
        assert row["composition"] == pytest.approx(size / float(A.norm()), rel=1e-6)
        bases = [np.linalg.svd(M.numpy())[0][:, : np.linalg.matrix_rank(M.numpy())] for M in (A.T, B)]
        if max(basis.shape[1] for basis in bases) == made.cfg.d_model - centres:
            assert np.isnan(row["kernel"])
        elif reader != "logit":
            assert row["kernel"] == pytest.approx(np.mean(np.cos(subspace_angles(*bases)) ** 2), rel=1e-5)


@torch.no_grad()
def test_composition_is_that_of_transformer_lens():
    made = load_bridge(random_model("gpt2", frozen=True))
    frame = composition.measure_weights({"m": made}, draws=1)
    own = frame[frame["draw"].isna()].set_index(["writer", "reader"])["composition"]
    for mode, kind in {"Q": "query", "K": "key", "V": "value"}.items():
        expected = made.all_composition_scores(mode).scores
        for writer in range(3):
            for reader in range(3):
                found = own[f"L0H{writer}", f"L1H{reader} {kind}"]
                assert found == pytest.approx(float(expected[0, writer, 1, reader]), rel=1e-4)


def test_random_weights_compose_by_chance():
    made = loaded("llama", frozen=True)
    frame = composition.measure_weights({"m": made}, draws=60)
    random = frame[frame["draw"].notna()].groupby(["writer", "reader"])["composition"].agg(lambda x: (x**2).mean())
    assert random.mean() == pytest.approx(1 / made.cfg.d_model, rel=0.05)
    pd.testing.assert_frame_equal(composition.measure_weights({"m": made}, draws=60), frame)


@torch.no_grad()
@pytest.mark.parametrize("change", ["rotation", "values", "queries"])
def test_what_changes_no_function_changes_no_score(change):
    model = load_bridge(random_model("gpt2", frozen=True))
    changed = copy.deepcopy(model)
    if change == "rotation":
        Q = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0]
        for module in (changed.embed, changed.pos_embed):
            module.weight.copy_(module.weight @ Q)
        changed.unembed.weight.copy_(changed.unembed.weight @ Q)
    for block in changed.blocks:
        q, k, v, o = (getattr(block.attn, part) for part in "qkvo")
        if change == "rotation":
            for module in (q, k, v, getattr(block.mlp, "in")):
                module.weight.copy_(module.weight @ Q)
            for module in (o, block.mlp.out):
                module.weight.copy_(Q.T @ module.weight)
                module.bias.copy_(module.bias @ Q)
        elif change == "values":
            v.weight.mul_(3), v.bias.mul_(3), o.weight.div_(3)
        else:
            q.weight.mul_(3), q.bias.mul_(3), k.weight.div_(3), k.bias.div_(3)
    torch.testing.assert_close(changed(TOKENS), model(TOKENS), rtol=1e-3, atol=1e-3)
    one, other = (composition.measure_weights({"m": each}, draws=1).query("draw.isna()") for each in (model, changed))
    assert not torch.equal(model.blocks[0].attn.W_O, changed.blocks[0].attn.W_O) or change == "queries"
    np.testing.assert_allclose(one[list(composition.SCORES)], other[list(composition.SCORES)], rtol=1e-4)
    circuits = [composition.measure_circuits({"m": each}) for each in (model, changed)]
    pd.testing.assert_frame_equal(*circuits, rtol=1e-3, atol=1e-4)
    fits = [composition.measure_edges({"m": each}, SCORED)[["size", "variance_effect"]] for each in (model, changed)]
    np.testing.assert_allclose(fits[0]["size"], fits[1]["size"], rtol=1e-3, atol=1e-5)


@three_families
@each_state
@torch.no_grad()
def test_fits_by_loops_over_tokens(name, frozen):
    made = loaded(name, frozen=frozen)
    stream = Stream(made)
    found = composition.measure_edges({"m": made}, SCORED).set_index(["divisor", "writer", "reader"])
    units = ["label", "reader", "unit"]
    frames = [
        edges.measure_prompt({"m": made}, SCORED[1], position=position, target=None).assign(position=position)
        for position in range(len(SCORED[1]))
    ]
    rows = pd.concat([frame[frame["kind"] != "logit"] for frame in frames])
    scales = [
        {point: stream.scale(stream.centre(x[0].double()).square().sum(-1)) for point, x in cache.items()}
        for _, cache in (made.run_with_cache(block[None], return_cache_object=False) for block in SCORED)
        for cache in [{point: cache[point] for point in stream.points}]
    ]
    points = {reader.label(head): reader.point for reader in stream.readers for head in range(4)}
    of_reader = rows[rows["component"] == "reader"].set_index(["reader", "unit", "position"])["contribution"]
    of_bias = rows[rows["component"] == "bias"].set_index(["reader", "unit", "position"])["contribution"]
    own = (of_reader - of_bias) ** 2
    parts = rows[rows["component"].isin(composition.WRITERS)]
    assert {*found.index.get_level_values(0)} == ({"none"} if frozen else {"mean", "own"})
    for (writer, reader), group in parts.groupby(["label", "reader"], sort=False):
        scale = [float(scales[1][points[reader]][position]) for position in group["position"]]
        mean = float(scales[0][points[reader]].mean())
        size = np.sqrt((group["direct_effect"] ** 2).sum() / own[reader].sum())
        for divisor in found.index.get_level_values(0).unique():
            by = mean if divisor == "mean" else np.array(scale)
            group = group.assign(predicted=group["contribution"] * scale / by)
            row = found.loc[divisor, writer, reader]
            norms = group.assign(**{c: group[c] ** 2 for c in ("predicted", "contribution", "direct_effect")})
            norms = norms.groupby("position")[["predicted", "contribution", "direct_effect"]].sum()
            for what, column in {"contribution": "contribution", "effect": "direct_effect"}.items():
                error = ((group[column] - group["predicted"]) ** 2).sum()
                variance = ((group[column] - group.groupby(units)[column].transform("mean")) ** 2).sum()
                if variance > 1e-9 * (group[column] ** 2).sum():
                    assert row[f"r2_{what}"] == pytest.approx(1 - error / variance, rel=1e-3, abs=1e-5)
                    if len({*np.round(norms[column], 9)}) == len(norms):
                        expected = spearmanr(norms["predicted"].astype("float32"), norms[column]).statistic
                        assert row[f"rank_{what}"] == pytest.approx(expected, abs=1e-6)
            assert row["size"] == pytest.approx(size, rel=1e-4)
    of_logit = found[found["kind"] == "logit"].droplevel([0, 2])
    assert of_logit["tokens"].eq(len(SCORED[1]) - 1).all()


def test_what_norms_cost(make_gpt2):
    models = trio(make_gpt2)
    frame = composition.measure(models, TOKENS)
    assert frame[["model", "divisor"]].drop_duplicates().to_numpy().tolist() == [
        ["original", "mean"],
        ["original", "own"],
        ["control", "mean"],
        ["control", "own"],
        ["ln_free", "none"],
    ]
    by = frame.set_index(["model", "divisor"])
    exact = ["r2_contribution", "r2_effect", "rank_contribution", "rank_effect"]
    np.testing.assert_allclose(by.loc["ln_free", exact], 1, atol=1e-6)
    np.testing.assert_allclose(by.loc[("original", "own"), "r2_contribution"], 1)
    assert (by.loc[("original", "mean"), "r2_contribution"] < 0.999).all()
    assert (by.loc["original", "r2_effect"] < 0.999).all()
    text = composition.describe(frame)
    assert "ln_free: 1.000 and 1.000" in text
    assert text.count("own divisors: 1.000 and 0.") == 2
    distances = composition.measure_distances(models, TOKENS)
    counted = distances.groupby(["model", "divisor", "component", "kind"])["edges"].sum()
    pd.testing.assert_series_equal(counted.sort_index(), frame.set_index(counted.index.names)["edges"].sort_index())


def test_ranking(make_gpt2):
    models = {"ln_free": trio(make_gpt2)["ln_free"]}
    found = composition.measure_edges(models, TOKENS)
    weights = composition.measure_weights(models, draws=3)
    frame = composition.rank(weights, found, top=0.3).set_index(["component", "kind", "score"])
    own = weights[weights["draw"].isna()].merge(found[["writer", "reader", "size"]])
    heads = own[(own["component"] == "head") & (own["kind"] == "query")]
    assert len(heads) == 9
    row = frame.loc["head", "query", "composition"]
    assert (row["edges"], row["largest"]) == (9, 3)
    largest = {*heads.nlargest(3, "size").index}
    order = heads.sort_values("composition", ascending=False).index
    precisions = [len(largest & {*order[: i + 1]}) / (i + 1) for i, edge in enumerate(order) if edge in largest]
    assert row["precision"] == pytest.approx(np.mean(precisions))
    assert row["rank"] == pytest.approx(spearmanr(heads["composition"], heads["size"]).statistic)
    perfect = weights.merge(found[["writer", "reader", "size"]])
    perfect = perfect.assign(composition=perfect["size"].where(perfect["draw"].isna(), -perfect["size"]))
    best = composition.rank(perfect.drop(columns="size"), found, top=0.3).set_index(["component", "kind", "score"])
    row = best.loc["head", "query", "composition"]
    assert (row["precision"], row["rank"], row["rank_random"]) == (1, pytest.approx(1), pytest.approx(-1))
    assert row["precision_random"] < 0.5
    assert row["precision_random_sd"] == pytest.approx(0)
    assert ("mlp", "query", "kernel") not in frame.index, "MLPs fill the stream"
    expected = frame.loc[("head", ["query", "key", "value"], "kernel"), "precision"].mean()  # of equally many edges
    assert f"ln_free, Projection Kernel: {expected:.2f} against" in composition.describe_ranking(frame.reset_index())


@torch.no_grad()
def test_circuits_against_matrices_over_the_vocabulary():
    made = loaded("gpt2", frozen=True)
    frame = composition.measure_circuits({"m": made}).set_index(["layer", "head"])
    attn, E = made.blocks[1].attn, made.W_E.double()
    OV = E @ attn.W_V[2].double() @ attn.W_O[2].double() @ made.W_U.double()
    QK = E @ attn.W_Q[2].double() @ attn.W_K[2].double().T @ E.T
    torch.testing.assert_close(composition.ov_circuit(made, 1, 2).AB, OV - OV.mean(-1, keepdim=True))
    torch.testing.assert_close(composition.qk_circuit(made, 1, 2).AB, QK * Stream(made).score_scale(1))
    for column, circuit in {"copying": OV - OV.mean(-1, keepdim=True), "matching": QK}.items():
        values = np.linalg.eigvals(circuit.numpy())
        values = values[np.argsort(-np.abs(values))[:4]]  # of rank d_head
        assert frame.loc[(1, 2), column] == pytest.approx(values.real.sum() / np.abs(values).sum(), rel=1e-4)


def test_contract(make_gpt2):
    assert_keeps_contract(composition.measure_edges, make_gpt2)


def test_what_is_not_known_is_refused(make_gpt2):
    made = loaded("gpt2")
    for writer in ("L7H0", "L0H7", "b_O"):
        with pytest.raises(ValueError, match=f"No writer is called {writer}"):
            composition.virtual_weights(made, writer, "logit")
    for reader in ("L0H0", "L0N999"):
        with pytest.raises(ValueError, match=rf"No reader is called {reader}\. Names are L0H0 query"):
            composition.virtual_weights(made, "embed", reader)
    blocks = {"m": load_hooked_blocks(random_model("blocks", block="pre-ln"))}
    with pytest.raises(NolnError, match="norms are not folded"):
        composition.measure_weights(blocks)


def test_plots(make_gpt2):
    models = trio(make_gpt2)
    found = composition.measure_edges(models, TOKENS)
    ranking = composition.rank(composition.measure_weights(models, draws=2), found)
    figures = [
        composition.plot(composition.summarise(found)),
        composition.plot_distances(composition.summarise_distances(found)),
        composition.plot_ranking(ranking),
    ]
    for figure in figures:
        assert_plots_by_model(figure, list(models))
    maps = composition.plot_circuits(composition.measure_circuits(models))
    assert [note.text for note in maps.layout.annotations][:3] == list(models)


@pytest.mark.parametrize(
    ("name", "config"),
    [("gpt_neox", {"num_hidden_layers": 1}), ("gpt2", {"n_layer": 1, "n_head": 1, "n_embd": 3, "vocab_size": 3})],
)
def test_models_without_edges_between_heads(name, config):
    models = {"m": load_bridge(random_model(name, **config))}
    found = composition.measure_edges(models, SCORED % 3)
    ranking = composition.rank(composition.measure_weights(models, draws=1), found)
    assert composition.describe_ranking(ranking) == "There are too few edges between heads to rank."
    distances = composition.summarise_distances(found)
    for figure in (composition.plot_distances(distances), composition.plot_ranking(ranking)):
        assert any(axis.title.text for axis in figure.select_yaxes())
