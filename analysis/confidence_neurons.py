"""Confidence neurons: neurons of the last MLP that control how confident the model is, not what it predicts.

They write with a large norm in directions that hardly change the logits, so they act through the scale of the final
norm (Gurnee et al. 2024, arXiv 2401.12181, and Stolfo et al. 2024, arXiv 2406.16254, who call them entropy neurons).
Baroni et al. 2025, arXiv 2507.02559, found that they have no effect without the norm.

1. For every neuron i: ‖w_out,i‖, and LogitVar(i), the variance over the vocabulary of
   W_U[:,v]·w_out,i / (‖W_U[:,v]‖ ‖w_out,i‖). With w the unit vector along w_out,i, this is wᵀ C w, where C is the
   covariance over the vocabulary of the unit columns of W_U. So no neurons × tokens product is needed.
2. Candidates have a large norm and a small LogitVar.
3. Mean-ablation sets neurons to their mean activation over all tokens, ā. Only the final norm and the unembedding come
   after the last MLP, so the new logits follow from the clean ones. With s and s' the final norm's scale before and
   after, and b_U the bias of the unembedding:
       direct = logits − (a − ā) · W_out W_U / s     the scale keeps its value
       total  = b_U + (direct − b_U) · s / s'        the scale changes too
   The effect through the final norm is that of total minus that of direct. The scale is the divisor of the model's own
   final norm. In a model without one, nothing divides, and s/s' = 1. In Gemma 2, a separate norm normalises the output
   of the MLP; in both effects it changes with the ablation. If the model soft-caps logits, this is applied last.
4. The singular directions of W_U in the residual stream, and the fraction of w_out in each: what is written in
   directions with a small singular value does not reach the logits.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
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

_HELD = 2**24
"""The maximum number of activations per model to hold until their means are known: 64 MiB in float32."""
LARGE = 0.1
"""The fraction of neurons, those with the largest ‖w_out‖, from which candidates are chosen."""

PARTS = {
    "total": "Total change",
    "direct": "With the final norm’s<br>scale held",
    "through_ln": "Through the final<br>norm’s scale",
}
MEASURES = {"entropy": "entropy", "loss": "CE"}


def candidates(model: Any, count: int = 6) -> list[int]:
    """Return the most likely confidence neurons of `model`, at most `count`.

    They are the neurons with the smallest LogitVar among those with a large ‖w_out‖ (`LARGE`), the smallest first.
    """
    norm, logit_var = _norm_and_logit_var(model)
    large = norm.topk(math.ceil(LARGE * len(norm))).indices
    return large[logit_var[large].argsort()[:count]].tolist()


def measure_neurons(models: Mapping[str, Any], neurons: Sequence[int]) -> pd.DataFrame:
    """Measure the weights of every neuron of the last MLP.

    Returns one row per model and neuron: norm, ‖w_out‖ (in units of the residual stream); logit_var, LogitVar (a
    squared cosine, dimensionless); candidate, whether it is one of `neurons`.

    Raises:
        NolnError: a model does not have one of the neurons, or a neuron is given twice.
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
    """Mean-ablate the same `neurons` in every model: each alone, and the first k together, for every k.

    Returns one row per model, ablation ("alone" or "together"), neuron (the last, if several are ablated) and measure
    (entropy of the prediction, or loss, the CE). ablated is the number of ablated neurons. In nats/token, means over
    tokens that have a next one: clean, without ablation; total, the change caused by the ablation; direct, the change
    with the final norm's scale frozen; through_ln, the difference of the two.

    Raises:
        NolnError: a model does not have one of the neurons, or a neuron is given twice.
    """
    neurons = list(neurons)
    alone, together = [[k] for k in range(len(neurons))], [[*range(k + 1)] for k in range(len(neurons))]
    groups = [*alone, *together[1:]]  # the first neuron is the same group in both
    rows = []
    for name, model in models.items():
        _check(name, model, neurons)
        found = _ablate(name, model, tokens, neurons, groups, batch_size).tolist()
        for ablation, group in [*(("alone", group) for group in alone), *(("together", group) for group in together)]:
            which = {"model": name, "ablation": ablation, "neuron": neurons[group[-1]], "ablated": len(group)}
            for measure, (clean, total, direct) in zip(MEASURES, found[groups.index(group)], strict=True):
                changes = {"total": total - clean, "direct": direct - clean, "through_ln": total - direct}
                rows.append({**which, "measure": measure, "clean": clean, **changes})
    return pd.DataFrame(rows)


