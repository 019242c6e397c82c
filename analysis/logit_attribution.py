"""Direct logit attribution (DLA) and direct effect of every part of a model on a logit, and the logit lens.

1. For each token, `readout` computes two effects of every component of the final residual stream on the logit of a
   target: its DLA, which is its share at the scale of the full stream, and its direct effect, which is how much the
   logit loses when the component is removed and the final norm is applied again.
2. Over tokens, NMAE = 100 · mean|DLA − direct effect| / mean|direct effect|. It is 0 % if the final norm is linear
   (Baroni et al. 2025, arXiv 2507.02559; their code scores the current token, and this module the next).
3. The logit lens reads the residual stream between blocks as if it were the final stream.

The logits of Gemma 2 are soft-capped. The attributed logit, and the logit of the lens, are those before soft-capping,
which are sums; the loss and top token of the lens are those of capped logits. What a head or neuron writes in Gemma 2
is its share of a post-norm's output: see `analysis.readout`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from analysis import figures, palette
from analysis.batches import forwards, pieces
from analysis.readout import Readout, hook_names
from analysis.stream import Component, Stream

_BARS = 24
"""The number of components in the figure of a prompt."""
_STATISTICS = ("dla", "direct_effect", "dla_abs", "direct_effect_abs", "error_abs", "dla_max", "direct_effect_max")
_LENS = ("loss", "agreement", "logit", "scale")


def measure(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    batch_size: int = 8,
    pair: tuple[int, int] | None = None,
    centre_unembedding: bool = True,
) -> pd.DataFrame:
    """Measure, for each model, how far DLA is from the direct effects of heads, and its sum from the logit.

    Arguments are those of `measure_components`, columns those of `summarise`.
    """
    components = measure_components(
        models, tokens, batch_size=batch_size, pair=pair, centre_unembedding=centre_unembedding
    )
    return summarise(components)


def summarise(components: pd.DataFrame) -> pd.DataFrame:
    """Summarise the table of `measure_components`: one row per model, in the order of the models.

    Columns: model, target, unembedding; nmae, the mean NMAE of heads (except those without any effect), in %, as in the
    paper; nmae_pooled, 100 · Σ mean|DLA − direct effect| / Σ mean|direct effect| over heads, in %, as in its code;
    residue, the largest |logit − sum of the DLA of all components| over tokens, in logits; residue_relative, the same
    divided by the largest |logit|, dimensionless; effect_residue and effect_residue_relative, the same with direct
    effects instead of DLA; tokens.
    """
    rows = []
    for model, frame in components.groupby("model", sort=False):
        heads = frame[frame["component"] == "head"]
        logit, residue = (frame[frame["component"] == name].iloc[0] for name in ("logit", "residue"))
        rows.append(
            {
                "model": model,
                "target": logit["target"],
                "unembedding": logit["unembedding"],
                "nmae": heads["nmae"].mean(),
                "nmae_pooled": 100 * heads["error_abs"].sum() / heads["direct_effect_abs"].sum(),
                "residue": residue["dla_max"],
                "residue_relative": residue["dla_max"] / logit["dla_max"],
                "effect_residue": residue["direct_effect_max"],
                "effect_residue_relative": residue["direct_effect_max"] / logit["dla_max"],
                "tokens": logit["tokens"],
            }
        )
    return pd.DataFrame(rows)


def describe_residue(frame: pd.DataFrame) -> str:
    """Describe how closely the parts of each model add up to its logit, from the table of `measure` or `summarise`."""
    residues = [
        f"{row.model}: {row.residue:.2g} by DLA, {row.effect_residue:.2g} by direct effect"
        for row in frame.itertuples()
    ]
    return (
        f"How far the sum over all components is from the logit, at the worst token, in logits: {'; '.join(residues)}."
    )


@figures.of_text
def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure` or `summarise`: the NMAE of each model."""
    figure = go.Figure(
        [
            go.Bar(
                name=row["model"],
                legendgroup=row["model"],
                x=["Mean of the heads’ NMAE", "NMAE of all heads together"],
                y=[row["nmae"], row["nmae_pooled"]],
                marker_color=palette.colour(row["model"]),
                texttemplate="%{y:.3g}",
                textposition="outside",
            )
            for row in frame.to_dict("records")
        ]
    )
    figure.update_yaxes(title=f"Error of DLA (NMAE, %),<br>W_U {frame['unembedding'].iloc[0]}")
    return figure


