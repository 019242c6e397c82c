"""Paths are held to all products of three small models, made one by one from the embedding up."""

import numpy as np
import pytest
import torch
from test_composition import three_families
from test_graph import PAIR, SHORT
from test_tools_on_families import each_family, each_state, loaded

from analysis import graph, paths
from analysis.stream import Stream

PROMPT = SHORT[:4]


@torch.no_grad()
def by_hand(made, most):
    """The value of every path through at most `most` components, by its name."""
    _, cache = made.run_with_cache(PROMPT[None], return_cache_object=False)
    cache = {name: x[0].double() for name, x in cache.items()}
    stream, cfg = Stream(made), made.cfg
    is_parallel = "blocks.0.hook_resid_mid" not in stream.points

    def scaled(x, point, position):
        x = stream.centre(x)
        return x / stream.scale(stream.centre(cache[point][position]).square().sum())

    values = {}

    def go(name, x, position, stage, left):
        """Stages are the heads of a layer, and its MLP: what reads after `stage` sees what was written there."""
        if position == len(PROMPT) - 1:
            w = made.W_U[:, PAIR[0]].double() - made.W_U[:, PAIR[1]].double()
            values[f"{name} → logit"] = float(scaled(x, stream.final, position) @ w)
        if not left:
            return
        for layer in range(cfg.n_layers):
            attn, mlp = made.blocks[layer].attn, made.blocks[layer].mlp
            if stage < 2 * layer:
                y = scaled(x, f"blocks.{layer}.hook_resid_pre", position)
                for head in range(cfg.n_heads):
                    W_V = attn.W_V.repeat_interleave(cfg.n_heads // len(attn.W_V), dim=0)[head].double()
                    out = y @ W_V @ attn.W_O[head].double()
                    for at in range(position, len(PROMPT)):
                        share = cache[f"blocks.{layer}.attn.hook_pattern"][head, at, position]
                        go(f"{name} → L{layer}H{head}@{at}", share * out, at, 2 * layer, left - 1)
            if stage < (2 * layer if is_parallel else 2 * layer + 1):
                where = "pre" if is_parallel else "mid"
                y = scaled(x, f"blocks.{layer}.hook_resid_{where}", position)
                gated = getattr(mlp, "W_gate", None) is not None
                pre = cache[f"blocks.{layer}.mlp.hook_pre{'_linear' if gated else ''}"][position]
                gate = cache[f"blocks.{layer}.mlp.hook_post"][position] / pre
                out = (y @ mlp.W_in.double() * gate) @ mlp.W_out.double()
                go(f"{name} → L{layer} MLP@{position}", out, position, 2 * layer + 1, left - 1)

    for kind in ("embed", "pos_embed"):
        if f"hook_{kind}" in cache:
            for position in range(len(PROMPT)):
                go(f"{kind}@{position}", cache[f"hook_{kind}"][position], position, -1, most)
    return values


@three_families
@each_state
def test_the_largest_are_those_of_all(name, frozen):
    made = loaded(name, frozen=frozen)
    held = graph.Held(made, PROMPT, PAIR)
    for most in range(4):
        expected = by_hand(made, most)
        order = sorted(expected, key=lambda path: -abs(expected[path]))
        found = paths.find(held, 12, most, steps=10**6)
        assert found.is_complete
        scale = abs(expected[order[0]])
        np.testing.assert_allclose(
            found.frame["value"], [expected[path] for path in order[:12]], rtol=1e-3, atol=1e-4 * scale
        )
        assert all(expected[row.path] == pytest.approx(row.value, rel=1e-3) for row in found.frame.itertuples())
        assert (found.frame["components"] <= most).all()
        assert found.at_most == (pytest.approx(abs(found.frame["value"].iloc[-1])) if len(order) > 12 else 0)
        assert found.within == pytest.approx(sum(expected.values()), rel=1e-3, abs=1e-4 * scale)
        assert found.remainder == pytest.approx(held.logit - held.bias - found.frame["value"].sum())


@each_state
@each_family
def test_all_paths_are_what_embeddings_are_worth(name, frozen):
    held = graph.Held(loaded(name, frozen=frozen), PROMPT, PAIR)
    rows = [row for row, component in enumerate(held.components) if component.layer is None]
    assert paths.find(held, 1, 4).within == pytest.approx(float(held.values[rows].sum()), rel=1e-6, abs=1e-8)


def test_a_search_that_is_cut_off_says_what_may_be_missing():
    held = graph.Held(loaded("gpt2", frozen=True), PROMPT, PAIR)
    whole = paths.find(held, 30, 3, steps=10**6)
    for steps in (1, 5, 20):
        found = paths.find(held, 30, 3, steps=steps)
        missing = whole.frame[~whole.frame["path"].isin(found.frame["path"])]
        assert missing["value"].abs().max() <= found.at_most or missing.empty
        assert found.is_complete == (found.at_most <= found.frame["value"].abs().min())
    assert not paths.find(held, 30, 3, steps=1).is_complete
    with pytest.raises(ValueError, match="count is 0 and most is 3"):
        paths.find(held, 0)
