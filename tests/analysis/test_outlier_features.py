from types import SimpleNamespace

import numpy as np
import pytest
import torch
from contract import TOKENS, assert_keeps_contract, assert_plots_by_model, trio

from analysis import load_bridge, outlier_features
from analysis.stream import Stream


def test_contract(make_gpt2):
    assert_keeps_contract(outlier_features.measure, make_gpt2)


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    return matrix[~np.eye(len(matrix), dtype=bool)]


def expected(x: np.ndarray) -> dict[str, float]:
    """The definitions, with the n × n and d × d matrices written out."""
    strengths = np.square(x).mean(0)
    y = x - x.mean(1, keepdims=True)
    y = y / np.sqrt(np.square(y).mean())
    n, d = y.shape
    features, inputs = off_diagonal(y.T @ y / n), off_diagonal(y @ y.T / d)
    magnitude = np.sort(np.abs(x), axis=1)
    return {
        "kurtosis": np.square(strengths).mean() / strengths.mean() ** 2,
        "max_median_ratio": (magnitude[:, -1] / magnitude[:, (d - 1) // 2]).mean(),
        "kurtosis_code": np.square(y).mean(0).var(ddof=1),
        "feature_correlation_rms": np.sqrt(np.square(features).mean()),
        "input_correlation": inputs.mean(),
        "input_correlation_rms": np.sqrt(np.square(inputs).mean()),
        "tokens": n,
    }


def test_against_the_definitions(make_gpt2):
    model = load_bridge(make_gpt2())
    frame = outlier_features.measure({"m": model}, TOKENS, batch_size=2).set_index(["point", "token_class"])
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    for point in Stream(model).points:
        x = cache[point].double().numpy()
        for token_class, part in (("all", x), ("all but position 0", x[:, 1:])):
            row = frame.loc[point, token_class]
            for name, value in expected(part.reshape(-1, part.shape[-1])).items():
                assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


class Constant:
    """A model whose residual stream is `x` everywhere, whatever it reads."""

    cfg = SimpleNamespace(n_layers=1, d_vocab=1, device="cpu")
    hook_dict = frozenset({"blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post"})
    unembed = torch.nn.Identity()

    def __init__(self, x: torch.Tensor):
        self.x = x

    def run_with_cache(self, batch, names_filter, **_):
        return torch.zeros(*batch.shape, 1), dict.fromkeys(names_filter, self.x.expand(*batch.shape, -1))


@pytest.mark.parametrize(
    ("x", "kurtosis", "ratio"),
    [
        (torch.tensor([2.0, -2, 2, -2, 2, -2]), 1, 1),  # all features alike
        (torch.tensor([0.0, 0, 0, 0, 0, 5]), 6, torch.inf),  # a single one
        (torch.tensor([1.0, 1, 1, 1, 1, 3]), (5 + 81) / 6 / (14 / 6) ** 2, 3),
    ],
)
def test_where_it_is_known(x, kurtosis, ratio):
    frame = outlier_features.measure({"m": Constant(x)}, TOKENS)
    np.testing.assert_allclose(frame["kurtosis"], kurtosis)
    np.testing.assert_allclose(frame["max_median_ratio"], ratio)
    np.testing.assert_allclose(frame["input_correlation"], 1, rtol=1e-6)  # all tokens are the same


def test_plot(make_gpt2):
    models = trio(make_gpt2)
    assert_plots_by_model(outlier_features.plot(outlier_features.measure(models, TOKENS)), list(models))
