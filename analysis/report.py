"""All analyses -> one directory: a self-contained HTML page, tables as CSV, figures as plotly JSON.

1. Name the models: those given, or those of the newest run; load them, and pack the texts as in training.
2. Measure and plot, analysis by analysis, in the order of `ANALYSES`.
3. Answer the questions that the page opens with, from the tables (`answers`).
4. Write everything under a temporary name, and rename it when it is complete.
"""

import functools
import importlib.util
import itertools
import json
import platform
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import torch
from plotly.colors import get_colorscale
from plotly.offline import get_plotlyjs
from tqdm.auto import tqdm

from analysis import (
    answers,
    attention,
    benchmarks,
    confidence_neurons,
    faithfulness,
    logit_attribution,
    loss,
    outlier_features,
    palette,
    patching,
    residual_norms,
    token_view,
)
from analysis.loading import load_trio
from analysis.prompts import Pair, choose_pairs, encode_pairs, read_pairs
from analysis.texts import Sample, read_text
from finetune import NolnError, checkpoint
from finetune.run_directory import control_of, recipe_of, version_of

ROWS_SHOWN = 40
"""Rows of a table on the page; the CSV has all."""
TOKENS_VIEWED = 512
"""Tokens in the token view, in two blocks."""
PROMPT_TOKENS = 24
"""Tokens in the prompt whose logits are attributed: the first of the text."""
WORST = 6
"""Of the worst tokens, how many of each model and text."""
COLOURSCALES = {"sequential": "Cividis", "sequentialminus": "Cividis", "diverging": "RdBu"}
PACKAGES = ("noln", "torch", "transformers", "transformer-lens", "plotly")


_PNG_NEEDS = (
    "PNGs are drawn by kaleido and Chrome or Chromium: install the extra `png` (pip install -e '.[png]') and a browser "
    "(BROWSER_PATH names one that is not found), or leave --png away."
)


class ReportError(NolnError):
    """A report that cannot be made as asked; the message says why and what to do."""


class Inputs(NamedTuple):
    """What the analyses of a report look at."""

    models: dict[str, Any]
    samples: dict[str, Sample]
    """The texts by name."""
    pairs: Sequence[Pair]
    """For patching."""
    batch_size: int

    def each(self, measure: Callable[..., pd.DataFrame], **options: Any) -> pd.DataFrame:
        """Return what `measure` makes of the models and the first text."""
        tokens = next(iter(self.samples.values())).tokens
        return measure(self.models, tokens, batch_size=self.batch_size, **options)


@dataclass(frozen=True)
class Grain:
    """One table of an analysis and its figure."""

    name: str
    """With the module's, the name of the files."""
    title: str
    plot: Callable[[pd.DataFrame], go.Figure] | None
    python: str
    """The call that makes what is plotted, from `models` and `tokens`."""
    plotted: str | None = None
    """The grain whose table is plotted, if another than this one."""
    note: Callable[[pd.DataFrame], str] | None = None
    """Says of the table what no figure shows."""


@dataclass(frozen=True)
class Analysis:
    """One module of the package, and its section of the page."""

    module: ModuleType
    title: str
    sentence: str
    """What it measures."""
    measure: Callable[[Inputs], dict[str, pd.DataFrame]]
    """Makes the tables by grain, from as few forwards as can be."""
    grains: tuple[Grain, ...]
    python: tuple[str, ...] = ()
    """What the calls of its grains need beside models and tokens; {pairs} stands for the file of prompt pairs."""

    @property
    def name(self) -> str:
        """The module's name, in tables and file names too."""
        return self.module.__name__.rpartition(".")[2]


def _loss(inputs: Inputs) -> dict[str, pd.DataFrame]:
    """Measure every text: they stand side by side in each table."""
    token = pd.concat(
        [
            loss.measure_tokens(inputs.models, sample.tokens, sample.documents, text=name, batch_size=inputs.batch_size)
            for name, sample in inputs.samples.items()
        ],
        ignore_index=True,
    )
    tokenizer = inputs.models["original"].tokenizer
    worst = [
        loss.worst_tokens(token[token["text"] == name], sample.tokens, tokenizer, WORST)
        for name, sample in inputs.samples.items()
    ]
    return {
        "model": loss.summarise(token),
        "position": loss.average_positions(token),
        "token": token,
        "worst": pd.concat(worst, ignore_index=True),
    }


