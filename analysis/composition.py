"""What weights alone say: the virtual weights between any two components, and how well they predict what edges carry.

A component writes a · W_out to the residual stream, where a is its activation, and a reader computes N(x) · W_in. So
the virtual weights between them are W_out W_in, which do not depend on the prompt (Elhage et al. 2021, "A Mathematical
Framework for Transformer Circuits"). Without norms, nothing else is between them. With norms, what is written is
divided by a number that depends on the prompt, and on everything else in the stream. Two questions measure the cost.

1. *With activations*: how much of what an edge carries is a · W_out W_in / σ̄, with one σ̄ for all prompts? In a model
   with norms, σ̄ is the mean of the divisor over other text ("mean"), or the divisor of each token of each prompt
   ("own"), as graphs use it; without norms nothing divides ("none"). What an edge carries is its contribution or its
   direct effect, as in `analysis.edges`. The token's own divisor predicts the contribution exactly, by definition.
2. *Without activations*: do the edges with the highest scores, computed from weights, have the largest effects? The
   scores of an edge:
   - `composition`: ‖W_OV W‖ / (‖W_OV‖ ‖W‖), with Frobenius norms. W_OV = W_V W_O maps what the writing head reads to
     what it writes; for an MLP it is W_out, and for an embedding its matrix. W belongs to the reader: W_Q W_Kᵀ
     (Q-composition), its transpose (K-composition), W_V W_O (V-composition), W_in of an MLP, or W_U.
   - `strength`: ‖W_OV W‖ / ‖W‖: the same without dividing by the size of the writer. It is meaningful only with norms:
     without them, W_V contains the divisor of its layer, and the length of the stream is unknown.
   - `kernel`: the Projection Kernel ‖VᵀU‖², with V and U orthonormal bases of the spaces that the writer writes to and
     the reader reads from. It is the sum of the squared cosines of the angles between the two spaces (Yamagiwa et al.
     2026, arXiv 2601.10266), here divided by the smaller dimension, so that it is 1 if one space contains the other.
   The scores are compared with those of random weights, for which all singular values are kept and the directions in
   which each component writes are drawn at random. Then the mean of composition² is 1/d_model, whatever the singular
   values.

Norms are folded into weights. If norms centre, everything is in the space without the mean. Rotating the residual
stream, or rescaling values against W_O or queries against keys, changes no score. With rotary positions, QK circuits
are those between a token and itself. If there is a live norm between a component and the stream (Gemma 2), virtual
weights include its gain, but not its division.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from plotly.subplots import make_subplots
from scipy.stats import rankdata
from torch import Tensor
from transformer_lens import FactoredMatrix

from analysis import figures, palette
from analysis.batches import forwards
from analysis.edges import KINDS, Reading, Side, inner_sides
from analysis.readout import Readout, Written, hook_names
from analysis.stream import Component, Reader, Stream

SCORES = {"composition": "Composition score", "strength": "Strength", "kernel": "Projection Kernel"}
"""The scores of an edge, with their titles in figures."""
TOP = 0.1
"""The fraction of the edges of a kind that count as the largest."""
WRITERS = {"embed": "tokens", "pos_embed": "positions", "head": "heads", "mlp": "MLPs"}
"""Kinds of components whose output depends on the prompt or position, with their names in figures."""
DIVISORS = {"mean": "mean divisor", "own": "own divisors"}
"""The divisors of predictions in models with norms, with their names in figures."""
_ONE = {"none": "one divisor", "mean": "one divisor", "own": "own divisors"}
_SYMBOLS = {"none": "circle", "mean": "circle", "own": "diamond-open"}
_TITLES = {"contribution": "Contribution", "effect": "Direct effect"}
_READERS = {"query": "queries", "key": "keys", "value": "values", "mlp": "MLPs", "logit": "logit"}
_PARTS = ("head", "mlp")
_PRECISIONS = ("precision", "precision_random")
_ENDS = ["writer", "reader"]
_RANKED = ["model", "component", "kind", "score", *_PRECISIONS, "precision_random_sd", "rank", "rank_random"]
_RANKED += ["edges", "largest"]
_NAMES = re.compile(r"L(?P<layer>\d+)(?:H(?P<head>\d+)|N(?P<neuron>\d+)| MLP)")


@torch.inference_mode()
def virtual_weights(model: Any, writer: str, reader: str) -> FactoredMatrix:
    """Return the weights from the activations of a writer to a reader, as a factored matrix. `.AB` multiplies it out.

    Multiplied by the writer's activations, they are its contribution to the reader. In a model with norms, the product
    must also be divided by the norm's divisor at the token.

    Args:
        model: a model from a loader of `analysis`.
        writer: "embed", whose activations are one-hot tokens; "pos_embed", one-hot positions; "L2H3", the `hook_z` of a
            head; "L2 MLP", the neurons of an MLP; or "L2N17", one of them.
        reader: "L2H3 query" and the like; "L2 MLP"; "L2N17", one of its neurons; for gated MLPs also "L2 MLP gate" and
            "L2N17 gate"; or "logit", the logits of all tokens.

    Raises:
        NolnError: the model is one of `finetune.blocks`.
        ValueError: there is no writer or reader with that name.
    """
    stream = Stream(model)
    if reader == "logit":
        stream.require_folded_norm()
        R = model.W_U
    else:
        R = _read(stream, reader)
    written = _written(stream, writer)
    return FactoredMatrix(stream.centre(written.double()), R.double())


def _written(stream: Stream, name: str) -> Float[Tensor, "activation d_model"]:
    """Return the output weights of the writer called `name`."""
    if name in WRITERS:
        component = next((component for component in stream.components if component.kind == name), None)
        if component is not None and component.layer is None:
            return _embedding(stream, component)
    match = _NAMES.fullmatch(name)
    if match is None or int(match["layer"]) >= stream.model.cfg.n_layers:
        raise ValueError(f"No writer is called {name}. Names are embed, pos_embed, L0H0, L0 MLP, L0N0 and so on.")
    layer = int(match["layer"])
    W = stream.weight((stream.heads if match["head"] else stream.neurons)[layer])
    part = match["head"] or match["neuron"]
    if part is not None and int(part) >= len(W):
        raise ValueError(f"No writer is called {name}. Layer {layer} has only {len(W)} of this kind.")
    return W if part is None else W[int(part)].view(-1, W.shape[-1])


def _read(stream: Stream, name: str) -> Float[Tensor, "d_model unit"]:
    """Return the input weights of the reader called `name`."""
    neuron = re.fullmatch(r"(L\d+)N(\d+)((?: gate)?)", name)
    for reader in stream.readers:
        W = stream.read_weights(reader)[0]
        for head in range(W.shape[1]):
            if neuron is None and reader.label(head) == name:
                return W[:, head]
            if neuron and reader.label(head) == f"{neuron[1]} MLP{neuron[3]}" and int(neuron[2]) < W.shape[-1]:
                return W[:, head, int(neuron[2]), None]
    raise ValueError(f"No reader is called {name}. Names are L0H0 query, L0 MLP, L0N0, logit and so on.")


def _embedding(stream: Stream, component: Component) -> Float[Tensor, "token d_model"]:
    """Return the embedding of each token, or of each position."""
    model = stream.model
    if component.kind == "pos_embed":
        return model.pos_embed.W_pos if hasattr(model.pos_embed, "W_pos") else model.pos_embed.weight
    return model.embed(torch.arange(model.cfg.d_vocab, device=model.cfg.device)[None])[0]  # some families scale it


@torch.inference_mode()
def ov_circuit(model: Any, layer: int, head: int) -> FactoredMatrix:
    """Return how much a head raises the logit of each token when it attends to each token: [attended, logit].

    This is W_E W_V W_O W_U as a factored matrix, with the mean over the vocabulary subtracted from W_U. With norms, it
    must be divided twice: where the head reads, and before the logits.
    """
    return _ov_circuit(Stream(model), _tokens(Stream(model)), layer, head)


@torch.inference_mode()
def qk_circuit(model: Any, layer: int, head: int, writer: str = "embed") -> FactoredMatrix:
    """Return a head's attention score of each token for each token, or of positions if `writer` is "pos_embed".

    This is W_E W_Q W_Kᵀ W_Eᵀ times the scale of scores, as a factored matrix: [query, key]. With norms, it must be
    divided twice. Biases are omitted, and rotary positions are those of a token and itself.
    """
    stream = Stream(model)
    return _qk_circuit(stream, stream.centre(_written(stream, writer).double()), layer, head)


def _tokens(stream: Stream) -> Float[Tensor, "token d_model"]:
    return stream.centre(_written(stream, "embed").double())


def _ov_circuit(stream: Stream, E: Float[Tensor, "token d_model"], layer: int, head: int) -> FactoredMatrix:
    stream.require_folded_norm()
    W_O, W_U = stream.weight(stream.heads[layer])[head].double(), stream.model.W_U.double()
    to_logits = stream.centre(W_O) @ W_U
    return FactoredMatrix(E @ _every_head(stream, "V", layer)[head], to_logits - to_logits.mean(-1, keepdim=True))


def _qk_circuit(stream: Stream, E: Float[Tensor, "token d_model"], layer: int, head: int) -> FactoredMatrix:
    W_Q, W_K = (_every_head(stream, part, layer)[head] for part in "QK")
    return FactoredMatrix(E @ W_Q * stream.score_scale(layer), (E @ W_K).T)


def _every_head(stream: Stream, part: str, layer: int) -> Float[Tensor, "head d_model d_head"]:
    """Return W_Q, W_K or W_V of every head of a layer in float64. Shared ones are repeated."""
    reader = next(reader for reader in stream.readers if (reader.layer, reader.part) == (layer, part))
    W = stream.read_weights(reader)[0].movedim(1, 0).double()
    return W.repeat_interleave(stream.model.cfg.n_heads // len(W), dim=0)


@torch.inference_mode()
def measure_circuits(models: Mapping[str, Any]) -> pd.DataFrame:
    """Measure what single heads do with tokens, from their weights.

    Returns one row per model and head. Columns: model, layer, head; copying, Σλ / Σ|λ| over the eigenvalues of
    `ov_circuit`, from −1 to 1: at 1, the head raises the logits of the tokens that it attends to (Elhage et al. 2021);
    matching, the same for `qk_circuit`: at 1, tokens attend to tokens like themselves.

    Raises:
        NolnError: a model is one of `finetune.blocks`.
        ValueError: the weights of the final norm are not folded into the unembedding.
    """
    rows = []
    for name, model in models.items():
        stream = Stream(model)
        E = _tokens(stream)
        for layer in range(model.cfg.n_layers):
            for head in range(model.cfg.n_heads):
                circuits = _ov_circuit(stream, E, layer, head), _qk_circuit(stream, E, layer, head)
                copying, matching = (_positive(circuit.eigenvalues) for circuit in circuits)
                rows.append({"model": name, "layer": layer, "head": head, "copying": copying, "matching": matching})
    return pd.DataFrame(rows)


def _positive(eigenvalues: Tensor) -> float:
    return float(eigenvalues.real.sum() / eigenvalues.abs().sum())


class _Edges(NamedTuple):
    """All edges of a model, and the order of their numbers."""

    pairs: list[tuple[int, Component]]
    """Pairs of the index of the reading side (that of the logit is last) and the writing component. Each pair has an
    array of numbers, [part of the component, reader of the side]."""
    names: pd.DataFrame
    """writer, reader, component, kind and distance of each edge."""


def _all_edges(stream: Stream, sides: list[Side]) -> _Edges:
    """Return the edges into `sides` and into the logit."""
    layers, heads = stream.model.cfg.n_layers, stream.model.cfg.n_heads
    readers = [side.names.drop_duplicates("reader")[["reader", "kind", "reader_layer"]] for side in sides]
    by_side = [(side.point, list(frame.to_numpy())) for side, frame in zip(sides, readers, strict=True)]
    pairs, rows = [], []
    for number, (point, its) in enumerate([*by_side, (stream.final, [("logit", "logit", layers)])]):
        for component in stream.components_at(point):
            if component.kind in WRITERS:
                pairs.append((number, component))
                layer = -1 if component.layer is None else component.layer
                for part in range(heads if component.kind == "head" else 1):
                    label = component.label(part)
                    rows += [(label, reader, component.kind, kind, at - layer) for reader, kind, at in its]
    return _Edges(pairs, pd.DataFrame(rows, columns=["writer", "reader", "component", "kind", "distance"]))


class _Factor:
    """The weights of writers or readers in the form that norms of products need: singular values and directions."""

    def __init__(self, size: Float[Tensor, "part k"], directions: Float[Tensor, "part k d"]) -> None:
        self.size, self.directions = size, directions.contiguous()

    def redrawn(self, generator: torch.Generator) -> "_Factor":
        """Return the same singular values with random directions."""
        gaussian = torch.randn(self.directions.mT.shape, generator=generator)
        return _Factor(self.size.float(), torch.linalg.qr(gaussian)[0].mT.to(self.directions.device))

    def float(self) -> "_Factor":
        """Return the same in float32, which is precise enough for random weights."""
        return _Factor(self.size.float(), self.directions.float())

    def scores(self, reader: "_Factor") -> dict[str, Float[Tensor, "part head"]]:
        """Return the scores of all edges from these writers to the readers."""
        k, m, d = self.directions.shape[1], reader.directions.shape[1], self.directions.shape[-1]
        cosines = self.directions.flatten(0, 1) @ reader.directions.flatten(0, 1).T
        squares = cosines.square().unflatten(0, (-1, k)).unflatten(-1, (-1, m))
        product = torch.einsum("pkhm,pk,hm->ph", squares, self.size.square(), reader.size.square()).sqrt()
        mine, its = self.size.norm(dim=-1)[:, None], reader.size.norm(dim=-1)
        kernel = squares.sum((1, 3)) / min(k, m)
        return {
            "composition": product / (mine * its),
            "strength": product / its,
            "kernel": kernel if max(k, m) < d else torch.full_like(kernel, torch.nan),
        }


def _space(stream: Stream) -> Float[Tensor, "d_model d"]:
    """Return an orthonormal basis of the whole stream or, if norms centre, of its vectors with mean 0."""
    eye = torch.eye(stream.model.cfg.d_model, dtype=torch.float64, device=stream.model.cfg.device)
    return eye if stream.norm != "LN" else torch.linalg.svd(stream.centre(eye))[0][:, :-1]


def _writing(stream: Stream, component: Component, space: Float[Tensor, "d_model d"]) -> _Factor:
    """Return W_V W_O of heads, W_out of an MLP, or the embeddings."""
    if component.kind == "head":
        assert component.layer is not None
        W_V = space.T @ _every_head(stream, "V", component.layer)
        circuit = FactoredMatrix(W_V, stream.weight(component).double() @ space)
        return _Factor(circuit.S, circuit.V.mT)
    W = _embedding(stream, component) if component.layer is None else stream.weight(stream.neurons[component.layer])
    _, size, directions = torch.linalg.svd(W.double() @ space, full_matrices=False)
    return _Factor(size[None], directions[None])


def _reading(stream: Stream, reader: Reader, space: Float[Tensor, "d_model d"]) -> _Factor:
    """Return W_Q W_Kᵀ, its transpose, W_V W_O or W_in of the heads or the MLP of a reader."""
    W = space.T @ stream.read_weights(reader)[0].movedim(1, 0).double()
    if reader.kind == "mlp":
        return _columns(W)
    if reader.kind == "value":
        others = stream.weight(stream.heads[reader.layer]).double() @ space
    else:
        others = (space.T @ _every_head(stream, "K" if reader.kind == "query" else "Q", reader.layer)).mT
    # Heads that share a key or a value are concatenated.
    circuit = FactoredMatrix(W, others.unflatten(0, (len(W), -1)).transpose(1, 2).flatten(2))
    return _Factor(circuit.S, circuit.U.mT)


def _columns(W: Float[Tensor, "part d unit"]) -> _Factor:
    directions, size, _ = torch.linalg.svd(W, full_matrices=False)
    return _Factor(size, directions.mT)


@torch.inference_mode()
def measure_weights(models: Mapping[str, Any], *, draws: int = 5, seed: int = 0) -> pd.DataFrame:
    """Score every edge by the weights, and by random weights with the same singular values.

    Args:
        models: models by name.
        draws: how many sets of random weights to draw.
        seed: their seed.

    Returns one row per model, draw, writer and reader. Columns: model; draw, missing for the model's own weights;
    writer and reader, such as "L2H3" and "L4H1 query" or "logit"; component and kind, their kinds, as in
    `edges.measure_edges`; distance, from writer to reader in layers, where tokens and positions come before layer 0 and
    the logit after the last; composition, strength and kernel, as defined above, without units. kernel is NaN if writer
    or reader spans the whole stream.

    Raises:
        NolnError: a model is one of `finetune.blocks`.
        ValueError: the weights of the final norm are not folded into the unembedding.
    """
    frames = []
    for name, model in models.items():
        stream, generator = Stream(model), torch.Generator().manual_seed(seed)
        stream.require_folded_norm()
        pairs, names = _all_edges(stream, inner_sides(stream))
        space, W_U = _space(stream), model.W_U.double()
        reading = []
        for _, group in itertools.groupby(stream.readers, lambda reader: (reader.point, reader.kind == "mlp")):
            its = [_reading(stream, reader, space) for reader in group]
            both = [torch.cat(values) for values in zip(*((each.size, each.directions) for each in its), strict=True)]
            reading.append(_Factor(*both))
        reading.append(_columns(space.T @ (W_U - W_U.mean(-1, keepdim=True))[None]))
        own = {component: _writing(stream, component, space) for _, component in pairs}
        float32 = [factor.float() for factor in reading]
        for draw in range(-1, draws):
            writing = own if draw < 0 else {each: factor.redrawn(generator) for each, factor in own.items()}
            sides = reading if draw < 0 else float32
            scores = [writing[component].scores(sides[side]) for side, component in pairs]
            columns = {key: torch.cat([each[key].flatten() for each in scores]).cpu().numpy() for key in SCORES}
            number = pd.array([None if draw < 0 else draw] * len(names), "Int64")
            frames.append(pd.DataFrame({"model": name, "draw": number, **names, **columns}))
    return pd.concat(frames, ignore_index=True)


def measure(models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], *, batch_size: int = 8) -> pd.DataFrame:
    """Measure how well virtual weights predict edges, by kind of edge: `summarise` of `measure_edges`."""
    return summarise(measure_edges(models, tokens, batch_size=batch_size))


def measure_distances(
    models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], *, batch_size: int = 8
) -> pd.DataFrame:
    """Measure the same as `measure`, but also by distance in layers: `summarise_distances` of `measure_edges`."""
    return summarise_distances(measure_edges(models, tokens, batch_size=batch_size))


def measure_ranking(
    models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], *, batch_size: int = 8, draws: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Measure how well weights alone find the largest edges: `rank` of `measure_weights` and `measure_edges`."""
    edges = measure_edges(models, tokens, batch_size=batch_size)
    return rank(measure_weights(models, draws=draws, seed=seed), edges)


