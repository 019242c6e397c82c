"""How much heads attend to position 0, the attention sink, and how spread out their attention is.

1. Attention patterns are reduced layer by layer while a model runs. None is kept.
2. For each head, over all blocks and query positions ≥ 1: the sink rate, which is the fraction of query positions whose
   attention to position 0 exceeds 0.3 (Baroni et al. 2025, arXiv 2507.02559); the mean attention to position 0; the
   mean entropy of the pattern.
3. All heads have the same number of query positions, so a model's numbers are the means of its heads'.

Without a prefix, position 0 can be any token of the text. With a prefix, it is the prefix in all blocks. Do not compare
sink rates with and without a prefix. A head with local attention does not see position 0 from beyond its window.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from analysis import figures, palette
from analysis.batches import forwards

SINK_THRESHOLD = 0.3
"""A query position counts in the sink rate if its attention to position 0 exceeds this."""


def measure_heads(models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], *, batch_size: int = 8) -> pd.DataFrame:
    """Measure the attention of each head.

    Returns one row per model, layer and head: sink_rate (a fraction); sink_rate_code, which also counts query position
    0, as the paper's released code does, although it can attend to nothing else; attention_to_0 (a fraction) and
    entropy (nats), means over blocks and query positions ≥ 1.
    """
    queries = tokens.shape[1] - 1
    frames = []
    for name, model in models.items():
        cfg = model.cfg
        total = torch.zeros(cfg.n_layers, 3, cfg.n_heads, dtype=torch.float64, device=cfg.device)
        hooks = [(f"blocks.{i}.attn.hook_pattern", partial(_add, total=total[i])) for i in range(cfg.n_layers)]
        with model.hooks(fwd_hooks=hooks):
            for _ in forwards({name: model}, tokens, (), batch_size, f"Attention of {name}", unembed=False):
                pass
        layer, head = np.indices((cfg.n_layers, cfg.n_heads)).reshape(2, -1)
        sink_rate, attention_to_0, entropy = (total / (len(tokens) * queries)).movedim(1, 0).flatten(1).cpu().numpy()
        means = {
            "sink_rate": sink_rate,
            "sink_rate_code": (sink_rate * queries + 1) / (queries + 1),
            "attention_to_0": attention_to_0,
            "entropy": entropy,
        }
        frames.append(pd.DataFrame({"model": name, "layer": layer, "head": head, **means}))
    return pd.concat(frames, ignore_index=True)


def _add(pattern: Float[Tensor, "batch head query key"], hook: Any, *, total: Float[Tensor, "3 head"]) -> None:
    """Add the sums over blocks and query positions ≥ 1 of sinks, attention to position 0 and entropy to `total`."""
    pattern = pattern[:, :, 1:].double()
    to_0 = pattern[..., 0]
    total += torch.stack([to_0 > SINK_THRESHOLD, to_0, torch.special.entr(pattern).sum(-1)]).sum((1, 3))


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Average the table of `measure_heads` over all heads: one row per model, without the columns layer and head."""
    return frame.drop(columns=["layer", "head"]).groupby("model", sort=False).mean().reset_index()


def measure(models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], *, batch_size: int = 8) -> pd.DataFrame:
    """Measure the attention of each model: `summarise` of `measure_heads`."""
    return summarise(measure_heads(models, tokens, batch_size=batch_size))


@figures.of_text
def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure`: fractions on the left, entropy on the right."""
    shares = {
        "sink_rate": "Sink rate",
        "sink_rate_code": "Sink rate,<br>counting query 0",
        "attention_to_0": "Mean attention<br>to position 0",
    }
    figure = make_subplots(1, 2, column_widths=[0.75, 0.25], horizontal_spacing=0.12)
    for row in frame.itertuples():
        style = {"name": row.model, "legendgroup": row.model, "marker_color": palette.colour(row.model)}
        style |= {"texttemplate": "%{y:.3f}", "textposition": "outside", "textangle": -90}
        figure.add_bar(x=list(shares.values()), y=[getattr(row, share) for share in shares], **style, row=1, col=1)
        figure.add_bar(x=["Entropy of<br>patterns"], y=[row.entropy], showlegend=False, **style, row=1, col=2)
    figure.update_yaxes(range=[0, 1.05], row=1, col=1)
    figure.update_yaxes(range=[0, 1.3 * frame["entropy"].max()], row=1, col=2)  # room for the numbers
    return figure.update_layout(yaxis_title="Share", yaxis2_title="Mean entropy (nats)")


@figures.of_text
def plot_heads(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure_heads` as heat maps: one row per measure, one column per model."""
    entropy = {"cmin": 0, "cmax": frame["entropy"].max()}
    return figures.heat_maps(
        frame,
        {
            "sink_rate": ("Sink rate<br>(share)", {"cmin": 0, "cmax": 1}),
            "attention_to_0": ("Mean attention<br>to position 0<br>(share)", {"cmin": 0, "cmax": 1}),
            "entropy": ("Entropy<br>(nats)", entropy),
        },
    )
