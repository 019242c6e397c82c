"""Graphs are held to forwards of the whole model, and their direct effects to forwards of plain transformers."""

import json

import networkx as nx
import numpy as np
import pandas as pd
import plotly.io
import pytest
import torch
from contract import TOKENS, TOOLS, trio
from models import random_model
from test_edges import POSITION, PROMPT, Plain
from test_tools_on_families import VARIANTS, each_family, each_state, loaded, make, plain_activations

from analysis import edges, graph, load_hooked_blocks
from analysis.__main__ import main
from finetune.errors import NolnError
from finetune.folding import norms_of

PAIR = (5, 17)
SHORT = PROMPT[: POSITION + 1]


def check_interventions(models, frozen):
    for made in models.values():
        found = graph.build(made, SHORT[:5], PAIR, share=0.9, most=12, neurons=1)
        frame = graph.intervene(found, top=(3,))
        assert frame["what"].unique().tolist() == ["node", "nodes", "edge", "edges"]
        actual = frame["held"].abs().mean()
        assert actual > 1e-3
        error = (frame["predicted"] - frame["held"]).abs()
        assert (error.max() < 1e-4 * frame["held"].abs().max()) == frozen
        assert frozen or error.mean() > 0.02 * actual


@each_state
@each_family
def test_without_norms_the_logit_falls_as_predicted(name, frozen):
    check_interventions({tool: loaded(name, tool, frozen=frozen) for tool in TOOLS}, frozen)


@pytest.mark.parametrize(("name", "config"), [VARIANTS[0], VARIANTS[3], VARIANTS[6]])
def test_variants(name, config):
    model = random_model(name, frozen=True, **config)
    check_interventions({tool: load(model) for tool, load in TOOLS.items()}, True)


@each_state
@each_family
@torch.no_grad()
def test_what_flows_into_a_node_adds_up(name, frozen):
    held = graph.Held(loaded(name, frozen=frozen), SHORT, PAIR)
    last = torch.tensor([POSITION])
    model = held.model
    logits = plain_activations(make(name, frozen=frozen), SHORT[None])["uncapped"][0, -1]
    expected = float(logits[PAIR[0]] - logits[PAIR[1]])
    scale = float(logits.abs().max())
    root, *others = held.consumers
    assert float(held.flows(root, last).sum()) + held.bias == pytest.approx(expected, abs=1e-4 * scale)
    G = root.direction[-1] / held.scale(held.stream.final)[-1]
    layer = model.cfg.n_layers - 1
    block, neurons = model.blocks[layer], held.stream.neurons[layer]
    out = held.stream.weight(neurons).double() @ G
    if neurons.scale:
        out = out / held._cache[neurons.scale][-1]
    b_in = held.stream.read_weights(held.readers[layer, "in"])[1][0].double()
    bias = (b_in * held.gate[layer][0, -1] * out).sum()
    if not neurons.scale and block.mlp.b_out is not None:
        bias += block.mlp.b_out.double() @ G
    consumer = next(c for c in others if held.components[c.row].kind == "mlp")
    assert float(held.flows(consumer, last).sum() + bias) == pytest.approx(
        float(held.values[consumer.row, -1]), abs=1e-4 * scale
    )


@each_state
@each_family
@torch.no_grad()
def test_direct_effects_are_those_of_forwards_without_the_source(name, frozen):
    """Of edges into the last MLP, at the end: its pre-activations, read by W_out and the logit."""
    model = make(name, frozen=frozen)
    found = plain_activations(model, TOKENS[:2])
    plain = Plain(model, found)
    made = loaded(name, frozen=frozen)
    held = graph.Held(made, SHORT, PAIR)
    row = held.labels.index(["L1 MLP"] * len(SHORT))
    consumer = next(consumer for consumer in held.consumers if consumer.row == row)
    norm = next(
        norm for norm in reversed(norms_of(model)) if norm.layer == 1 and any("in" in r.parts for r in norm.readers)
    )
    _, labels = plain.before(norm)
    whole = plain.read(norm)["L1 MLP"]
    neurons = made.blocks[1].mlp
    stream = held.stream
    x = found["blocks.1.hook_resid_post"][1, POSITION].double()
    w = made.W_U[:, PAIR[0]].double() - made.W_U[:, PAIR[1]].double()
    scale = 1.0
    if not frozen:
        x = x - x.mean() if stream.norm == "LN" else x
        scale = (x.square().mean() + made.cfg.eps).sqrt()
    each = stream.neurons[1]
    _, cache = made.run_with_cache(SHORT[None], return_cache_object=False)
    after = cache[each.scale][0, POSITION] if each.scale else 1.0
    out = (stream.weight(each).double() / after @ (w / scale)).numpy()
    gate = held.gate[1][0, POSITION].double().numpy()
    assert neurons.W_in.shape[1] == len(whole)
    largest = 0.0
    for label in labels:
        change = whole - plain.read(norm, plain.parts[label][1:2])["L1 MLP"]
        expected = float((change.to_numpy() * gate * out).sum())
        source = next(row for row, its in enumerate(held.labels) if its[0] == label)
        found_effect = held.direct_effect(consumer, POSITION, source, POSITION)
        largest = max(largest, abs(expected))
        assert found_effect == pytest.approx(expected, abs=1e-3 * max(1, largest)), label


