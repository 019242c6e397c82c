"""Draw the README's figure, light and dark: `make notebooks`, or `python notebooks/readme_figure.py`.

It compares the original with the LN-free model: the norms of residual vectors, and what heads do to a logit according
to direct logit attribution (DLA) against what they really do (their direct effect). This needs the extra `png`, and
Chrome or Chromium.
"""

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis import load_trio, logit_attribution, palette, residual_norms
from analysis.stream import label
from analysis.texts import read_text

THEMES = {"light": {"ink": "#1f2328", "lines": "#d1d9e0"}, "dark": {"ink": "#e6edf3", "lines": "#3d444d"}}
LABELS = {"original": "original", "ln_free": "LN-free"}
TOKENS = 8_192
PROMPT_TOKENS = 48
TICKS = [factor * 10**power for power in range(-2, 5) for factor in (1, 2, 5)]


def measure(tokens: int = TOKENS) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what the figure shows of the bundled models: norms of residual vectors, and effects of heads."""
    models = load_trio("micro", None, "micro-ln-free")
    text = read_text("books-report", models["original"], tokens).tokens
    effects = logit_attribution.measure_prompt(models, text[0, :PROMPT_TOKENS])
    return residual_norms.measure(models, text), effects[effects["component"] == "head"]


def draw(norms: pd.DataFrame, effects: pd.DataFrame, ink: str, lines: str) -> go.Figure:
    """Draw what `measure` returns on a transparent background, with text in `ink` and the grid in `lines`."""
    figure = make_subplots(
        1,
        3,
        column_widths=[0.42, 0.29, 0.29],
        horizontal_spacing=0.06,
        subplot_titles=["Norms of residual vectors", *(f"Effects of heads, {model}" for model in LABELS.values())],
    )
    for (model, token_class), points in norms.groupby(["model", "token_class"], sort=False):
        if token_class == "end-of-text":
            continue
        is_first = token_class == "position 0"
        figure.add_scatter(
            x=points["point"].map(label),
            y=points["norm"],
            name=f"{LABELS[model]}, {'position 0' if is_first else 'ordinary tokens'}",
            line={"color": palette.colour(model), "width": 2.5, "dash": "dot" if is_first else "solid"},
            mode="lines",
            row=1,
            col=1,
        )
    least, most = effects[["direct_effect", "dla"]].min().min(), effects[["direct_effect", "dla"]].max().max()
    margin = 0.06 * (most - least)
    limits = [least - margin, most + margin]
    for col, model in enumerate(LABELS, start=2):
        points = effects[effects["model"] == model]
        x, y = points["direct_effect"], points["dla"]
        figure.add_scatter(x=limits, y=limits, mode="lines", line={"color": lines}, showlegend=False, row=1, col=col)
        marker = {"color": palette.colour(model), "size": 5, "opacity": 0.5}
        figure.add_scatter(x=x, y=y, mode="markers", marker=marker, showlegend=False, row=1, col=col)
        figure.add_annotation(
            text=f"<b>DLA is off by {100 * (x - y).abs().mean() / x.abs().mean():.0f} %</b>",
            font_color=palette.colour(model),
            x=0.05,
            y=0.97,
            xref="x domain",
            yref="y domain",
            showarrow=False,
            row=1,
            col=col,
        )
        figure.update_xaxes(title="Direct effect (logits)", range=limits, nticks=6, row=1, col=col)
        figure.update_yaxes(range=limits, nticks=6, row=1, col=col)
    figure.update_yaxes(title="DLA (logits)", title_standoff=4, row=1, col=2)
    figure.update_yaxes(type="log", tickvals=TICKS, title="Mean L2 norm", title_standoff=6, row=1, col=1)
    figure.update_xaxes(title="Layer, place", tickangle=-60, row=1, col=1)
    figure.update_xaxes(showgrid=False, linecolor=lines, showline=True, zeroline=False, ticks="")
    figure.update_yaxes(gridcolor=lines, gridwidth=0.5, zeroline=False)
    return figure.update_layout(
        template="none",
        width=1080,
        height=410,
        margin={"l": 60, "r": 16, "t": 40, "b": 96},
        font={"family": "Inter, Helvetica, Arial, sans-serif", "size": 13, "color": ink},
        legend={"orientation": "h", "x": 0, "y": -0.26, "yanchor": "top"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )


if __name__ == "__main__":
    measured = measure()
    directory = Path(__file__).parent / "figures"
    directory.mkdir(exist_ok=True)
    for theme, colours in THEMES.items():
        draw(*measured, **colours).write_image(directory / f"overview-{theme}.png", scale=2)
