"""Does a model still compute what a reference does: its predictions, residual streams, heads and neurons.

1. Predictions, token by token: JSD and KL to the reference, whether the top token is the same, and the rank correlation
   of the reference's top tokens; of each model its entropy, and its calibration as the expected calibration error (ECE)
   over equal bins of the top token's probability (Guo et al. 2017, arXiv 1706.04599).
2. Residual streams between blocks: cosine similarity, token by token, and linear CKA, which sees no rotation
   (Kornblith et al. 2019, arXiv 1905.00414).
3. Heads: the total variation distance of attention patterns, and the correlation over tokens of their direct logit
   attribution of the next token: are they the same heads that make the prediction?
4. Neurons of MLPs: the correlation over tokens of their activations.

CKA and correlations come from sums over tokens in float64, so that memory does not grow with the number of tokens.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from scipy.stats import pearsonr, rankdata
from torch import Tensor
from torch.nn import functional as F

from analysis import figures, palette
from analysis.batches import forwards, predictions
from analysis.readout import Readout
from analysis.stream import Stream
from finetune.evaluate import js_divergence, kl_divergence

_TOP = 50
"""How many of the reference's top tokens are ranked."""
_BINS = 10
"""Of the top token's probability."""
_COLUMNS = ("jsd", "kl", "agreement", "rank_correlation", "entropy", "confidence", "correct")
_PATTERNS_AT_ONCE = 2**28
"""Numbers in one model's attention patterns of one batch: bounds the memory, and no result depends on it."""
_POSITIONS = {"all": 0, "after 0": 1}
"""From which position on residual streams are compared: in GPT-2 the one at 0 is so long that CKA sees little else."""


