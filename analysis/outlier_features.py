"""Outlier features: a few directions of the residual stream's basis that contain most of its norm.

Let X be the activations at a point of the residual stream, n tokens × d features, and s_j² the token mean of x_j².

- Kurtosis (He et al. 2024, "Understanding and Minimising Outlier Features", arXiv 2405.19279):
  mean_j(s_j⁴)/(mean_j s_j²)², from 1 (all features are equal) to d (a single feature).
- Max-median ratio (same paper): the mean over tokens of max_j|x_j| / median_j|x_j|.
- The quantities that the released code of He and Hofmann, "Simplifying Transformer Blocks" (arXiv 2311.01906), logs of
  Y, which is X minus each token's mean over the width, divided by the RMS over all tokens and features: the variance of
  Y's s_j², there also called kurtosis (it is the kurtosis of Y minus 1, times d/(d−1)); the correlations of features,
  the off-diagonal entries of YᵀY/n; the correlations of inputs, those of YYᵀ/d. Their X is one batch; here it is all
  tokens.

In models of `load_trio` with LayerNorm, the mean over the width, on which no prediction depends, is removed from X. In
models with RMSNorm, which reads the mean, it is not removed.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Int
from torch import Tensor

from analysis import figures
from analysis.batches import forwards
from analysis.stream import Stream, label
from finetune.features import FeatureSums

CLASSES = ("all", "all but position 0")
"""The second class exists because GPT-2's activations at position 0 are so large that they dominate the first."""


def measure(models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], *, batch_size: int = 8) -> pd.DataFrame:
    """Measure outlier features of each model at every point of the residual stream.

    Returns one row per model, point (hook name) and token_class. All measures are dimensionless: kurtosis, from 1 to
    d_model; max_median_ratio (the lower median of an even number of features); kurtosis_code, the variance of s_j²;
    feature_correlation_rms over pairs of features; input_correlation (mean) and input_correlation_rms over pairs of
    tokens. tokens: their number.
    """
    rows = []
    for name, model in models.items():
        points = Stream(model).points
        first: dict[str, FeatureSums] = {}
        rest: dict[str, FeatureSums] = {}
        said = f"Outlier features of {name}"
        for _, outputs in forwards({name: model}, tokens, points, batch_size, said, unembed=False):
            for point in points:
                x = outputs[name].cache[point]
                for sums, part in ((first, x[:, :1]), (rest, x[:, 1:])):
                    sums[point] = sums[point].plus(FeatureSums.of(part)) if point in sums else FeatureSums.of(part)
        for point in points:
            for token_class, sum_ in zip(CLASSES, (first[point].plus(rest[point]), rest[point]), strict=True):
                measured = {column: value.item() for column, value in sum_.measured().items()}
                row = {"model": name, "point": point, "token_class": token_class, **measured}
                rows.append(row | {"tokens": int(sum_.tokens)})
    return pd.DataFrame(rows)


@figures.of_text
def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure` by point. Dotted lines are without position 0."""
    quantities = {
        "kurtosis": "Kurtosis<br>(1 to width)",
        "max_median_ratio": "Max-median ratio",
        "feature_correlation_rms": "Correlation of<br>features (RMS)",
        "input_correlation": "Correlation of<br>tokens (mean)",
    }
    figure = figures.lines(frame.assign(point=frame["point"].map(label)), "point", quantities, dash="token_class")
    figure.update_yaxes(type="log", dtick="D2", row=1).update_yaxes(type="log", row=2)
    return figure.update_xaxes(title="Point of the residual stream (block, resid_pre, mid or post)", row=4)
