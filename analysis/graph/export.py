"""Hands a graph to other tools: networkx, whose GraphML many read, and circuit-tracer's frontend."""

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
    """Return a graph as one of networkx, with the columns of its tables as attributes; missing values are omitted."""
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
    features of their layer, with their labels as names (`clerp`); position embeddings and biases of attention, into
    which nothing flows, become errors. A head lies in its layer beside the MLP. Weights of links are flows, in logits;
    the influence of a node is, as there, that of all nodes up to it, the most influential first. A click on a head or
    MLP shows what flows in and out of it; examples of texts, which the frontend looks for as well, do not exist.

    Its server takes a directory with the graph as SLUG.json and `{"graphs": [METADATA]}` as graph-metadata.json, where
    METADATA is the graph's `metadata` and SLUG the `slug` in it.
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
