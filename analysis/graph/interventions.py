"""Checks a graph with forwards of the whole model: removes nodes or edges, and measures how much the logit falls."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from analysis import figures, palette
from analysis.edges import Target
from analysis.graph.held import Held
from analysis.graph.pruning import Graph, build_all
from analysis.stream import Reader

TOP = (1, 2, 5, 10, 20)
"""How many of the largest nodes or edges to remove together."""
_ROWS = 32
"""Interventions per forward."""


class Removal(NamedTuple):
    """What to remove together: nodes, from the stream, or edges, from the input of their targets."""

    what: str
    label: str
    nodes: tuple[tuple[int, int], ...] = ()
    """(row, position) of each node."""
    edges: tuple[tuple[int, int, int, int], ...] = ()
    """(row, position) of each edge's source, followed by those of its target. The root has row −1."""
    predicted: float = 0.0


@torch.inference_mode()
def intervene(graph: Graph, top: Sequence[int] = TOP) -> pd.DataFrame:
    """Remove each node and each edge of a graph, and the largest together, and measure how much the logit falls.

    Returns one row per intervention. Columns: model; what, one of node, edge, nodes and edges (the largest by |value|
    or |flow|, together); label; count, how many are removed; predicted, held and free, the falls of the logit, in
    logits, according to the graph, in a forward with patterns and gates held fixed, and in a forward with nothing held
    fixed (missing for edges).
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
    """Yield what to remove: each node, each edge, and the largest of each together."""
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
    """Return how much the logit falls at each removal, from one forward with one row per removal."""
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
            where = f"blocks.{component.layer}.hook_{name}_out" if name else "hook_embed"  # also for positions
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
        """Yield (batch row, row of the MLP or index of the head, position, loss of its input) for a layer's nodes."""
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
    """Build the graph of each model and check it: `intervene` of `build`, with the options and errors of the latter.

    If `target` is None, it is the first model's most likely token.
    """
    return pd.concat([intervene(graph) for graph in build_all(models, prompt, target, **options)], ignore_index=True)


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Summarise the table of `measure` or `intervene`: one row per model and kind of removal.

    Columns: model; what; error and error_free, 100 · mean|predicted − fall of the logit| / mean|fall|, in %, with
    patterns and gates held fixed, and with nothing held fixed (missing for edges); interventions, their number.
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
    """Plot the table of `measure`: the fall of the logit over the predicted fall. On the grey line they are equal."""
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
    figure.update_xaxes(title="Predicted fall of the logit<br>(◇: several removed together)")
    return figure.update_yaxes(title="Actual fall of the logit", col=1)