def describe(frame: pd.DataFrame) -> str:
    """Describe the largest change of entropy through the final norm by a single neuron, from the table of `measure`."""
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

    Returns one row per model, group of neurons ("candidates", which are `neurons`, or "all"), and singular direction of
    W_U, numbered from 1 for the largest: singular_value (logits per unit of W_U's input); share, the fraction of
    ‖w_out‖² in that direction, averaged over the group; cumulative, the sum of the shares up to this direction.

    Raises:
        NolnError: a model does not have one of the neurons, or a neuron is given twice.
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
            f"{name} has no neurons {unknown} in its last MLP. They are numbered from 0 to {model.cfg.d_mlp - 1}."
        )
    if len(set(neurons)) < len(neurons):
        raise NolnError(f"{list(neurons)} contains a neuron twice. Name each neuron once.")


@torch.no_grad()
def _w_out(model: Any) -> Float[Tensor, "neuron d_model"]:
    """Return the output weights of the last MLP's neurons, in float64."""
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
    """Return Σ u uᵀ, Σ u and the number of columns u of W_U, in float64. If `unit`, the columns are normalised.

    Padding of the vocabulary, whose columns are zero, is not counted. W_U is large, so it is processed in pieces.
    """
    d_model, vocabulary = model.W_U.shape
    total, sum_ = (
        torch.zeros(shape, dtype=torch.float64, device=model.W_U.device) for shape in ((d_model,) * 2, d_model)
    )
    count = 0
    for piece in pieces(vocabulary, d_model, model.W_U.device):
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
    name: str,
    model: Any,
    tokens: Int[Tensor, "block pos"],
    neurons: Sequence[int],
    groups: Sequence[Sequence[int]],
    batch_size: int,
) -> Float[Tensor, "group measure 3"]:
    """Return each measure without ablation, with it, and with it at a frozen scale, as means over tokens.

    `groups` are indices into `neurons`. Ablation needs the means over all tokens. Until they are known, activations of
    at most `_HELD` numbers are held; for the remaining tokens the forwards run again.
    """
    stream = Stream(model)
    hook = stream.neurons[-1].hook
    mean = torch.zeros(len(neurons), dtype=torch.float64, device=model.cfg.device)
    held, numbers = [], 0
    for batch, state in _states(name, stream, tokens, neurons, batch_size, f"Mean activations of {name}"):
        mean += state[hook].sum((0, 1), dtype=torch.float64) / tokens.numel()
        numbers += sum(activation.numel() for activation in state.values())
        if numbers <= _HELD:
            held.append((batch, state))
    rest = tokens[sum(len(batch) for batch, _ in held) :]
    again = _states(name, stream, rest, neurons, batch_size, f"Ablating neurons of {name}") if len(rest) else ()

    wide = torch.promote_types(model.W_U.dtype, torch.float32)
    W_U, b_U, W_out = (weight.to(wide) for weight in (model.W_U, model.b_U, stream.weight(stream.neurons[-1])))
    directions = [W_U if stream.neurons[-1].scale else W_out[neurons][group] @ W_U for group in groups]
    total = torch.zeros(len(groups), len(MEASURES), 3, dtype=torch.float64, device=model.cfg.device)
    for batch, state in itertools.chain(held, again):
        changes = _changes(stream, state, mean, neurons, groups)
        for i, block in enumerate(batch):
            logits = stream.unembed(state[stream.final][i : i + 1, :-1])[0]
            for piece in pieces(len(logits), model.cfg.d_vocab, logits.device):
                clean, targets = logits[piece].to(wide), block[1:][piece]
                measured_clean = _entropy_and_loss(stream.cap(clean), targets)
                for group, (change, ratio) in enumerate(changes):
                    direct = torch.addmm(clean, change[i, piece].to(wide), directions[group])
                    measured = measured_direct = _entropy_and_loss(stream.cap(direct), targets)
                    if stream.norm is not None:
                        scaled = torch.lerp(b_U, direct, ratio[i, piece].to(wide))
                        measured = _entropy_and_loss(stream.cap(scaled), targets)
                    total[group] += torch.stack([measured_clean, measured, measured_direct], dim=1)
    return total / tokens[:, 1:].numel()


def _states(
    name: str,
    stream: Stream,
    tokens: Int[Tensor, "block pos"],
    neurons: Sequence[int],
    batch_size: int,
    description: str,
) -> Iterator[tuple[Int[Tensor, "batch pos"], dict[str, Tensor]]]:
    """Yield each batch with its final residual stream, the activations of `neurons`, and those of their post-norm."""
    last = stream.neurons[-1]
    names = [*last.hooks, stream.final]
    if last.scale:
        names.append(last.scale.replace("hook_scale", "hook_normalized"))
    for batch, outputs in forwards({name: stream.model}, tokens, names, batch_size, description, unembed=False):
        cache = outputs[name].cache  # in a bridge, under more names than those asked for
        yield batch, {hook: cache[hook] for hook in names} | {last.hook: cache[last.hook][..., neurons]}


