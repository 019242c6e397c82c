"""Outlier features: a few directions of the residual stream's basis that carry most of it.

With X the activations at a point of the residual stream, n tokens by d features, and s_j² the mean over tokens of x_j²:

- Kurtosis (He et al. 2024, "Understanding and Minimising Outlier Features", arXiv 2405.19279):
  mean_j(s_j⁴)/(mean_j s_j²)², from 1, all features alike, to d, a single one.
- Max-median ratio (same paper): the mean over tokens of max_j|x_j| / median_j|x_j|.
- What the released code of He and Hofmann, "Simplifying Transformer Blocks" (arXiv 2311.01906), logs of Y, which is X
  less each token's mean over the width, divided by the RMS over all tokens and features: the variance of Y's s_j²,
  there called kurtosis too (the kurtosis of Y less 1, times d/(d−1)); the correlations of features, the off-diagonal
  entries of YᵀY/n; the correlations of inputs, those of YYᵀ/d. Their code takes one batch for X, this one all tokens.

The models of `load_trio` have the mean over the width taken out of X, on which no prediction depends.

No n × n matrix is made: ‖YYᵀ‖ = ‖YᵀY‖ (Frobenius), and the entries of YYᵀ add up to |Σ y|².
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis import figures
from analysis.batches import forwards
from analysis.residual_norms import label, residual_points

CLASSES = ("all", "all but position 0")
"""The second because in GPT-2 the activations at position 0 are so large that they make up the first."""


class _Sums(NamedTuple):
    """Sums over tokens of one point of the residual stream, in float64; y is x less its mean over the width."""

    tokens: Float[Tensor, ""]
    ratio: Float[Tensor, ""]
    """max|x| / median|x|."""
    x_square: Float[Tensor, " d_model"]
    y: Float[Tensor, " d_model"]
    y_gram: Float[Tensor, "d_model d_model"]
    y_norm_4: Float[Tensor, ""]
    """‖y‖⁴."""

    @classmethod
    def of(cls, x: Float[Tensor, "batch pos d_model"]) -> "_Sums":
        x = x.float().flatten(0, 1)
        y = x - x.mean(-1, keepdim=True)
        magnitude = x.abs()
        sums = (
            torch.tensor(len(x), device=x.device),
            (magnitude.amax(-1) / magnitude.median(-1).values).double().sum(),
            x.double().square().sum(0),
            y.double().sum(0),
            y.T @ y,  # in float64 slow on many GPUs
            y.double().square().sum(-1).square().sum(),
        )
        return cls(*(value.double() for value in sums))

    def plus(self, other: "_Sums") -> "_Sums":
        return _Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def columns(self) -> dict[str, float]:
        n, d = self.tokens, len(self.x_square)
        square = self.y_gram.trace() / (n * d)
        features = self.y_gram / (n * square)
        strengths = features.diagonal()
        feature_squares = (features - strengths.diag()).square().sum() / (d * (d - 1))
        input_sum = (self.y.square().sum() - self.y_gram.trace()) / (d * square)
        input_squares = (self.y_gram.square().sum() - self.y_norm_4) / (d * square) ** 2
        columns = {
            "kurtosis": self.x_square.square().mean() / self.x_square.mean().square(),
            "max_median_ratio": self.ratio / n,
            "kurtosis_code": strengths.var(),
            "feature_correlation_rms": feature_squares.sqrt(),
            "input_correlation": input_sum / (n * (n - 1)),
            "input_correlation_rms": (input_squares / (n * (n - 1))).clamp(min=0).sqrt(),
        }
        return {name: value.item() for name, value in columns.items()} | {"tokens": int(n)}


def measure(models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], *, batch_size: int = 8) -> pd.DataFrame:
    """Measure outlier features of each model at every point of the residual stream.

    Returns a row a model, point (hook name) and token_class, all without unit: kurtosis, from 1 to d_model;
    max_median_ratio (of an even number of features the lower median); kurtosis_code, the variance of s_j²;
    feature_correlation_rms over pairs of features; input_correlation (mean) and input_correlation_rms over pairs of
    tokens. tokens: their number.
    """
    rows = []
    for name, model in models.items():
        points = residual_points(model)
        first: dict[str, _Sums] = {}
        rest: dict[str, _Sums] = {}
        for _, outputs in forwards({name: model}, tokens, points, batch_size, f"Outlier features of {name}"):
            for point in points:
                x = outputs[name].cache[point]
                for sums, part in ((first, x[:, :1]), (rest, x[:, 1:])):
                    sums[point] = sums[point].plus(_Sums.of(part)) if point in sums else _Sums.of(part)
        for point in points:
            for token_class, sum_ in zip(CLASSES, (first[point].plus(rest[point]), rest[point]), strict=True):
                rows.append({"model": name, "point": point, "token_class": token_class, **sum_.columns()})
    return pd.DataFrame(rows)


def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot what `measure` returns by point; dotted without position 0."""
    quantities = {
        "kurtosis": "Kurtosis<br>(no unit, 1 to width)",
        "max_median_ratio": "Max-median ratio<br>(no unit)",
        "feature_correlation_rms": "Feature correlation<br>(RMS, no unit)",
        "input_correlation": "Input correlation<br>(mean, no unit)",
    }
    figure = figures.lines(frame.assign(point=frame["point"].map(label)), "point", quantities, dash="token_class")
    figure.update_yaxes(type="log", dtick="D2", row=1).update_yaxes(type="log", row=2)
    return figure.update_xaxes(title="Point of the residual stream (layer, place)", row=4)