@torch.inference_mode()
def measure_components(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    batch_size: int = 8,
    pair: tuple[int, int] | None = None,
    centre_unembedding: bool = True,
    neurons: bool = False,
) -> pd.DataFrame:
    """Measure DLA and direct effect of every component, over all tokens that have a target.

    Args:
        models: models by name, all on one device.
        tokens: blocks as in training.
        batch_size: blocks per forward. No result depends on it.
        pair: two token ids. The target is then the logit of the first minus that of the second, at every position.
            None: the next token.
        centre_unembedding: whether to subtract from W_U its mean over the vocabulary. It cancels out in a pair.
        neurons: also measure every neuron of every MLP.

    Returns one row per model and component. Columns:

    - model; target; unembedding, "centred" or "as it is";
    - component, one of embed, pos_embed, head, b_O, mlp (including its bias), neuron, b_U, logit (the value that the
      others sum to) and residue (the difference; neurons do not count); label, such as L2H3; layer, head and neuron if
      it has them;
    - over tokens, in logits: dla, its mean, dla_abs, the mean of its absolute value, and dla_max, the maximum of that;
      direct_effect, direct_effect_abs and direct_effect_max, the same; error_abs, the mean |DLA − direct effect|;
    - nmae, in %; tokens, their number.
    """
    count = len(tokens) * (tokens.shape[1] - (pair is None))
    frames = []
    for name, model in models.items():
        sums: dict[tuple[str, int | None], Float[Tensor, "5 component"]] = {}
        maxima: dict[tuple[str, int | None], Float[Tensor, "2 component"]] = {}
        hooks = hook_names(model, neurons)
        for batch, outputs in forwards({name: model}, tokens, hooks, batch_size, f"Logit attribution of {name}"):
            logits, cache = outputs[name]
            readout = Readout(model, batch, cache, pair, centre_unembedding)
            for component, layer, effects in readout.components(logits, neurons):
                values = torch.stack(effects).flatten(1, 2)
                absolute, error = values.abs(), (values[:1] - values[1:]).abs()
                maximum = absolute.amax(1)
                key = component, layer
                sums[key] = torch.cat([values, absolute, error]).sum(1) + sums.get(key, 0)
                maxima[key] = maximum.maximum(maxima.get(key, maximum))
        for (component, layer), total in sums.items():
            statistics = torch.cat([total / count, maxima[component, layer]]).T.cpu().numpy()
            frame = _labels(name, model, pair, centre_unembedding, component, layer, len(statistics))
            frame[list(_STATISTICS)] = statistics
            frames.append(frame)
    components = pd.concat(frames, ignore_index=True)
    is_part = ~components["component"].isin(["logit", "residue"])
    components["nmae"] = (100 * components["error_abs"] / components["direct_effect_abs"]).where(is_part)
    return components.assign(tokens=count)


