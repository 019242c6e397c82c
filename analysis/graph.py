"""The circuit behind one logit of a prompt: a graph whose edges add up, checked by taking them out.

Attention patterns and the gates of MLPs are held as they are at the prompt. What is left of a model without norms is
linear from embeddings to logit, and each of its edges exact (Elhage et al. 2021; the attribution graphs of Ameisen et
al. 2025, "Circuit Tracing", hold the norms too).

1. A node is a component at a position: a token or position embedding, a head, the bias of an attention, an MLP or, if
   asked for, its neurons that matter most, the MLP then being the rest. What reads the logit is the root.
2. A node reads through weights, W_V of a head at each position that it attends to, or W_in of an MLP, and counts by
   what it does to the logit: G · W_O or G · W_out, where G is the direction in which everything after it, through all
   paths, reads the stream. The gate of a neuron is its activation over its pre-activation or, in a gated MLP, over what
   its activation function is multiplied by.
3. The flow of an edge is c · r / σ(x), with c what the source wrote, r the direction in which the target reads as in 2,
   and σ the norm's scale, 1 without a norm. Flows are in logits. Those into a node, with its bias, add up to its
   value, which is its own effect on the logit through all paths, and those into the root to the logit.
4. The direct effect of an edge is what the target loses along r when c is taken out of the stream before it and the
   norm, if there is one, is applied afresh: the flow itself in a model without norms.
5. The influence of the root is 1; that of a node is shared out to its sources by the size of their flows. The graph
   keeps the most influential nodes up to a share of all influence, then the most influential edges between them.
6. `intervene` checks it with forwards of the whole model: it takes nodes out of the stream, or edges out of what one
   target reads, one by one and the largest together, with patterns and gates held, and nothing else. Then the logit is
   to fall by the value or the flow; by the sum, where several are taken out. It does so without norms. With norms the
   logit falls by something else, as they divide by what is left. Nodes are also taken out with nothing held.

Where a live norm lies between a head or MLP and the stream (Gemma 2), its scale is part of what is held to draw the
graph, but is applied afresh by the forwards. Logits are those before soft-capping.
"""

import html
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from analysis import figures, palette
from analysis.edges import Target, logit_side, run, target_logit
from analysis.logit_attribution import token_text
from analysis.readout import Written
from analysis.stream import Component, Reader, Stream

ROOT = "logit"
TOP = (1, 2, 5, 10, 20)
"""How many of the largest are taken out together."""
_EDGES = 0.95
"""The share of the influence of all edges between the nodes kept that the edges kept have."""
_ROWS = 32
"""Interventions in one forward."""


class Consumer(NamedTuple):
    """A node that reads: of some layer, at all positions."""

    row: int
    """Its row among the writers; −1: the logit."""
    reader: Reader | None
    direction: Float[Tensor, "pos d_model"]
    """How it reads at each of its positions, through all paths after it, without the pattern."""
    pattern: Float[Tensor, "pos source"] | None
    """How much of each source it reads. None: only its own position."""


