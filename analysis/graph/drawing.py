"""Draws a graph, with positions along the horizontal axis and layers along the vertical axis."""

import html
import math

import plotly.graph_objects as go

from analysis.graph.held import ROOT
from analysis.graph.pruning import Graph


def plot(graph: Graph) -> go.Figure:
    """Plot a graph, with positions along the horizontal axis, layers along the vertical axis, and the logit on top.

    Dots are nodes, with their value as the size. Lines are edges, with their flow as the width. Blue raises the logit,
    and orange lowers it. Hovering over a node shows its value, and how much of what flows into it is drawn. Hovering
    over an edge shows how much its direct effect differs from its flow.
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
        bow = 0.03 * (to_y - y) * (x == to_x)  # otherwise edges at one position overlap
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
        text=_edge_texts(graph),
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
        customdata=_node_texts(graph),
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
    title = f"{graph.model}: what makes up the logit of {graph.target}, {graph.held.logit:.3g}"
    return figure.update_layout(
        title=html.escape(title, quote=False), showlegend=False, height=200 + 36 * len(rows), hovermode="closest"
    )


def _colour(value: float) -> str:
    return "#0072B2" if value >= 0 else "#D55E00"


def _node_texts(graph: Graph) -> list[str]:
    """Describe each node: its value, and the fraction of what flows into it that is shown."""
    return [
        html.escape(f"{node.label} at position {node.position}, {node.token}: {node.value:+.4g} logits", quote=False)
        + ("" if math.isnan(node.completeness) else f"; {100 * node.completeness:.0f} % of its inflow is shown")
        for node in graph.nodes.itertuples()
    ]


def _edge_texts(graph: Graph) -> list[str]:
    """Describe each edge: its flow, and how much the direct effect differs."""
    return [
        f"{edge.source} → {edge.target}: {edge.flow:+.4g} logits, direct effect {edge.direct_effect:+.4g}, "
        f"error {edge.flow - edge.direct_effect:+.2g}"
        for edge in graph.edges.itertuples()
    ]
