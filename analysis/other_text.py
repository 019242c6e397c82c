"""Whether a model is still the same on other text, and the mechanism by which it fails if it is not.

1. By text: the loss, its difference to the reference's, and the JSD to the reference, with the worst token of each.
2. The mechanism. An LN-free model divides every token by the same constant. If the std of a token's residual stream
   differs from the stds on which the constant was measured, the token is read too large or too small, and the next one
   is mispredicted. Therefore the excess loss, that of the LN-free model minus the reference's, is shown against the std
   of the token from which it is predicted, divided by the constant, at each point of the stream.

A constant that is folded into weights cannot be separated from the gain. It is represented by the mean std over the
tokens of a text like the one of fine-tuning, which is proportional, at every site, to the constant that divides. For
RMSNorm, everything is about the RMS instead. The divisors of post-norms (Gemma 2) are not considered.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Int
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots
from torch import Tensor

from analysis import figures, palette
from analysis.batches import forwards, pieces
from analysis.stream import Stream, label
from finetune.evaluate import js_divergence

_PER_OCTAVE = 4
"""The number of bins per factor of two of the ratio of std and constant."""


@torch.inference_mode()
def measure_tokens(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    text: str = "text",
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Measure each model at every token of `tokens` that has one before it in its block.

    Args:
        models: those of `analysis.load_trio`.
        tokens: packed blocks.
        text: the name of the text.
        reference: the model to compare with. It has its own rows.
        batch_size: blocks per forward. No result depends on it.

    Returns one row per token and model. Columns: text; model; block and position of the predicted token; loss (nats);
    difference (nats), loss minus that of `reference`; jsd (nats) to the reference; and for each point of the residual
    stream, under its hook name, the std at the token before, in units of the stream (NaN for models with norms).
    """
    points = Stream(models[reference]).points
    norm_free = [name for name, model in models.items() if Stream(model).norm is None]
    values: dict[str, list[np.ndarray]] = {name: [] for name in models}
    for batch, outputs in forwards(models, tokens, points, batch_size, f"Comparing on {text}", float32=True):
        for i, block in enumerate(batch):
            for piece in pieces(len(block) - 1, models[reference].cfg.d_vocab, block.device):
                log_probs = {name: output.logits[i, piece].float().log_softmax(-1) for name, output in outputs.items()}
                for name, found in log_probs.items():
                    columns = [
                        -found.gather(-1, block[1:][piece].unsqueeze(-1)).squeeze(-1),
                        js_divergence(log_probs[reference], found),
                    ]
                    if name in norm_free:
                        cache = outputs[name].cache
                        columns += [cache[point][i, piece].double().square().mean(-1).sqrt() for point in points]
                    values[name].append(torch.stack([column.double().cpu() for column in columns], dim=1).numpy())
    block, position = np.indices((len(tokens), tokens.shape[1] - 1)).reshape(2, -1)
    measured = {name: np.concatenate(rows) for name, rows in values.items()}
    frames = []
    for name, (loss, jsd, *stds) in ((name, rows.T) for name, rows in measured.items()):
        frame = pd.DataFrame({"text": text, "model": name, "block": block, "position": position + 1, "loss": loss})
        frame["difference"], frame["jsd"] = loss - measured[reference][:, 0], jsd
        frame[list(points)] = np.transpose(stds) if stds else np.nan
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Average the table of `measure_tokens` over the tokens of each text and model.

    Returns one row per text and model. Columns: these; the means over tokens of loss, difference and jsd, and their
    maxima, `…_max`, all in nats; tokens.
    """
    measures = {
        column: (name, how)
        for name in ("loss", "difference", "jsd")
        for column, how in ((name, "mean"), (f"{name}_max", "max"))
    }
    return frame.groupby(["text", "model"], sort=False).agg(**measures, tokens=("loss", "size")).reset_index()


def measure(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    text: str = "text",
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Compare models on a text: `summarise` of `measure_tokens`, with the same arguments."""
    return summarise(measure_tokens(models, tokens, text=text, reference=reference, batch_size=batch_size))