class Held:
    """A model at one prompt, with patterns, gates and norms as they are there: what writes, and what reads."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Any,
        prompt: Int[Tensor, " pos"],
        target: Target | None = None,
        centre_unembedding: bool = True,
        neurons: int = 0,
    ) -> None:
        """Run the model on the prompt; the target is read at its end. None: the token that the model finds likeliest.

        `neurons` is how many of each MLP and position are nodes by themselves.

        Raises:
            NolnError: a model of `finetune.blocks`.
            ValueError: a final norm whose weights are not folded into the unembedding.
        """
        self.model, self.prompt, self.stream = model, prompt, Stream(model)
        self.centre_unembedding = centre_unembedding
        stream, cfg = self.stream, model.cfg
        self.readers = {(reader.layer, reader.part): reader for reader in stream.readers}
        written = (*stream.components, *stream.neurons)
        hooks = [*stream.points, *(hook for component in written for hook in component.hooks)]
        hooks += [self.readers[layer, "in"].hook for layer in range(cfg.n_layers)]
        hooks += [f"blocks.{layer}.attn.hook_pattern" for layer in range(cfg.n_layers)]
        logits, cache = run(model, prompt, hooks)
        self.target = int(logits[0, -1].argmax()) if target is None else target
        self.logit = float(self.read(logits, cache[stream.final]))
        first = self.target[0] if isinstance(self.target, tuple) else self.target
        self.probability = float(logits[0, -1].double().softmax(-1)[first])
        self.pattern = [cache[f"blocks.{layer}.attn.hook_pattern"] for layer in range(cfg.n_layers)]
        self.gate = []
        for layer, each in enumerate(stream.neurons):
            pre = cache[self.readers[layer, "in"].hook]
            # Where it is 0 nothing is let through, whatever the gate: half is what GELU and SiLU have there.
            self.gate.append(torch.where(pre == 0, 0.5, cache[each.hook] / torch.where(pre == 0, 1, pre)))
        self.labels: list[list[str]] = []
        self.components: list[Component] = []
        self._vectors: list[Tensor] = []
        self._values: dict[int, Tensor] = {}
        self.consumers: list[Consumer] = []
        self._cache = {hook: activation[0] for hook, activation in cache.items()}
        rows = {component: self._add_writer(component) for component in stream.components}
        self._read_backwards(rows, neurons)
        self.vectors: Float[Tensor, "row pos d_model"] = torch.stack(self._vectors)
        self.values: Float[Tensor, "row pos"] = torch.stack([self._values[row] for row in range(len(self.labels))])

    def read(
        self, logits: Float[Tensor, "batch pos vocab"], resid: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, " batch"]:
        """Return the target's logit at the end, before soft-capping."""
        uncapped = self.stream.uncapped(logits[:, -1:], resid[:, -1:])[:, 0]
        return target_logit(uncapped, self.target, self.centre_unembedding)

    def _add_writer(self, component: Component) -> slice:
        """Add the parts of a component as rows, and return which they are."""
        vectors = Written(self.stream, component, self._cache.__getitem__).vectors()
        vectors = vectors.expand(len(self.prompt), *vectors.shape[-2:]).transpose(0, 1)
        first = len(self.labels)
        for part, vector in enumerate(vectors):
            self.labels.append([component.label(part)] * len(self.prompt))
            self.components.append(component)
            self._vectors.append(vector)
        return slice(first, len(self.labels))

    def _read_backwards(self, rows: dict[Component, slice], neurons: int) -> None:
        """Find from the logit down in which direction each node reads, and what each is worth."""
        stream = self.stream
        side = logit_side(stream, self.target, self.centre_unembedding)
        end = torch.zeros_like(self._cache[stream.final], dtype=torch.float64)
        end[-1] = stream.centre(side.W[:, 0].double())
        self.consumers.append(Consumer(-1, None, end, None))
        self.bias = float(side.b)
        G = end / self.scale(stream.final)
        by_kind = {(component.kind, component.layer): part for component, part in rows.items()}
        for layer in reversed(range(self.model.cfg.n_layers)):
            into_mlp, into_values = self.readers[layer, "in"], self.readers[layer, "V"]
            after, G = G, G + self._read_mlp(layer, into_mlp, G, by_kind["mlp", layer].start, neurons)
            is_parallel = into_mlp.point == into_values.point
            between = after if is_parallel else G
            if ("b_O", layer) in by_kind:
                self._set_values(by_kind["b_O", layer], between)
            G = G + self._read_heads(layer, into_values, between, by_kind["head", layer])
        for kind in ("embed", "pos_embed"):
            if (kind, None) in by_kind:
                self._set_values(by_kind[kind, None], G)

    def _set_values(self, rows: slice, G: Float[Tensor, "pos d_model"]) -> None:
        for row in range(rows.start, rows.stop):
            self._values[row] = torch.linalg.vecdot(self._vectors[row], G)

    def scale(self, point: str) -> Float[Tensor, "pos 1"]:
        """Return what a norm divides by at a point of the stream: 1 without one."""
        x = self.stream.centre(self._cache[point].double())
        return self.stream.scale(x.square().sum(-1, keepdim=True))

    def written_scale(self, component: Component) -> Float[Tensor, "pos 1"] | int:
        """Return what a live norm divides by on the way of heads or neurons to the stream: 1 without one."""
        return self._cache[component.scale].double() if component.scale else 1

    def _read_mlp(
        self, layer: int, reader: Reader, G: Float[Tensor, "pos d_model"], row: int, neurons: int
    ) -> Float[Tensor, "pos d_model"]:
        """Add an MLP, and its neurons that matter most, as consumers; return in which direction it reads the stream."""
        each = self.stream.neurons[layer]
        W_out = self.stream.weight(each).double()
        through = (G / self.written_scale(each)) @ W_out.T * self.gate[layer][0].double()
        W_in = self.stream.read_weights(reader)[0][:, 0].double()
        rest = through.clone()
        activation = self._cache[each.hook].double()
        worth = activation * (G / self.written_scale(each) @ W_out.T)
        for top in worth.abs().topk(min(neurons, len(W_out)), dim=-1).indices.T.unsqueeze(-1):  # one a position
            alone = torch.zeros_like(rest).scatter(1, top, rest.gather(1, top))
            rest = rest - alone
            written = activation.gather(1, top) / self.written_scale(each) * W_out[top[:, 0]]
            written = self.stream.centre(written)
            self._vectors[row] = self._vectors[row] - written
            self.labels.append([each.label(int(neuron)) for neuron in top])
            self.components.append(each)
            self._vectors.append(written)
            self._set_values(slice(len(self.labels) - 1, len(self.labels)), G)
            self.consumers.append(Consumer(len(self.labels) - 1, reader, self.stream.centre(alone @ W_in.T), None))
        self._set_values(slice(row, row + 1), G)
        self.consumers.append(Consumer(row, reader, self.stream.centre(rest @ W_in.T), None))
        return self.stream.centre(through @ W_in.T) / self.scale(reader.point)

    def _read_heads(
        self, layer: int, reader: Reader, G: Float[Tensor, "pos d_model"], rows: slice
    ) -> Float[Tensor, "pos d_model"]:
        """Add the heads of a layer as consumers, and return in which direction their values read the stream."""
        heads = self.stream.heads[layer]
        W_O, W_V = self.stream.weight(heads).double(), self.stream.read_weights(reader)[0].double()
        self._set_values(rows, G)
        direction = torch.zeros_like(G)
        for head, row in enumerate(range(rows.start, rows.stop)):
            value = head * W_V.shape[1] // len(W_O)
            reads = (G / self.written_scale(heads)) @ W_O[head].T @ W_V[:, value].T
            pattern = self.pattern[layer][0, head].double()
            self.consumers.append(Consumer(row, reader, self.stream.centre(reads), pattern))
            direction += pattern.T @ self.consumers[-1].direction
        return direction / self.scale(reader.point)

    def sources(self, consumer: Consumer) -> Int[Tensor, " row"]:
        """Return which rows a consumer reads."""
        point = self.stream.final if consumer.reader is None else consumer.reader.point
        there = self.stream.components_at(point)
        layers = {component.layer for component in there if component.kind == "mlp"}
        known = [c in there or (c.kind == "neuron" and c.layer in layers) for c in self.components]
        return torch.tensor(known).nonzero()[:, 0]

    def flows(self, consumer: Consumer, positions: Int[Tensor, " node"]) -> Float[Tensor, "node source seen"]:
        """Return the flows from each of its `sources` into a consumer at some positions.

        At each of them a head sees all positions, whatever else reads only its own.
        """
        point = self.stream.final if consumer.reader is None else consumer.reader.point
        vectors = self.vectors[self.sources(consumer)] / self.scale(point)
        reads = consumer.direction[positions]
        if consumer.pattern is None:
            return torch.einsum("snd,nd->ns", vectors[:, positions], reads).unsqueeze(-1)
        return torch.einsum("spd,nd->nsp", vectors, reads) * consumer.pattern[positions].unsqueeze(1)

    def units(self, row: int, position: int) -> Float[Tensor, " neuron"]:
        """Return which neurons of its MLP a row has at a position, as ones and zeros."""
        of_layer = [
            r for r, c in enumerate(self.components) if c.kind == "neuron" and c.layer == self.components[row].layer
        ]
        alone = torch.zeros_like(self.gate[0][0, 0])
        for neuron in of_layer if self.components[row].kind == "mlp" else [row]:
            alone[int(self.labels[neuron][position].split("N")[-1])] = 1
        return 1 - alone if self.components[row].kind == "mlp" else alone

    def direct_effect(self, consumer: Consumer, position: int, row: int, source: int) -> float:
        """Return what a node loses along the direction in which it reads, when one source is taken out for it."""
        point = self.stream.final if consumer.reader is None else consumer.reader.point
        x = self.stream.centre(self._cache[point][source].double())
        reads = consumer.direction[position]
        reads = reads if consumer.pattern is None else reads * consumer.pattern[position, source]
        before, after = ((y @ reads / self.stream.scale(y @ y)) for y in (x, x - self.vectors[row, source]))
        return float(before - after)


