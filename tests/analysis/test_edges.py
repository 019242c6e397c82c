"""Contributions come from loops over heads and positions here, direct effects from forwards of plain transformers."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from contract import TOKENS, TOOLS, assert_flat_in_memory, assert_keeps_contract, assert_plots_by_model, trio
from models import random_model
from test_tools_on_families import (
    VARIANTS,
    each_family,
    each_state,
    hooked,
    loaded,
    make,
    plain_activations,
    written,
)

from analysis import edges, load_hooked_blocks, logit_attribution
from analysis.stream import Stream
from finetune.errors import NolnError
from finetune.families import family_of
from finetune.folding import norms_of, part_of_column

PROMPT = TOKENS[1]
POSITION = 7


class Plain:
    """A plain model on one prompt: its readers by the names that `edges` has, and what a norm makes of them."""

    def __init__(self, model, found):
        self.model, self.found = model, found
        self.width = found["blocks.0.attn.hook_q"].shape[-1]
        self.biases = {}
        for layer, part, path in family_of(model).writers_of(model.config.num_hidden_layers):
            bias = getattr(model.get_submodule(path), "bias", None)
            norm = next((norm for norm in norms_of(model) if norm.writer == path), None)
            if part == "o" and bias is not None:
                assert norm is None
                self.biases[f"L{layer} b_O"] = bias.detach().expand_as(found["hook_embed"])
        self.parts = written(model, found) | self.biases
        if hasattr(model.base_model, "wpe"):
            self.parts["pos_embed"] = model.base_model.wpe.weight[: TOKENS.shape[1]].expand_as(found["hook_embed"])

    def names(self, layer, part):
        """The readers of a part, in the order of its columns: (reader, unit)."""
        count = self.found[f"blocks.{layer}.attn.hook_{part}"].shape[2] if part in "qkv" else 1
        name = {"q": " query", "k": " key", "v": " value", "in": " MLP", "gate": " MLP gate"}[part]
        if part in "qkv":
            return [(f"L{layer}H{head}{name}", unit) for head in range(count) for unit in range(self.width)]
        return [(f"L{layer}{name}", unit) for unit in range(1000)]

    def before(self, norm):
        """The labels of what was written before a norm, from the forward that wrote it."""
        seen = []
        with torch.no_grad(), hooked(self.model, norm.path, True, lambda x: seen.append(x)):
            self.model(PROMPT[None])
        whole, total, labels = seen[0][0], torch.zeros_like(seen[0][0]), []
        for label, part in self.in_order():
            if torch.allclose(total, whole, atol=1e-4 * float(whole.abs().max())):
                break
            labels.append(label)
            total = total + part[1]
        return whole, labels

    def in_order(self):
        order = {label: i for i, label in enumerate(["embed", "pos_embed"])}

        def key(item):
            label = item[0]
            if label in order:
                return (-1, order[label])
            layer, rest = int(label[1 : label.index(" ") if " " in label else label.index("H")]), label
            return (layer, 1 if "MLP" in rest else 0)

        return sorted(self.parts.items(), key=key)

    @torch.no_grad()
    def read(self, norm, without=None):
        """What the readers of a norm make of the stream, less what `without` says, at POSITION: by (reader, unit)."""
        values = {}

        def keep(reader, output):
            columns = part_of_column(self.model, reader)
            for i, part in enumerate(reader.parts):
                if part != "unembed":
                    units = output[0, POSITION, columns == i].double().numpy()
                    values.update(zip(self.names(norm.layer, part), units, strict=False))

        handles = [
            self.model.get_submodule(reader.path).register_forward_hook(
                lambda _, __, output, reader=reader: keep(reader, output)
            )
            for reader in norm.readers
        ]
        with hooked(self.model, norm.path, True, lambda x: None if without is None else x - without):
            self.model(PROMPT[None])
        for handle in handles:
            handle.remove()
        return pd.Series(values)

    @torch.no_grad()
    def contribution(self, norm, x, c):
        """What the readers make of c by itself, at the scale by which the norm divides x."""
        module, style = self.model.get_submodule(norm.path), family_of(self.model).style
        x, c = x[POSITION].double(), c[POSITION].double()
        if style.centred:
            x, c = x - x.mean(), c - c.mean()
        scaled = c / (x.square().mean() + getattr(module, style.eps)).sqrt() * (module.weight + style.gain_offset)
        values = {}
        for reader in norm.readers:
            weight = self.model.get_submodule(reader.path).weight.double()
            weight = (
                weight.T
                if weight.shape[1] == len(scaled) and "Conv1D" not in str(type(self.model.get_submodule(reader.path)))
                else weight
            )
            columns = part_of_column(self.model, reader)
            for i, part in enumerate(reader.parts):
                values.update(
                    zip(self.names(norm.layer, part), (scaled @ weight[:, columns == i]).numpy(), strict=False)
                )
        return pd.Series(values)


def check(models, model, frozen):
    """Every edge at one position, of every tool, against forwards of the plain model and products by hand."""
    plain = Plain(model, plain_activations(model, TOKENS[:2]))
    frames = {
        tool: edges.measure_prompt({"m": made}, PROMPT, position=POSITION).set_index(["label", "reader", "unit"])
        for tool, made in models.items()
    }
    for norm in norms_of(model)[:-1]:
        if not norm.readers:
            continue
        x, labels = plain.before(norm)
        whole = plain.read(norm)
        assert len(labels) >= 1
        for frame in frames.values():
            rows = frame.loc[("reader", slice(None), slice(None)), "contribution"].droplevel(0)
            np.testing.assert_allclose(rows[whole.index], whole, atol=1e-4 * whole.abs().max())
        sums = dict.fromkeys(frames, 0.0)
        for label in labels:
            effect = whole - plain.read(norm, plain.parts[label][1:2])
            contribution = plain.contribution(norm, x, plain.parts[label][1])
            scale = max(effect.abs().max(), whole.abs().max())
            for tool, frame in frames.items():
                rows = frame.loc[label].loc[whole.index]
                np.testing.assert_allclose(rows["contribution"], contribution[whole.index], atol=1e-4 * scale)
                np.testing.assert_allclose(rows["direct_effect"], effect, atol=3e-4 * scale)
                assert np.allclose(rows["contribution"], effect, atol=3e-4 * scale) == (
                    frozen or np.allclose(contribution[whole.index], effect, atol=3e-4 * scale)
                )
                sums[tool] = sums[tool] + rows["contribution"].to_numpy()
        for tool, frame in frames.items():
            biases = frame.loc["bias"].loc[whole.index, "contribution"]
            np.testing.assert_allclose(sums[tool] + biases, whole, atol=1e-4 * whole.abs().max())
            for point_label in {*frame.index.get_level_values(0)} - {*labels, "bias", "reader"}:
                # A HookedTransformer has zeros where a family has no biases.
                others = frame.loc[point_label]["contribution"]
                assert (others.reindex(whole.index).fillna(0) == 0).all(), point_label


@each_state
@each_family
def test_edges_against_forwards_without_the_component(name, frozen):
    check({tool: loaded(name, tool, frozen=frozen) for tool in TOOLS}, make(name, frozen=frozen), frozen)


@each_state
@pytest.mark.parametrize(("name", "config"), VARIANTS[:2] + VARIANTS[3:])
def test_edges_of_variants(name, config, frozen):
    model = random_model(name, frozen=frozen, **config)
    check({tool: load(model) for tool, load in TOOLS.items()}, model, frozen)


@each_state
@each_family
def test_the_logit_is_read_as_in_logit_attribution(name, frozen):
    for tool in TOOLS:
        models = {"m": loaded(name, tool, frozen=frozen)}
        frame = edges.measure_prompt(models, PROMPT, ["logit"], position=POSITION).set_index("label")
        expected = logit_attribution.measure_prompt(models, PROMPT)
        expected = expected[expected["position"] == POSITION].set_index("label")
        assert {*frame.index} == {*expected.index} - {"b_U", "logit", "residue"} | {"bias", "reader"}
        for mine, theirs in {label: label for label in frame.index}.items():
            row = expected.loc[{"bias": "b_U", "reader": "logit"}.get(theirs, theirs)]
            assert frame.loc[mine, "contribution"] == pytest.approx(row["dla"], rel=1e-6, abs=1e-8)
            assert frame.loc[mine, "direct_effect"] == pytest.approx(row["direct_effect"], rel=1e-6, abs=1e-8)


@each_state
@each_family
@torch.no_grad()
def test_sources_by_loops_over_heads_and_positions(name, frozen):
    model = make(name, frozen=frozen)
    found = plain_activations(model, PROMPT[None])
    for tool in TOOLS:
        made = loaded(name, tool, frozen=frozen)
        stream = Stream(made)
        frame = edges.measure_prompt({"m": made}, PROMPT, ["L1H0 value"], position=POSITION, sources=True)
        heads = frame[frame["component"] == "head"].set_index(["head", "source", "unit"])
        reader = next(reader for reader in stream.readers if reader.layer == 1 and reader.kind == "value")
        W, _ = stream.read_weights(reader)
        pattern, v = found["blocks.0.attn.hook_pattern"][0], found["blocks.0.attn.hook_v"][0]
        x = found["blocks.1.hook_resid_pre"][0, POSITION]
        scale = 1.0
        if not frozen:
            x = x - x.mean() if stream.norm == "LN" else x
            scale = (x.square().mean() + made.cfg.eps).sqrt()
        component = stream.heads[0]
        groups = pattern.shape[0] // v.shape[1]
        out = found["blocks.0.attn.hook_z"][0, POSITION].flatten() @ stream.weight_before_norm(component).flatten(0, 1)
        if component.scale:
            scale = scale * (out.square().mean() + made.cfg.eps).sqrt()
        for head in range(pattern.shape[0]):
            for source in range(POSITION + 1):
                c = pattern[head, POSITION, source] * v[source, head // groups] @ stream.weight(component)[head]
                c = c - c.mean() if stream.norm == "LN" else c
                expected = (c / scale @ W[:, 0]).numpy()
                np.testing.assert_allclose(heads.loc[head, source]["contribution"], expected, atol=1e-4)
        whole = edges.measure_prompt({"m": made}, PROMPT, ["L1H0 value"], position=POSITION)
        whole = whole[whole["component"] == "head"].set_index(["head", "unit"])["contribution"]
        np.testing.assert_allclose(heads.groupby(["head", "unit"])["contribution"].sum(), whole, atol=1e-5)


@each_state
@each_family
@torch.no_grad()
def test_scores_make_the_pattern(name, frozen):
    """The softmax of what scores add up to, soft-capped as the model does, is the plain model's pattern."""
    model = make(name, frozen=frozen)
    cap = getattr(model.config, "attn_logit_softcapping", None)
    for tool, layer in itertools.product(TOOLS, range(2)):
        made = loaded(name, tool, frozen=frozen)
        expected = plain_activations(model, PROMPT[None])[f"blocks.{layer}.attn.hook_pattern"][0]
        for head in (made.cfg.n_heads - 1,):
            seen = [key for key in range(POSITION + 1) if expected[head, POSITION, key] > 0]
            scores = torch.tensor(
                [
                    edges.measure_scores({"m": made}, PROMPT, layer, head, query=POSITION, key=key)[
                        "contribution"
                    ].sum()
                    for key in seen
                ]
            )
            scores = cap * (scores / cap).tanh() if cap else scores
            np.testing.assert_allclose(scores.softmax(0), expected[head, POSITION, seen], atol=1e-4)


