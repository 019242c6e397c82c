"""Figures that several analyses share: one colour per model, one panel per quantity."""

import functools
import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis import palette

TAIL = {"median": 50, "percentile_95": 95, "percentile_99_9": 99.9, "max": 100}
"""Percentiles by the names that they have in tables."""
TAIL_TITLE = "Median (●), 95th percentile (▲), 99.9th percentile (◆) and maximum (✖) over tokens"
_TAIL_NAMES = dict(zip(TAIL, ("median", "95th percentile", "99.9th percentile", "maximum"), strict=True))
_SYMBOLS = ("circle", "triangle-up", "diamond", "x")


def of_text(plot: Callable[..., go.Figure]) -> Callable[..., go.Figure]:
    """Escape the texts that `plot` draws (names, tokens, prompts), because plotly reads them as HTML."""

    @functools.wraps(plot)
    def escaped(frame: pd.DataFrame, *arguments: Any, **options: Any) -> go.Figure:
        changes = {}
        for column in frame.columns[~frame.dtypes.map(pd.api.types.is_numeric_dtype)]:
            texts = [text for text in frame[column].unique() if isinstance(text, str)]
            if hostile := {text: html.escape(text, quote=False) for text in texts if set(text) & set("<>&")}:
                changes[column] = frame[column].replace(hostile)
        return plot(frame.assign(**changes), *arguments, **options)

    return escaped


def add_tail(
    figure: go.Figure,
    model: str,
    x: Sequence[str] | pd.Series,
    tail: Mapping[str, Any],
    *,
    row: int,
    col: int,
    legend: bool = False,
) -> None:
    """Add the percentiles in `tail`, which has one number per `x` for each name in `TAIL`, to a panel."""
    for (name, values), symbol in zip(tail.items(), _SYMBOLS, strict=True):
        figure.add_scatter(
            x=x,
            y=values,
            name=model,
            legendgroup=model,
            offsetgroup=model,
            mode="markers",
            marker={"color": palette.colour(model), "size": 9, "symbol": symbol},
            hovertemplate=f"%{{x}}: {_TAIL_NAMES[name]} %{{y:.3g}}",
            showlegend=legend and name == "median",
            row=row,
            col=col,
        )


def lines(
    frame: pd.DataFrame, x: str, quantities: Mapping[str, str], *, column: str | None = None, dash: str | None = None
) -> go.Figure:
    """Plot quantities over the column `x` of `frame`, one below the other, one line per model.

    Args:
        frame: tidy, with a column `model`.
        x: the column on the horizontal axis.
        quantities: titles of the vertical axes, with units, by column.
        column: a column for each value of which there is a column of panels.
        dash: a column for each value of which there is a line. The first is solid, the others are dotted.
    """
    columns: list[Any] = list(frame[column].unique()) if column else [None]
    keys = ["model", *(key for key in (column, dash) if key)]
    figure = make_subplots(
        len(quantities),
        len(columns),
        shared_xaxes=True,
        shared_yaxes="rows",
        column_titles=columns if column else None,
        vertical_spacing=0.15 / len(quantities),
        horizontal_spacing=0.03,
    )
    for values, line in frame.groupby(keys, sort=False):
        key = dict(zip(keys, values, strict=True))
        col = columns.index(key[column]) + 1 if column else 1
        is_first = dash is None or key[dash] == frame[dash].iloc[0]
        for row, (quantity, title) in enumerate(quantities.items(), start=1):
            figure.add_scatter(
                x=line[x],
                y=line[quantity],
                name=f"{key['model']}, {key[dash]}" if dash else key["model"],
                legendgroup=key["model"],
                showlegend=row == col == 1,
                line={"color": palette.colour(key["model"]), "dash": "solid" if is_first else "dot"},
                row=row,
                col=col,
            )
            figure.update_yaxes(title=title, row=row, col=1)
    return figure.update_layout(height=200 + 200 * len(quantities))


def heat_maps(frame: pd.DataFrame, quantities: Mapping[str, tuple[str, dict[str, Any]]]) -> go.Figure:
    """Plot quantities of heads over layer and head: one row of maps per quantity, one column per model.

    Args:
        frame: tidy, with columns `model`, `layer` and `head`.
        quantities: for each column, the title of its colour axis, with units, and other properties of that axis.
    """
    models, count = list(frame["model"].unique()), len(quantities)
    figure = make_subplots(
        count,
        len(models),
        shared_xaxes=True,
        shared_yaxes=True,
        column_titles=models,
        vertical_spacing=0.06,
        horizontal_spacing=0.03,
    )
    for row, (quantity, (title, axis)) in enumerate(quantities.items(), start=1):
        for col, model in enumerate(models, start=1):
            heat = frame[frame["model"] == model].pivot(index="layer", columns="head", values=quantity)
            figure.add_heatmap(z=heat, x=heat.columns, y=heat.index, coloraxis=f"coloraxis{row}", row=row, col=col)
        bar = {"title": title, "len": 0.95 / count, "y": 1 - (row - 0.5) / count}
        figure.update_layout({f"coloraxis{row}": {"colorscale": "Cividis", "colorbar": bar, **axis}})
    figure.update_xaxes(dtick=max(1, int(frame["head"].max()) // 6)).update_xaxes(title="Head", row=count)
    figure.update_yaxes(dtick=max(1, int(frame["layer"].max()) // 6)).update_yaxes(title="Layer", col=1)
    return figure.update_layout(height=150 + 230 * count)
