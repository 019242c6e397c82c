"""Builds the graph behind a logit: measures how much each node and edge matters, and keeps those that matter most."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis.edges import Target
from analysis.graph.held import ROOT, Consumer, Held
from analysis.logit_attribution import token_text
from analysis.stream import Component

_EDGES = 0.95
"""The fraction of the influence of all edges between kept nodes that kept edges have."""


@dataclass(frozen=True)
class Graph:
    """The circuit behind one logit: a pruned graph, and what it was pruned from."""

    model: str
    """The name of the model."""
    nodes: pd.DataFrame
    """One row per node, with the root first. Columns: node, such as "L2H3@5"; component, label, layer, head and neuron,
    as in `edges.measure_prompt`; position; token; value, its effect on the logit through all paths, in logits;
    influence, from 0 to 1; inflow, the sum of all flows into it, and explained, that of kept edges, in logits;
    completeness, the fraction of the total size of the flows into it that kept edges have, NaN if nothing flows in."""
    edges: pd.DataFrame
    """One row per edge. Columns: source and target, nodes; flow and direct_effect, in logits; influence."""
    tokens: tuple[str, ...]
    """The texts of the prompt's tokens, in quotes."""
    target: str
    share: float
    """The fraction of all influence that kept nodes have."""
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
        model: a model from a loader of `analysis`.
        prompt: token ids.
        target: a token, or two for the logit of the first minus that of the second. None: the model's most likely
            token.
        name: the name of the model.
        share: the fraction of the influence of all nodes to keep. Of the influence of the edges between these, 95 % is
            kept, or all of it if the share is 1.
        most: the maximum number of nodes to keep. `Graph.share` is the share that they have.
        neurons: the number of neurons, per MLP and position, that are separate nodes.
        centre_unembedding: whether to subtract from W_U its mean over the vocabulary. It cancels out in a difference.

    Raises:
        NolnError: the model is one of `finetune.blocks`.
        ValueError: the share is not above 0 and at most 1, or the weights of the final norm are not folded into the
            unembedding.
    """
    if not 0 < share <= 1:
        raise ValueError(f"The share is {share}; it must be above 0 and at most 1.")
    held = Held(model, prompt, target, centre_unembedding, neurons)
    influence = torch.zeros_like(held.values)
    for consumer in held.consumers:  # the root first, and each after everything that it flows into
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


def build_all(
    models: Mapping[str, Any], prompt: Int[Tensor, " pos"], target: Target | None = None, **options: Any
) -> list[Graph]:
    """Build the graph of each model, all for the same target, as `build` does."""
    graphs: list[Graph] = []
    for name, model in models.items():
        graphs.append(build(model, prompt, target, name=name, **options))
        target = graphs[0].held.target
    return graphs


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
    """Return the edges that lead to the root through other edges."""
    while True:
        targets = set(zip(edges["row"], edges["position"], strict=True)) | {(-1, last)}
        has_sources = [key in targets for key in zip(edges["to_row"], edges["to_position"], strict=True)]
        if all(has_sources):
            return edges.copy()
        edges = edges[has_sources]


def _nodes(
    held: Held, edges: pd.DataFrame, influence: Float[Tensor, "row pos"], consumers: Mapping[int, Consumer]
) -> pd.DataFrame:
    """Return the nodes that the edges connect: the root first, then by influence."""
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
