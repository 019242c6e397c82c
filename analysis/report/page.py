"""Renders the page: the tables and figures that it shows, the Python code that makes them, and the HTML."""

import itertools
import json
import platform
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import get_colorscale
from plotly.offline import get_plotlyjs

from analysis import palette, patching
from analysis.report.cards import Card
from analysis.report.options import Options
from analysis.report.sections import Analysis, Table
from analysis.stream import Stream
from analysis.texts import Sample
from finetune.run_directory import version_of

ROWS_SHOWN = 40
"""The maximum number of rows of a table on the page. The CSV has all rows."""
COLOURSCALES = {"sequential": "Cividis", "sequentialminus": "Cividis", "diverging": "RdBu"}
PACKAGES = ("noln", "torch", "transformers", "transformer-lens", "plotly")


def render(
    models: Mapping[str, Any],
    samples: Mapping[str, Sample],
    names: Mapping[str, str],
    options: Options,
    cards: Sequence[Card],
    token_view: Mapping[str, Any],
    sections: Sequence[Mapping[str, Any]],
) -> str:
    """Return the page as HTML.

    Args:
        models: the compared models, by name.
        samples: the texts, by name.
        names: descriptions of the models, such as their directories.
        options: the options, of which the revision of the original and the prefix are shown.
        cards: the cards at the top of the page.
        token_view: the result of `tokens.view`.
        sections: the result of `section_data` for each analysis.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis.report", ""),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # models keep their order
    return environment.get_template("page.html.jinja").render(
        title=f"What removing {'RMSNorm' if Stream(models['original']).norm == 'RMS' else 'LayerNorm'} changed",
        names={
            **names,
            **({"original": f"{names['original']} at revision {options.revision}"} if options.revision else {}),
        },
        colours={name: palette.colour(name) for name in models},
        facts=_facts(models["original"], samples, options.prefix),
        cards=cards,
        view=token_view,
        sections=sections,
        colorscales={kind: get_colorscale(scale) for kind, scale in COLOURSCALES.items()},
        nonce=secrets.token_hex(16),
        plotly_js=get_plotlyjs(),
    )


def section_data(
    analysis: Analysis, tables: Sequence[Mapping[str, Any]], code: str, left_out: str = ""
) -> dict[str, Any]:
    """Return what the page shows of an analysis: the `table_data` of each table, or why the analysis is missing."""
    about = {"module": analysis.name, "title": analysis.title, "sentence": analysis.sentence}
    return {**about, "tables": tables, "code": code, "left_out": left_out}


def table_data(table: Table, file: str, frame: pd.DataFrame, figure: go.Figure | None) -> dict[str, Any]:
    """Return what the page shows of a table, which is saved as `file`.csv, and of its figure."""
    if figure is not None:
        figure.layout.template = None  # the page has its own templates, light and dark
    first = frame.head(ROWS_SHOWN)
    is_text = {column: not pd.api.types.is_numeric_dtype(frame[column]) for column in frame}
    return {
        "title": table.title,
        "file": file,
        "figure": None if figure is None else json.loads(figure.to_json()),
        "row_count": len(frame),
        "columns": [{"name": str(column), "is_text": is_text[column]} for column in frame],
        "rows": [[_cell(value) for value in row] for row in first.itertuples(index=False)],
        "note": table.note(frame) if table.note is not None else "",
    }


def _cell(value: Any) -> str:
    if pd.isna(value):
        return ""
    if isinstance(value, float | np.floating):
        return f"{value:.4g}".replace("-", "−")
    return str(value).replace("\n", "⏎")


def python_code(analysis: Analysis, names: Mapping[str, str], options: Options, text: str, token_count: int) -> str:
    """Return Python code that creates the tables and figures of an analysis from `token_count` tokens of `text`."""
    models = ", ".join(repr(names[key]) if key in names else "None" for key in ("original", "control", "ln_free"))
    models += f", revision={options.revision!r}" if options.revision else ""
    pairs = str(options.pairs) if options.pairs is not None else None
    prefix = "" if options.prefix is None else f", prefix={options.prefix!r}"
    context = "" if options.context is None else f", context={options.context}"
    calls = []
    for before, table in itertools.pairwise((None, *analysis.tables)):
        assert table is not None
        if before is None or before.python != table.python:
            calls.append(f"frame = {table.python.replace('{prefix}', prefix)}")
        if table.plot is not None:
            calls.append(f"{analysis.name}.{table.plot.__name__}(frame).show()")
    return "\n".join(
        [
            f"from analysis import {analysis.name}, load_trio",
            *(["from analysis.prompts import choose_pairs"] if analysis.module is patching else []),
            "from analysis.texts import read_text",
            "",
            f"models = load_trio({models})",
            f"tokens, documents, _ = read_text({text!r}, models['original'], {token_count}{context}{prefix})",
            *(line.format(pairs=pairs) for line in analysis.python),
            *calls,
        ]
    )


def _facts(model: Any, samples: Mapping[str, Sample], prefix: str | None) -> dict[str, str]:
    """Return the texts, time and versions with which the models were compared."""
    return {
        "Text": "; ".join(sample.description for sample in samples.values()),
        "Packing": (
            "as in training: documents follow one another, each ended by the end-of-text token, and are cut into "
            f"blocks of {next(iter(samples.values())).tokens.shape[1]} tokens, with "
            f"{'nothing' if prefix is None else repr(prefix)} prepended; the blocks are spread evenly over the text, "
            "or are the first ones of a Hub data set"
        ),
        "Models": (
            "the weights and biases of norms are folded into the weights that read them; "
            + (
                "weights that write to the residual stream are not centred, because RMSNorm reads its mean"
                if Stream(model).norm == "RMS"
                else "weights that write to the residual stream are centred, which changes no prediction"
            )
        ),
        "Made": time.strftime("%Y-%m-%d %H:%M %Z"),
        "Versions": ", ".join(
            [
                f"python {platform.python_version()}",
                *(f"{name} {version_of(name) or 'not installed'}" for name in PACKAGES),
            ]
        ),
    }