@dataclass(frozen=True)
class Graph:
    """The circuit behind one logit: a pruned graph and what it was pruned from."""

    model: str
    """Its name."""
    nodes: pd.DataFrame
    """One row per node, the root first. Columns: node, such as "L2H3@5"; component, label, layer, head and neuron, as
    in `edges.measure_prompt`; position; token; value, its effect on the logit through all paths, logits; influence,
    from 0 to 1; inflow, the sum of all flows into it, and explained, that of the edges kept, logits; completeness, the
    share of the size of all flows into it that edges kept have, NaN where nothing flows in."""
    edges: pd.DataFrame
    """One row per edge. Columns: source and target, nodes; flow and direct_effect, logits; influence."""
    tokens: tuple[str, ...]
    """The texts of the prompt's tokens, in quotes."""
    target: str
    share: float
    """The share of all influence that the nodes kept have."""
    held: Held = field(repr=False)


@torch.inference_mode()
def build(
    model: Any,
    prompt: Int[Tensor, " pos"],
    target: Target | None = None,
    *,
    name: str = "model",
    share: float = 0.8,
    most: int = 60,
    neurons: int = 0,
    centre_unembedding: bool = True,
) -> Graph:
    """Build the graph behind the logit of `target` at the end of a prompt, and prune it.

    Args:
        model: what a loader of `analysis` returns.
        prompt: token ids.
        target: a token, or two for how far the logit of the first is above that of the second. None: the token that
            the model finds likeliest.
        name: of the model.
        share: of the influence of all nodes, to be kept. Of that of the edges between these 95 % is kept, or all if the
            share is 1.
        most: nodes to be kept at most: `Graph.share` says what they come to.
        neurons: of each MLP and position, to be nodes by themselves.
        centre_unembedding: whether W_U is taken less its mean over the vocabulary. It cancels out in a difference.

    Raises:
        NolnError: a model of `finetune.blocks`.
        ValueError: a share that is not above 0 and at most 1, or a final norm whose weights are not folded into the
            unembedding.
    """
    if not 0 < share <= 1:
        raise ValueError(f"The share is {share}, but is to be above 0 and at most 1.")
    held = Held(model, prompt, target, centre_unembedding, neurons)
    influence = torch.zeros_like(held.values)
    for consumer in held.consumers:  # the root first, and each after all that it flows into
        positions, mine, flows = _into(held, consumer, influence)
        shares = (mine.view(-1, 1, 1) * flows.abs() / _size(flows)).nan_to_num()
        if consumer.pattern is None:
            influence[held.sources(consumer)[:, None], positions] += shares[..., 0].T
        else:
            influence[held.sources(consumer)] += shares.sum(0)
    order = influence.flatten().argsort(descending=True, stable=True)
    reached = influence.flatten()[order].cumsum(0) / influence.sum()
    order = order[: min(most, int((reached < share).sum()) + 1)]
    kept = torch.zeros_like(influence, dtype=torch.bool)
    kept.view(-1)[order] = True
    rows: list[tuple[int, int, int, int, float, float]] = []
    for consumer in held.consumers:
        positions, mine, flows = _into(held, consumer, influence * kept)
        sources, size = held.sources(consumer), _size(flows)
        for node, source, seen in (flows != 0).nonzero().tolist():
            row, to = int(sources[source]), int(positions[node])
            place = to if consumer.pattern is None else seen
            if kept[row, place]:
                flow = float(flows[node, source, seen])
                rows.append((row, place, consumer.row, to, flow, float(mine[node]) * abs(flow) / float(size[node])))
    edges = pd.DataFrame(rows, columns=["row", "position", "to_row", "to_position", "flow", "influence"])
    edges = edges.sort_values("influence", ascending=False, kind="stable")
    before = edges["influence"].cumsum() - edges["influence"]
    edges = _leading_to_root(edges[before < (_EDGES if share < 1 else 1) * edges["influence"].sum()], len(prompt) - 1)
    consumers = {consumer.row: consumer for consumer in held.consumers}
    edges["direct_effect"] = [
        held.direct_effect(consumers[edge.to_row], edge.to_position, edge.row, edge.position)
        for edge in edges.itertuples()
    ]
    nodes = _nodes(held, edges, influence, consumers)
    names = {
        (row, position): node for node, row, position in nodes[["node", "row", "position"]].itertuples(index=False)
    }
    for end, place_of in {"source": ["row", "position"], "target": ["to_row", "to_position"]}.items():
        edges[end] = [names[key] for key in edges[place_of].itertuples(index=False, name=None)]
    edges = edges[["source", "target", "flow", "direct_effect", "influence"]]
    is_there = nodes["row"] >= 0
    return Graph(
        name,
        nodes.drop(columns="row"),
        edges.reset_index(drop=True),
        tuple(token_text(model, token) for token in prompt),
        " − ".join(
            token_text(model, token) for token in (held.target if isinstance(held.target, tuple) else (held.target,))
        ),
        float(nodes.loc[is_there, "influence"].sum() / influence.sum()),
        held,
    )