@torch.inference_mode()
def measure_edges(models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], *, batch_size: int = 8) -> pd.DataFrame:
    """Measure how well virtual weights predict the contribution and the direct effect of every edge, over tokens.

    Every other block, from the second on, is predicted. The remaining blocks determine the mean divisors. A single
    block is used for both.

    Args:
        models: models by name.
        tokens: blocks as in training.
        batch_size: blocks per forward. No result depends on it.

    Returns one row per model, divisor, writer and reader. Columns:

    - model; divisor: "mean" and "own" for a model with norms, "none" for one without;
    - writer, reader, component, kind and distance, as in `measure_weights`. The logit is that of the next token, with
      W_U centred;
    - r2_contribution and r2_effect, for the contribution and the direct effect: the fraction of the variance over
      tokens that is predicted, over all units of the reader together;
    - rank_contribution and rank_effect: the rank correlation, over the tokens of a block, between the norms over these
      units of the predicted and the actual values; the mean over blocks;
    - variance_… and error_…: the mean squares, summed over units, from which r2_… is computed;
    - size: the root mean square of the direct effect divided by that of the reader minus its bias, without units;
    - tokens: how many are predicted.

    Raises:
        NolnError: a model is one of `finetune.blocks`.
        ValueError: the weights of the final norm are not folded into the unembedding.
    """
    frames = []
    for name, model in models.items():
        stream = Stream(model)
        sides = inner_sides(stream)
        pairs, names = _all_edges(stream, sides)
        readers = [len(side.readers) for side in sides]
        fits = {pair: _Fit() for pair in pairs}
        means = {} if stream.norm is None else _mean_divisors(stream, tokens[::2], batch_size, name)
        scored = tokens[1::2] if len(tokens) > 1 else tokens
        hooks = [*dict.fromkeys([*hook_names(model), *(side.point for side in sides)])]
        said = f"Fits of {name}"
        for batch, outputs in forwards({name: model}, scored, hooks, batch_size, said, unembed=False):
            cache = outputs[name].cache
            flat = {hook: activation.flatten(0, 1) for hook, activation in cache.items()}
            written = {component: Written(stream, component, flat.__getitem__) for component in stream.components}
            readings = [Reading(stream, side.W, side.b, flat[side.point]) for side in sides]
            readout = Readout(model, batch, cache)
            for (side, component), fit in fits.items():
                if side == len(sides):
                    found = _squares_of_logit(readout, component, means.get(stream.final))
                else:
                    found = _squares(readings[side], written[component], readers[side], means.get(sides[side].point))
                fit.add(*found, len(batch))
        columns = [fits[pair].columns() for pair in pairs]
        for divisor in columns[0]:
            values = {
                key: torch.cat([each[divisor][key].flatten() for each in columns]).cpu().numpy()
                for key in columns[0][divisor]
            }
            count = np.repeat(
                [fits[pair].tokens for pair in pairs], [each[divisor]["size"].numel() for each in columns]
            )
            frames.append(pd.DataFrame({"model": name, "divisor": divisor, **names, **values, "tokens": count}))
    return pd.concat(frames, ignore_index=True)