@figures.of_text
def plot_components(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure_components`: the NMAE of each component over its mean |direct effect|."""
    figure = go.Figure()
    for name, points in frame.dropna(subset="nmae").groupby("model", sort=False):
        figure.add_scatter(
            name=name,
            legendgroup=name,
            x=points["direct_effect_abs"],
            y=points["nmae"],
            mode="markers",
            marker={"color": palette.colour(name), "opacity": 0.7},
            text=points["label"],
            hovertemplate="%{text}: direct effect %{x:.3g} logits, NMAE %{y:.3g} %",
        )
    figure.update_xaxes(title="Mean |direct effect| (logits)", type="log")
    figure.update_yaxes(title=f"Error of DLA (NMAE, %),<br>W_U {frame['unembedding'].iloc[0]}")
    return figure


@figures.of_text
def plot_heads(frame: pd.DataFrame) -> go.Figure:
    """Plot the NMAE of the heads in the table of `measure_components`: one map of layer and head per model."""
    heads = frame[frame["component"] == "head"]
    return figures.heat_maps(
        heads, {"nmae": (f"Error of DLA<br>(NMAE, %),<br>W_U {heads['unembedding'].iloc[0]}", {"cmin": 0})}
    )


@torch.inference_mode()
def measure_prompt(
    models: Mapping[str, Any],
    prompt: Int[Tensor, " pos"],
    *,
    pair: tuple[int, int] | None = None,
    centre_unembedding: bool = True,
    neurons: bool = False,
) -> pd.DataFrame:
    """Measure DLA and direct effect of every component at every token of one prompt that has a target.

    Arguments are those of `measure_components`. Returns one row per model, position and component. Columns: model,
    unembedding, component, label, layer, head and neuron, as there; position; token and target, their texts in quotes;
    dla and direct_effect, in logits.
    """
    frames = []
    for name, model in models.items():
        texts = np.array([token_text(model, token) for token in prompt], dtype=object)
        for batch, outputs in forwards({name: model}, prompt.unsqueeze(0), hook_names(model, neurons)):
            logits, cache = outputs[name]
            readout = Readout(model, batch, cache, pair, centre_unembedding)
            for component, layer, effects in readout.components(logits, neurons):
                positions, parts = np.indices(effects.dla.shape[1:]).reshape(2, -1)
                labels = _labels(name, model, pair, centre_unembedding, component, layer, effects.dla.shape[2])
                frame = labels.iloc[parts].assign(position=positions, token=texts[positions])
                if pair is None:
                    frame["target"] = texts[positions + 1]
                frame[["dla", "direct_effect"]] = torch.stack(effects, dim=-1).flatten(0, 2).cpu().numpy()
                frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def largest_first(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort the table of `measure_prompt`: the last position first, and at each the largest |DLA| in any model first."""
    largest = frame["dla"].abs().groupby([frame["position"], frame["label"]]).transform("max")
    order = frame.assign(largest=largest).sort_values(["position", "largest", "label"], ascending=False, kind="stable")
    return order.drop(columns="largest").reset_index(drop=True)


def describe_prompt(frame: pd.DataFrame) -> str:
    """Describe the prompt of `measure_prompt`, and the target at its last position."""
    tokens = frame.drop_duplicates("position").sort_values("position")
    return f"The prompt, token by token: {' '.join(tokens['token'])}; the target: {tokens['target'].iloc[-1]}."


@figures.of_text
def plot_prompt(frame: pd.DataFrame) -> go.Figure:
    """Plot the DLA of components at the last position in the table of `measure_prompt`, as bars.

    The logit comes first, followed by the components with the largest DLA in any model, in the order of the frame.
    """
    last = frame[(frame["position"] == frame["position"].max()) & (frame["component"] != "residue")]
    parts = last[last["component"] != "logit"]
    largest = parts["dla"].abs().groupby(parts["label"]).max().nlargest(_BARS).index
    labels = ["logit", *parts["label"].drop_duplicates()[lambda label: label.isin(largest)]]
    figure = go.Figure()
    for name, bars in last.groupby("model", sort=False):
        figure.add_bar(
            name=name,
            legendgroup=name,
            x=labels,
            y=bars.set_index("label")["dla"].reindex(labels),
            marker_color=palette.colour(name),
        )
    text = last[["token", "target"]].iloc[0]
    figure.update_xaxes(title=f"The logit, and the {len(largest)} components with the largest DLA", tickangle=-90)
    figure.update_yaxes(title=f"DLA to the logit of {text['target']}<br>(logits), W_U {last['unembedding'].iloc[0]}")
    return figure


@torch.inference_mode()
def measure_lens(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    batch_size: int = 8,
    pair: tuple[int, int] | None = None,
    centre_unembedding: bool = True,
) -> pd.DataFrame:
    """Measure what the residual stream between blocks predicts when it is read as if it were final: the logit lens.

    The final norm divides a layer's residual vector by that vector's own scale, not by the scale of the final one.

    Arguments are those of `measure_components`. Returns one row per model and layer (the number of blocks before).
    Columns: model, target, unembedding, layer; and means over tokens: loss of the next token, in nats; agreement, how
    often the top token is the model's own, from 0 to 1; logit, that of the target; scale, the norm's divisor, in units
    of the residual stream (1 without a norm).
    """
    frames = []
    for name, model in models.items():
        points = Stream(model).between_blocks
        total = torch.zeros(len(points), len(_LENS), dtype=torch.float64)
        for batch, outputs in forwards({name: model}, tokens, points, batch_size, f"Logit lens of {name}"):
            logits, cache = outputs[name]
            readout = Readout(model, batch, cache, pair, centre_unembedding)
            top = logits[:, :-1].argmax(-1)
            for layer, point in enumerate(points):
                normalised, scale = readout.normalise(cache[point])
                loss, likeliest = _predict(model, normalised[:, :-1], batch[:, 1:])
                values = loss, top == likeliest, readout.read(normalised), scale
                # All blocks have the same number of tokens, so their means can be averaged.
                total[layer] += torch.stack([value.double().flatten(1).mean(1).sum().cpu() for value in values])
        frame = pd.concat(
            [_labels(name, model, pair, centre_unembedding, "", layer, 1) for layer in range(len(points))]
        )
        frame = frame[["model", "target", "unembedding", "layer"]]
        frame[list(_LENS)] = (total / len(tokens)).numpy()
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _predict(
    model: Any, normalised: Float[Tensor, "batch pos d_model"], targets: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Return the loss and the top token of the logits of vectors that have passed the final norm."""
    losses, likeliest, flat = [], [], normalised.flatten(0, 1).to(model.W_U)
    for piece in pieces(len(flat), model.cfg.d_vocab, flat.device):
        logits = Stream(model).cap(flat[piece] @ model.W_U + model.b_U)
        losses.append(F.cross_entropy(logits.float(), targets.flatten()[piece], reduction="none"))
        likeliest.append(logits.argmax(-1))
    return torch.cat(losses).view_as(targets), torch.cat(likeliest).view_as(targets)


@figures.of_text
def plot_lens(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure_lens` by layer."""
    quantities = {
        "loss": "CE<br>(nats/token)",
        "agreement": "Same top token<br>as at the end (share)",
        "logit": f"Logit of the target,<br>W_U {frame['unembedding'].iloc[0]}",
    }
    return figures.lines(frame, "layer", quantities).update_xaxes(title="Number of blocks before", row=len(quantities))


def token_text(model: Any, token: int | Tensor) -> str:
    """Return the text of a token in quotes, or its id if the model has no tokenizer."""
    return repr(model.tokenizer.decode([int(token)])) if model.tokenizer is not None else str(int(token))


def _target(model: Any, pair: tuple[int, int] | None) -> str:
    return "next token" if pair is None else " − ".join(token_text(model, token) for token in pair)


def _labels(
    name: str,
    model: Any,
    pair: tuple[int, int] | None,
    centre_unembedding: bool,
    component: str,
    layer: int | None,
    count: int,
) -> pd.DataFrame:
    """Return the columns that identify `count` components of one kind and layer, and their target."""
    numbers = {kind: range(count) if component == kind else [None] * count for kind in ("head", "neuron")}
    return pd.DataFrame(
        {
            "model": name,
            "target": _target(model, pair),
            "unembedding": "centred" if centre_unembedding else "as it is",
            "component": component,
            "label": [Component(component, layer, "").label(i) for i in range(count)],
            "layer": pd.array([layer] * count, "Int64"),
            **{kind: pd.array(list(number), "Int64") for kind, number in numbers.items()},
        }
    )