def _changes(
    stream: Stream,
    state: Mapping[str, Tensor],
    mean: Float[Tensor, " neuron"],
    neurons: Sequence[int],
    groups: Sequence[Sequence[int]],
) -> list[tuple[Float[Tensor, "batch pos direction"], Float[Tensor, "batch pos 1"]]]:
    """Return, for each group, the change of the final norm's output at its clean scale s, and s / s'.

    The change has one coefficient per neuron of the group, to be multiplied by w_out. With a post-norm, which is not
    linear, it is the change itself.
    """
    last, resid = stream.neurons[-1], state[stream.final]
    W_out, scale = stream.weight_before_norm(last)[neurons], stream.measured_scale(resid)
    excess = (state[last.hook] - mean).to(resid)
    changes = []
    for group in groups:
        written = excess[..., group] @ W_out[group]
        change = _through_post_norm(stream, written, state) if last.scale else -written
        ratio = scale / stream.measured_scale(resid + change)
        changes.append(((change if last.scale else -excess[..., group]) / scale, ratio))
    return changes


def _through_post_norm(
    stream: Stream, excess: Float[Tensor, "batch pos d_model"], cache: Mapping[str, Tensor]
) -> Float[Tensor, "batch pos d_model"]:
    """Return the change of the stream when `excess` is subtracted from the last MLP's output, before its post-norm.

    With m the output, s the norm's divisor, g its gain, n = m/s and e = excess/s, this is
    g·(n − e)/RMS(n − e) − g·n. The norm's eps is added to m², so eps/s² is added to n².
    """
    neurons = stream.neurons[-1]
    scale, normalised = cache[neurons.scale], cache[neurons.scale.replace("hook_scale", "hook_normalized")]
    left = normalised - excess / scale
    rms = (left.square().mean(-1, keepdim=True) + stream.model.cfg.eps / scale.square()).sqrt()
    return (stream.gain(neurons) * (left / rms - normalised)).to(excess)


def _entropy_and_loss(logits: Float[Tensor, "pos vocab"], targets: Int[Tensor, " pos"]) -> Float[Tensor, " measure"]:
    """Return entropy and loss, each summed over tokens.

    With x the logits minus the largest and p = exp(x) / Z, the entropy is log Z − Σ p x and the loss log Z − x[target].
    The largest p is 1 / Z. This needs a single exponential per logit; the exp of log-probabilities would be a second.
    """
    logits = logits - logits.amax(-1, keepdim=True)
    probabilities = logits.softmax(-1)
    log_Z = -probabilities.amax(-1).log()
    entropy = log_Z - torch.linalg.vecdot(probabilities, logits)
    loss = log_Z - logits.gather(-1, targets[:, None])[:, 0]
    return torch.stack([entropy, loss]).sum(1, dtype=torch.float64)


@figures.of_text
def plot_neurons(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure_neurons`: LogitVar against ‖w_out‖, one panel per model, candidates as diamonds."""
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
    """Plot the changes by single neurons in the table of `measure`: one row per measure, one column per part."""
    figure = _plot_changes(frame[frame["ablation"] == "alone"].astype({"neuron": str}), "neuron", go.Bar)
    return figure.update_xaxes(type="category").update_xaxes(title="Neuron ablated", row=len(MEASURES))


@figures.of_text
def plot_cumulative(frame: pd.DataFrame) -> go.Figure:
    """Plot the changes by several neurons together in the table of `measure`, against their number."""
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
    """Plot the table of `measure_spectrum`: singular values above, cumulative fraction of ‖w_out‖² below."""
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06)
    for (model, neurons), group in frame.groupby(["model", "neurons"], sort=False):
        line = {"color": palette.colour(model), "dash": "solid" if neurons == "candidates" else "dot"}
        style = {"x": group["direction"], "mode": "lines", "line": line, "legendgroup": model}
        if neurons == "candidates":
            # W_U is centred, so one value is 0 except for rounding, and would squeeze the others on a log axis.
            values = group["singular_value"].where(group["singular_value"] > 1e-6 * group["singular_value"].max())
            figure.add_scatter(y=values, name=model, showlegend=False, **style, row=1, col=1)
        figure.add_scatter(y=group["cumulative"], name=f"{model}, {neurons}", **style, row=2, col=1)
    figure.update_yaxes(title="Singular value of W_U<br>(logits per unit read)", type="log", row=1)
    figure.update_yaxes(title="Share of ‖w_out‖² up to<br>this direction", row=2)
    return figure.update_xaxes(title="Singular direction of W_U, from the largest", row=2)