@torch.inference_mode()
def measure_tokens(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Compare the prediction of every next token with that of `models[reference]`.

    Args:
        models: what `analysis.load_trio` returns.
        tokens: packed blocks.
        reference: the model to compare with; it has rows of its own.
        batch_size: blocks in one forward; no result depends on it.

    Returns one row per token and model. Columns: model; reference; block and position of the token that is predicted;
    jsd and kl, KL(reference ‖ model), nats; agreement, whether both have the same top token; rank_correlation,
    Spearman's over the logits of the reference's top 50 tokens; entropy, nats; confidence, the probability of the top
    token; correct, whether that is the token.
    """
    # Made whole: small arrays kept from each block would lie between the large ones, whose place could not be reused.
    values = {name: np.empty((tokens[:, 1:].numel(), len(_COLUMNS))) for name in models}
    end = 0
    for targets, log_probs in predictions(models, tokens, batch_size):
        end += len(targets)
        expected = log_probs[reference]
        top = expected.topk(min(_TOP, expected.shape[-1])).indices
        expected_ranks = rankdata(expected.gather(-1, top).cpu(), axis=-1)
        for name, found in log_probs.items():
            ranks = rankdata(found.gather(-1, top).cpu(), axis=-1)
            log_prob, likeliest = found.max(-1)
            columns = (
                js_divergence(expected, found),
                kl_divergence(expected, found),
                top[:, 0] == likeliest,
                torch.from_numpy(pearsonr(expected_ranks, ranks, axis=-1).statistic),
                -(found.exp() * found).sum(-1),
                log_prob.double().exp(),
                likeliest == targets,
            )
            rows = slice(end - len(targets), end)
            values[name][rows] = torch.stack([column.double().cpu() for column in columns], dim=1).numpy()
    block, position = np.indices((len(tokens), tokens.shape[1] - 1)).reshape(2, -1)
    frames = []
    for name in models:
        frame = pd.DataFrame({"model": name, "reference": reference, "block": block, "position": position + 1})
        frame[list(_COLUMNS)] = values[name]
        frames.append(frame)
    return pd.concat(frames, ignore_index=True).astype({"agreement": bool, "correct": bool})


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Average what `measure_tokens` returns over the tokens of each model.

    Returns one row per model. Columns: model; reference; the means over tokens of jsd and kl, nats, agreement, from 0
    to 1, rank_correlation, dimensionless, and entropy, nats; of jsd and kl also `…_median`, `…_percentile_95`,
    `…_percentile_99_9` and `…_max`; accuracy of the top token, from 0 to 1; ece, over 10 bins, from 0 to 1; tokens.
    """
    rows = []
    bins = calibrate(frame)
    for (model, reference), tokens in frame.groupby(["model", "reference"], sort=False):
        row = {"model": model, "reference": reference}
        for column in ("jsd", "kl"):
            values = np.percentile(tokens[column], list(figures.TAIL.values()))
            tail = {f"{column}_{name}": value for name, value in zip(figures.TAIL, values, strict=True)}
            row |= {column: tokens[column].mean(), **tail}
        row |= tokens[["agreement", "rank_correlation", "entropy"]].mean().to_dict()
        full = bins[(bins["model"] == model) & (bins["tokens"] > 0)]
        errors = (full["accuracy"] - full["confidence"]).abs()
        row |= {"accuracy": tokens["correct"].mean(), "ece": np.average(errors, weights=full["tokens"])}
        rows.append(row | {"tokens": len(tokens)})
    return pd.DataFrame(rows)


def calibrate(frame: pd.DataFrame) -> pd.DataFrame:
    """Measure how often the top token is right, by its probability, from what `measure_tokens` returns.

    Returns one row per model and bin of the top token's probability. Columns: model; bin_start and bin_end, which is in
    the bin; confidence, the mean probability, and accuracy, both from 0 to 1, NaN in an empty bin; tokens.
    """
    edges = np.linspace(0, 1, _BINS + 1)
    frames = []
    for model, tokens in frame.groupby("model", sort=False):
        of_bins = tokens.groupby(np.searchsorted(edges[1:-1], tokens["confidence"]))
        bins = of_bins.agg(confidence=("confidence", "mean"), accuracy=("correct", "mean"), tokens=("correct", "size"))
        bins = bins.reindex(range(_BINS)).fillna({"tokens": 0}).astype({"tokens": int})
        bins.insert(0, "model", model)
        bins.insert(1, "bin_start", edges[:-1])
        bins.insert(2, "bin_end", edges[1:])
        frames.append(bins)
    return pd.concat(frames, ignore_index=True)


def measure(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Compare the predictions of models with a reference's: `summarise` of `measure_tokens`, whose arguments it takes.

    Raises:
        ValueError: no model is called `reference`, or there is no other model.
    """
    _check(models, reference)
    return summarise(measure_tokens(models, tokens, reference=reference, batch_size=batch_size))


@figures.of_text
def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot what `measure` returns, one panel per quantity."""
    titles = {
        "jsd": "JSD to the reference<br>(nats/token)",
        "kl": "KL from the reference<br>(nats/token)",
        "agreement": "Same top token as<br>the reference (share)",
        "rank_correlation": f"Rank correlation of the<br>reference’s top {_TOP}",
        "entropy": "Entropy of predictions<br>(nats/token)",
        "ece": "Calibration error<br>(ECE, probability)",
    }
    figure = make_subplots(2, 3, horizontal_spacing=0.12, vertical_spacing=0.25, subplot_titles=list(titles.values()))
    colours = [palette.colour(name) for name in frame["model"]]
    for panel, column in enumerate(titles):
        place = {"row": panel // 3 + 1, "col": panel % 3 + 1}
        figure.add_bar(x=frame["model"], y=frame[column], marker_color=colours, showlegend=False, **place)
    return figure


@figures.of_text
def plot_tails(frame: pd.DataFrame) -> go.Figure:
    """Plot the JSD and KL of the median token and of the tail in what `measure` returns."""
    titles = {"jsd": "JSD to the reference (nats)", "kl": "KL from the reference (nats)"}
    figure = make_subplots(1, 2, horizontal_spacing=0.12)
    for row in _compared(frame).to_dict("records"):
        for col, column in enumerate(titles, start=1):
            values = {name: [row[f"{column}_{name}"]] for name in figures.TAIL}
            figures.add_tail(figure, row["model"], [row["model"]], values, row=1, col=col, legend=col == 1)
    for col, title in enumerate(titles.values(), start=1):
        figure.update_yaxes(title=title, type="log", dtick="D2", row=1, col=col)
    return figure.update_layout(title=figures.TAIL_TITLE, height=420)


def measure_calibration(
    models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], *, batch_size: int = 8
) -> pd.DataFrame:
    """Measure how often the top token is right, by its probability: `calibrate` of `measure_tokens`."""
    first = next(iter(models))
    return calibrate(measure_tokens(models, tokens, reference=first, batch_size=batch_size))


@figures.of_text
def plot_calibration(frame: pd.DataFrame) -> go.Figure:
    """Plot what `measure_calibration` returns: accuracy over probability, equal on the line, and tokens in each bin."""
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.75, 0.25], vertical_spacing=0.05)
    figure.add_shape(type="line", x0=0, y0=0, x1=1, y1=1, line={"color": "grey", "dash": "dot"}, row=1, col=1)
    for name, bins in frame.groupby("model", sort=False):
        style = {"name": name, "legendgroup": name}
        line = {"color": palette.colour(name)}
        figure.add_scatter(x=bins["confidence"], y=bins["accuracy"], line=line, **style, row=1, col=1)
        share = bins["tokens"] / bins["tokens"].sum()
        middle = (bins["bin_start"] + bins["bin_end"]) / 2
        figure.add_bar(x=middle, y=share, marker=line, showlegend=False, **style, row=2, col=1)
    figure.update_xaxes(title="Probability of the top token", row=2, col=1)
    figure.update_yaxes(title="How often the top token<br>is right (share)", row=1, col=1)
    return figure.update_yaxes(title="Tokens<br>(share)", row=2, col=1)