def _mean_divisors(stream: Stream, tokens: Int[Tensor, "block pos"], batch_size: int, name: str) -> dict[str, float]:
    """Return the mean over tokens of the norms' divisor, at each point of the stream."""
    sums = dict.fromkeys(stream.points, 0.0)
    said = f"Divisors of {name}"
    for _, outputs in forwards({name: stream.model}, tokens, stream.points, batch_size, said, unembed=False):
        for point in sums:
            x = stream.centre(outputs[name].cache[point].double())
            sums[point] += float(stream.scale(x.square().sum(-1)).sum())
    return {point: total / tokens.numel() for point, total in sums.items()}


def _divisors(scale: Float[Tensor, "token 1"], mean: float | None) -> dict[str, Float[Tensor, "token 1"]]:
    """Return the divisors of predictions by name. In a model without norms, `mean` is None."""
    return {"none": scale} if mean is None else {"mean": torch.full_like(scale, mean), "own": scale}


_Squares = dict[str, Float[Tensor, "part token reader"]]
_Sums = dict[str, Float[Tensor, "part unit"]]


def _squares(reading: Reading, written: Written, readers: int, mean: float | None) -> tuple[_Squares, _Sums]:
    """Return sums of squares over the units of readers, and sums over tokens of contributions and direct effects.

    A direct effect is α c·w + β x·w, where α and β are numbers of a token. So everything follows from three products of
    c·w and x·w.
    """
    made: list[_Squares] = []
    sums = {"contribution": torch.zeros(()), "effect": torch.zeros(())}
    for at, cw, alpha in reading.products(written):
        scale, xw = reading.scale[at], reading.xw[at]
        beta = 1 / scale - alpha
        cc, cx, xx = (y.unflatten(-1, (readers, -1)).sum(-1) for y in (cw.square(), cw * xw, xw.square()[None]))
        squares = {"contribution": cc / scale.square(), "reader": (xx / scale.square()).expand_as(cc)}
        for key, share in {"effect": 0 * scale, **{k: 1 / by for k, by in _divisors(scale, mean).items()}}.items():
            left = alpha - share
            error = left.square() * cc + 2 * left * beta * cx + beta.square() * xx
            if key == "effect":
                squares[key] = error.clamp(min=0)
                continue
            squares[f"{key} size"] = cc * share.square()
            squares[f"{key} error_contribution"] = (1 / scale - share).square() * cc
            squares[f"{key} error_effect"] = error.clamp(min=0)
        made.append(squares)
        sums["contribution"] = sums["contribution"] + torch.einsum("ptu,t->pu", cw, 1 / scale[:, 0])
        sums["effect"] = sums["effect"] + torch.einsum("ptu,pt->pu", cw, alpha[..., 0]) + beta[..., 0] @ xw
    return {key: torch.cat([squares[key] for squares in made], dim=1) for key in made[0]}, sums