def _residual_norms(inputs: Inputs) -> dict[str, pd.DataFrame]:
    point = inputs.each(residual_norms.measure)
    step = point[["model", "point", "token_class", "growth", "cosine", "tokens"]].dropna()
    return {"point": point.drop(columns=["growth", "cosine"]), "step": step}


def _attention(inputs: Inputs) -> dict[str, pd.DataFrame]:
    head = inputs.each(attention.measure_heads)
    return {"model": attention.summarise(head), "head": head}


def _logit_attribution(inputs: Inputs) -> dict[str, pd.DataFrame]:
    component = inputs.each(logit_attribution.measure_components)
    prompt = next(iter(inputs.samples.values())).tokens[0, :PROMPT_TOKENS]
    return {
        "model": logit_attribution.summarise(component),
        "component": component,
        "head": component[component["component"] == "head"],
        "prompt": logit_attribution.largest_first(logit_attribution.measure_prompt(inputs.models, prompt)),
        "lens": inputs.each(logit_attribution.measure_lens),
    }


def _faithfulness(inputs: Inputs) -> dict[str, pd.DataFrame]:
    token = inputs.each(faithfulness.measure_tokens)
    model = faithfulness.summarise(token)
    is_tail = model.columns.str.startswith(("jsd_", "kl_"))
    return {
        "model": model.loc[:, ~is_tail],
        "tail": model.loc[:, is_tail | model.columns.isin(["model", "reference", "tokens"])],
        "calibration": faithfulness.calibrate(token),
        "layer": inputs.each(faithfulness.measure_layers),
        "head": inputs.each(faithfulness.measure_heads),
        "neuron": inputs.each(faithfulness.measure_neurons),
    }


def _confidence_neurons(inputs: Inputs) -> dict[str, pd.DataFrame]:
    neurons = confidence_neurons.candidates(inputs.models["original"])
    ablation = inputs.each(confidence_neurons.measure, neurons=neurons)
    return {
        "neuron": confidence_neurons.measure_neurons(inputs.models, neurons),
        "ablation": ablation[ablation["ablation"] == "alone"],
        "cumulative": ablation[ablation["ablation"] == "together"],
        "spectrum": confidence_neurons.measure_spectrum(inputs.models, neurons),
    }


def _patching(inputs: Inputs) -> dict[str, pd.DataFrame]:
    """Patch the pairs that every model can do: where a logit difference is small, effects in shares of it are noise."""
    tokenizer = inputs.models["original"].tokenizer
    pair = patching.measure_pairs(inputs.models, inputs.pairs, tokenizer)
    if not (able := patching.told_apart(pair)):
        return {"pair": pair}
    place = patching.measure(inputs.models, inputs.pairs, tokenizer, only=able)
    return {"pair": pair, "layer": patching.summarise(place), "place": place}


_PATCH = "patching.measure(models, pairs, tokenizer, only=patching.told_apart(frame))"

