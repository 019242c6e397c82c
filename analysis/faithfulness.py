"""How faithful a model is to a reference: comparisons of predictions, residual streams, heads and neurons.

1. Predictions, token by token: JSD and KL to the reference, whether the top token is the same, and the rank correlation
   of the reference's top tokens. For each model also its entropy, and its calibration, as the expected calibration
   error (ECE) over equal bins of the top token's probability (Guo et al. 2017, arXiv 1706.04599).
2. Residual streams between blocks: cosine similarity, token by token, and linear CKA, which is invariant to rotations
   (Kornblith et al. 2019, arXiv 1905.00414).
3. Heads: the total variation distance of attention patterns, and the correlation over tokens of their direct logit
   attribution to the next token. The latter shows whether the same heads make the prediction.
4. MLP neurons: the correlation of their activations over tokens.

CKA and correlations are computed from sums over tokens in float64, so memory does not grow with the number of tokens.
`measure_all` computes all four from the same forwards.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F

from analysis import figures, palette
from analysis.batches import Forward, forwards, predictions_of
from analysis.readout import Readout
from analysis.stream import Stream
from finetune.evaluate import js_divergence, kl_divergence

_TOP = 50
"""How many of the reference's top tokens are ranked."""
_BINS = 10
"""The number of bins of the top token's probability."""
_COLUMNS = ("jsd", "kl", "agreement", "rank_correlation", "entropy", "confidence", "correct")
_PATTERNS_AT_ONCE = 2**28
"""The maximum number of attention probabilities per model and batch, to limit memory. No result depends on it."""
_POSITIONS = {"all": 0, "after 0": 1}
"""The first position of residual streams to compare. GPT-2's stream at position 0 is so long that it dominates CKA."""


def measure_all(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    reference: str = "original",
    batch_size: int = 8,
) -> dict[str, pd.DataFrame]:
    """Compare predictions, residual streams, heads and neurons, with one forward per model and batch instead of four.

    Arguments and errors are those of `measure`. Returns the tables of `measure_tokens`, `measure_layers`,
    `measure_heads` and `measure_neurons`, with the keys token, layer, head and neuron.
    """
    _check(models, reference)
    kinds: list[Callable[..., _Comparison]] = [_Tokens, _Layers, _Heads, _Neurons]
    frames = _compare([kind(models, tokens, reference) for kind in kinds], batch_size)
    return dict(zip(("token", "layer", "head", "neuron"), frames, strict=True))