def _squares_of_logit(readout: Readout, component: Component, mean: float | None) -> tuple[_Squares, _Sums]:
    """Return the same as `_squares` for the next token's logit, whose weights differ from token to token."""
    normalised, scale = readout.normalise(readout.r)
    scale = scale.flatten(0, 1)
    contribution, effect = (values.flatten(0, 1).T.unsqueeze(-1) for values in readout.effects(component))
    reader = (readout.read(normalised) - readout.b).flatten().unsqueeze(-1)
    squares = {"contribution": contribution.square(), "reader": reader.square().expand_as(effect)}
    squares["effect"] = effect.square()
    for key, by in _divisors(scale, mean).items():
        predicted = contribution * scale / by
        squares[f"{key} size"] = predicted.square()
        squares[f"{key} error_contribution"] = (contribution - predicted).square()
        squares[f"{key} error_effect"] = (effect - predicted).square()
    return squares, {"contribution": contribution.sum(1), "effect": effect.sum(1)}


class _Fit:
    """Sums over tokens for the edges from one component to the readers of one point."""

    def __init__(self) -> None:
        self.tokens = self._blocks = 0
        self._squares: dict[str, Any] = {}
        self._sums: dict[str, Any] = {}
        self._correlations: dict[tuple[str, str], Any] = {}

    def add(self, squares: _Squares, sums: _Sums, blocks: int) -> None:
        """Add the tokens of a number of whole blocks."""
        self.tokens += squares["effect"].shape[1]
        self._blocks += blocks
        for total, values in ((self._squares, {k: v.sum(1) for k, v in squares.items()}), (self._sums, sums)):
            for key, value in values.items():
                total[key] = total.get(key, 0) + value
        predicted = [key.removesuffix(" size") for key in squares if key.endswith(" size")]
        ranks = {key: _ranks(squares[key], blocks) for key in ("contribution", "effect")}
        for divisor in predicted:
            mine = _ranks(squares[f"{divisor} size"], blocks)
            for what, its in ranks.items():
                correlation = (mine * its).sum((1, 2))
                self._correlations[divisor, what] = self._correlations.get((divisor, what), 0) + correlation

    def columns(self) -> dict[str, dict[str, Float[Tensor, "part reader"]]]:
        """Return the columns of `measure_edges` by divisor."""
        means = {key: total / self.tokens for key, total in self._squares.items()}
        readers = means["effect"].shape[1]
        made: dict[str, dict[str, Tensor]] = {}
        for (divisor, what), correlations in self._correlations.items():
            of_means = (self._sums[what] / self.tokens).square().unflatten(-1, (readers, -1)).sum(-1)
            variance, error = means[what] - of_means, means[f"{divisor} error_{what}"]
            made.setdefault(divisor, {}).update(
                {
                    f"r2_{what}": 1 - error / variance,
                    f"rank_{what}": correlations / self._blocks,
                    f"variance_{what}": variance,
                    f"error_{what}": error,
                }
            )
        for columns in made.values():
            columns["size"] = (means["effect"] / means["reader"]).sqrt()
        return made