def by_std(frame: pd.DataFrame) -> pd.DataFrame:
    """Average the excess loss by the ratio of std and constant, from the table of `measure_tokens`.

    The constants are means over the tokens after position 0 of the first text in `frame`.

    Returns one row per text, model without norms, point of the residual stream, and bin of the ratio that contains
    tokens. There are four bins per factor of two. Columns: text, model, point; ratio, std over constant at the centre
    of the bin, without units; difference, the mean excess loss, and difference_max, that of the worst token, both in
    nats; tokens.
    """
    points = [column for column in frame if "hook_resid" in column]
    rows = []
    for (text, model), group in frame.groupby(["text", "model"], sort=False):
        if group[points].isna().all(axis=None):
            continue
        own = frame[(frame["text"] == frame["text"].iloc[0]) & (frame["model"] == model) & (frame["position"] > 1)]
        ratios = np.log2(group[points] / own[points].mean())
        for point in points:
            bins = (ratios[point] * _PER_OCTAVE).round().rename("bin")
            binned = group.groupby(bins)["difference"].agg(difference="mean", difference_max="max", tokens="size")
            binned.insert(0, "ratio", 2.0 ** (binned.index / _PER_OCTAVE))
            rows.append(binned.assign(text=text, model=model, point=point))
    columns = ["text", "model", "point", "ratio", "difference", "difference_max", "tokens"]
    return pd.concat(rows, ignore_index=True)[columns] if rows else pd.DataFrame(columns=columns)


def measure_stds(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    text: str = "text",
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Measure the excess loss by std over constant: `by_std` of `measure_tokens`, with the same arguments.

    The constants are then those of this text. To use those of another text, apply `by_std` to the concatenated tables
    of `measure_tokens` for both, with the other text first.
    """
    return by_std(measure_tokens(models, tokens, text=text, reference=reference, batch_size=batch_size))


@figures.of_text
def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot what `measure` returns: means by text, and the largest of a token (✖)."""
    titles = {"difference": "Loss minus the original's<br>(nats/token)", "jsd": "JSD to the original<br>(nats/token)"}
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    for model, group in frame[frame["jsd_max"] > 0].groupby("model", sort=False):
        for row, column in enumerate(titles, start=1):
            for name, symbol in ((column, "circle"), (f"{column}_max", "x")):
                figure.add_scatter(
                    x=group["text"],
                    y=group[name],
                    name=model,
                    legendgroup=model,
                    offsetgroup=model,
                    showlegend=row == 1 and symbol == "circle",
                    mode="markers",
                    cliponaxis=False,
                    marker={"color": palette.colour(str(model)), "size": 9, "symbol": symbol},
                    hovertemplate=f"%{{x}}: {'worst token' if symbol == 'x' else 'mean'} %{{y:.3g}} nats",
                    row=row,
                    col=1,
                )
    for row, title in enumerate(titles.values(), start=1):
        figure.update_yaxes(title=title, row=row, col=1)
    figure.update_yaxes(type="log", row=2).update_xaxes(title="Text", row=2)
    return figure.update_layout(scattermode="group", title="Mean over tokens (●) and worst token (✖)", height=600)


@figures.of_text
def plot_stds(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure_stds` for one model: one panel per text, one line per point of the stream."""
    texts, points = list(frame["text"].unique()), list(frame["point"].unique())
    colours = dict(zip(points, sample_colorscale("Viridis", np.linspace(0, 0.9, max(2, len(points)))), strict=False))
    figure = make_subplots(
        max(1, len(texts)), 1, shared_xaxes=True, subplot_titles=texts, vertical_spacing=0.2 / max(1, len(texts))
    )
    for (text, point), line in frame[frame["model"] == frame["model"].iloc[:1].squeeze()].groupby(
        ["text", "point"], sort=False
    ):
        figure.add_scatter(
            x=line["ratio"],
            y=line["difference"],
            customdata=line[["difference_max", "tokens"]],
            name=label(str(point)),
            legendgroup=str(point),
            showlegend=text == texts[0],
            mode="lines+markers",
            line={"color": colours[point], "width": 1.5},
            marker={"size": np.clip(2 + np.log2(line["tokens"].to_numpy(float)), 3, 10)},
            hovertemplate="%{x:.2f} × the constant: mean %{y:.3f} nats, worst token %{customdata[0]:.2f} nats, "
            "%{customdata[1]} tokens",
            row=texts.index(text) + 1,
            col=1,
        )
    figure.update_xaxes(type="log", tickvals=[2.0**power for power in range(-6, 7)])
    figure.update_xaxes(title="Std of a token over the constant (no unit; larger dots: more tokens)", row=len(texts))
    figure.update_yaxes(title="Loss minus the<br>original's (nats/token)")
    figure.update_layout(legend={"title": "Point<br>(block, resid_…)", "tracegroupgap": 0})
    return figure.update_layout(height=150 + 280 * max(1, len(texts)))