def _into(
    held: Held, consumer: Consumer, influence: Float[Tensor, "row pos"]
) -> tuple[Int[Tensor, " node"], Float[Tensor, " node"], Float[Tensor, "node source seen"]]:
    """Return the positions at which a consumer has influence, that influence, and the flows into it."""
    if consumer.row < 0:
        positions = torch.tensor([len(held.prompt) - 1])
        return positions, held.values.new_ones(1), held.flows(consumer, positions)
    positions = influence[consumer.row].nonzero()[:, 0]
    return positions, influence[consumer.row, positions], held.flows(consumer, positions)


def _size(flows: Float[Tensor, "node source seen"]) -> Float[Tensor, "node 1 1"]:
    return flows.abs().sum((1, 2), keepdim=True)


def _leading_to_root(edges: pd.DataFrame, last: int) -> pd.DataFrame:
    """Return the edges from which edges lead on to the root."""
    while True:
        targets = set(zip(edges["row"], edges["position"], strict=True)) | {(-1, last)}
        has_sources = [key in targets for key in zip(edges["to_row"], edges["to_position"], strict=True)]
        if all(has_sources):
            return edges.copy()
        edges = edges[has_sources]


def _nodes(
    held: Held, edges: pd.DataFrame, influence: Float[Tensor, "row pos"], consumers: Mapping[int, Consumer]
) -> pd.DataFrame:
    """Return the nodes that edges connect: the root first, then by influence."""
    last = len(held.prompt) - 1
    keys = {(-1, last): 1.0}
    keys |= {(row, at): float(influence[row, at]) for row, at in zip(edges["row"], edges["position"], strict=True)}
    kept = edges.groupby(["to_row", "to_position"])["flow"]
    sums, sizes = kept.sum(), kept.agg(lambda flow: flow.abs().sum())
    rows = []
    for (row, position), its in sorted(keys.items(), key=lambda item: -item[1]):
        is_root = row < 0
        component = Component(ROOT, None, "") if is_root else held.components[row]
        label = ROOT if is_root else held.labels[row][position]
        number = int(label.split(component.kind[0].upper())[-1]) if component.kind in ("head", "neuron") else None
        inflow = completeness = np.nan
        if row in consumers:
            flows = held.flows(consumers[row], torch.tensor([position]))
            inflow, size = float(flows.sum()), float(_size(flows))
            completeness = sizes.get((row, position), 0) / size if size else np.nan
        rows.append(
            {
                "node": f"{label}@{position}",
                "component": component.kind,
                "label": label,
                "layer": component.layer,
                "head": number if component.kind == "head" else None,
                "neuron": number if component.kind == "neuron" else None,
                "position": position,
                "token": token_text(held.model, held.prompt[position]),
                "value": held.logit if is_root else float(held.values[row, position]),
                "influence": its,
                "inflow": inflow,
                "explained": sums.get((row, position), 0.0),
                "completeness": completeness,
                "row": row,
            }
        )
    frame = pd.DataFrame(rows)
    return frame.astype(dict.fromkeys(("layer", "head", "neuron"), "Int64"))