def test_a_score_is_a_table_of_pairs():
    model = make("gpt2", frozen=True)
    frame = edges.measure_scores({"m": loaded("gpt2", frozen=True)}, PROMPT, 1, 2, key=3)
    labels = ["b_Q", "embed", "pos_embed", "L0H0", "L0H1", "L0H2", "L0 b_O", "L0 MLP"]
    assert frame["query_label"].drop_duplicates().tolist() == labels
    assert frame["key_label"].drop_duplicates().tolist() == ["b_K", *labels[1:]]
    assert len(frame) == len(labels) ** 2
    assert frame["query"].unique().tolist() == [len(PROMPT) - 1]
    found = plain_activations(model, PROMPT[None])
    q, k = (found[f"blocks.1.attn.hook_{x}"][0, position, 2] for x, position in (("q", -1), ("k", 3)))
    assert frame["contribution"].sum() == pytest.approx(float(q @ k / 2), rel=1e-4)
    with pytest.raises(ValueError, match="position 5, is after the query, position 2"):
        edges.measure_scores({"m": loaded("gpt2")}, PROMPT, 0, 0, key=5, query=2)


def test_over_tokens_it_is_the_mean_of_prompts(make_gpt2):
    """What a table over tokens says follows from what is said of each position of each prompt."""
    models = {name: model for name, model in trio(make_gpt2).items() if name != "control"}
    tokens = TOKENS[:2, :3]
    frame = edges.measure_edges(models, tokens).set_index(["model", "reader", "label"])
    rows = pd.concat(
        edges.measure_prompt(models, prompt, position=position)
        for prompt in tokens
        for position in range(tokens.shape[1])
    )
    rows["error"] = rows["contribution"] - rows["direct_effect"]
    columns = ["contribution", "direct_effect", "error"]
    for key, group in rows[rows["kind"] != "logit"].groupby(["model", "reader", "label"]):
        row = frame.loc[key]
        means = group[columns].abs().mean()
        found = row[[f"{column}_abs" for column in columns]].astype(float)
        np.testing.assert_allclose(found, means, rtol=1e-6, atol=1e-14)
        assert row["tokens"] == tokens.numel()
        if key[2] == "reader":
            assert row["contribution_max"] == pytest.approx(group["contribution"].abs().max())
        elif key[2] != "bias":
            assert row["nmae"] == pytest.approx(100 * means["error"] / means["direct_effect"], rel=1e-6, abs=1e-9)