ANALYSES = (
    Analysis(
        loss,
        "Loss",
        "The cross-entropy of every next token, and what it is in the LN-free model and in the control less what it is "
        "in the original; of a mean that a few tokens make, the percentiles tell.",
        _loss,
        (
            Grain("model", "By model and text", loss.plot, "loss.measure(models, tokens, documents)"),
            Grain("position", "By position", loss.plot_positions, "loss.measure_positions(models, tokens)"),
            Grain(
                "token",
                "Difference to the original by token",
                loss.plot_tokens,
                "loss.measure_tokens(models, tokens, documents)",
            ),
            Grain(
                "worst",
                "The worst tokens",
                None,
                f"loss.worst_tokens(frame, tokens, models['original'].tokenizer, {WORST})",
            ),
        ),
    ),
    Analysis(
        residual_norms,
        "Residual norms",
        "The L2 norm and std of the residual stream at each of its points, at position 0, at end-of-text tokens and "
        "at the others; bars are the spread over tokens, dashes the largest. Then how it grows and turns on the way.",
        _residual_norms,
        (
            Grain("point", "By point of the stream", residual_norms.plot, "residual_norms.measure(models, tokens)"),
            Grain("step", "From point to point", residual_norms.plot_steps, "residual_norms.measure(models, tokens)"),
        ),
    ),
    Analysis(
        logit_attribution,
        "Logit attribution",
        "How well the direct logit attribution (DLA) of a head, an MLP or the embeddings to the next token tells what "
        "its removal does to the logit (direct effect); the unembedding is centred. NMAE is the error over the effect.",
        _logit_attribution,
        (
            Grain(
                "model",
                "NMAE by model",
                logit_attribution.plot,
                "logit_attribution.measure(models, tokens)",
                note=logit_attribution.describe_residue,
            ),
            Grain(
                "component",
                "DLA against direct effect",
                logit_attribution.plot_components,
                "logit_attribution.measure_components(models, tokens)",
            ),
            Grain(
                "head",
                "NMAE by head",
                logit_attribution.plot_heads,
                "logit_attribution.measure_components(models, tokens)",
            ),
            Grain(
                "prompt",
                "One prompt",
                logit_attribution.plot_prompt,
                "logit_attribution.largest_first(\n"
                f"    logit_attribution.measure_prompt(models, tokens[0, :{PROMPT_TOKENS}])\n)",
                note=logit_attribution.describe_prompt,
            ),
            Grain("lens", "Logit lens", logit_attribution.plot_lens, "logit_attribution.measure_lens(models, tokens)"),
        ),
    ),
    Analysis(
        faithfulness,
        "Faithfulness",
        "Whether a model still does what the original does: its predictions, and inside, layer by layer, its residual "
        "stream, attention patterns, heads and neurons. What the control shows, fine-tuning did.",
        _faithfulness,
        (
            Grain("model", "Predictions", faithfulness.plot, "faithfulness.measure(models, tokens)"),
            Grain("tail", "The tail of tokens", faithfulness.plot_tails, "faithfulness.measure(models, tokens)"),
            Grain(
                "calibration",
                "Calibration",
                faithfulness.plot_calibration,
                "faithfulness.measure_calibration(models, tokens)",
            ),
            Grain("layer", "By layer", faithfulness.plot_layers, "faithfulness.measure_layers(models, tokens)"),
            Grain("head", "By head", faithfulness.plot_heads, "faithfulness.measure_heads(models, tokens)"),
            Grain("neuron", "By neuron", faithfulness.plot_neurons, "faithfulness.measure_neurons(models, tokens)"),
        ),
    ),
    Analysis(
        attention,
        "Attention",
        "How much heads attend to position 0, the attention sink, and how spread their patterns are.",
        _attention,
        (
            Grain("model", "By model", attention.plot, "attention.measure(models, tokens)"),
            Grain("head", "By head", attention.plot_heads, "attention.measure_heads(models, tokens)"),
        ),
    ),
    Analysis(
        confidence_neurons,
        "Confidence neurons",
        "What neurons of the last MLP do that write much and yet hardly in directions that the logits see: the change "
        "of entropy and loss when their activation is set to its mean, and what of it goes through the final LN.",
        _confidence_neurons,
        (
            Grain(
                "neuron",
                "LogitVar against norm",
                confidence_neurons.plot_neurons,
                "confidence_neurons.measure_neurons(models, neurons)",
            ),
            Grain(
                "ablation",
                "Neurons ablated one by one",
                confidence_neurons.plot,
                "confidence_neurons.measure(models, tokens, neurons)",
                note=confidence_neurons.describe,
            ),
            Grain(
                "cumulative",
                "Neurons ablated together",
                confidence_neurons.plot_cumulative,
                "confidence_neurons.measure(models, tokens, neurons)",
            ),
            Grain(
                "spectrum",
                "Spectrum of the unembedding",
                confidence_neurons.plot_spectrum,
                "confidence_neurons.measure_spectrum(models, neurons)",
            ),
        ),
        ("neurons = confidence_neurons.candidates(models['original'])",),
    ),
    Analysis(
        patching,
        "Patching",
        "How well attribution patching, one backward pass, estimates activation patching, a forward for each place, on "
        "pairs of prompts that every model here can tell apart.",
        _patching,
        (
            Grain(
                "pair",
                "Can the models do it?",
                patching.plot_pairs,
                "patching.measure_pairs(models, pairs, tokenizer)",
                note=patching.describe_pairs,
            ),
            Grain("layer", "Error by layer", patching.plot, _PATCH, "place"),
            Grain("place", "By place", patching.plot_effects, _PATCH),
        ),
        (
            "tokenizer = models['original'].tokenizer",
            "pairs = choose_pairs(tokenizer, {pairs!r})",
        ),
    ),
    Analysis(
        outlier_features,
        "Outlier features",
        "Whether a few features carry most of the residual stream: kurtosis is 1 where all are alike and grows with "
        "outliers; max-median ratio and the correlations of features and of tokens tell of the same.",
        lambda inputs: {"point": inputs.each(outlier_features.measure)},
        (Grain("point", "By point of the stream", outlier_features.plot, "outlier_features.measure(models, tokens)"),),
    ),
)
"""The sections of the page, in order. To add an analysis, add an entry."""