class Removal(NamedTuple):
    """What is taken out at once: nodes of the stream, or edges out of what one node reads."""

    what: str
    label: str
    nodes: tuple[tuple[int, int], ...] = ()
    """(row, position)."""
    edges: tuple[tuple[int, int, int, int], ...] = ()
    """(row, position) of the source and of the target, −1 being the row of the root."""
    predicted: float = 0.0


@torch.inference_mode()
def intervene(graph: Graph, top: Sequence[int] = TOP) -> pd.DataFrame:
    """Take out each node and each edge of a graph, and the largest together, and see what becomes of the logit.

    Returns one row per intervention. Columns: model; what, node, edge, nodes or edges (the largest by |value| or
    |flow|, together); label; count, of what is taken out; predicted, the fall of the logit that the graph says, held,
    the fall in a forward with patterns and gates held, and free, in one with nothing held (missing of edges), logits.
    """
    removals = list(_removals(graph, top))
    rows = []
    for start in range(0, len(removals), _ROWS):
        some = removals[start : start + _ROWS]
        held = _fall(graph.held, some, hold=True)
        free = _fall(graph.held, some, hold=False) if any(removal.nodes for removal in some) else held
        for removal, with_gates, without in zip(some, held, free, strict=True):
            rows.append(
                {
                    "model": graph.model,
                    "what": removal.what,
                    "label": removal.label,
                    "count": len(removal.nodes) + len(removal.edges),
                    "predicted": removal.predicted,
                    "held": with_gates,
                    "free": np.nan if removal.edges else without,
                }
            )
    return pd.DataFrame(rows)


def _removals(graph: Graph, top: Sequence[int]) -> Iterator[Removal]:
    """Yield what is taken out: each node, each edge, and the largest of each together."""
    held = graph.held
    row_of = {f"{label}@{at}": (row, at) for row, labels in enumerate(held.labels) for at, label in enumerate(labels)}
    row_of[graph.nodes["node"].iloc[0]] = (-1, len(held.prompt) - 1)
    nodes = [
        Removal("node", node, nodes=(row_of[node],), predicted=value)
        for node, value in graph.nodes[["node", "value"]].iloc[1:].itertuples(index=False)
    ]
    edges = [
        Removal("edge", f"{source} → {target}", edges=((*row_of[source], *row_of[target]),), predicted=flow)
        for source, target, flow in graph.edges[["source", "target", "flow"]].itertuples(index=False)
    ]
    for singles in (nodes, edges):
        yield from singles
        largest = sorted(singles, key=lambda removal: -abs(removal.predicted))
        for count in top:
            if 1 < count <= len(largest):
                some = largest[:count]
                yield Removal(
                    some[0].what + "s",
                    f"the {count} largest",
                    tuple(node for removal in some for node in removal.nodes),
                    tuple(edge for removal in some for edge in removal.edges),
                    sum(removal.predicted for removal in some),
                )


