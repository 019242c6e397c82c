"""The size of the residual stream, from the embeddings to the end, and how it grows and rotates on the way.

1. At every hook point of the residual stream and for every token x: the L2 norm ‖x‖, and the (biased) std of x over the
   width. LayerNorm divides by the std. RMSNorm divides by ‖x‖/√d_model, which also depends on the mean over the width.
2. Relative to the point before: growth ‖x‖/‖x_before‖, and the cosine similarity of x and x_before.
3. Summaries over tokens. Position 0 and end-of-text tokens are separate from the others, because in GPT-2 they differ
   by far: Heimersheim 2024 (arXiv 2409.13710), Baroni et al. 2025 (arXiv 2507.02559).

In models of `load_trio` with LayerNorm, the mean over the width, on which no prediction depends, is removed from x, so
‖x‖ is the std times √d_model. In models with RMSNorm, which reads the mean, it is not removed. If the text has a
prefix, position 0 is the prefix, the same token in every block.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor
from torch.nn import functional as F

from analysis import figures, palette
from analysis.batches import forwards
from analysis.stream import Stream, label

CLASSES = ("ordinary", "position 0", "end-of-text")
"""The classes of token; position 0 wins over end-of-text."""
_TITLES = {"ordinary": "Ordinary tokens", "position 0": "Position 0", "end-of-text": "End-of-text tokens"}


def residual_points(model: Any) -> list[str]:
    """Return the hook names of the residual stream in order: `analysis.stream.Stream.points`."""
    return list(Stream(model).points)


def measure(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    eot_token_id: int | None = None,
    batch_size: int = 8,
) -> pd.DataFrame:
    """Measure the residual stream of each model at every point.

    Args:
        models: those of `analysis.load_trio`.
        tokens: packed blocks.
        eot_token_id: the end-of-text token. None: that of the model's tokenizer, if it has one.
        batch_size: blocks per forward. No result depends on it.

    Returns one row per model, point (hook name) and token_class that has tokens. norm and std: the mean over the tokens
    of the class, with `…_spread` (std over the tokens), `…_median` (the lower one of an even number, to 0.3 %) and
    `…_max`, all in units of the residual stream. growth and cosine: means over the tokens, dimensionless, NaN at the
    first point. tokens: their number.
    """
    return pd.concat(
        [_measure(*named, tokens, eot_token_id, batch_size) for named in models.items()], ignore_index=True
    )


def _measure(
    name: str, model: Any, tokens: Int[Tensor, "block pos"], eot_token_id: int | None, batch_size: int
) -> pd.DataFrame:
    if eot_token_id is None:
        eot_token_id = getattr(model.tokenizer, "eos_token_id", None)
    points = list(Stream(model).points)
    summaries = {token_class: _Summary() for token_class in CLASSES}
    said = f"Residual norms of {name}"
    for batch, outputs in forwards({name: model}, tokens, points, batch_size, said, unembed=False):
        values = _per_token([outputs[name].cache[point] for point in points])
        classes = torch.zeros_like(batch)
        if eot_token_id is not None:
            classes[batch == eot_token_id] = CLASSES.index("end-of-text")
        classes[:, 0] = CLASSES.index("position 0")
        for i, summary in enumerate(summaries.values()):
            if (classes == i).any():
                summary.add(values[..., classes == i])
    return pd.concat(
        [
            pd.DataFrame({"model": name, "point": points, "token_class": token_class, **summary.columns()})
            for token_class, summary in summaries.items()
            if summary.count
        ]
    )


def _per_token(residuals: Sequence[Float[Tensor, "batch pos d_model"]]) -> Float[Tensor, "4 point batch pos"]:
    """Return norm, std, growth and cosine of each token in float64. The last two are NaN at the first point."""
    norms = torch.stack([x.double().norm(dim=-1) for x in residuals])
    stds = torch.stack([x.double().std(dim=-1, correction=0) for x in residuals])
    cosines = torch.stack([F.cosine_similarity(x.double(), y.double(), dim=-1) for x, y in pairwise(residuals)])
    unknown = torch.full_like(norms[:1], torch.nan)
    return torch.stack([norms, stds, torch.cat([unknown, norms[1:] / norms[:-1]]), torch.cat([unknown, cosines])])


class _Summary:
    """The reported statistics, computed batch by batch.

    A median is the mean of the values in the bucket of the middle value. Buckets are 0.3 % wide, so memory does not
    grow with the number of tokens.
    """

    OCTAVES = 20
    """Buckets cover 2^-20 to 2^20. Values outside count in the first or last bucket."""
    PER_OCTAVE = 256

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0
        self.squares: Any = 0
        self.greatest = torch.tensor(-torch.inf, dtype=torch.float64)
        self.bucket_count: Any = 0
        self.bucket_total: Any = 0

    def add(self, values: Float[Tensor, "4 point token"]) -> None:
        self.count += values.shape[-1]
        self.total = self.total + values.sum(-1)
        self.squares = self.squares + values.square().sum(-1)
        self.greatest = torch.maximum(values.amax(-1), self.greatest)
        octaves = values[:2].log2().nan_to_num(-self.OCTAVES).clamp(-self.OCTAVES, self.OCTAVES)
        bucket = ((octaves + self.OCTAVES) * self.PER_OCTAVE).long().flatten(0, 1)
        size = 2 * self.OCTAVES * self.PER_OCTAVE + 1
        bucket = (bucket + size * torch.arange(len(bucket), device=bucket.device)[:, None]).flatten()
        shape = (2, values.shape[1], size)
        length = math.prod(shape)
        self.bucket_count = self.bucket_count + bucket.bincount(minlength=length).view(shape)
        self.bucket_total = self.bucket_total + bucket.bincount(values[:2].flatten(), length).view(shape)

    def columns(self) -> dict[str, Any]:
        mean = self.total / self.count
        spread = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        middle = (2 * self.bucket_count.cumsum(-1) < self.count).sum(-1, keepdim=True)
        median = (self.bucket_total.gather(-1, middle) / self.bucket_count.gather(-1, middle)).squeeze(-1)
        columns = {}
        for i, quantity in enumerate(("norm", "std")):
            columns[quantity] = mean[i]
            columns[f"{quantity}_spread"] = spread[i]
            columns[f"{quantity}_median"] = median[i]
            columns[f"{quantity}_max"] = self.greatest[i]
        columns |= {"growth": mean[2], "cosine": mean[3]}
        return {column: values.cpu().numpy() for column, values in columns.items()} | {"tokens": self.count}


@figures.of_text
def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure`: mean, spread and maximum of norm and std by point, one row per token class."""
    titles = {"norm": "L2 norm (no unit)", "std": "Std over the width (no unit)"}
    classes = [token_class for token_class in CLASSES if (frame["token_class"] == token_class).any()]
    figure = make_subplots(
        len(classes), len(titles), shared_xaxes=True, column_titles=list(titles.values()), vertical_spacing=0.04
    )
    for (model, token_class), group in frame.groupby(["model", "token_class"], sort=False):
        row = classes.index(token_class) + 1
        for col, quantity in enumerate(titles, start=1):
            style = {
                "x": group["point"].map(label),
                "name": model,
                "legendgroup": model,
                "line_color": palette.colour(model),
            }
            figure.add_scatter(
                y=group[quantity],
                error_y={"array": group[f"{quantity}_spread"], "thickness": 1, "width": 2},
                showlegend=row == col == 1,
                **style,
                row=row,
                col=col,
            )
            figure.add_scatter(
                y=group[f"{quantity}_max"],
                mode="markers",
                marker={"symbol": "line-ew-open", "size": 9},
                hovertemplate="%{x}: maximum %{y:.3g}",
                showlegend=False,
                **style,
                row=row,
                col=col,
            )
    for row, token_class in enumerate(classes, start=1):
        figure.update_yaxes(title=_TITLES[token_class], row=row, col=1)
    figure.update_layout(
        title="Mean over tokens, with std over tokens (bars) and maximum (—)", height=150 + 250 * len(classes)
    )
    figure.update_xaxes(title="Point of the residual stream<br>(block, resid_pre, mid or post)", row=len(classes))
    return figure.update_yaxes(type="log", dtick="D2")


@figures.of_text
def plot_steps(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure`: growth and cosine from each point to the next, one column per token class."""
    steps = frame[frame["growth"].notna()].assign(point=lambda rows: rows["point"].map(label))
    steps = steps.replace({"token_class": _TITLES})
    quantities = {
        "growth": "L2 norm over that at<br>the point before",
        "cosine": "Cosine similarity<br>with the point before",
    }
    figure = figures.lines(steps, "point", quantities, column="token_class").update_yaxes(type="log", dtick="D2", row=1)
    return figure.update_xaxes(title="Point (block, resid_…)", row=2)