def _benchmarks(tasks: Sequence[str]) -> Analysis:
    """Return the section that there is where tasks are asked for: their data may have to come from the Hub."""
    return Analysis(
        benchmarks,
        "Benchmarks",
        "How well the models do on tasks of EleutherAI's lm-evaluation-harness; the difference to the original is "
        "taken example by example.",
        lambda inputs: {"task": benchmarks.measure(inputs.models, tasks, batch_size=inputs.batch_size)},
        (Grain("task", "By task", benchmarks.plot, f"benchmarks.measure(models, {list(tasks)})"),),
    )


def run(
    original: str | Path | None = None,
    control: str | Path | None = None,
    ln_free: str | Path | None = None,
    revision: str | None = None,
    text: Sequence[str] = ("books-report", "shifted-peps"),
    pairs: str | Path | None = None,
    tokens: int = 8_192,
    out: str | Path | None = None,
    only: Sequence[str] = (),
    batch_size: int = 8,
    png: bool = False,
    benchmark: Sequence[str] = (),
) -> Path:
    """Load models and texts, write a report of them, and return its page: what `python -m analysis report` does.

    Args:
        original: a short name, a directory or a Hub id, as are the other two; `write` takes models in memory. All
            None: those of the newest run under runs/, or the bundled ones where there is no run.
        control: the model fine-tuned in the same way with LN kept.
        ln_free: the LN-free model.
        revision: of the original, a model on the Hub; that of the run's recipe where the run is.
        text: sources as in a recipe; the first one serves the analyses that look at one text.
        pairs: a JSON file of prompt pairs for patching, as `prompts.read_pairs` wants it. None: as for `write`.
        tokens: how many of each text, at most, in blocks spread evenly over it.
        out: the directory to write. None: reports/TIME.
        only: names of analyses. Empty: all.
        batch_size: blocks in one forward; no number depends on it.
        png: also write the figures as PNG.
        benchmark: tasks for `benchmarks.measure`, NAME or NAME=FILE.jsonl.

    Raises:
        ReportError: no models, texts or tokens, an analysis that there is not, `out` exists, a batch size below 1, or
            what PNGs need is not there.
        BenchmarkError: as `benchmarks.check` does.
        CheckpointError, TextError, PairError: models, texts or pairs do not do.
    """
    directory = Path(out) if out is not None else Path("reports") / time.strftime("%Y%m%d-%H%M%S")
    check(directory, only, batch_size, png, benchmark)
    if tokens < 1:
        raise ReportError(f"--tokens is {tokens}, but is to be at least 1.")
    if not text:
        raise ReportError("Name at least one text with --text, or leave it away.")
    tokenizer = None
    if all(given is None for given in (original, control, ln_free, revision)):
        original, revision, control, ln_free, tokenizer = _newest()
    if original is None or ln_free is None:
        raise ReportError("Name both --original and --ln-free, or neither: then those of the newest run are taken.")
    names = {"original": original, "control": control, "ln_free": ln_free}
    if pairs is not None:
        read_pairs(pairs)  # raise now rather than later
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = load_trio(original, control, ln_free, tokenizer, revision=revision, device=device)
    samples = {name: read_text(name, models["original"], tokens) for name in text}
    return write(
        models,
        samples,
        directory,
        names={key: str(names[key]) for key in models},
        revision=revision,
        pairs=pairs,
        only=only,
        batch_size=batch_size,
        png=png,
        benchmark=benchmark,
    )