def _ranks(values: Float[Tensor, "part token reader"], blocks: int) -> Float[Tensor, "part block _ reader"]:
    """Return the ranks over the tokens of each block, centred and normalised: their products are correlations."""
    by_block = values.unflatten(1, (blocks, -1))
    # In float32: otherwise rounding orders values that are equal, such as those of one token's embeddings.
    ranks = torch.from_numpy(rankdata(by_block.float().cpu().numpy(), axis=2)).to(values)
    centred = ranks - ranks.mean(2, keepdim=True)
    return centred / centred.norm(dim=2, keepdim=True)


def summarise(edges: pd.DataFrame) -> pd.DataFrame:
    """Summarise the table of `measure_edges`: one row per model, divisor and kind of edge.

    Columns: model; divisor; component, the kind of writer; kind, the kind of reader; for the contribution and the
    direct effect: r2_…, the median over edges; r2_…_pooled, computed from the summed variances; rank_…, the mean over
    edges; edges, their number; tokens.
    """
    return _summarise(edges, ["model", "divisor", "component", "kind"])


def summarise_distances(edges: pd.DataFrame) -> pd.DataFrame:
    """Summarise the table of `measure_edges` as `summarise` does, but also by distance in layers."""
    return _summarise(edges, ["model", "divisor", "component", "kind", "distance"])


