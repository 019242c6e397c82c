"""Writes the graphs of a prompt: one page, with the graphs as tables, GraphML and JSON beside it.

1. Load the models, build each model's graph behind one logit, and remove its nodes and edges, one by one and together.
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
    """A graph cannot be drawn as requested; the message says why and what to do."""


def run(options: GraphOptions) -> Path:
    """Load models, write the page of a prompt, and return its path, as `python -m analysis graph` does.

    Raises:
        GraphError: `out` exists, the prompt or target does not suit the models, or a number is out of range.
        CheckpointError: a model cannot be used.
    """
    out = expanded(options.out or Path("graphs") / time.strftime("%Y%m%d-%H%M%S"))
    if out.exists():
        raise GraphError(f"{out} already exists, and nothing is overwritten. Choose another directory with --out.")
    if not 0 < options.share <= 1:
        raise GraphError(f"--share is {options.share}; it must be above 0 and at most 1.")
    if options.paths < 1 or options.components < 0:
        raise GraphError("--paths must be at least 1, and --components must be at least 0.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = load_trio(options.original, options.control, options.ln_free, revision=options.revision, device=device)
    tokenizer = models["original"].tokenizer
    if tokenizer is None:
        raise GraphError("The original model's directory has no tokenizer. Put its tokenizer.json there.")
    first = prefix_of(Text(prefix=options.prefix), tokenizer)
    tokens = [*([] if first is None else [first]), *tokenizer.encode(options.prompt, add_special_tokens=False)]
    longest = min(model.cfg.n_ctx for model in models.values())
    if not 1 <= len(tokens) <= longest:
        raise GraphError(f"The prompt has {len(tokens)} tokens; it must have from 1 to {longest}.")
    target = _target(tokenizer, options)
    named = {"share": options.share, "most": options.most, "neurons": options.neurons}
    graphs = graph.build_all(models, torch.tensor(tokens), target, **named)
    names = {name: str(getattr(options, name)) for name in models}
    return write(graphs, out, names=names, count=options.paths, most=options.components)


def _target(tokenizer: Any, options: GraphOptions) -> Target | None:
    """Return the target that the options specify."""
    ids = []
    for flag, text in {"target": options.target, "against": options.against}.items():
        if text is not None:
            found = tokenizer.encode(text, add_special_tokens=False)
            if len(found) != 1:
                raise GraphError(
                    f"--{flag} is {text!r}, which is {len(found)} tokens; it must be a single token. Mind the space."
                )
            ids += found
    if options.against is not None and options.target is None:
        raise GraphError("--against is compared with --target. Set both.")
    return (ids[0], ids[1]) if len(ids) == 2 else ids[0] if ids else None


def write(
    graphs: Sequence[Graph],
    out: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    count: int = 20,
    most: int = 3,
) -> Path:
    """Write graphs of one prompt, the results of removing their parts, and a page about both to `out`.

    Beside the page are, for each model, `NAME-nodes.csv`, `NAME-edges.csv`, `NAME-paths.csv`, `NAME.graphml` and
    `NAME-circuit-tracer.json`, and for all models `interventions.csv`.

    Args:
        graphs: those of `graph.build_all`.
        out: the directory to write, completely or not at all.
        names: descriptions of the models for the top of the page (None: their names).
        count: the number of largest paths, as in `paths.find`.
        most: the maximum number of components on such a path.

    Returns the path of the page.

    Raises:
        GraphError: `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise GraphError(f"{out} already exists, and nothing is overwritten. Choose another directory.")
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
            figure.layout.template = None  # the page has its own templates, light and dark
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
