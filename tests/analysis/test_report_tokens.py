import numpy as np
import pytest

from analysis import faithfulness, loss
from analysis.report import tokens
from analysis.texts import read_text


def test_token_view_is_of_the_numbers_that_the_analyses_have(micro_trio):
    text = read_text("books-report", micro_trio["original"], 512).tokens
    view = tokens.measure(micro_trio, text).set_index(["model", "block", "position"])
    keys = ["model", "block", "position"]
    losses = loss.measure_tokens(micro_trio, text).set_index(keys)["loss"]
    far = faithfulness.measure_tokens(micro_trio, text).set_index(keys)["jsd"]
    assert len(view) == len(losses)
    np.testing.assert_allclose(view["loss"], losses.reindex(view.index), rtol=1e-5)
    compared = view.drop("original", level="model")
    np.testing.assert_allclose(compared["jsd"], far.reindex(compared.index), atol=1e-6)
    first = view.loc["ln_free", 0, 1]
    logits = micro_trio["ln_free"](text[:1])[0, 0]
    assert first["tokens"][0] == logits.argmax()
    assert first["probabilities"][0] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-5)