def _summarise(edges: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    groups = edges.groupby(keys, sort=False)
    columns = {}
    for what in ("contribution", "effect"):
        columns[f"r2_{what}"] = groups[f"r2_{what}"].median()
        columns[f"r2_{what}_pooled"] = 1 - groups[f"error_{what}"].sum() / groups[f"variance_{what}"].sum()
        columns[f"rank_{what}"] = groups[f"rank_{what}"].mean()
    return pd.DataFrame({**columns, "edges": groups.size(), "tokens": groups["tokens"].first()}).reset_index()


def rank(weights: pd.DataFrame, edges: pd.DataFrame, top: float = TOP) -> pd.DataFrame:
    """Measure how well scores find the largest edges of each kind, from `measure_weights` and `measure_edges`.

    The largest edges are the fraction `top` of a kind with the largest `size`, at least one. Returns one row per model,
    kind with at least two edges, and score, except for kernels that are NaN. Columns: model; component, the kind of
    writer; kind, the kind of reader; score, one of `SCORES`; precision, the average precision of the edges in the order
    of the score; precision_random and precision_random_sd, its mean and standard deviation over draws of random
    weights; rank, the rank correlation of score and size over edges; rank_random, its mean over draws; edges, their
    number; largest, how many of them count as the largest.
    """
    sizes = edges.drop_duplicates(["model", *_ENDS])[["model", *_ENDS, "size"]]
    rows = []
    for (model, component, kind), frame in weights.merge(sizes).groupby(["model", "component", "kind"], sort=False):
        own = frame[frame["draw"].isna()]
        largest = own["size"].rank(ascending=False, method="first") <= max(1, round(top * len(own)))
        for score in SCORES:
            if len(own) < 2 or own[score].isna().any():
                continue
            precision, correlation = [], []
            for _, each in frame.groupby("draw", dropna=False, sort=False):  # the model's own weights come first
                precision.append(average_precision(each[score].to_numpy(), largest.to_numpy()))
                correlation.append(_rank_correlation(each[score], each["size"]))
            rows.append(
                {
                    "model": model,
                    "component": component,
                    "kind": kind,
                    "score": score,
                    "precision": precision[0],
                    "precision_random": pd.Series(precision[1:]).mean(),
                    "precision_random_sd": pd.Series(precision[1:]).std(),
                    "rank": correlation[0],
                    "rank_random": pd.Series(correlation[1:]).mean(),
                    "edges": len(own),
                    "largest": int(largest.sum()),
                }
            )
    return pd.DataFrame(rows, columns=_RANKED)


def _rank_correlation(x: pd.Series, y: pd.Series) -> float:
    with np.errstate(invalid="ignore"):  # if all scores are equal
        return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def average_precision(score: Float[np.ndarray, " edge"], wanted: Bool[np.ndarray, " edge"]) -> float:
    """Return the mean, over the wanted edges, of the fraction of wanted edges among all with at least their score."""
    hits = wanted[np.argsort(-score, kind="stable")]
    return float((hits.cumsum() / np.arange(1, len(hits) + 1))[hits].mean())


def describe(frame: pd.DataFrame) -> str:
    """Describe what norms cost a weights-only account of heads and MLPs, from the table of `measure`."""
    parts = []
    shown = frame[frame["component"].isin(_PARTS)]
    for (model, divisor), rows in shown.groupby(["model", "divisor"], sort=False):
        contribution, effect = (np.average(rows[f"r2_{what}"], weights=rows["edges"]) for what in _TITLES)
        name = model if divisor == "none" else f"{model}, {DIVISORS[divisor]}"
        parts.append(f"{name}: {contribution:.3f} and {effect:.3f}")
    return (
        "R² of the contribution and of the direct effect, for the median edge of each kind, averaged over edges from "
        f"heads and MLPs: {'; '.join(parts)}. With a token's own divisor, that of the contribution is 1 by definition."
    )


def describe_ranking(frame: pd.DataFrame) -> str:
    """Describe how well scores find the largest edges between heads, from the table of `rank`."""
    rows = frame[(frame["component"] == "head") & frame["kind"].isin(["query", "key", "value"])]
    if rows.empty:
        return "There are too few edges between heads to rank."
    parts = []
    for (model, score), group in rows.groupby(["model", "score"], sort=False):
        own, random = (np.average(group[column], weights=group["edges"]) for column in _PRECISIONS)
        parts.append(f"{model}, {SCORES[score]}: {own:.2f} against {random:.2f}")
    return (
        "Average precision (1 where the largest edges have the highest scores) for edges between heads, averaged over "
        f"queries, keys and values, against that of random weights: {'; '.join(parts)}. Without norms, W_V holds what "
        "its layer divides by, so that strengths cannot be compared between layers."
    )


@figures.of_text
def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure`: how well virtual weights predict each kind of edge from heads and MLPs."""
    figure = make_subplots(1, 2, shared_yaxes=True, column_titles=list(_TITLES.values()), horizontal_spacing=0.03)
    for (name, divisor), rows in frame[frame["component"].isin(_PARTS)].groupby(["model", "divisor"], sort=False):
        for col, what in enumerate(_TITLES, start=1):
            figure.add_scatter(
                name=name if divisor == "none" else f"{name}, {DIVISORS[divisor]}",
                legendgroup=name,
                showlegend=col == 1,
                offsetgroup=f"{name} {divisor}",
                x=_kinds(rows),
                y=rows[f"r2_{what}"],
                mode="markers",
                marker={"color": palette.colour(name), "size": 9, "symbol": _SYMBOLS[divisor]},
                row=1,
                col=col,
            )
    figure.update_yaxes(title="R² (median edge)", col=1)
    return _by_kind(figure)


@figures.of_text
def plot_distances(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure_distances`: R² of heads' direct effects over distance, one panel per reader kind."""
    heads = frame[(frame["component"] == "head") & (frame["kind"] != "logit")]
    if heads.empty:  # for a model with one layer of parallel blocks
        return go.Figure().update_yaxes(title="R² of direct effects").update_layout(height=360)
    heads = heads.sort_values("kind", key=lambda kinds: kinds.map([*KINDS].index), kind="stable")
    heads = heads.assign(kind=heads["kind"].map(KINDS), divisor=heads["divisor"].replace(_ONE))
    figure = figures.lines(
        heads, "distance", {"r2_effect": "R² of direct effects<br>(median edge)"}, column="kind", dash="divisor"
    )
    return figure.update_xaxes(title="Layers from writer to reader").update_layout(height=360)


@figures.of_text
def plot_ranking(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `rank`: average precision of scores, and of those of random weights (○, ± std)."""
    figure = make_subplots(
        1, len(SCORES), shared_yaxes=True, column_titles=list(SCORES.values()), horizontal_spacing=0.03
    )
    frame = frame[frame["component"].isin(_PARTS)]
    for (name, score), rows in frame.groupby(["model", "score"], sort=False):
        for column, symbol in zip(_PRECISIONS, ("circle", "circle-open"), strict=True):
            is_random = column != _PRECISIONS[0]
            figure.add_scatter(
                name=name,
                legendgroup=name,
                showlegend=score == "composition" and not is_random,
                offsetgroup=name,
                x=_kinds(rows),
                y=rows[column],
                error_y={"array": rows["precision_random_sd"], "thickness": 1, "width": 2} if is_random else None,
                mode="markers",
                marker={"color": palette.colour(name), "size": 8, "symbol": symbol},
                row=1,
                col=1 + list(SCORES).index(score),
            )
    figure.update_layout(title="Of the model’s weights (●) and of random weights (○, with std over draws)")
    figure.update_yaxes(title=f"Average precision for the<br>largest {100 * TOP:.0f} % of edges", col=1, range=[0, 1])
    return _by_kind(figure)


@figures.of_text
def plot_circuits(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure_circuits`: copying and matching of each head, one column per model."""
    axis = {"cmin": -1, "cmax": 1, "colorscale": "RdBu"}
    return figures.heat_maps(frame, {"copying": ("Copying (OV)", axis), "matching": ("Matching (QK)", axis)})


def _by_kind(figure: go.Figure) -> go.Figure:
    order = [f"{WRITERS[component]} → {reader}" for component in _PARTS for reader in _READERS.values()]
    figure.update_xaxes(tickangle=-45, categoryorder="array", categoryarray=order)
    return figure.update_layout(scattermode="group", height=460)


def _kinds(rows: pd.DataFrame) -> pd.Series:
    return rows["component"].map(WRITERS) + " → " + rows["kind"].map(_READERS)
