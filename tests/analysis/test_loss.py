import numpy as np
import pandas as pd
import pytest
import torch
from contract import TOKENS, TOOLS, assert_keeps_contract, assert_plots_by_model, trio
from models import random_model

from analysis import load_bridge, load_hooked_blocks, loss
from analysis.batches import forwards
from finetune.checkpoint import load_tokenizer

DOCUMENTS = np.array([0, 0, 0, 1, 1, 1, 2])[:, None] + np.zeros((7, 11), int)


@pytest.mark.parametrize("measure", [loss.measure, loss.measure_positions, loss.measure_tokens])
def test_contract(measure, make_gpt2):
    assert_keeps_contract(measure, make_gpt2)


@torch.inference_mode()
@pytest.mark.parametrize("load", [*TOOLS.values(), load_hooked_blocks])
def test_bfloat16_models_have_logits_in_float32(load):
    """What is rounded is what the unembedding reads, not what it returns."""
    plain = random_model("blocks", block="pre-ln") if load is load_hooked_blocks else random_model("gpt2")
    model = load(plain, dtype=torch.bfloat16)
    read = []
    model.unembed.register_forward_pre_hook(lambda _, given: read.append(given[0].double()))
    _, outputs = next(forwards({"model": model}, TOKENS, batch_size=len(TOKENS), float32=True))
    unembed = model.unembed
    weight = unembed.weight.T if load is load_hooked_blocks else unembed.W_U
    bias = 0 if load is load_hooked_blocks else unembed.b_U
    logits = outputs["model"].logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), read[0] @ weight.double() + bias, rtol=1e-5, atol=1e-4)
    assert model(TOKENS).dtype == torch.bfloat16  # as before


@torch.no_grad()
def plain_losses(model) -> np.ndarray:
    """CE of every next token in float64, block by block and token by token."""
    model = model.double()
    found = np.empty((len(TOKENS), TOKENS.shape[1] - 1))
    for i, block in enumerate(TOKENS):
        logits = model(block[None]).logits[0]
        for j in range(len(block) - 1):
            found[i, j] = torch.logsumexp(logits[j], 0) - logits[j, block[j + 1]]
    return found


def test_tokens_against_plain_transformers(make_gpt2):
    plain = {"original": make_gpt2(seed=1), "ln_free": make_gpt2(seed=2)}
    frame = loss.measure_tokens(
        {name: load_bridge(model) for name, model in plain.items()}, TOKENS, DOCUMENTS, text="t"
    )
    expected = {name: plain_losses(model) for name, model in plain.items()}
    assert (frame["text"] == "t").all()
    for row in frame.itertuples():
        before = row.position - 1
        assert row.loss == pytest.approx(expected[row.model][row.block, before], abs=1e-5)
        assert row.difference == pytest.approx(
            expected[row.model][row.block, before] - expected["original"][row.block, before], abs=1e-5
        )
        assert row.token == TOKENS[row.block, row.position]
        assert row.document == DOCUMENTS[row.block, before]
    assert len(frame) == 2 * 7 * 10


def test_averages(make_gpt2):
    expected = plain_losses(make_gpt2())
    models = {"original": load_bridge(make_gpt2())}
    (row,) = loss.measure(models, TOKENS).itertuples()
    assert row.loss == pytest.approx(expected.mean(), abs=1e-5)
    # Blocks of one length are the documents: the error is that of the mean of their means.
    assert row.loss_error == pytest.approx(expected.mean(1).std(ddof=1) / 7**0.5, abs=1e-5)
    assert row.median == pytest.approx(np.median(expected), abs=1e-5)
    assert row.percentile_95 == pytest.approx(np.quantile(expected, 0.95), abs=1e-5)
    assert row.percentile_99_9 == pytest.approx(np.quantile(expected, 0.999), abs=1e-5)
    assert row.max == pytest.approx(expected.max(), abs=1e-5)
    assert (row.tokens, row.documents, row.difference, row.difference_error) == (70, 7, 0, 0)
    by_position = loss.measure_positions(models, TOKENS)
    assert list(by_position["position"]) == list(range(1, 11))
    np.testing.assert_allclose(by_position["loss"], expected.mean(0), atol=1e-5)
    np.testing.assert_allclose(by_position["loss_error"], expected.std(0, ddof=1) / 7**0.5, atol=1e-5)


def test_without_the_reference_differences_are_unknown(make_gpt2):
    frame = loss.measure({"mine": load_bridge(make_gpt2())}, TOKENS)
    assert frame[["difference", "difference_error"]].isna().all(axis=None)
    assert frame[["loss", "loss_error"]].notna().all(axis=None)


def test_worst_tokens_with_their_context():
    tokenizer = load_tokenizer("micro")
    tokens = torch.tensor([tokenizer.encode(text)[:6] for text in ("a b c d e f", "g h i j k l")])
    block, position = np.indices((2, 5)).reshape(2, -1)
    known = {"text": "t", "block": block, "position": position + 1, "token": tokens[:, 1:].numpy().ravel()}
    values = np.arange(10.0)
    frame = pd.concat(
        [
            pd.DataFrame({**known, "model": "original", "loss": values, "difference": 0.0}),
            pd.DataFrame({**known, "model": "ln_free", "loss": values[::-1], "difference": values[::-1] - values}),
        ]
    )
    worst = loss.worst_tokens(frame, tokens, tokenizer, k=2, context=2)
    assert list(worst["model"]) == ["original", "original", "ln_free", "ln_free"]
    assert list(worst["loss"]) == [9, 8, 9, 8]
    assert worst["token"][0] == tokenizer.decode(tokens[1, 5])
    assert worst["context"][0] == tokenizer.decode(tokens[1, 3:5])
    assert worst["context"][2] == tokenizer.decode(tokens[0, :1])  # no more of the block comes before
    differences = loss.worst_tokens(frame, tokens, tokenizer, by="difference")
    assert list(differences["difference"]) == [9, 7, 5, 3, 1]
    assert set(differences["model"]) == {"ln_free"}


def test_plots(make_gpt2):
    models = trio(make_gpt2)
    frame = pd.concat(
        [loss.measure_tokens(models, TOKENS[part], text=text) for part, text in ((slice(4), "a"), (slice(4, 7), "b"))]
    )
    assert_plots_by_model(loss.plot(loss.summarise(frame)), list(models))
    assert_plots_by_model(loss.plot_positions(loss.average_positions(frame)), list(models))
    figure = loss.plot_tokens(frame)
    assert_plots_by_model(figure, ["control", "ln_free"])
    assert sorted(np.nansum(trace.y) for trace in figure.data) == [30, 30, 40, 40]  # no tail is cut


def test_tokens_at_which_a_model_overflows_are_counted(make_gpt2):
    frame = loss.measure_tokens(trio(make_gpt2), TOKENS, text="a")
    lost = (frame["model"] == "ln_free") & (frame["block"] == 0)
    frame.loc[lost, ["loss", "difference"]] = float("nan")
    figure = loss.plot_tokens(frame)
    assert figure.layout.annotations[0].text == f"a; ln_free overflows at {lost.sum()} tokens"
    counts = {trace.name: np.nansum(trace.y) for trace in figure.data}
    assert counts == {"control": 70, "ln_free": 60}
