"""Sums over tokens from which outlier features are computed: over one batch in training, over many in an analysis.

`analysis.outlier_features` defines the measures. No tokens × tokens matrix is needed, because ‖YYᵀ‖ = ‖YᵀY‖ (Frobenius)
and the entries of YYᵀ sum to |Σ y|².
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class FeatureSums(NamedTuple):
    """Sums over tokens of activations x, all in one dtype. y is x minus its mean over the width."""

    tokens: Float[Tensor, ""]
    ratio: Float[Tensor, ""]
    """max|x| / median|x|."""
    x_square: Float[Tensor, " d_model"]
    y: Float[Tensor, " d_model"]
    y_gram: Float[Tensor, "d_model d_model"]
    y_norm_4: Float[Tensor, ""]
    """‖y‖⁴."""

    @classmethod
    def of(cls, x: Float[Tensor, "batch pos d_model"], dtype: torch.dtype = torch.float64) -> "FeatureSums":
        """Sum over the tokens of x, in `dtype`. Not every device supports float64."""
        x = x.float().flatten(0, 1)
        y = x - x.mean(-1, keepdim=True)
        magnitude = x.abs()
        sums = (
            torch.tensor(len(x), device=x.device),
            (magnitude.amax(-1) / magnitude.median(-1).values).to(dtype).sum(),
            x.to(dtype).square().sum(0),
            y.to(dtype).sum(0),
            y.T @ y,  # float64 would be slow on many GPUs
            y.to(dtype).square().sum(-1).square().sum(),
        )
        return cls(*(value.to(dtype) for value in sums))

    def plus(self, other: "FeatureSums") -> "FeatureSums":
        """Return the sums over the tokens of both `self` and `other`."""
        return FeatureSums(*(a + b for a, b in zip(self, other, strict=True)))

    def measured(self) -> dict[str, Float[Tensor, ""]]:
        """Return the measures of `analysis.outlier_features.measure`, by name. They have no units."""
        n, d = self.tokens, len(self.x_square)
        square = self.y_gram.trace() / (n * d)
        features = self.y_gram / (n * square)
        strengths = features.diagonal()
        input_sum = (self.y.square().sum() - self.y_gram.trace()) / (d * square)
        input_squares = (features.square().sum() * n**2 - self.y_norm_4 / square**2) / d**2
        return {
            "kurtosis": self.x_square.square().mean() / self.x_square.mean().square(),
            "max_median_ratio": self.ratio / n,
            "kurtosis_code": strengths.var(),
            "feature_correlation_rms": ((features - strengths.diag()).square().sum() / (d * (d - 1))).sqrt(),
            "input_correlation": input_sum / (n * (n - 1)),
            "input_correlation_rms": (input_squares / (n * (n - 1))).clamp(min=0).sqrt(),
        }