def _newest() -> tuple[str, str | None, str | Path | None, Path | str, Any]:
    """Return original, its revision, control and LN-free model, and their tokenizer, of the run completed last.

    A run writes its `ln_free/` before it trains the control, and its results at the end.
    """
    runs = [path.parent for path in Path("runs").glob("*/results.csv") if (path.parent / "ln_free").is_dir()]
    if not runs:
        return "micro", None, "micro-control", "micro-ln-free", None
    newest = max(runs, key=lambda run: (run / "results.csv").stat().st_mtime)
    recipe: Any = recipe_of(newest)
    control = control_of(recipe, newest)
    return recipe.model, recipe.revision, control, newest / "ln_free", checkpoint.load_tokenizer(newest / "ln_free")


def check(
    out: Path, only: Sequence[str] = (), batch_size: int = 8, png: bool = False, benchmark: Sequence[str] = ()
) -> None:
    """Raise what `write` raises of these arguments, as far as that is known without a model."""
    if batch_size < 1:
        raise ReportError(f"--batch-size is {batch_size}, but is to be at least 1.")
    if png and importlib.util.find_spec("kaleido") is None:
        raise ReportError(_PNG_NEEDS)
    if out.exists():
        raise ReportError(f"{out} exists, and a report writes over nothing: name another directory with --out.")
    known = [*(analysis.name for analysis in ANALYSES), *(["benchmarks"] if benchmark else [])]
    if unknown := [name for name in only if name not in known]:
        raise ReportError(f"There is no analysis {', '.join(unknown)}: name some of {', '.join(known)}.")
    if benchmark:
        benchmarks.check(benchmark)


def write(
    models: Mapping[str, Any],
    samples: Mapping[str, Sample],
    out: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    revision: str | None = None,
    pairs: str | Path | None = None,
    only: Sequence[str] = (),
    batch_size: int = 8,
    png: bool = False,
    benchmark: Sequence[str] = (),
) -> Path:
    """Run the analyses, write their tables and figures and a page of them all to `out`, and return the page.

    Args:
        models: as `load_trio` returns them, `original` and `ln_free` among them.
        samples: the texts by name, as `read_text` returns them; the first one serves the analyses that look at one.
        out: the directory to write, whole or not at all.
        names: what the models are, on top of the page and in its Python; where None, their keys.
        revision: of the original, there too.
        pairs: a JSON file of prompt pairs for patching. None: those that `prompts.choose_pairs` chooses.
        only: names of analyses. Empty: all.
        batch_size: blocks in one forward; no number depends on it.
        png: also write the figures as PNG.
        benchmark: tasks for `benchmarks.measure`, NAME or NAME=FILE.jsonl.

    Raises:
        ReportError: no `original` or `ln_free`, `out` exists, an analysis that there is not, a batch size below 1, or
            what PNGs need is not there.
        BenchmarkError: as `benchmarks.check` does.
        PairError: `pairs` cannot be read or do not suit the tokenizer, or none can be made for it.
    """
    out, names = Path(out), dict(names or {name: name for name in models})
    check(out, only, batch_size, png, benchmark)
    if not {"original", "ln_free"} <= models.keys():
        raise ReportError(f"The models are {', '.join(models)}: a report compares `original` and `ln_free`.")
    analyses = [analysis for analysis in ANALYSES if not only or analysis.name in only]
    analyses += [_benchmarks(benchmark)] if benchmark else []
    chosen: list[Pair] = []
    if any(analysis.module is patching for analysis in analyses):
        chosen = choose_pairs(models["original"].tokenizer, pairs)
        encode_pairs(chosen, models["original"].tokenizer, models["original"].cfg.n_ctx)  # raise now rather than later
    beside = next(parent for parent in out.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=beside) as temporary:
        partial = Path(temporary) / out.name
        partial.mkdir()
        inputs = Inputs(dict(models), dict(samples), chosen, batch_size)
        tables: dict[tuple[str, str], pd.DataFrame] = {}
        sections = []
        for analysis in (progress := tqdm(analyses, unit="analysis")):
            progress.set_description(analysis.title)
            frames = analysis.measure(inputs)
            tables |= {(analysis.name, grain): frame for grain, frame in frames.items()}
            made = replace(analysis, grains=tuple(g for g in analysis.grains if g.name in frames))
            grains = [_save(frames, grain, partial / f"{analysis.name}-{grain.name}") for grain in made.grains]
            sections.append(
                {
                    "module": analysis.name,
                    "title": analysis.title,
                    "sentence": analysis.sentence,
                    "grains": grains,
                    "code": _code(made, names, revision, pairs, *next(iter(samples.items()))),
                }
            )
        page = (
            _environment()
            .get_template("report.html.jinja")
            .render(
                title="What removing LayerNorm changed",
                names=names | ({"original": f"{names['original']} at revision {revision}"} if revision else {}),
                colours={name: palette.colour(name) for name in models},
                facts=_facts(models["original"], samples),
                cards=answers.answer(tables),
                view=_view(models, samples, batch_size),
                sections=sections,
                colorscales={kind: get_colorscale(scale) for kind, scale in COLOURSCALES.items()},
                nonce=secrets.token_hex(16),
                plotly_js=get_plotlyjs(),
            )
        )
        (partial / "report.html").write_text(page, encoding="utf-8")
        if png:
            write_png(partial)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(out)
    return out / "report.html"