def test_only_in_the_ln_free_model_every_edge_is_exact(make_gpt2):
    models = trio(make_gpt2)
    frame = edges.measure(models, TOKENS)
    assert frame["kind"].tolist() == ["logit", "query", "key", "value", "mlp"] * 3
    exact = frame["model"] == "ln_free"
    assert (frame["residue_relative"] < 1e-5).all()
    assert frame.loc[exact, ["nmae", "nmae_all", "nmae_pooled"]].to_numpy().max() < 1e-8
    assert frame.loc[exact, "effect_residue_relative"].max() < 1e-5
    assert frame.loc[~exact, ["nmae", "nmae_all", "nmae_pooled"]].to_numpy().min() > 0.1
    assert frame.loc[~exact, "effect_residue_relative"].min() > 1e-3
    of_logit = frame[frame["kind"] == "logit"].set_index("model")["nmae"]
    expected = logit_attribution.measure(models, TOKENS).set_index("model")["nmae"]
    pd.testing.assert_series_equal(of_logit, expected)
    text = edges.describe(frame)
    assert text.count("by contribution") == 3


def test_contract(make_gpt2):
    assert_keeps_contract(edges.measure_edges, make_gpt2)


def test_memory_is_flat(make_gpt2):
    assert_flat_in_memory(edges.measure_edges, make_gpt2)


