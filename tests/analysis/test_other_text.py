import json

import numpy as np
import pandas as pd
import plotly.io
import pytest
import torch
from contract import TOKENS, assert_keeps_contract, assert_plots_by_model, trio
from models import random_model

from analysis import faithfulness, loss, other_text
from analysis.stream import Stream

OTHER = torch.randint(5, (4, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def models():
    return trio(random_model)


@pytest.fixture(scope="module")
def tokens(models):
    texts = {"own": TOKENS, "far": OTHER}
    return pd.concat(other_text.measure_tokens(models, blocks, text=text) for text, blocks in texts.items())


def test_contract():
    assert_keeps_contract(other_text.measure, random_model)
    assert_keeps_contract(other_text.measure_tokens, random_model)


def test_what_loss_and_faithfulness_find(models):
    frame = other_text.measure(models, TOKENS).set_index("model")
    losses = loss.measure(models, TOKENS).set_index("model")
    predictions = faithfulness.measure(models, TOKENS).set_index("model")
    for column, found, name in (
        ("loss", losses, "loss"),
        ("difference", losses, "difference"),
        ("loss_max", losses, "max"),
        ("jsd", predictions, "jsd"),
        ("jsd_max", predictions, "jsd_max"),
    ):
        np.testing.assert_allclose(frame[column], found[name], rtol=1e-5, atol=1e-6)
    assert (frame["tokens"] == 70).all()
    assert frame.loc["original", ["difference", "difference_max", "jsd"]].tolist() == [0, 0, 0]
    assert frame["difference_max"]["ln_free"] > frame["difference"]["ln_free"]


def test_bins_of_stds_against_a_loop(models, tokens):
    frame = other_text.by_std(tokens)
    points = Stream(models["ln_free"]).points
    assert set(frame["model"]) == {"ln_free"}
    assert list(frame["point"].unique()) == list(points)
    stds = {}
    for text, blocks in (("own", TOKENS), ("far", OTHER)):
        with torch.no_grad():
            _, cache = models["ln_free"].run_with_cache(blocks, return_cache_object=False)
        stds[text] = {point: cache[point].double().pow(2).mean(-1).sqrt()[:, :-1] for point in points}
    for text, blocks in (("own", TOKENS), ("far", OTHER)):
        excess = loss.measure_tokens(models, blocks).query("model == 'ln_free'")["difference"].to_numpy()
        for point in points:
            constant = stds["own"][point][:, 1:].mean()  # without position 0
            binned: dict[int, list[float]] = {}
            for std, value in zip(stds[text][point].flatten().tolist(), excess, strict=True):
                binned.setdefault(round(4 * np.log2(std / constant.item())), []).append(value)
            rows = frame[(frame["text"] == text) & (frame["point"] == point)]
            assert rows["tokens"].tolist() == [len(binned[key]) for key in sorted(binned)]
            np.testing.assert_allclose(rows["ratio"], [2 ** (key / 4) for key in sorted(binned)])
            np.testing.assert_allclose(rows["difference"], [np.mean(binned[key]) for key in sorted(binned)], atol=1e-5)
            np.testing.assert_allclose(rows["difference_max"], [max(binned[key]) for key in sorted(binned)], atol=1e-5)


def test_a_token_that_became_longer_is_the_one_that_is_mispredicted():
    """The mechanism, in a model whose embedding of one token is eight times as long as the reference's."""
    model, changed = (trio(random_model)["ln_free"] for _ in range(2))
    changed.embed.W_E.data[7] *= 8
    frame = other_text.measure_stds({"original": model, "ln_free": changed}, TOKENS)
    frame = frame[(frame["model"] == "ln_free") & (frame["point"] == "blocks.0.hook_resid_pre")]
    longest, usual = frame.loc[frame["ratio"].idxmax()], frame.loc[frame["tokens"].idxmax()]
    assert longest["ratio"] > 3 * usual["ratio"]
    assert longest["difference_max"] > 2 * usual["difference_max"]


def test_models_with_norms_alone_have_no_constants(models):
    frame = other_text.measure_stds({name: models[name] for name in ("original", "control")}, TOKENS)
    assert frame.empty
    assert not other_text.plot_stds(frame).data


def test_plots(models, tokens):
    assert_plots_by_model(other_text.plot(other_text.summarise(tokens)), ["control", "ln_free"])
    figure = other_text.plot_stds(other_text.by_std(tokens))
    shown = [trace.name for trace in figure.data if trace.showlegend]
    assert len(shown) == len(set(shown)) == len(Stream(models["ln_free"]).points)
    assert plotly.io.from_json(figure.to_json()) == figure
    assert json.loads(figure.to_json())["layout"]["xaxis2"]["title"]["text"].startswith("Std of a token")
