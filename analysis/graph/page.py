"""Writes what `graph` finds for a prompt: one page, with the graphs as tables, GraphML and JSON beside it.

1. Load the models, build the graph of each behind one logit, and take its nodes and edges out, one by one and together.
2. Find the largest paths from the tokens to the logit.
3. Write everything under a temporary name, and rename it when it is complete.
"""

import json
import re
import secrets
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import networkx as nx
import pandas as pd
import torch
from plotly.offline import get_plotlyjs

from analysis import graph, palette, paths
from analysis.edges import Target
from analysis.graph.pruning import Graph
from analysis.loading import load_trio
from analysis.report.options import GraphOptions
from finetune.errors import NolnError
from finetune.names import expanded
from finetune.recipe import Text
from finetune.text import prefix_of


class GraphError(NolnError):
    """A graph that cannot be drawn as asked; the message says why and what to do."""


def run(options: GraphOptions) -> Path:
    """Load models, write the page of a prompt, and return it: what `python -m analysis graph` does.

    Raises:
        GraphError: `out` exists, the models cannot take the prompt or target, or the share is out of range.
        CheckpointError: a model cannot be used.
    """
    out = expanded(options.out or Path("graphs") / time.strftime("%Y%m%d-%H%M%S"))
    if out.exists():
        raise GraphError(f"{out} already exists, and nothing is overwritten: name another directory with --out.")
    if not 0 < options.share <= 1:
        raise GraphError(f"--share is {options.share}, but must be above 0 and at most 1.")
    if options.paths < 1 or options.components < 0:
        raise GraphError("--paths must be at least 1, and --components at least 0.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = load_trio(options.original, options.control, options.ln_free, revision=options.revision, device=device)
    tokenizer = models["original"].tokenizer
    if tokenizer is None:
        raise GraphError("The original model has no tokenizer beside it: put its tokenizer.json there.")
    first = prefix_of(Text(prefix=options.prefix), tokenizer)
    tokens = [*([] if first is None else [first]), *tokenizer.encode(options.prompt, add_special_tokens=False)]
    longest = min(model.cfg.n_ctx for model in models.values())
    if not 1 <= len(tokens) <= longest:
        raise GraphError(f"The prompt has {len(tokens)} tokens, but must have 1 to {longest}.")
    target = _target(tokenizer, options)
    named = {"share": options.share, "most": options.most, "neurons": options.neurons}
    graphs = graph.build_all(models, torch.tensor(tokens), target, **named)
    names = {name: str(getattr(options, name)) for name in models}
    return write(graphs, out, names=names, count=options.paths, most=options.components)


def _target(tokenizer: Any, options: GraphOptions) -> Target | None:
    """Return the tokens that the options ask for."""
    ids = []
    for flag, text in {"target": options.target, "against": options.against}.items():
        if text is not None:
            found = tokenizer.encode(text, add_special_tokens=False)
            if len(found) != 1:
                raise GraphError(
                    f"--{flag} is {text!r}, which is {len(found)} tokens, but must be one: mind the space."
                )
            ids += found
    if options.against is not None and options.target is None:
        raise GraphError("--against is compared with --target: give both.")
    return (ids[0], ids[1]) if len(ids) == 2 else ids[0] if ids else None


def write(
    graphs: Sequence[Graph],
    out: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    count: int = 20,
    most: int = 3,
) -> Path:
    """Write graphs of one prompt, what happens to the logit when parts are taken out, and a page of them to `out`.

    Beside the page are, of each model, `NAME-nodes.csv`, `NAME-edges.csv`, `NAME-paths.csv`,
    `NAME.graphml`, and `NAME-circuit-tracer.json`, and of all `interventions.csv`.

    Args:
        graphs: what `graph.build_all` returns.
        out: the directory to write, whole or not at all.
        names: what the models are, on top of the page; where None, their keys.
        count: of the largest paths, as in `paths.find`.
        most: components that these go through, at most.

    Returns the page.

    Raises:
        GraphError: `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise GraphError(f"{out} already exists, and nothing is overwritten: name another directory.")
    interventions = pd.concat([graph.intervene(each) for each in graphs], ignore_index=True)
    figures = {"interventions": graph.plot_interventions(interventions)}
    beside = next(parent for parent in out.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{out.name}.") as directory:
        partial = Path(directory) / out.name
        partial.mkdir()
        interventions.to_csv(partial / "interventions.csv", index=False)
        shown = []
        for each in graphs:
            file = re.sub(r"[^\w.-]+", "-", each.model)
            each.nodes.to_csv(partial / f"{file}-nodes.csv", index=False)
            each.edges.to_csv(partial / f"{file}-edges.csv", index=False)
            nx.write_graphml(graph.to_networkx(each), partial / f"{file}.graphml")
            traced = json.dumps(graph.to_circuit_tracer(each), indent=1)
            (partial / f"{file}-circuit-tracer.json").write_text(traced, encoding="utf-8")
            figures[file] = graph.plot(each)
            largest = paths.find(each.held, count, most)
            largest.frame.to_csv(partial / f"{file}-paths.csv", index=False)
            rows = list(largest.frame.itertuples())
            nodes = list(each.nodes.itertuples())
            shown.append({"graph": each, "file": file, "nodes": nodes, "paths": largest, "path_rows": rows})
        for figure in figures.values():
            figure.layout.template = None  # the page has its own, light and dark
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("analysis.graph", ""),
            autoescape=True,
            trim_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        html = environment.get_template("page.html.jinja").render(
            prompt=graphs[0].tokens,
            target=graphs[0].target,
            names=names or {each.model: each.model for each in graphs},
            colours={each.model: palette.colour(each.model) for each in graphs},
            graphs=shown,
            most=most,
            errors=graph.summarise(interventions).to_dict("records"),
            figures={name: json.loads(figure.to_json()) for name, figure in figures.items()},
            nonce=secrets.token_hex(16),
            plotly_js=get_plotlyjs(),
        )
        (partial / "graph.html").write_text(html, encoding="utf-8")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(out)
    return out / "graph.html"