def _save(frames: Mapping[str, pd.DataFrame], grain: Grain, path: Path) -> dict[str, Any]:
    """Write the table and the figure beside the page, and return what the page shows of them."""
    frame = frames[grain.name]
    frame.to_csv(path.with_name(f"{path.name}.csv"), index=False)
    shown = {"title": grain.title, "file": path.name, "figure": None, "rows": len(frame), "table": _table(frame)}
    shown["note"] = grain.note(frame) if grain.note is not None else ""
    if grain.plot is not None:
        figure = grain.plot(frames[grain.plotted or grain.name])
        rows = len({axis.domain for axis in figure.select_yaxes()})
        figure.layout.height = figure.layout.height or 200 + 200 * rows
        figure.write_json(path.with_name(f"{path.name}.json"))
        figure.layout.template = None  # the page has its own, light and dark
        shown["figure"] = json.loads(figure.to_json())
    return shown


def write_png(directory: str | Path, scale: float = 2) -> list[Path]:
    """Draw every figure that a report wrote to `directory` as PNG beside its JSON, and return the files.

    `scale` is pixels of the file by pixel of the figure. It takes the extra `png` and Chrome or Chromium; the
    environment variable BROWSER_PATH names one that is not found.

    Raises:
        ReportError: one of them is not there.
    """
    sources = sorted(Path(directory).glob("*.json"))
    files = [source.with_suffix(".png") for source in sources]
    try:
        plotly.io.write_images([plotly.io.read_json(source) for source in sources], files, scale=scale)
    except (ValueError, RuntimeError) as error:  # what plotly makes of a missing kaleido or browser
        raise ReportError(f"{_PNG_NEEDS} ({str(error).strip().splitlines()[0]})") from error
    return files


def _table(frame: pd.DataFrame) -> dict[str, Any]:
    """Return the first rows of `frame` as text."""
    shown = frame.head(ROWS_SHOWN)
    is_text = {column: not pd.api.types.is_numeric_dtype(frame[column]) for column in frame}
    columns = [{"name": str(column), "is_text": is_text[column]} for column in frame]
    return {"columns": columns, "rows": [[_cell(value) for value in row] for row in shown.itertuples(index=False)]}


def _cell(value: Any) -> str:
    if pd.isna(value):
        return ""
    if isinstance(value, float | np.floating):
        return f"{value:.4g}".replace("-", "−")
    return str(value).replace("\n", "⏎")


