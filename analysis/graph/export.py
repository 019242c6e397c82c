"""Exports a graph to other tools: networkx, whose GraphML many tools read, and circuit-tracer's frontend."""

import json
import math
import re
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd

from analysis.graph.held import ROOT
from analysis.graph.pruning import Graph


def to_networkx(graph: Graph) -> nx.DiGraph:
    """Convert a graph to networkx, with the columns of its tables as attributes. Missing values are omitted."""
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
    """Return a graph in the format of circuit-tracer's frontend, schema version 1. Write it with `json.dump`.

    That frontend supports features of transcoders, their errors, embeddings and logits. Heads, MLPs and neurons become
    features of their layer, with their labels as names (`clerp`). Position embeddings and biases of attention, which
    have no inputs, become errors. A head is in the same layer as the MLP. Weights of links are flows, in logits. As in
    circuit-tracer, the influence of a node is the sum over all nodes up to it, with the most influential first.
    Clicking on a head or MLP shows the flows into and out of it. There are no text examples, which the frontend looks
    for as well.

    The frontend's server expects a directory with the graph as SLUG.json and `{"graphs": [METADATA]}` as
    graph-metadata.json, where METADATA is the graph's `metadata`, and SLUG is the `slug` in it.
    """
    held, layers = graph.held, graph.held.model.cfg.n_layers
    tokens, heads = held.prompt.tolist(), held.model.cfg.n_heads
    target = held.target[0] if isinstance(held.target, tuple) else held.target
    shares = graph.nodes["influence"].iloc[1:]
    upto = (shares.cumsum() / shares.sum() * graph.share).tolist()  # for the frontend's slider of nodes
    ids: dict[str, str] = {}
    nodes = []
    for node, cumulative in zip(graph.nodes.itertuples(), [0.0, *upto], strict=True):
        layer, kind, clerp = str(node.layer), "cross layer transcoder", node.label
        if node.component == ROOT:
            layer, kind, feature = str(layers + 1), "logit", target
            clerp = f"Output {graph.target} (p={held.probability:.3f})"  # the frontend parses this
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