def measure_tokens(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Compare the prediction of every next token with that of `models[reference]`.

    Args:
        models: those of `analysis.load_trio`.
        tokens: packed blocks.
        reference: the model to compare with. It has its own rows.
        batch_size: blocks per forward. No result depends on it.

    Returns one row per token and model. Columns: model; reference; block and position of the predicted token; jsd and
    kl, KL(reference ‖ model), in nats; agreement, whether both have the same top token; rank_correlation, Spearman's,
    over the logits of the reference's top 50 tokens; entropy, in nats; confidence, the probability of the top token;
    correct, whether the top token is the predicted token.
    """
    (frame,) = _compare([_Tokens(models, tokens, reference)], batch_size)
    return frame


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Average the table of `measure_tokens` over the tokens of each model.

    Returns one row per model. Columns: model; reference; the means over tokens of jsd and kl, in nats, agreement, from
    0 to 1, rank_correlation, dimensionless, and entropy, in nats; for jsd and kl also `…_median`, `…_percentile_95`,
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
    """Measure how often the top token is correct, by its probability, from the table of `measure_tokens`.

    Returns one row per model and bin of the top token's probability. Columns: model; bin_start (exclusive) and bin_end
    (inclusive); confidence, the mean probability, and accuracy, both from 0 to 1, and NaN in an empty bin; tokens.
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
    """Compare the predictions of models with a reference's: `summarise` of `measure_tokens`, with the same arguments.

    Raises:
        ValueError: no model is called `reference`, or there is no other model.
    """
    _check(models, reference)
    return summarise(measure_tokens(models, tokens, reference=reference, batch_size=batch_size))


@figures.of_text
def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure`, one panel per quantity."""
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
    """Plot the JSD and KL of the median token and of the tail in the table of `measure`."""
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
    """Measure how often the top token is correct, by its probability: `calibrate` of `measure_tokens`."""
    first = next(iter(models))
    return calibrate(measure_tokens(models, tokens, reference=first, batch_size=batch_size))


@figures.of_text
def plot_calibration(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure_calibration`: accuracy over probability (equal on the line), and tokens per bin."""
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


def measure_layers(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Compare the residual streams between blocks with those of `models[reference]`.

    Arguments and errors are those of `measure`. Returns one row per model, positions ("all" or "after 0") and layer,
    the number of blocks before. Columns: these; reference; cosine, the cosine similarity of the two vectors of a token,
    averaged over tokens; cka, linear, over tokens, from 0 to 1. Both are dimensionless.
    """
    _check(models, reference)
    (frame,) = _compare([_Layers(models, tokens, reference)], batch_size)
    return frame


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


def measure_heads(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Compare each head with the same head of `models[reference]`.

    Arguments and errors are those of `measure`. Returns one row per model, layer and head. Columns: these; reference;
    attention_distance, the total variation distance ½ Σ_key |difference| of attention patterns, from 0 to 1, averaged
    over blocks and query positions ≥ 1 (0 can only attend to itself); dla_correlation, Pearson's correlation over
    tokens of the direct logit attribution to the next token (W_U centred), NaN if a head's is constant.
    """
    _check(models, reference)
    (frame,) = _compare([_Heads(models, tokens, reference)], batch_size)
    return frame


@figures.of_text
def plot_heads(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure_heads` as heat maps: one row per quantity, one column per model."""
    return figures.heat_maps(
        _compared(frame),
        {
            "attention_distance": ("Total variation<br>distance of<br>attention (0 to 1)", {"cmin": 0}),
            "dla_correlation": ("Correlation<br>of DLA<br>(no unit)", {"cmax": 1}),
        },
    )


def measure_neurons(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Compare the activation of each MLP neuron with that of the same neuron of `models[reference]`.

    Arguments and errors are those of `measure`. Returns one row per model, layer and neuron. Columns: these; reference;
    correlation, Pearson's over tokens, NaN if a neuron is constant.
    """
    _check(models, reference)
    (frame,) = _compare([_Neurons(models, tokens, reference)], batch_size)
    return frame


@figures.of_text
def plot_neurons(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure_neurons`: quartiles over a layer's neurons as boxes, 5 and 95 % as whiskers."""
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
        raise ValueError(
            f"A comparison needs {reference!r} and at least one other model, but the models are {', '.join(models)}."
        )


def _compared(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of all models except the reference, whose values are trivial."""
    return frame[frame["model"] != frame["reference"]]


class _Comparison(ABC):
    """A comparison of models with a reference, computed batch by batch from the outputs of their forwards."""

    hooks: Sequence[str] = ()
    """The names of the activations that it needs."""

    def __init__(self, models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], reference: str) -> None:
        self.models, self.tokens, self.reference = models, tokens, reference

    @abstractmethod
    def add(self, batch: Int[Tensor, "batch pos"], outputs: Mapping[str, Forward]) -> None:
        """Add the next batch."""

    @abstractmethod
    def of(self, name: str) -> pd.DataFrame:
        """Return the rows of a model, after all batches were added."""


@torch.inference_mode()
def _compare(comparisons: Sequence[_Comparison], batch_size: int) -> list[pd.DataFrame]:
    """Return the table of each comparison, from the same forwards. All have the same models and tokens."""
    models, tokens, reference = comparisons[0].models, comparisons[0].tokens, comparisons[0].reference
    hooks = list(dict.fromkeys(hook for comparison in comparisons for hook in comparison.hooks))
    if patterns := sum(hook.endswith("hook_pattern") for hook in hooks):
        numbers = patterns * models[reference].cfg.n_heads * tokens.shape[1] ** 2
        batch_size = min(batch_size, max(1, _PATTERNS_AT_ONCE // numbers))
    unembed = any(isinstance(comparison, _Tokens) for comparison in comparisons)
    batches = forwards(models, tokens, hooks, batch_size, "Comparing models", float32=True, unembed=unembed)
    for batch, outputs in batches:
        for comparison in comparisons:
            comparison.add(batch, outputs)
    return [_frame(comparison) for comparison in comparisons]


def _frame(comparison: _Comparison) -> pd.DataFrame:
    frames = []
    for name in comparison.models:
        frame = comparison.of(name)
        frame.insert(0, "model", name)
        frame.insert(1, "reference", comparison.reference)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


class _Tokens(_Comparison):
    """The comparison of `measure_tokens`."""

    def __init__(self, models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], reference: str) -> None:
        super().__init__(models, tokens, reference)
        # Allocated in full: small arrays kept from each block would fragment the memory of the large ones.
        self._values = {name: np.empty((tokens[:, 1:].numel(), len(_COLUMNS))) for name in models}
        self._end = 0

    def add(self, batch: Int[Tensor, "batch pos"], outputs: Mapping[str, Forward]) -> None:
        for targets, log_probs in predictions_of(batch, outputs):
            rows = slice(self._end, self._end + len(targets))
            self._end = rows.stop
            expected = log_probs[self.reference]
            top = expected.topk(min(_TOP, expected.shape[-1])).indices
            expected_ranks = _centred_ranks(expected.gather(-1, top))
            for name, found in log_probs.items():
                ranks = _centred_ranks(found.gather(-1, top))
                log_prob, likeliest = found.max(-1)
                columns = (
                    js_divergence(expected, found),
                    kl_divergence(expected, found),
                    top[:, 0] == likeliest,
                    torch.linalg.vecdot(expected_ranks, ranks) / (expected_ranks.norm(dim=-1) * ranks.norm(dim=-1)),
                    -(found.exp() * found).sum(-1),
                    log_prob.double().exp(),
                    likeliest == targets,
                )
                self._values[name][rows] = torch.stack([column.double().cpu() for column in columns], dim=1).numpy()

    def of(self, name: str) -> pd.DataFrame:
        block, position = np.indices((len(self.tokens), self.tokens.shape[1] - 1)).reshape(2, -1)
        frame = pd.DataFrame({"block": block, "position": position + 1})
        frame[list(_COLUMNS)] = self._values[name]
        return frame.astype({"agreement": bool, "correct": bool})


def _centred_ranks(values: Float[Tensor, "token top"]) -> Float[Tensor, "token top"]:
    ranks = torch.from_numpy(rankdata(values.cpu(), axis=-1))
    return ranks - ranks.mean(-1, keepdim=True)


class _Layers(_Comparison):
    """The comparison of `measure_layers`. Linear CKA is ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖), with X and Y centred over tokens."""

    def __init__(self, models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], reference: str) -> None:
        super().__init__(models, tokens, reference)
        self.hooks = Stream(models[reference]).between_blocks
        shape = len(self.hooks), 2  # for each layer, position 0 and the positions after it
        width, device = models[reference].cfg.d_model, models[reference].cfg.device

        def zeros(*shape: int) -> dict[str, Tensor]:
            return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name in models}

        self._cosine, self._sum = zeros(*shape), zeros(*shape, width)
        self._square, self._product = zeros(*shape, width, width), zeros(*shape, width, width)

    def add(self, batch: Int[Tensor, "batch pos"], outputs: Mapping[str, Forward]) -> None:
        for layer, point in enumerate(self.hooks):
            for part, positions in enumerate((slice(1), slice(1, None))):
                at = layer, part
                vectors = {
                    name: output.cache[point][:, positions].flatten(0, 1).double() for name, output in outputs.items()
                }
                x = vectors[self.reference]
                for name, y in vectors.items():
                    square = y.T @ y
                    self._cosine[name][at] += F.cosine_similarity(x, y, dim=-1).sum()
                    self._sum[name][at] += y.sum(0)
                    self._square[name][at] += square
                    self._product[name][at] += square if y is x else x.T @ y

    def of(self, name: str) -> pd.DataFrame:
        frames = []
        for positions, start in _POSITIONS.items():
            count = len(self.tokens) * (self.tokens.shape[1] - start)
            sums = (self._cosine[name], self._sum[self.reference], self._sum[name])
            products = (self._square[self.reference], self._product[name], self._square[name])
            cosine, x, y, xx, xy, yy = (parts[:, start:].sum(1) for parts in (*sums, *products))
            xx, xy, yy = (
                (product - a.unsqueeze(2) * b.unsqueeze(1) / count).flatten(1).norm(dim=1)
                for product, a, b in ((xx, x, x), (xy, x, y), (yy, y, y))
            )
            found = {"cosine": (cosine / count).cpu(), "cka": (xy**2 / (xx * yy)).cpu()}
            frames.append(pd.DataFrame({"positions": positions, "layer": range(len(self.hooks)), **found}))
        return pd.concat(frames)


class _Heads(_Comparison):
    """The comparison of `measure_heads`."""

    def __init__(self, models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], reference: str) -> None:
        super().__init__(models, tokens, reference)
        cfg = models[reference].cfg
        self._streams = {name: Stream(model) for name, model in models.items()}
        self._patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(cfg.n_layers)]
        written = [hook for stream in self._streams.values() for heads in stream.heads for hook in heads.hooks]
        self.hooks = [*self._patterns, *dict.fromkeys(written), self._streams[reference].final]
        self._distance = {name: torch.zeros(cfg.n_layers, cfg.n_heads, dtype=torch.float64) for name in models}
        self._correlation = _Correlation(reference)

    def add(self, batch: Int[Tensor, "batch pos"], outputs: Mapping[str, Forward]) -> None:
        dla = {}
        for name, (_, cache) in outputs.items():
            readout = Readout(self.models[name], batch, cache)
            dla[name] = torch.cat([readout.dla(heads) for heads in self._streams[name].heads], dim=-1).flatten(0, 1)
            for layer, point in enumerate(self._patterns):
                difference = outputs[self.reference].cache[point][:, :, 1:] - cache[point][:, :, 1:]
                distance = torch.linalg.vector_norm(difference, 1, (0, 2, 3), dtype=torch.float64) / 2
                self._distance[name][layer] += distance.cpu()
        self._correlation.add(dla)

    def of(self, name: str) -> pd.DataFrame:
        layer, head = np.indices(self._distance[name].shape).reshape(2, -1)
        distance = self._distance[name].flatten() / self.tokens[:, 1:].numel()
        correlation = self._correlation.value(name).cpu()
        return pd.DataFrame(
            {"layer": layer, "head": head, "attention_distance": distance, "dla_correlation": correlation}
        )


class _Neurons(_Comparison):
    """The comparison of `measure_neurons`."""

    def __init__(self, models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], reference: str) -> None:
        super().__init__(models, tokens, reference)
        self.hooks = [neurons.hook for neurons in Stream(models[reference]).neurons]
        self._correlations = [_Correlation(reference) for _ in self.hooks]

    def add(self, batch: Int[Tensor, "batch pos"], outputs: Mapping[str, Forward]) -> None:
        for hook, correlation in zip(self.hooks, self._correlations, strict=True):
            correlation.add({name: output.cache[hook].flatten(0, 1) for name, output in outputs.items()})

    def of(self, name: str) -> pd.DataFrame:
        values = torch.stack([correlation.value(name) for correlation in self._correlations]).cpu().numpy()
        layer, neuron = np.indices(values.shape).reshape(2, -1)
        return pd.DataFrame({"layer": layer, "neuron": neuron, "correlation": values.ravel()})


class _Correlation:
    """Pearson correlations over tokens of the series of models with those of a reference, computed batch by batch."""

    def __init__(self, reference: str) -> None:
        self._reference, self._count = reference, 0
        self._sums: dict[str, Any] = {}

    def add(self, series: Mapping[str, Float[Tensor, "token series"]]) -> None:
        x = series[self._reference].double()
        self._count += len(x)
        for name, y in series.items():
            y = x if name == self._reference else y.double()
            sums = torch.stack([y.sum(0), (y * y).sum(0), (x * y).sum(0)])
            self._sums[name] = self._sums.get(name, 0) + sums

    def value(self, name: str) -> Float[Tensor, " series"]:
        """Return the correlations. NaN if a series is constant, that is, if its variance is only due to rounding."""
        (x, xx, _), (y, yy, xy) = (self._sums[each] / self._count for each in (self._reference, name))
        variances = [
            torch.where(v > 1e-12 * square, v, torch.nan) for v, square in ((xx - x * x, xx), (yy - y * y, yy))
        ]
        return (xy - x * y) / (variances[0] * variances[1]).sqrt()