def _code(
    analysis: Analysis,
    names: Mapping[str, str],
    revision: str | None,
    pairs: str | Path | None,
    text: str,
    sample: Sample,
) -> str:
    """Return how to make an analysis's tables and figures in Python."""
    models = ", ".join(repr(names[key]) if key in names else "None" for key in ("original", "control", "ln_free"))
    models += f", revision={revision!r}" if revision else ""
    calls = []
    for before, grain in itertools.pairwise((None, *analysis.grains)):
        assert grain is not None
        if before is None or before.python != grain.python:
            calls.append(f"frame = {grain.python}")
        if grain.plot is not None:
            calls.append(f"{analysis.name}.{grain.plot.__name__}(frame).show()")
    return "\n".join(
        [
            f"from analysis import {analysis.name}, load_trio",
            *(["from analysis.prompts import choose_pairs"] if analysis.module is patching else []),
            "from analysis.texts import read_text",
            "",
            f"models = load_trio({models})",
            f"tokens, documents, _ = read_text({text!r}, models['original'], {sample.tokens.numel()})",
            *(line.format(pairs=str(pairs) if pairs is not None else None) for line in analysis.python),
            *calls,
        ]
    )


def _facts(model: Any, samples: Mapping[str, Sample]) -> dict[str, str]:
    """Return on what, when and with which versions the models were compared."""
    return {
        "Text": "; ".join(sample.description for sample in samples.values()),
        "Packing": (
            "as in training: documents one after another, each ended by the end-of-text token, cut in blocks of "
            f"{model.cfg.n_ctx} tokens, nothing prepended; the blocks are spread evenly over the text, of a Hub data "
            "set the first ones"
        ),
        "Models": (
            "norms folded into the weights that read them; the mean over the width of what is written to the residual "
            "stream, on which no prediction depends, taken out"
        ),
        "Made": time.strftime("%Y-%m-%d %H:%M %Z"),
        "Versions": ", ".join(
            [
                f"python {platform.python_version()}",
                *(f"{name} {version_of(name) or 'not installed'}" for name in PACKAGES),
            ]
        ),
    }


def _view(models: Mapping[str, Any], samples: Mapping[str, Sample], batch_size: int) -> dict[str, Any]:
    """Return the text of the token view, and what its script needs to know of each token."""
    name, sample = next(iter(samples.items()))
    length = min(sample.tokens.shape[1], TOKENS_VIEWED // 2)
    tokens = sample.tokens[[0, len(sample.tokens) // 2] if len(sample.tokens) > 1 else [0], :length]
    frame = token_view.measure(dict(models), tokens, batch_size=batch_size)
    decode = functools.cache(lambda token: models["original"].tokenizer.decode([token]))

    def per_token(model: str, column: str) -> list[Any]:
        """Return a column with None at position 0 of each block, before which there is nothing."""
        values = frame.loc[frame["model"] == model].sort_values(["block", "position"])[column].tolist()
        return [
            value
            for start in range(0, len(values), length - 1)
            for value in [None, *values[start : start + length - 1]]
        ]

    data = {}
    losses = per_token("original", "loss")
    for model in models:
        top = zip(per_token(model, "tokens"), per_token(model, "probabilities"), strict=True)
        data[model] = {
            "colour": palette.colour(model),
            "losses": per_token(model, "loss"),
            "loss": [None if a is None else a - b for a, b in zip(per_token(model, "loss"), losses, strict=True)],
            "jsd": per_token(model, "jsd"),
            "top": [None if ids is None else [[decode(i), p] for i, p in zip(ids, ps, strict=True)] for ids, ps in top],
        }
    compared = [model for model in models if model != "original"]
    scale = {
        measure: np.quantile([abs(x) for model in compared for x in data[model][measure] if x is not None], 0.99)
        for measure in ("loss", "jsd")
    }
    return {
        "sentence": f"{tokens.numel():,} tokens of {name}.",
        "compared": compared,
        "blocks": [[decode(token) for token in block] for block in tokens.tolist()],
        "data": {"models": data, "scale": scale},
    }


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis", ""), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # models keep their order
    return environment
