"""How well models predict each next token: by model, by position, and token by token.

1. The cross-entropy (CE) of every next token under every model, from log-probabilities in float32.
2. Its mean over tokens, with documents as independent samples, and the same for the difference to a reference.
3. Median, 95 and 99.9 percentiles, and the worst tokens. The mean of an LN-free model may be dominated by very few
   tokens, like the 130.2 of GPT-2 XL on the Pile, which is due to three samples (Baroni et al. 2025, arXiv 2507.02559).

Tables have a column `text`. Concatenate the tables of several texts with `pandas.concat` to plot them side by side.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Int
from plotly.subplots import make_subplots
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from analysis import figures, palette
from analysis.batches import forwards, pieces
from finetune.evaluate import mean_and_error


def measure_tokens(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    documents: Int[np.ndarray, "block pos"] | None = None,
    *,
    text: str = "text",
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Measure each model's CE at every token of `tokens` that has one before it in its block.

    Args:
        models: those of `analysis.load_trio`.
        tokens: packed blocks.
        documents: the document of each token, `Blocks.document_ids()`. None: each block is one document.
        text: the name of the text.
        reference: the model to subtract.
        batch_size: blocks per forward. No result depends on it.

    Returns one row per token and model: text, model; block, position and token (id) of the predicted token; document of
    the token before it; loss (nats); difference (loss minus that of `reference`, NaN without one, nats).
    """
    # Allocated in full: small arrays kept from each batch would fragment the memory of the large ones.
    loss = {name: np.empty((len(tokens), tokens.shape[1] - 1)) for name in models}
    for name, model in models.items():  # one model at a time, because logits are large
        end = 0
        for batch, outputs in forwards({name: model}, tokens, (), batch_size, f"Loss of {name}", float32=True):
            end += len(batch)
            logits, targets = outputs[name].logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
            values = [
                F.cross_entropy(logits[piece].float(), targets[piece], reduction="none")
                for piece in pieces(len(targets), model.cfg.d_vocab, targets.device)
            ]
            loss[name][end - len(batch) : end] = torch.cat(values).view(len(batch), -1).double().cpu().numpy()
    if documents is None:
        documents = np.broadcast_to(np.arange(len(tokens))[:, None], tokens.shape)
    block, position = np.indices((len(tokens), tokens.shape[1] - 1)).reshape(2, -1)
    predicted = {
        "block": block,
        "position": position + 1,
        "token": tokens[:, 1:].cpu().numpy().ravel(),
        "document": documents[:, :-1].ravel(),
    }
    subtracted = loss.get(reference, np.full_like(next(iter(loss.values())), np.nan))
    frames = [
        pd.DataFrame(
            {
                "text": text,
                "model": name,
                **predicted,
                "loss": loss[name].ravel(),
                "difference": (loss[name] - subtracted).ravel(),
            }
        )
        for name in models
    ]
    return pd.concat(frames, ignore_index=True)


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Average the table of `measure_tokens` over the tokens of each text and model.

    Returns one row per text and model, in nats/token: loss (the mean over tokens) and difference (to the reference),
    each with its standard error over documents, `…_error`; median, percentile_95, percentile_99_9, max; tokens;
    documents.
    """
    rows = []
    for (text, model), group in frame.groupby(["text", "model"], sort=False):
        row = {"text": text, "model": model}
        documents = group["document"].to_numpy()
        for column in ("loss", "difference"):
            values = group[column].to_numpy()
            known = not np.isnan(values).any()
            row[column], row[f"{column}_error"] = mean_and_error(values, documents) if known else (np.nan, np.nan)
        percentiles = np.percentile(group["loss"], list(figures.TAIL.values()))
        row |= dict(zip(figures.TAIL, percentiles, strict=True))
        rows.append(row | {"tokens": len(group), "documents": len(np.unique(documents))})
    return pd.DataFrame(rows)


def average_positions(frame: pd.DataFrame) -> pd.DataFrame:
    """Average the table of `measure_tokens` over blocks, position by position.

    Returns one row per text, model and position (of the predicted token): loss, the mean over blocks, and loss_error,
    its standard error over blocks, in nats/token; tokens.
    """
    by_position = frame.groupby(["text", "model", "position"], sort=False)["loss"]
    return by_position.agg(loss="mean", loss_error="sem", tokens="size").reset_index()


def measure(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    documents: Int[np.ndarray, "block pos"] | None = None,
    *,
    text: str = "text",
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Measure each model's CE on a text: `summarise` of `measure_tokens`, with the same arguments."""
    return summarise(measure_tokens(models, tokens, documents, text=text, reference=reference, batch_size=batch_size))


def measure_positions(
    models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], *, text: str = "text", batch_size: int = 8
) -> pd.DataFrame:
    """Measure each model's CE by position: `average_positions` of `measure_tokens`, with the same arguments."""
    return average_positions(measure_tokens(models, tokens, text=text, batch_size=batch_size))


