"""How well attribution patching estimates activation patching, on pairs of prompts.

1. A pair consists of a clean and a corrupt prompt with the same number of tokens, and the next token that each calls
   for, `correct` and `wrong`. With LD the logit of `correct` minus that of `wrong` at the last position, as returned by
   the model (Gemma 2's soft-cap is one more nonlinearity),
   metric = (LD − LD_corrupt) / (LD_clean − LD_corrupt): 0 for the corrupt prompt and 1 for the clean one.
2. A place is a hook point of a layer, a position and, if the hook point has heads, a head.
3. Activation patching: run the corrupt prompt with the activation at one place replaced by that of the clean prompt.
   The effect is the metric minus that of the corrupt prompt, which is 0. Many places are run in one batch, in whole
   forwards, because a single block of a model with rotary positions cannot be called alone. Only the last position is
   unembedded.
4. Attribution patching: (a_clean − a_corrupt) · ∂metric/∂a, with the gradient at the corrupt prompt. This is the effect
   to first order, for all places from one backward pass (Syed et al. 2023, arXiv 2310.10348).
5. Error = |attribution − activation|. LN is one of the nonlinearities that cause it; Baroni et al. 2025, arXiv
   2507.02559, found that it does not decrease when LN is removed.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from analysis import figures, palette
from analysis.prompts import Pair, PairTokens, encode_pairs
from finetune.progress import progress

HOOK_POINTS = "hook_resid_pre", "hook_attn_out", "hook_mlp_out", "attn.hook_z"
"""Hook points of a layer, by their names in TransformerLens."""

Metric = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]]


def measure(
    models: Mapping[str, Any],
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    only: Collection[int] | None = None,
    hook_points: Sequence[str] = HOOK_POINTS,
    batch_size: int = 32,
    prefix: str | None = None,
) -> pd.DataFrame:
    """Patch every place of every layer of every model, one by one, for every pair.

    Positions before the first difference between the prompts are omitted, because both effects are 0 there.

    Args:
        models: those of `analysis.load_trio`.
        pairs: pairs of prompts.
        tokenizer: the tokenizer of the models.
        only: the numbers of the pairs to patch, from 1. None: all.
        hook_points: the hook points to patch, by their names in a layer.
        batch_size: places per forward. No result depends on it.
        prefix: a token to prepend to each prompt, as `text.prefix` in a recipe. It is at position 0.

    Returns:
        One row per model, pair (numbered from 1), hook point, layer, position and head (NA without heads). `token` is
        the clean prompt's token there. `activation`, `attribution` and `error` are fractions of LD_clean − LD_corrupt
        (no unit). If a model hardly distinguishes the prompts, this difference is small, and the fractions are large
        and mean little. Omit such pairs by passing `solved_by_all` of `measure_pairs` as `only`.

    Raises:
        PairError: as in `encode_pairs`.
    """
    frames = []
    for model_name, model in models.items():
        encoded = dict(enumerate(encode_pairs(pairs, tokenizer, model.cfg.n_ctx, prefix), 1))
        for number in progress(encoded if only is None else only, f"Patching {model_name}", unit="pair", leave=False):
            tokens = encoded[number]
            words = tokenizer.batch_decode(tokens.clean[:, None])
            for frame in _patch_pair(model, tokens, hook_points, batch_size):
                frame.insert(0, "model", model_name)
                frame.insert(1, "pair", number)
                frame.insert(frame.columns.get_loc("position") + 1, "token", [words[i] for i in frame["position"]])
                frames.append(frame)
    frame = pd.concat(frames, ignore_index=True)
    frame["error"] = (frame["attribution"] - frame["activation"]).abs()
    return frame


def _patch_pair(model: Any, tokens: PairTokens, hook_points: Sequence[str], batch_size: int) -> list[pd.DataFrame]:
    """Return one frame per layer and hook point."""
    device = model.cfg.device
    names = {f"blocks.{layer}.{point}": (layer, point) for layer in range(model.cfg.n_layers) for point in hook_points}
    corrupt = tokens.corrupt.to(device)
    with torch.no_grad():
        logits, clean = model.run_with_cache(
            tokens.clean[None].to(device), names_filter=list(names), return_cache_object=False
        )
        low, high = _logit_difference(model(corrupt[None]), tokens), _logit_difference(logits, tokens)

    def metric(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        return (_logit_difference(logits, tokens) - low) / (high - low)

    attributed = _attribution(model, corrupt, {name: clean[name][0] for name in names}, metric)
    differs = int((tokens.clean != tokens.corrupt).nonzero()[0])
    frames = []
    for name, (layer, point) in names.items():
        activation = clean[name][0]
        places = torch.ones(activation.shape[:-1]).nonzero()
        places = places[places[:, 0] >= differs]
        columns = {
            "hook_point": point,
            "layer": layer,
            "position": places[:, 0],
            "head": pd.array(places[:, 1].tolist() if places.shape[1] == 2 else [pd.NA] * len(places), dtype="Int64"),
            "activation": _activation(model, corrupt, name, activation, places, metric, batch_size).cpu(),
            "attribution": attributed[name][places.unbind(1)].cpu(),
        }
        frames.append(pd.DataFrame(columns))
    return frames


def _logit_difference(logits: Float[Tensor, "batch pos vocab"], tokens: PairTokens) -> Float[Tensor, " batch"]:
    last = logits[:, -1].double()
    return last[:, tokens.correct] - last[:, tokens.wrong]


@torch.no_grad()
def _activation(
    model: Any,
    corrupt: Int[Tensor, " pos"],
    name: str,
    clean: Float[Tensor, "pos ... d"],
    places: Int[Tensor, "place axis"],
    metric: Metric,
    batch_size: int,
) -> Float[Tensor, " place"]:
    """Return the effect of replacing the activation of `name`, at each of `places`, by the clean activation."""

    def patch(activation: Float[Tensor, "place pos ... d"], hook: Any, part: Tensor) -> Tensor:
        activation = activation.clone()
        where = part.unbind(1)
        activation[(torch.arange(len(part)), *where)] = clean[where]
        return activation

    effects = []
    last_only = model.unembed.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -1:],))
    try:
        for part in places.split(batch_size):
            hooks = [(name, partial(patch, part=part))]
            effects.append(metric(model.run_with_hooks(corrupt.expand(len(part), -1), fwd_hooks=hooks)))
    finally:
        last_only.remove()
    return torch.cat(effects)


def _attribution(
    model: Any, corrupt: Int[Tensor, " pos"], clean: Mapping[str, Float[Tensor, "pos ... d"]], metric: Metric
) -> dict[str, Float[Tensor, "pos ..."]]:
    """Return the first-order effect of replacing the activation at each place of each hook by the clean activation."""
    activations, nothings = {}, {}

    def add_nothing(activation: Tensor, hook: Any, name: str) -> Tensor:
        # The added zero has the gradient of the activation, whether or not the model's parameters require gradients.
        activations[name], nothings[name] = activation.detach(), torch.zeros_like(activation, requires_grad=True)
        return activation + nothings[name]

    with torch.enable_grad():
        logits = model.run_with_hooks(
            corrupt[None], fwd_hooks=[(name, partial(add_nothing, name=name)) for name in clean]
        )
        gradients = torch.autograd.grad(metric(logits).sum(), list(nothings.values()))
    return {
        name: ((clean[name] - activations[name][0]) * gradient[0]).double().sum(-1)
        for name, gradient in zip(nothings, gradients, strict=True)
    }


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Average the error in the table of `measure` over pairs, positions and heads.

    Returns one row per model, hook point and layer: mean_error and error_spread, the mean and standard deviation, as
    fractions of LD_clean − LD_corrupt; places, their number.
    """
    errors = frame.groupby(["model", "hook_point", "layer"], sort=False)["error"]
    return errors.agg(mean_error="mean", error_spread="std", places="count").reset_index()