def _fall(held: Held, removals: Sequence[Removal], hold: bool) -> Float[np.ndarray, " removal"]:
    """Return by how much the logit falls when something is taken out, in one forward with one row per removal."""
    model, stream = held.model, held.stream
    dtype, tokens = model.cfg.dtype, held.prompt.unsqueeze(0).expand(len(removals), -1).to(model.cfg.device)
    seen: dict[str, Tensor] = {}
    hooks: dict[str, list[Callable[..., Tensor | None]]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda activation, hook: seen.__setitem__(name, activation.clone())

    taken: dict[str, Tensor] = {}
    for i, removal in enumerate(removals):
        for row, position in removal.nodes:
            component = held.components[row]
            name = {"head": "attn", "b_O": "attn", "mlp": "mlp", "neuron": "mlp"}.get(component.kind)
            where = f"blocks.{component.layer}.hook_{name}_out" if name else "hook_embed"  # positions are added to it
            delta = taken.setdefault(where, held.vectors.new_zeros(*tokens.shape, model.cfg.d_model))
            delta[i, position] += held.vectors[row, position]
    for where, delta in taken.items():
        hooks.setdefault(where, []).append(lambda x, hook, delta=delta: x - delta.to(x))

    by_consumer: dict[tuple[int, int, int], dict[int, Tensor]] = {}
    for i, removal in enumerate(removals):
        for row, position, to_row, to_position in removal.edges if hold else ():
            deltas = by_consumer.setdefault((i, to_row, to_position), {})
            delta = held.vectors[row, position].to(dtype)
            deltas[position] = delta + deltas.get(position, torch.zeros_like(delta))
    consumers = {consumer.row: consumer for consumer in held.consumers}

    def losses(layer: int, kind: str) -> Iterator[tuple[int, int, int, Tensor]]:
        """Yield (batch row, row of the MLP or number of the head, position, what it loses) for a layer's nodes."""
        for (i, row, position), deltas in by_consumer.items():
            reader = consumers[row].reader
            if reader is None or (reader.layer, reader.kind) != (layer, kind):
                continue
            places = list(deltas)
            x = seen[reader.point][i, places]
            both = stream.centre(torch.stack([x, x - torch.stack(list(deltas.values()))]))
            read = both / stream.scale(both.square().sum(-1, keepdim=True))
            W = stream.read_weights(reader)[0]
            if kind == "mlp":
                yield i, row, position, (read[0] - read[1])[0] @ W[:, 0]
                continue
            head = row - next(r for r, c in enumerate(held.components) if c == stream.heads[layer])
            values = (read[0] - read[1]) @ W[:, head * W.shape[1] // model.cfg.n_heads]
            yield i, head, position, held.pattern[layer][0, head, position, places] @ values

    for layer in range(model.cfg.n_layers if hold else 0):
        into_mlp, values = held.readers[layer, "in"], held.readers[layer, "V"]

        def attend(z: Tensor, hook: Any, layer: int = layer, values: Reader = values) -> Tensor:
            v = seen[values.hook].repeat_interleave(z.shape[2] // seen[values.hook].shape[2], dim=2)
            z = torch.einsum("hqk,bkhd->bqhd", held.pattern[layer][0], v)
            for i, head, position, loss in losses(layer, "value"):
                z[i, position, head] -= loss
            return z

        def gate(post: Tensor, hook: Any, layer: int = layer, into_mlp: Reader = into_mlp) -> Tensor:
            post = seen[into_mlp.hook] * held.gate[layer]
            for i, row, position, loss in losses(layer, "mlp"):
                loss = loss * held.gate[layer][0, position]
                post[i, position] -= loss * held.units(row, position)
            return post

        hooks |= {
            point: [*hooks.get(point, []), keep(point)] for point in dict.fromkeys((values.point, into_mlp.point))
        }
        hooks |= {hook: [keep(hook)] for hook in (values.hook, into_mlp.hook)}
        hooks |= {values.hook.replace("hook_v", "hook_z"): [attend], stream.neurons[layer].hook: [gate]}

    def read(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        for (i, row, position), deltas in by_consumer.items():
            if row < 0:
                x[i, position] -= deltas[position]
        seen[stream.final] = x
        return x

    hooks.setdefault(stream.final, []).append(read)
    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, each) for name, all_ in hooks.items() for each in all_])
    return (held.logit - held.read(logits, seen[stream.final])).cpu().numpy()


def measure(
    models: Mapping[str, Any], prompt: Int[Tensor, " pos"], target: Target | None = None, **options: Any
) -> pd.DataFrame:
    """Build the graph of each model and check it: `intervene` of `build`, whose options and errors are these.

    Where `target` is None it is the token that the first model finds likeliest.
    """
    return pd.concat([intervene(graph) for graph in build_all(models, prompt, target, **options)], ignore_index=True)


def build_all(
    models: Mapping[str, Any], prompt: Int[Tensor, " pos"], target: Target | None = None, **options: Any
) -> list[Graph]:
    """Build the graph of each model, all of one target, as `build` does."""
    graphs: list[Graph] = []
    for name, model in models.items():
        graphs.append(build(model, prompt, target, name=name, **options))
        target = graphs[0].held.target
    return graphs


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Summarise what `measure` or `intervene` returns, one row per model and what is taken out.

    Columns: model; what; error and error_free, 100 · mean|predicted − fall of the logit| / mean|fall|, %, with patterns
    and gates held and with nothing held (missing of edges); interventions, how many.
    """
    rows = []
    for (model, what), group in frame.groupby(["model", "what"], sort=False):
        errors = {}
        for column, kind in {"error": "held", "error_free": "free"}.items():
            actual = group[kind]
            errors[column] = 100 * (group["predicted"] - actual).abs().mean() / actual.abs().mean()
        rows.append({"model": model, "what": what, **errors, "interventions": len(group)})
    return pd.DataFrame(rows)


@figures.of_text
def plot_interventions(frame: pd.DataFrame) -> go.Figure:
    """Plot what `measure` returns: how much the logit falls over what the graph says; on the grey line the same."""
    figure = make_subplots(
        1, 2, shared_yaxes=True, column_titles=["Patterns and gates held", "Nothing held"], horizontal_spacing=0.04
    )
    ends = [min(frame["predicted"].min(), frame["held"].min()), max(frame["predicted"].max(), frame["held"].max())]
    for col, column in enumerate(("held", "free"), start=1):
        figure.add_scatter(
            x=ends, y=ends, mode="lines", line_color="grey", hoverinfo="skip", showlegend=False, row=1, col=col
        )
        for name, rows in frame.dropna(subset=column).groupby("model", sort=False):
            is_one = rows["what"].isin(["node", "edge"])
            figure.add_scatter(
                name=name,
                legendgroup=name,
                showlegend=col == 1,
                x=rows["predicted"],
                y=rows[column],
                mode="markers",
                marker={
                    "color": palette.colour(name),
                    "opacity": 0.7,
                    "symbol": ["circle" if one else "diamond-open" for one in is_one],
                    "size": [6 if one else 10 for one in is_one],
                },
                text=rows["what"] + " " + rows["label"],
                hovertemplate="%{text}: predicted %{x:.4g}, actual %{y:.4g} logits",
                row=1,
                col=col,
            )
    figure.update_xaxes(title="Predicted fall of the logit<br>(◇: the largest together)")
    return figure.update_yaxes(title="Fall of the logit (logits)", col=1)


def plot(graph: Graph) -> go.Figure:
    """Plot a graph: positions across, layers up, the logit on top.

    Dots are nodes, their size the value; lines are edges, their width the flow; blue raises the logit, orange lowers.
    What a node is worth, how much of what flows into it is shown, and by how much direct effects differ, is shown when
    one points at it.
    """
    nodes = graph.nodes.copy()
    layers = graph.held.model.cfg.n_layers
    heights = {
        "embed": 0.0,
        "pos_embed": 0.0,
        ROOT: 2.0 * layers + 1,
        "head": 1.0,
        "b_O": 1.0,
        "mlp": 2.0,
        "neuron": 2.0,
    }
    nodes["y"] = nodes["component"].map(heights) + 2 * nodes["layer"].fillna(0).astype(float)
    place = nodes.groupby(["position", "y"])
    spread = (place.cumcount() - (place["node"].transform("size") - 1) / 2) / place["node"].transform("size").clip(
        lower=2
    )
    nodes["x"] = nodes["position"] + 0.8 * spread
    edges = graph.edges.copy()
    at = nodes.set_index("node")
    figure = go.Figure()
    widest = edges["flow"].abs().max()
    middle = []
    for edge in edges.itertuples():
        (x, y), (to_x, to_y) = (at.loc[node, ["x", "y"]] for node in (edge.source, edge.target))
        bow = 0.03 * (to_y - y) * (x == to_x)  # or edges of one position would lie on each other
        middle.append(((x + to_x) / 2 + bow, (y + to_y) / 2))
        figure.add_scatter(
            x=[x, middle[-1][0], to_x],
            y=[y, middle[-1][1], to_y],
            mode="lines",
            line={"color": _colour(edge.flow), "width": 0.5 + 5 * abs(edge.flow) / widest, "shape": "spline"},
            opacity=0.5,
            hoverinfo="skip",
        )
    figure.add_scatter(
        name="edges",
        x=[x for x, _ in middle],
        y=[y for _, y in middle],
        mode="markers",
        marker={"size": 5, "color": [_colour(flow) for flow in edges["flow"]], "opacity": 0.4},
        text=edge_texts(graph),
        hovertemplate="%{text}<extra></extra>",
    )
    figure.add_scatter(
        name="nodes",
        x=nodes["x"],
        y=nodes["y"],
        mode="markers+text",
        marker={
            "size": 9 + 16 * (nodes["value"].abs() / nodes["value"].abs().max()) ** 0.5,
            "color": [_colour(value) for value in nodes["value"]],
            "line": {"width": 1, "color": "white"},
        },
        text=nodes["label"].where(~nodes["component"].isin(["embed", "pos_embed"]), ""),
        textposition="top center",
        textfont={"size": 9},
        customdata=node_texts(graph),
        hovertemplate="%{customdata}<extra></extra>",
    )
    texts = [html.escape(token, quote=False) for token in graph.tokens]
    figure.update_xaxes(
        tickvals=list(range(len(texts))), ticktext=texts, tickangle=-45, title="Position", zeroline=False
    )
    rows = {0: "embeddings", 2 * layers + 1: "logit"}
    rows |= {2 * layer + 1: f"heads {layer}" for layer in range(layers)} | {
        2 * layer + 2: f"MLP {layer}" for layer in range(layers)
    }
    figure.update_yaxes(tickvals=sorted(rows), ticktext=[rows[key] for key in sorted(rows)], zeroline=False)
    title = f"{graph.model}: what makes the logit of {graph.target} {graph.held.logit:.3g}"
    return figure.update_layout(
        title=html.escape(title, quote=False), showlegend=False, height=200 + 36 * len(rows), hovermode="closest"
    )


def _colour(value: float) -> str:
    return "#0072B2" if value >= 0 else "#D55E00"


def node_texts(graph: Graph) -> list[str]:
    """Say of each node what it is worth, and how much of what flows into it is shown."""
    return [
        html.escape(f"{node.label} at {node.position}, {node.token}: {node.value:+.4g} logits", quote=False)
        + ("" if math.isnan(node.completeness) else f"; shown {100 * node.completeness:.0f} % of what flows in")
        for node in graph.nodes.itertuples()
    ]


def edge_texts(graph: Graph) -> list[str]:
    """Say of each edge what flows, and by how much the direct effect differs."""
    return [
        f"{edge.source} → {edge.target}: {edge.flow:+.4g} logits, direct effect {edge.direct_effect:+.4g}, "
        f"error {edge.flow - edge.direct_effect:+.2g}"
        for edge in graph.edges.itertuples()
    ]


def to_networkx(graph: Graph) -> nx.DiGraph:
    """Return a graph as one of networkx, with the columns of its tables as attributes, those missing left out."""
    made = nx.DiGraph(model=graph.model, target=graph.target, logit=graph.held.logit, share=graph.share)
    made.graph["tokens"] = json.dumps(graph.tokens)
    for row in graph.nodes.to_dict("records"):
        made.add_node(row.pop("node"), **{key: _plain(value) for key, value in row.items() if not pd.isna(value)})
    for row in graph.edges.to_dict("records"):
        made.add_edge(row.pop("source"), row.pop("target"), **{key: _plain(value) for key, value in row.items()})
    return made


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def to_circuit_tracer(graph: Graph) -> dict[str, Any]:
    """Return a graph as circuit-tracer's frontend reads it, schema version 1: `json.dump` it.

    That frontend knows features of transcoders, their errors, embeddings and logits. Heads, MLPs and neurons become
    features, of their layer, called by their labels (`clerp`); position embeddings and biases of attention, which
    nothing flows into, become errors. A head lies in its layer beside the MLP. Weights of links are flows, in logits;
    the influence of a node is, as there, that of all nodes up to it, the most influential first.
    """
    held, layers = graph.held, graph.held.model.cfg.n_layers
    tokens, heads = held.prompt.tolist(), held.model.cfg.n_heads
    target = held.target[0] if isinstance(held.target, tuple) else held.target
    shares = graph.nodes["influence"].iloc[1:]
    upto = (shares.cumsum() / shares.sum() * graph.share).tolist()  # what the frontend's slider of nodes cuts off
    ids: dict[str, str] = {}
    nodes = []
    for node, cumulative in zip(graph.nodes.itertuples(), [0.0, *upto], strict=True):
        layer, kind, clerp = str(node.layer), "cross layer transcoder", node.label
        if node.component == ROOT:
            layer, kind, feature = str(layers + 1), "logit", target
            clerp = f"Output {graph.target} (p={held.probability:.3f})"  # which the frontend takes apart
        elif node.component == "embed":
            layer, kind, feature = "E", "embedding", tokens[node.position]
        elif node.component in ("pos_embed", "b_O"):
            layer, kind = layer.replace("<NA>", "0"), "mlp reconstruction error"
            feature = -1 if node.component == "b_O" else -2
        else:  # heads first, then the MLP, then its neurons
            feature = int({"head": node.head, "mlp": heads}.get(node.component, heads + 1 + node.neuron))
        ids[node.node] = f"{layer}_{feature}_{node.position}"
        nodes.append(
            {
                "node_id": ids[node.node],
                "feature": node.position if kind == "embedding" else feature,
                "layer": layer,
                "ctx_idx": node.position,
                "feature_type": kind,
                "token_prob": held.probability if kind == "logit" else 0.0,
                "is_target_logit": kind == "logit",
                "run_idx": 0,
                "reverse_ctx_idx": 0,
                "jsNodeId": f"{layer}_{feature}-{node.position}",
                "clerp": clerp,
                "influence": cumulative,
                "activation": node.value,
            }
        )
    links = [
        {"source": ids[edge.source], "target": ids[edge.target], "weight": edge.flow}
        for edge in graph.edges.itertuples()
    ]
    tokenizer = held.model.tokenizer
    prompt_tokens = [str(token) if tokenizer is None else tokenizer.decode([token]) for token in tokens]
    return {
        "metadata": {
            "slug": re.sub(r"[^a-z0-9]+", "-", graph.model.lower()).strip("-") or "graph",
            "scan": graph.model,
            "transcoder_list": [],
            "prompt_tokens": prompt_tokens,
            "prompt": "".join(prompt_tokens),
            "node_threshold": math.ceil(graph.share * 1000) / 1000,
            "schema_version": 1,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": links,
    }