@torch.inference_mode()
def measure_layers(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Compare the residual streams between blocks with those of `models[reference]`.

    Arguments and errors are those of `measure`. Returns one row per model, positions ("all" or "after 0") and layer,
    the number of blocks before. Columns: these; reference; cosine, of the two vectors of a token, its mean over tokens,
    and cka, linear, over tokens, from 0 to 1: both dimensionless.
    """
    _check(models, reference)
    points = Stream(models[reference]).between_blocks
    keys = [(name, positions, layer) for name in models for positions in _POSITIONS for layer in range(len(points))]
    cosine = dict.fromkeys(keys, 0.0)
    cka = {key: _CKA() for key in keys}
    for _, outputs in forwards(models, tokens, points, batch_size, "Comparing residual streams"):
        for key in keys:
            name, positions, layer = key
            x, y = (
                outputs[model].cache[points[layer]][:, _POSITIONS[positions] :].flatten(0, 1).double()
                for model in (reference, name)
            )
            cosine[key] += F.cosine_similarity(x, y, dim=-1).sum().item()
            cka[key].add(x, y)
    return pd.DataFrame(
        [
            {
                "model": name,
                "reference": reference,
                "positions": positions,
                "layer": layer,
                "cosine": cosine[name, positions, layer] / cka[name, positions, layer].count,
                "cka": cka[name, positions, layer].value(),
            }
            for name, positions, layer in keys
        ]
    )


@figures.of_text
def plot_layers(frame: pd.DataFrame) -> go.Figure:
    """Plot what `measure_layers` returns, one column per choice of positions."""
    frame = _compared(frame).replace(
        {"positions": dict(zip(_POSITIONS, ("All positions", "Positions after 0"), strict=True))}
    )
    quantities = {"cosine": "Mean cosine similarity<br>(no unit)", "cka": "Linear CKA<br>(no unit)"}
    return figures.lines(frame, "layer", quantities, column="positions").update_xaxes(
        title="Number of blocks before", row=2
    )


@torch.inference_mode()
def measure_heads(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Compare each head with the same head of `models[reference]`.

    Arguments and errors are those of `measure`. Returns one row per model, layer and head. Columns: these; reference;
    attention_distance, the total variation distance ½ Σ_key |difference| of attention patterns, from 0 to 1, its mean
    over blocks and query positions ≥ 1 (0 can only attend to itself); dla_correlation, Pearson's, over tokens, of the
    direct logit attribution of the next token (W_U centred), NaN where a head's is constant.
    """
    _check(models, reference)
    cfg = models[reference].cfg
    queries = tokens.shape[1] - 1
    batch_size = min(batch_size, max(1, _PATTERNS_AT_ONCE // (cfg.n_layers * cfg.n_heads * (queries + 1) ** 2)))
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(cfg.n_layers)]
    streams = {name: Stream(model) for name, model in models.items()}
    written = dict.fromkeys(hook for stream in streams.values() for heads in stream.heads for hook in heads.hooks)
    names = [*patterns, *written, streams[reference].final]
    distance = {name: torch.zeros(cfg.n_layers, cfg.n_heads, dtype=torch.float64) for name in models}
    correlation = {name: _Correlation() for name in models}
    for batch, outputs in forwards(models, tokens, names, batch_size, "Comparing heads"):
        dla = {}
        for name, (_, cache) in outputs.items():
            readout = Readout(models[name], batch, cache)
            effects = [readout.effects(heads).dla for heads in streams[name].heads]
            dla[name] = torch.cat(effects, dim=-1).flatten(0, 1)
        for name in models:
            correlation[name].add(dla[reference], dla[name])
            for layer, point in enumerate(patterns):
                x, y = (outputs[model].cache[point][:, :, 1:] for model in (reference, name))
                distance[name][layer] += (x - y).abs().sum((0, 2, 3), dtype=torch.float64).cpu() / 2
    frames = []
    for name in models:
        frame = pd.MultiIndex.from_product([range(cfg.n_layers), range(cfg.n_heads)], names=["layer", "head"])
        frame = frame.to_frame(index=False)
        frame.insert(0, "model", name)
        frame.insert(1, "reference", reference)
        frame["attention_distance"] = distance[name].flatten().numpy() / (len(tokens) * queries)
        frame["dla_correlation"] = correlation[name].value().cpu().numpy()
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


@figures.of_text
def plot_heads(frame: pd.DataFrame) -> go.Figure:
    """Plot what `measure_heads` returns as heat maps: one row per quantity, one column per model."""
    return figures.heat_maps(
        _compared(frame),
        {
            "attention_distance": ("Total variation<br>distance of<br>attention (0 to 1)", {"cmin": 0}),
            "dla_correlation": ("Correlation<br>of DLA<br>(no unit)", {"cmax": 1}),
        },
    )


@torch.inference_mode()
def measure_neurons(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Compare the activation of each MLP neuron with that of the same neuron of `models[reference]`.

    Arguments and errors are those of `measure`. Returns one row per model, layer and neuron. Columns: these; reference;
    correlation, Pearson's over tokens, NaN where a neuron is constant.
    """
    _check(models, reference)
    points = [neurons.hook for neurons in Stream(models[reference]).neurons]
    correlation = {(name, layer): _Correlation() for name in models for layer in range(len(points))}
    for _, outputs in forwards(models, tokens, points, batch_size, "Comparing neurons"):
        for (name, layer), pair in correlation.items():
            pair.add(*(outputs[model].cache[points[layer]].flatten(0, 1) for model in (reference, name)))
    frames = []
    for (name, layer), pair in correlation.items():
        values = pair.value().cpu().numpy()
        row = {"model": name, "reference": reference, "layer": layer, "neuron": range(len(values))}
        frames.append(pd.DataFrame({**row, "correlation": values}))
    return pd.concat(frames, ignore_index=True)


@figures.of_text
def plot_neurons(frame: pd.DataFrame) -> go.Figure:
    """Plot what `measure_neurons` returns: quartiles over a layer's neurons as boxes, 5 and 95 % as whiskers."""
    figure = go.Figure()
    for name, neurons in _compared(frame).groupby("model", sort=False):
        quantiles = neurons.groupby("layer")["correlation"].quantile([0.05, 0.25, 0.5, 0.75, 0.95]).unstack()
        figure.add_box(
            name=name,
            legendgroup=name,
            x=quantiles.index,
            lowerfence=quantiles[0.05],
            q1=quantiles[0.25],
            median=quantiles[0.5],
            q3=quantiles[0.75],
            upperfence=quantiles[0.95],
            marker_color=palette.colour(name),
        )
    figure.update_layout(boxmode="group", title="Median, quartiles, and 5th and 95th percentiles over neurons")
    figure.update_xaxes(title="Layer", dtick=1)
    return figure.update_yaxes(title="Correlation of activations<br>with the reference’s")


def _check(models: Mapping[str, Any], reference: str) -> None:
    if reference not in models or len(models) == 1:
        raise ValueError(f"{reference!r} and at least one other model are needed to compare, not {', '.join(models)}.")


def _compared(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of all models but the reference, whose own are known beforehand."""
    return frame[frame["model"] != frame["reference"]]


class _Correlation:
    """Pearson correlations of two sets of series, over tokens that come batch by batch."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: Any = 0

    def add(self, x: Float[Tensor, "token series"], y: Float[Tensor, "token series"]) -> None:
        x, y = x.double(), y.double()
        self._count += len(x)
        self._sums = self._sums + torch.stack([series.sum(0) for series in (x, y, x * x, y * y, x * y)])

    def value(self) -> Float[Tensor, " series"]:
        """Return the correlations: NaN where a series is constant, that is, where rounding alone makes its variance."""
        x, y, xx, yy, xy = self._sums / self._count
        variances = [
            torch.where(v > 1e-12 * square, v, torch.nan) for v, square in ((xx - x * x, xx), (yy - y * y, yy))
        ]
        return (xy - x * y) / (variances[0] * variances[1]).sqrt()


class _CKA:
    """Linear CKA of two sets of vectors, over tokens that come batch by batch: ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖), centred."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: Any = (0, 0)
        self._products: Any = (0, 0, 0)

    def add(self, x: Float[Tensor, "token d_x"], y: Float[Tensor, "token d_y"]) -> None:
        self.count += len(x)
        self._sums = [total + vectors.sum(0) for total, vectors in zip(self._sums, (x, y), strict=True)]
        pairs = zip(self._products, (x, x, y), (x, y, y), strict=True)
        self._products = [total + a.T @ b for total, a, b in pairs]

    def value(self) -> float:
        x, y = self._sums
        pairs = zip(self._products, (x, x, y), (x, y, y), strict=True)
        xx, xy, yy = ((product - a.outer(b) / self.count).norm() for product, a, b in pairs)
        return (xy**2 / (xx * yy)).item()