@torch.no_grad()
def measure_pairs(
    models: Mapping[str, Any],
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: str | None = None,
) -> pd.DataFrame:
    """Measure whether the models solve the pairs: differences above 0 for the clean and below 0 for the corrupt prompt.

    Returns one row per model and pair (numbered from 1): the four texts of the pair; clean_difference and
    corrupt_difference, the logit of `correct` minus that of `wrong` at the end of each prompt, in logits. `prefix` is
    prepended to each prompt.

    Raises:
        PairError: as in `encode_pairs`.
    """
    rows = []
    for name, model in models.items():
        for number, tokens in enumerate(encode_pairs(pairs, tokenizer, model.cfg.n_ctx, prefix), 1):
            logits = model(torch.stack([tokens.clean, tokens.corrupt]).to(model.cfg.device))
            clean, corrupt = _logit_difference(logits, tokens).tolist()
            texts = asdict(pairs[number - 1])
            differences = {"clean_difference": clean, "corrupt_difference": corrupt}
            rows.append({"model": name, "pair": number, **texts, **differences})
    return pd.DataFrame(rows)


def solved_by_all(frame: pd.DataFrame) -> list[int]:
    """Return the numbers of the pairs in the table of `measure_pairs` that every model solves."""
    can = (frame["clean_difference"] > 0) & (frame["corrupt_difference"] < 0)
    return [int(pair) for pair, all_can in can.groupby(frame["pair"]).all().items() if all_can]