def worst_tokens(
    frame: pd.DataFrame,
    tokens: Int[Tensor, "block pos"],
    tokenizer: PreTrainedTokenizerBase,
    k: int = 10,
    *,
    by: Literal["loss", "difference"] = "loss",
    context: int = 20,
) -> pd.DataFrame:
    """Return the `k` tokens of each model with the largest loss, or the largest difference to the reference above 0.

    Args:
        frame: the table of `measure_tokens` for one text.
        tokens: the tokens that it was measured on.
        tokenizer: turns them into text.
        k: the number of tokens per model.
        by: the column to sort by.
        context: the number of preceding tokens, in the same block, to show.

    Returns the rows of `frame`, model by model with the worst first, with token as text, and a last column context.
    """
    worst = frame[frame[by] > 0].sort_values(by, ascending=False, kind="stable").groupby("model", sort=False).head(k)
    worst = pd.concat([worst[worst["model"] == model] for model in frame["model"].unique()], ignore_index=True)
    before = [
        tokens[block, max(0, position - context) : position]
        for block, position in zip(worst["block"], worst["position"], strict=True)
    ]
    return worst.assign(
        token=[tokenizer.decode([token]) for token in worst["token"]],
        context=[tokenizer.decode(ids) for ids in before],
    )


@figures.of_text
def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot what `measure` returns: means with standard errors, and the tail."""
    titles = "Mean over tokens, with its standard error over documents", figures.TAIL_TITLE
    figure = make_subplots(2, 1, subplot_titles=titles, vertical_spacing=0.15)
    for model, group in frame.groupby("model", sort=False):
        figure.add_scatter(
            x=group["text"],
            y=group["loss"],
            error_y={"array": group["loss_error"]},
            name=model,
            legendgroup=model,
            offsetgroup=model,
            mode="markers",
            marker={"color": palette.colour(model), "size": 9},
            row=1,
            col=1,
        )
        figures.add_tail(figure, str(model), group["text"], {name: group[name] for name in figures.TAIL}, row=2, col=1)
    figure.update_layout(scattermode="group", height=700)
    figure.update_xaxes(title="Text", row=2)
    return figure.update_yaxes(title="CE (nats/token)")


@figures.of_text
def plot_positions(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure_positions`, one panel per text."""
    texts = list(frame["text"].unique())
    figure = _panels(texts)
    for (model, text), group in frame.groupby(["model", "text"], sort=False):
        figure.add_scatter(
            x=group["position"],
            y=group["loss"],
            name=model,
            legendgroup=model,
            showlegend=text == texts[0],
            mode="lines",
            line={"color": palette.colour(model), "width": 1.5},
            customdata=group["loss_error"],
            hovertemplate="position %{x}: %{y:.3f} ± %{customdata:.3f} nats/token",
            row=texts.index(text) + 1,
            col=1,
        )
    figure.update_xaxes(type="log", dtick="D2").update_xaxes(title="Position in the block (tokens)", row=len(texts))
    return figure.update_yaxes(title="Mean CE (nats/token)")


@figures.of_text
def plot_tokens(frame: pd.DataFrame, reference: str = "original") -> go.Figure:
    """Plot the distribution of the differences to `reference` in the table of `measure_tokens`, one panel per text.

    Tokens at which a model overflows have no place on the axis. The title of the panel gives their number.
    """
    frame = frame[frame["model"] != reference]
    texts = list(frame["text"].unique())
    finite = np.isfinite(frame["difference"])
    lost = frame[~finite].groupby(["text", "model"], sort=False).size()
    notes = {
        text: "".join(f"; {model} overflows at {n} tokens" for (of, model), n in lost.items() if of == text)
        for text in texts
    }
    figure = _panels([text + notes[text] for text in texts])
    frame = frame[finite]
    edges = np.histogram_bin_edges(frame["difference"], bins=200)
    for (model, text), group in frame.groupby(["model", "text"], sort=False):
        counts, _ = np.histogram(group["difference"], edges)
        figure.add_scatter(
            x=(edges[1:] + edges[:-1]) / 2,
            y=np.where(counts > 0, counts, np.nan),  # a logarithmic axis cannot show 0
            name=model,
            legendgroup=model,
            showlegend=text == texts[0],
            mode="lines+markers",
            line={"color": palette.colour(model), "shape": "hvh", "width": 1.5},
            marker={"size": 3},
            row=texts.index(text) + 1,
            col=1,
        )
    figure.update_xaxes(title=f"CE of a token minus that of {reference} (nats)", row=len(texts))
    return figure.update_yaxes(title="Number of tokens", type="log")


def _panels(texts: list[str]) -> go.Figure:
    """Return an empty figure with one panel per text, arranged vertically."""
    figure = make_subplots(len(texts), 1, shared_xaxes=True, subplot_titles=texts, vertical_spacing=0.2 / len(texts))
    return figure.update_layout(height=150 + 300 * len(texts))