def test_layers(make_gpt2):
    models = trio(make_gpt2)
    frame = edges.measure_layers(models, TOKENS)
    of_values = frame[(frame["model"] == "original") & (frame["kind"] == "value")]
    assert of_values["reader_layer"].tolist() == [0, 1]
    assert of_values["edges"].tolist() == [3 * 2, 3 * 7]
    assert np.isnan(of_values["nmae"].iloc[0])  # no head comes before
    assert frame[frame["kind"] == "logit"]["reader_layer"].isna().all()


@torch.no_grad()
def test_neurons_are_parts_of_their_mlp(make_gpt2):
    frame = edges.measure_prompt(trio(make_gpt2), PROMPT, ["L1N5", "logit"], neurons=True)
    assert {*frame["reader"]} == {"L1 MLP", "logit"}
    assert {*frame.loc[frame["kind"] == "mlp", "unit"]} == {5}
    model = trio(make_gpt2)["ln_free"]
    W_in, b_out = model.blocks[1].mlp.W_in[:, 5].double(), model.blocks[0].mlp.b_out.double()
    rows = frame[(frame["model"] == "ln_free") & (frame["kind"] == "mlp") & (frame["layer"] == 0)]
    of = rows.groupby("component")["contribution"].sum()
    assert of["mlp"] == pytest.approx(of["neuron"] + float(b_out @ W_in), rel=1e-4)


def test_what_cannot_be_read_is_refused(make_gpt2):
    models = trio(make_gpt2)
    with pytest.raises(ValueError, match=r"No reader is called L7H0 query\. Names are L0H0 query"):
        edges.measure_prompt(models, PROMPT, ["L7H0 query"])
    blocks = {"m": load_hooked_blocks(random_model("blocks", block="pre-ln"))}
    with pytest.raises(NolnError, match=r"norms are not folded.* Use logit_attribution"):
        edges.measure(blocks, TOKENS)


def test_plots(make_gpt2):
    models = trio(make_gpt2)
    frame = edges.measure_edges(models, TOKENS)
    for figure in (edges.plot(edges.summarise(frame)), edges.plot_layers(edges.summarise_layers(frame))):
        assert_plots_by_model(figure, list(models))
