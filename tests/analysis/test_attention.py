import numpy as np
import pytest
import torch
from contract import TOKENS, assert_keeps_contract, assert_plots_by_model, trio

from analysis import attention, load_bridge, palette


@pytest.mark.parametrize("measure", [attention.measure, attention.measure_heads])
def test_contract(measure, make_gpt2):
    assert_keeps_contract(measure, make_gpt2)


@torch.no_grad()
def test_against_loops_over_plain_transformers(make_gpt2):
    models = {"m": load_bridge(make_gpt2())}
    heads = attention.measure_heads(models, TOKENS, batch_size=3)
    plain = make_gpt2(dtype=torch.float64)
    plain.set_attn_implementation("eager")
    patterns = [pattern.numpy() for pattern in plain(TOKENS, output_attentions=True).attentions]
    sinks_code, queries = 0, 0
    for row in heads.itertuples():
        sinks, to_0, entropies = [], [], []
        for block in patterns[row.layer][:, row.head]:
            for query, weights in enumerate(block):
                sinks_code += weights[0] > 0.3
                queries += 1
                if query >= 1:
                    sinks.append(weights[0] > 0.3)
                    to_0.append(weights[0])
                    entropies.append(-sum(w * np.log(w) for w in weights[: query + 1]))
        assert row.sink_rate == pytest.approx(np.mean(sinks))
        assert row.attention_to_0 == pytest.approx(np.mean(to_0), rel=1e-5)
        assert row.entropy == pytest.approx(np.mean(entropies), rel=1e-5)
    (whole,) = attention.measure(models, TOKENS).itertuples()
    assert 0 < whole.sink_rate < whole.sink_rate_code == pytest.approx(sinks_code / queries)
    assert whole.sink_rate == pytest.approx(heads["sink_rate"].mean())


def test_leaves_no_hook_behind(make_gpt2):
    model = load_bridge(make_gpt2())
    before = attention.measure({"m": model}, TOKENS)
    assert attention.measure({"m": model}, TOKENS).equals(before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_plots(make_gpt2):
    models = trio(make_gpt2)
    heads = attention.measure_heads(models, TOKENS)
    figure = attention.plot(attention.summarise(heads))
    assert [trace.marker.color for trace in figure.data[::2]] == [palette.colour(model) for model in models]
    assert_plots_by_model(figure, list(models))
    figure = attention.plot_heads(heads)
    assert len(figure.data) == 3 * len(models)
    assert [annotation.text for annotation in figure.layout.annotations] == list(models)
    assert figure.data[0].z.shape == (2, 3)