told_apart = solved_by_all  # the old name


def describe_pairs(frame: pd.DataFrame) -> str:
    """Describe how many of the pairs in the table of `measure_pairs` every model solves."""
    return (
        f"{len(solved_by_all(frame))} of {frame['pair'].nunique()} pairs are patched: those for which every model "
        "prefers the right answer to both prompts, so that the difference is above 0 for the clean prompt and below 0 "
        "for the corrupt one."
    )


@figures.of_text
def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure`: the mean error of attribution patching by layer, one panel per hook point."""
    points = list(frame["hook_point"].unique())
    columns = min(2, len(points))
    figure = make_subplots(
        math.ceil(len(points) / columns),
        columns,
        shared_xaxes=True,
        subplot_titles=points,
        vertical_spacing=0.12,
        horizontal_spacing=0.14,
    )
    for (model, point), group in summarise(frame).groupby(["model", "hook_point"], sort=False):
        row, col = divmod(points.index(point), columns)
        style = {"name": model, "legendgroup": model, "marker_color": palette.colour(model)}
        place = {"row": row + 1, "col": col + 1}
        figure.add_scatter(x=group["layer"], y=group["mean_error"], showlegend=row == col == 0, **style, **place)
    figure.update_xaxes(title="Layer", row=math.ceil(len(points) / columns))
    figure.update_yaxes(rangemode="tozero")
    return figure.update_yaxes(title="Mean error (share of<br>logit difference)", col=1)


@figures.of_text
def plot_effects(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure`: attribution against activation patching, one dot per place, one panel per model.

    On the grey line they are equal.
    """
    models = list(frame["model"].unique())
    figure = make_subplots(
        1, len(models), shared_xaxes="all", shared_yaxes=True, column_titles=models, horizontal_spacing=0.03
    )
    ends = frame["activation"].agg(["min", "max"])
    for col, model in enumerate(models, start=1):
        effects = frame[frame["model"] == model]
        figure.add_scatter(x=ends, y=ends, mode="lines", line_color="grey", hoverinfo="skip", row=1, col=col)
        figure.add_scatter(
            x=effects["activation"],
            y=effects["attribution"],
            mode="markers",
            marker={"color": palette.colour(model), "size": 4, "opacity": 0.5},
            name=model,
            hovertemplate="activation patching %{x:.3f}, attribution patching %{y:.3f}",
            row=1,
            col=col,
        )
    figure.update_xaxes(title="Activation patching<br>(share of logit<br>difference)").update_layout(showlegend=False)
    return figure.update_yaxes(title="Attribution patching<br>(share of logit difference)", col=1)


@figures.of_text
def plot_pairs(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure_pairs`: the logit difference of both prompts, pair by pair."""
    figure = go.Figure()
    for (model,), group in frame.groupby(["model"], sort=False):
        for prompt, symbol in (("clean", "circle"), ("corrupt", "circle-open")):
            figure.add_scatter(
                x=group["pair"],
                y=group[f"{prompt}_difference"],
                mode="markers",
                marker={"color": palette.colour(model), "symbol": symbol, "size": 9},
                text=group[prompt],
                name=f"{model}, {prompt}",
                legendgroup=model,
            )
    figure.update_layout(scattermode="group", xaxis={"title": "Pair (number)", "type": "category"})
    return figure.update_yaxes(title="Logit of the clean prompt’s answer minus<br>that of the corrupt prompt’s answer")
