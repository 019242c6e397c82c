"""Confidence neurons: those of the last MLP that set how sure the model is, not what it predicts.

They write with a large norm in directions that hardly change the logits, and so act through the scale of the final norm
(Gurnee et al. 2024, arXiv 2401.12181, and Stolfo et al. 2024, arXiv 2406.16254, who call them entropy neurons). Baroni
et al. 2025, arXiv 2507.02559, found that they have no effect without it.

1. For every neuron i, ‖w_out,i‖ and LogitVar(i), the variance over the vocabulary of
   W_U[:,v]·w_out,i / (‖W_U[:,v]‖ ‖w_out,i‖). With w the unit vector along w_out,i that is wᵀ C w, C the covariance over
   the vocabulary of the unit columns of W_U: no product of all neurons with all tokens is made.
2. Candidates have a large norm and a small LogitVar.
3. Mean-ablation sets neurons to their mean activation over all tokens, ā. Only the final norm and the unembedding come
   after the last MLP, so the new logits follow from the clean ones. With s and s' the final norm's scale before and
   after, and b_U the bias of the unembedding:
       direct = logits − (a − ā) · W_out W_U / s     the scale keeps its value
       total  = b_U + (direct − b_U) · s / s'        the scale follows
   What goes through the final norm is the effect of total less that of direct. The scale is what the model's own final
   norm divides by; where a model has none, nothing divides, and s/s' = 1. In Gemma 2 a norm of its own normalises what
   the MLP writes: both effects let it follow the ablation. Logits are soft-capped after this where the model does it.
4. The singular directions of W_U on the side of the residual stream, and the share of w_out in each: what lies in
   directions of small singular value does not reach the logits.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from analysis import figures, palette
from analysis.batches import forwards, pieces
from analysis.stream import Stream
from finetune.errors import NolnError

LARGE = 0.1
"""Share of the neurons, those of the largest ‖w_out‖, among which candidates are looked for."""

PARTS = {
    "total": "Total change",
    "direct": "With the final norm’s<br>scale held",
    "through_ln": "Through the final<br>norm’s scale",
}
MEASURES = {"entropy": "entropy", "loss": "CE"}


def candidates(model: Any, count: int = 6) -> list[int]:
    """Return the likeliest confidence neurons of `model`, at most `count`.

    Of the neurons of large ‖w_out‖ (`LARGE`) they are those of the smallest LogitVar, the smallest first.
    """
    norm, logit_var = _norm_and_logit_var(model)
    large = norm.topk(math.ceil(LARGE * len(norm))).indices
    return large[logit_var[large].argsort()[:count]].tolist()


def measure_neurons(models: Mapping[str, Any], neurons: Sequence[int]) -> pd.DataFrame:
    """Measure the weights of every neuron of the last MLP.

    Returns one row per model and neuron: norm, ‖w_out‖ (units of the residual stream); logit_var, LogitVar (a squared
    cosine, dimensionless); candidate, whether it is one of `neurons`.

    Raises:
        NolnError: a model does not have one of the neurons, or one is given twice.
    """
    frames = []
    for name, model in models.items():
        _check(name, model, neurons)
        norm, logit_var = _norm_and_logit_var(model)
        frame = pd.DataFrame(
            {"model": name, "neuron": range(len(norm)), "norm": norm.cpu(), "logit_var": logit_var.cpu()}
        )
        frames.append(frame.assign(candidate=frame["neuron"].isin(neurons)))
    return pd.concat(frames, ignore_index=True)


def measure(
    models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], neurons: Sequence[int], *, batch_size: int = 8
) -> pd.DataFrame:
    """Mean-ablate `neurons` in every model, the same in all: each alone, and the first k together, k from 1 to all.

    Returns one row per model, ablation ("alone" or "together"), neuron (of several the last) and measure, entropy of
    the prediction or loss (CE). ablated: how many neurons are. In nats/token, means over tokens that have a next one:
    clean, without ablation; total, the change by the ablation; direct, the change with the final norm's scale frozen;
    through_ln, their difference.

    Raises:
        NolnError: a model does not have one of the neurons, or one is given twice.
    """
    neurons = list(neurons)
    groups = [("alone", [neuron]) for neuron in neurons]
    groups += [("together", neurons[: k + 1]) for k in range(len(neurons))]
    rows = []
    for name, model in models.items():
        _check(name, model, neurons)
        found = _ablate(name, model, tokens, [group for _, group in groups], batch_size).tolist()
        for (ablation, group), values in zip(groups, found, strict=True):
            which = {"model": name, "ablation": ablation, "neuron": group[-1], "ablated": len(group)}
            for measure, (clean, total, direct) in zip(MEASURES, values, strict=True):
                changes = {"total": total - clean, "direct": direct - clean, "through_ln": total - direct}
                rows.append({**which, "measure": measure, "clean": clean, **changes})
    return pd.DataFrame(rows)


def describe(frame: pd.DataFrame) -> str:
    """Say how much entropy goes through the final norm at most, from what `measure` returns of single neurons."""
    frame = frame[(frame["ablation"] == "alone") & (frame["measure"] == "entropy")]
    found = []
    for model, rows in frame.groupby("model", sort=False):
        change, clean = rows["through_ln"].abs().max(), rows["clean"].iloc[0]
        found.append(f"{model}: {change:.2g} of {clean:.3g} ({100 * change / clean:.2g} %)")
    return (
        "Largest change of entropy by one neuron that goes through the final norm, nats/token, of the entropy without "
        f"ablation: {'; '.join(found)}."
    )


def measure_spectrum(models: Mapping[str, Any], neurons: Sequence[int]) -> pd.DataFrame:
    """Measure where in the spectrum of W_U the last MLP writes.

    Returns one row per model, group of neurons ("candidates", those of `neurons`, or "all"), and singular direction of
    W_U, numbered from 1 at the largest: singular_value (logits per unit of what W_U reads); share, that of ‖w_out‖² in
    the direction, mean over the group; cumulative, the shares summed from the first direction to this one.

    Raises:
        NolnError: a model does not have one of the neurons, or one is given twice.
    """
    frames = []
    for name, model in models.items():
        _check(name, model, neurons)
        W_out = _w_out(model)
        squares, directions = torch.linalg.eigh(_moments(model, unit=False)[0])
        squares, directions = squares.flip(0), directions.flip(1)
        shares = (W_out @ directions).square() / W_out.square().sum(1, keepdim=True)
        for group, members in {"candidates": shares[list(neurons)], "all": shares}.items():
            share = members.mean(0)
            columns = {
                "singular_value": squares.clamp(min=0).sqrt().cpu(),
                "share": share.cpu(),
                "cumulative": share.cumsum(0).cpu(),
            }
            frames.append(
                pd.DataFrame({"model": name, "neurons": group, "direction": range(1, len(share) + 1), **columns})
            )
    return pd.concat(frames, ignore_index=True)


def _check(name: str, model: Any, neurons: Sequence[int]) -> None:
    if unknown := sorted(set(neurons) - set(range(model.cfg.d_mlp))):
        raise NolnError(
            f"{name} has no neurons {unknown} in its last MLP: they are numbered 0 to {model.cfg.d_mlp - 1}."
        )
    if len(set(neurons)) < len(neurons):
        raise NolnError(f"{list(neurons)} names a neuron twice: name each once.")


@torch.no_grad()
def _w_out(model: Any) -> Float[Tensor, "neuron d_model"]:
    """Return what the neurons of the last MLP write through, in float64."""
    stream = Stream(model)
    return stream.weight(stream.neurons[-1]).detach().double()


@torch.no_grad()
def _norm_and_logit_var(model: Any) -> tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]]:
    total, mean, count = _moments(model, unit=True)
    mean = mean / count
    covariance = total / count - mean.outer(mean)
    norm = (W_out := _w_out(model)).norm(dim=1)
    unit = W_out / norm[:, None]
    return norm, ((unit @ covariance) * unit).sum(1)


@torch.no_grad()
def _moments(model: Any, unit: bool) -> tuple[Float[Tensor, "d_model d_model"], Float[Tensor, " d_model"], int]:
    """Return Σ u uᵀ, Σ u and the number of the columns u of W_U, float64; where `unit`, of length 1.

    What a vocabulary is padded with has no direction and is not counted. A piece at a time: W_U is large.
    """
    d_model, vocabulary = model.W_U.shape
    total, sum_ = (
        torch.zeros(shape, dtype=torch.float64, device=model.W_U.device) for shape in ((d_model,) * 2, d_model)
    )
    count = 0
    for piece in pieces(vocabulary, d_model):
        columns = model.W_U[:, piece].detach().double()
        columns = columns[:, (length := columns.norm(dim=0)) > 0]
        if unit:
            columns = columns / length[length > 0]
        total += columns @ columns.T
        sum_ += columns.sum(1)
        count += columns.shape[1]
    return total, sum_, count


@torch.no_grad()
def _ablate(
    name: str, model: Any, tokens: Int[Tensor, "block pos"], groups: Sequence[Sequence[int]], batch_size: int
) -> Float[Tensor, "group measure 3"]:
    """Return each measure without ablation, with it, and with it under a frozen scale, means over tokens."""
    stream = Stream(model)
    neurons = stream.neurons[-1]
    mean = torch.zeros(model.cfg.d_mlp, dtype=torch.float64, device=model.cfg.device)
    for _, outputs in forwards({name: model}, tokens, [neurons.hook], batch_size, f"Mean activations of {name}"):
        mean += outputs[name].cache[neurons.hook].double().sum((0, 1)) / tokens.numel()

    unembedded = {i: stream.weight(neurons)[i] @ model.W_U for i in {i for group in groups for i in group}}
    total = torch.zeros(len(groups), len(MEASURES), 3, dtype=torch.float64, device=model.cfg.device)
    names = [*neurons.hooks, stream.final]
    if neurons.scale:
        names.append(neurons.scale.replace("hook_scale", "hook_normalized"))
    for batch, outputs in forwards({name: model}, tokens, names, batch_size, f"Ablating neurons of {name}"):
        for i, block in enumerate(batch):
            # Piece by piece: the logits are needed for every group anew.
            for piece in pieces(len(block) - 1, model.cfg.d_vocab):
                cache = {name: activation[i : i + 1, piece] for name, activation in outputs[name].cache.items()}
                logits = outputs[name].logits[i : i + 1, piece]
                total += _ablate_piece(stream, block[1:][piece], logits, cache, mean, unembedded, groups)
    return total / tokens[:, 1:].numel()


def _ablate_piece(
    stream: Stream,
    targets: Int[Tensor, " pos"],
    logits: Float[Tensor, "1 pos vocab"],
    cache: Mapping[str, Tensor],
    mean: Float[Tensor, " neuron"],
    unembedded: Mapping[int, Float[Tensor, " vocab"]],
    groups: Sequence[Sequence[int]],
) -> Float[Tensor, "group measure 3"]:
    """Return what `_ablate` does, summed over the tokens of a piece of a block.

    `unembedded` holds W_out W_U of each neuron.
    """
    neurons, b_U = stream.neurons[-1], stream.model.b_U
    W_out, activation, resid = stream.weight_before_norm(neurons), cache[neurons.hook], cache[stream.final]
    clean, scale = _entropy_and_loss(logits, targets), stream.measured_scale(resid)
    logits = stream.uncapped(logits, resid)
    sums = []
    for group in groups:
        excess = (activation[..., group] - mean[group]).to(logits.dtype)
        if neurons.scale:
            change = _through_post_norm(stream, excess @ W_out[group], cache)
            direct = logits + (change / scale).to(logits.dtype) @ stream.model.W_U
        else:
            change = -excess @ W_out[group]
            directions = torch.stack([unembedded[i] for i in group])
            direct = torch.baddbmm(logits, (excess / scale).to(logits.dtype), directions[None], alpha=-1)
        ratio = scale / stream.measured_scale(resid + change)
        measured = direct_measured = _entropy_and_loss(stream.cap(direct), targets)
        if (ratio != 1).any():
            measured = _entropy_and_loss(stream.cap(b_U + (direct - b_U) * ratio), targets)
        sums.append(torch.stack([clean, measured, direct_measured], dim=1))
    return torch.stack(sums)


def _through_post_norm(
    stream: Stream, excess: Float[Tensor, "1 pos d_model"], cache: Mapping[str, Tensor]
) -> Float[Tensor, "1 pos d_model"]:
    """Return how the stream changes when `excess` is taken out of the last MLP's output, which a norm normalises.

    With m the output, s what the norm divides it by, g its gain, n = m/s and e = excess/s, that is
    g·(n − e)/RMS(n − e) − g·n. The norm's eps is in units of m², and of n² it is eps/s².
    """
    neurons = stream.neurons[-1]
    scale, normalised = cache[neurons.scale], cache[neurons.scale.replace("hook_scale", "hook_normalized")]
    left = normalised - excess / scale
    rms = (left.square().mean(-1, keepdim=True) + stream.model.cfg.eps / scale.square()).sqrt()
    return (stream.gain(neurons) * (left / rms - normalised)).to(excess)


def _entropy_and_loss(logits: Float[Tensor, "1 pos vocab"], targets: Int[Tensor, " pos"]) -> Float[Tensor, " measure"]:
    """Return both, summed over tokens."""
    log_probs = logits[0].float().log_softmax(-1)
    entropy = -torch.linalg.vecdot(log_probs.exp(), log_probs)
    loss = -log_probs.gather(-1, targets[:, None])
    return torch.stack([entropy.double().sum(), loss.double().sum()])


@figures.of_text
def plot_neurons(frame: pd.DataFrame) -> go.Figure:
    """Plot what `measure_neurons` returns: LogitVar against ‖w_out‖, one panel per model, candidates as diamonds."""
    models = list(frame["model"].unique())
    figure = make_subplots(1, len(models), shared_yaxes=True, column_titles=models, horizontal_spacing=0.03)
    for (model, candidate), group in frame.groupby(["model", "candidate"], sort=False):
        figure.add_scatter(
            x=group["norm"],
            y=group["logit_var"],
            customdata=group["neuron"],
            mode="markers",
            marker={
                "color": palette.colour(model),
                "symbol": "diamond" if candidate else "circle-open",
                "size": 10 if candidate else 4,
                "line": {"color": "black", "width": 1} if candidate else None,
            },
            name="candidates" if candidate else "others",
            legendgroup=str(candidate),
            showlegend=model == models[0],
            hovertemplate="neuron %{customdata}<br>‖w_out‖ %{x:.3g}<br>LogitVar %{y:.3g}<extra></extra>",
            row=1,
            col=models.index(model) + 1,
        )
    figure.update_yaxes(type="log").update_xaxes(title="Norm of the output<br>weights, ‖w_out‖")
    return figure.update_yaxes(title="LogitVar (no unit)", col=1)


@figures.of_text
def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot what `measure` returns of single neurons: the changes, one row per measure, one column per part."""
    figure = _plot_changes(frame[frame["ablation"] == "alone"].astype({"neuron": str}), "neuron", go.Bar)
    return figure.update_xaxes(type="category").update_xaxes(title="Neuron ablated", row=len(MEASURES))