def test_edges_into_the_root_are_those_of_edges(make_gpt2):
    models = trio(make_gpt2)
    for name, model in models.items():
        found = graph.build(model, SHORT, PAIR, share=1, most=10**6)
        expected = edges.measure_prompt({name: model}, SHORT, ["logit"], target=PAIR).set_index("label")
        into = found.edges[found.edges["target"] == found.nodes["node"].iloc[0]]
        assert len(into) == len(expected) - 2
        for edge in into.itertuples():
            row = expected.loc[edge.source.split("@")[0]]
            assert edge.flow == pytest.approx(row["contribution"], rel=1e-9)
            assert edge.direct_effect == pytest.approx(row["direct_effect"], rel=1e-6, abs=1e-9)


def test_pruning(make_gpt2):
    model = trio(make_gpt2)["ln_free"]
    whole = graph.build(model, SHORT, PAIR, share=1, most=10**6)
    assert whole.share == pytest.approx(1)
    consumers = whole.nodes.dropna(subset="inflow")
    np.testing.assert_allclose(consumers["completeness"], 1)
    np.testing.assert_allclose(consumers["explained"], consumers["inflow"], atol=1e-9)
    some = graph.build(model, SHORT, PAIR, share=0.7)
    assert 0.6 < some.share < 1
    assert len(some.nodes) < len(whole.nodes)
    assert {*some.nodes["node"].iloc[1:]} == {*some.edges["source"]}, "each leads on"
    assert {*some.edges["target"]} <= {*some.nodes["node"]}
    assert some.nodes["influence"].is_monotonic_decreasing
    assert len(graph.build(model, SHORT, PAIR, most=3).nodes) <= 4
    merged = some.nodes.merge(whole.nodes, on="node")
    np.testing.assert_allclose(merged["value_x"], merged["value_y"])
    with pytest.raises(ValueError, match="The share is 0; it must be above 0"):
        graph.build(model, SHORT, share=0)


def test_neurons_are_taken_out_of_their_mlp(make_gpt2):
    model = trio(make_gpt2)["original"]
    one, other = (graph.Held(model, SHORT, PAIR, neurons=count) for count in (0, 4))
    mlp = one.labels.index(["L1 MLP"] * len(SHORT))
    of_layer = [row for row, c in enumerate(other.components) if c.kind in ("mlp", "neuron") and c.layer == 1]
    assert len(of_layer) == 5
    torch.testing.assert_close(other.values[of_layer].sum(0), one.values[mlp])
    alone = other.values[of_layer[1:]].abs()
    assert (alone[:-1] >= alone[1:]).all(), "the largest come first"


def test_all_models_have_one_target(make_gpt2):
    models = trio(make_gpt2)
    graphs = graph.build_all(models, SHORT, share=0.5)
    likeliest = int(models["original"](SHORT[None])[0, -1].argmax())
    assert {each.held.target for each in graphs} == {likeliest}
    assert [each.model for each in graphs] == list(models)
    frame = graph.summarise(graph.measure(models, SHORT, share=0.5)).set_index(["model", "what"])
    assert frame.loc[("ln_free", slice(None)), "error"].max() < 0.01
    assert frame.loc[("original", ["node", "edge"]), "error"].min() > 1
    assert frame.loc[("ln_free", "node"), "error_free"] > 1, "attention and MLPs are as nonlinear as before"


@torch.no_grad()
def test_exports(make_gpt2, tmp_path):
    model = trio(make_gpt2)["ln_free"]
    found = graph.build(model, SHORT, PAIR, neurons=1)
    nx.write_graphml(graph.to_networkx(found), tmp_path / "graph.graphml")
    made = nx.read_graphml(tmp_path / "graph.graphml")
    assert {*made} == {*found.nodes["node"]}
    assert nx.is_directed_acyclic_graph(made)
    for edge in found.edges.itertuples():
        assert made.edges[edge.source, edge.target]["flow"] == pytest.approx(edge.flow)
    traced = json.loads(json.dumps(graph.to_circuit_tracer(found), allow_nan=False))
    ids = [node["node_id"] for node in traced["nodes"]]
    assert len({*ids}) == len(ids) == len(found.nodes)
    assert len({node["jsNodeId"] for node in traced["nodes"]}) == len(ids)
    assert all({link["source"], link["target"]} <= {*ids} for link in traced["links"])
    assert [node["layer"] for node in traced["nodes"] if node["feature_type"] == "logit"] == ["3"]
    kinds = {"embedding", "cross layer transcoder", "mlp reconstruction error", "logit"}
    assert {node["feature_type"] for node in traced["nodes"]} == kinds
    root = next(node for node in traced["nodes"] if node["feature_type"] == "logit")
    probability = model(SHORT[None])[0, -1].softmax(-1)[PAIR[0]].item()
    assert float(root["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(probability, abs=1e-3)
    assert all(node["influence"] <= traced["metadata"]["node_threshold"] for node in traced["nodes"])
    features = {(node["layer"], node["feature"], node["ctx_idx"]) for node in traced["nodes"]}
    assert len(features) == len(ids), "the frontend knows them apart"
    assert traced["metadata"]["prompt_tokens"] == [str(token) for token in SHORT.tolist()]


def test_plots(make_gpt2):
    models = trio(make_gpt2)
    graphs = graph.build_all(models, SHORT, PAIR)
    figure = graph.plot(graphs[0])
    assert plotly.io.from_json(figure.to_json()) == figure
    nodes = next(trace for trace in figure.data if trace.name == "nodes")
    assert len(nodes.x) == len(graphs[0].nodes)
    assert nodes.y[0] == max(nodes.y), "the logit is on top"
    hover = next(trace for trace in figure.data if trace.name == "edges").text
    assert len(hover) == len(graphs[0].edges)
    assert "direct effect" in hover[0]
    assert len([trace for trace in figure.data if trace.mode == "lines"]) == len(graphs[0].edges)
    interventions = pd.concat([graph.intervene(each) for each in graphs])
    assert plotly.io.from_json((drawn := graph.plot_interventions(interventions)).to_json()) == drawn


def test_blocks_are_refused():
    with pytest.raises(NolnError, match="norms are not folded"):
        graph.build(load_hooked_blocks(random_model("blocks", block="pre-ln")), SHORT)


def test_the_page(tiny, tmp_path, capsys):
    out = tmp_path / "graphs" / "one"
    flags = ["--original", tiny["original"], "--ln-free", tiny["ln_free"], "--out", str(out), "--share", "0.5"]
    main(["graph", "<b>It is</b> a truth", "--target", " the", "--against", " a", *flags])
    assert f"The graph is {out / 'graph.html'}" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names == {"graph.html", "interventions.csv"} | {
        f"{model}{end}"
        for model in ("original", "ln_free")
        for end in ("-nodes.csv", "-edges.csv", "-paths.csv", ".graphml", "-circuit-tracer.json")
    }
    page = (out / "graph.html").read_text(encoding="utf-8")
    text = page[: page.index("<script")]
    assert "<b>" not in text
    assert "&#39; the&#39; − &#39; a&#39;" in text
    assert 'tabindex="0"><td class="text">logit@' in text
    frame = pd.read_csv(out / "interventions.csv")
    assert {*frame["model"]} == {"original", "ln_free"}
    with pytest.raises(SystemExit, match="already exists, and nothing is overwritten"):
        main(["graph", "It is", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["It", "--share", "2"], "--share is 2.0; it must be above 0"),
        (["It", "--paths", "0"], "--paths must be at least 1"),
        (["It", "--target", " the a"], "--target is ' the a', which is 2 tokens; it must be a single token"),
        (["It", "--against", " the"], "Set both"),
        (["", "--target", " the"], "The prompt has 0 tokens; it must have from 1 to 32"),
        (["It is " * 40], "must have from 1 to 32"),
    ],
)
def test_what_cannot_be_drawn(flags, message, tiny, tmp_path):
    models = ["--original", tiny["original"], "--ln-free", tiny["ln_free"], "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=message):
        main(["graph", *flags, *models])
    assert not (tmp_path / "out").exists()