@figures.of_text
def plot_cumulative(frame: pd.DataFrame) -> go.Figure:
    """Plot what `measure` returns of neurons together: the changes by how many there are."""
    figure = _plot_changes(frame[frame["ablation"] == "together"], "ablated", go.Scatter)
    return figure.update_xaxes(title="Number of neurons ablated", row=len(MEASURES))


def _plot_changes(frame: pd.DataFrame, x: str, trace: type[go.Bar] | type[go.Scatter]) -> go.Figure:
    figure = make_subplots(
        len(MEASURES),
        len(PARTS),
        shared_xaxes=True,
        shared_yaxes=True,
        column_titles=list(PARTS.values()),
        vertical_spacing=0.06,
        horizontal_spacing=0.03,
    )
    for row, (measure, label) in enumerate(MEASURES.items(), start=1):
        for (model,), group in frame[frame["measure"] == measure].groupby(["model"], sort=False):
            style = {"name": model, "legendgroup": model, "marker_color": palette.colour(model)}
            for col, part in enumerate(PARTS, start=1):
                figure.add_trace(
                    trace(x=group[x], y=group[part], showlegend=row == col == 1, **style), row=row, col=col
                )
        figure.update_yaxes(title=f"Change of {label}<br>(nats/token)", row=row, col=1)
    return figure


@figures.of_text
def plot_spectrum(frame: pd.DataFrame) -> go.Figure:
    """Plot what `measure_spectrum` returns: singular values above, cumulative share of ‖w_out‖² below."""
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06)
    for (model, neurons), group in frame.groupby(["model", "neurons"], sort=False):
        line = {"color": palette.colour(model), "dash": "solid" if neurons == "candidates" else "dot"}
        style = {"x": group["direction"], "mode": "lines", "line": line, "legendgroup": model}
        if neurons == "candidates":
            # W_U is centred: one value is 0 but for rounding, and would squeeze the others on a log axis.
            values = group["singular_value"].where(group["singular_value"] > 1e-6 * group["singular_value"].max())
            figure.add_scatter(y=values, name=model, showlegend=False, **style, row=1, col=1)
        figure.add_scatter(y=group["cumulative"], name=f"{model}, {neurons}", **style, row=2, col=1)
    figure.update_yaxes(title="Singular value of W_U<br>(logits per unit read)", type="log", row=1)
    figure.update_yaxes(title="Share of ‖w_out‖² up to<br>this direction", row=2)
    return figure.update_xaxes(title="Singular direction of W_U, from the largest", row=2)
