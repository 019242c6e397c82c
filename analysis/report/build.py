"""Builds a report: one directory with the page, tables as CSV, and figures as plotly JSON.

1. Load the given models, or those of the newest run, and pack the texts as in training.
2. Measure and plot, analysis by analysis, in the order of `ANALYSES`. A section that is not possible for these models
   and texts is replaced by the reason.
3. Answer the questions at the top of the page from the tables (`cards`).
4. Write everything under a temporary name, and rename it when it is complete.
"""

import importlib.util
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io
import torch

from analysis import benchmarks, patching
from analysis.loading import check_alike, load_trio
from analysis.prompts import Pair, PairError, choose_pairs, encode_pairs, read_pairs
from analysis.report import cards, page, tokens
from analysis.report.options import Options
from analysis.report.sections import ANALYSES, Inputs, Table, benchmark_section
from analysis.texts import Sample, read_text
from finetune.checkpoint import load_tokenizer
from finetune.errors import NolnError
from finetune.names import expanded
from finetune.progress import progress
from finetune.run_directory import control_of, recipe_of
from finetune.text import LONGEST_CONTEXT, RANDOM_TOKENS

_PNG_NEEDS = (
    "PNGs require kaleido and Chrome or Chromium. Install the extra `png` (pip install -e '.[png]') and a browser (set "
    "BROWSER_PATH if it is not found), or omit --png."
)
_OF_RUN = {"original", "control", "ln_free", "text", "tokens", "context"}
"""Options from which `run` loads models and texts. `write` takes loaded ones instead."""


class ReportError(NolnError):
    """A report cannot be made as requested; the message says why and what to do."""


def run(options: Options | None = None, /, **given: Any) -> Path:
    """Load models and texts, write a report about them, and return its page, as `python -m analysis report` does.

    Args:
        options: the options. None: the default of each field, with the models of the newest run under runs/ or,
            without a run, the bundled ones.
        given: fields of `Options` that override those of `options`, as in `run(original="gpt2", ln_free="DIR")`. For
            models in memory, use `write`.

    Raises:
        ReportError: models, texts or tokens are missing, an analysis does not exist, `out` exists, the batch size is
            below 1, the context is too long for a model, no analysis suits the models, or requirements of PNGs are
            missing.
        BenchmarkError: as in `benchmarks.check`.
        CheckpointError, TextError, PairError: a model, a text or the pairs cannot be used.
    """
    options = replace(options or Options(), **given)
    options = replace(options, out=expanded(options.out or Path("reports") / time.strftime("%Y%m%d-%H%M%S")))
    check(options)
    tokenizer = None
    if all(name is None for name in (options.original, options.control, options.ln_free, options.revision)):
        options, tokenizer = _of_newest_run(options)
    if options.original is None or options.ln_free is None:
        raise ReportError("Set both --original and --ln-free, or neither to use those of the newest run.")
    if options.pairs is not None:
        read_pairs(options.pairs)  # raises now rather than later
    named = options.original, options.control, options.ln_free
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = load_trio(*named, tokenizer, revision=options.revision, device=device)
    original = models["original"]
    shortest = min(model.cfg.n_ctx for model in models.values())
    if options.context is None and shortest < min(original.cfg.n_ctx, LONGEST_CONTEXT):
        options = replace(options, context=shortest)
    if options.context is not None and options.context > shortest:
        raise ReportError(
            f"The context is {options.context}, but one of the models takes at most {shortest} tokens. Lower it."
        )
    samples = {
        name: read_text(name, original, options.tokens, context=options.context, prefix=options.prefix)
        for name in dict.fromkeys((*options.text, RANDOM_TOKENS))
    }
    names = {key: str(getattr(options, key)) for key in models}
    return _write(models, samples, names, options)


def _of_newest_run(options: Options) -> tuple[Options, Any]:
    """Return `options` with the models of the run that was completed last, and the tokenizer of these models.

    Without a run, these are the bundled models, with their own tokenizers. A run writes `ln_free/` before it trains the
    control, and writes its results at the end.
    """
    runs = [path.parent for path in Path("runs").glob("*/results.csv") if (path.parent / "ln_free").is_dir()]
    if not runs:
        return replace(options, original="micro", control="micro-control", ln_free="micro-ln-free"), None
    newest = max(runs, key=lambda run: (run / "results.csv").stat().st_mtime)
    recipe: Any = recipe_of(newest)
    control, ln_free = control_of(recipe, newest), newest / "ln_free"
    models = {"original": recipe.model, "control": control and str(control), "ln_free": str(ln_free)}
    context = options.context or recipe.context
    prefix = recipe.text.prefix if options.prefix is None else options.prefix
    models |= {"revision": recipe.revision}
    return replace(options, context=context, prefix=prefix, **models), load_tokenizer(ln_free)


def check(options: Options) -> None:
    """Raise the errors of `run` and `write` about these options, as far as they are known without a model."""
    if options.batch_size < 1:
        raise ReportError(f"--batch-size is {options.batch_size}; it must be at least 1.")
    if options.png and importlib.util.find_spec("kaleido") is None:
        raise ReportError(_PNG_NEEDS)
    if options.out is not None and options.out.exists():
        raise ReportError(
            f"{options.out} already exists, and nothing is overwritten. Choose another directory with --out."
        )
    known = [*(analysis.name for analysis in ANALYSES), *(["benchmarks"] if options.benchmark else [])]
    if unknown := [name for name in options.only if name not in known]:
        raise ReportError(f"There is no analysis {', '.join(unknown)}. The analyses are {', '.join(known)}.")
    if options.benchmark:
        benchmarks.check(options.benchmark)
    if options.tokens < 1:
        raise ReportError(f"--tokens is {options.tokens}; it must be at least 1.")
    if not options.text:
        raise ReportError("Name at least one text with --text, or omit it.")


def write(
    models: Mapping[str, Any],
    samples: Mapping[str, Sample],
    out: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    **given: Any,
) -> Path:
    """Run the analyses, write their tables and figures and a page about all of them to `out`, and return the page.

    Args:
        models: models from `load_trio`, including `original` and `ln_free`.
        samples: texts from `read_text`, by name. Analyses of a single text use the first.
        out: the directory to write, completely or not at all.
        names: descriptions of the models for the top of the page and its Python code (None: their keys).
        given: other fields of `Options`: `revision`, `prefix` (that of the samples), `pairs`, `only`, `batch_size`,
            `png`, `benchmark`.

    Raises:
        ReportError: `original` or `ln_free` is missing, `out` exists, an analysis does not exist, the batch size is
            below 1, or requirements of PNGs are missing.
        BenchmarkError: as in `benchmarks.check`.
        CheckpointError: the models cannot be compared.
        PairError: `pairs` cannot be read or do not suit the tokenizer.
        TypeError: an option names models or texts, or does not exist.
    """
    if named := sorted(_OF_RUN & given.keys()):
        raise TypeError(f"write() takes loaded models and texts, not {', '.join(named)}. Use run() instead.")
    options = Options(out=Path(out), **given)
    check(options)
    return _write(models, samples, names or {name: name for name in models}, options)


def _write(
    models: Mapping[str, Any], samples: Mapping[str, Sample], names: Mapping[str, str], options: Options
) -> Path:
    """Do the work of `write`, after the options have been checked."""
    if not {"original", "ln_free"} <= models.keys():
        raise ReportError(f"The models are {', '.join(models)}, but a report needs `original` and `ln_free`.")
    analyses = [analysis for analysis in ANALYSES if not options.only or analysis.name in options.only]
    analyses += [benchmark_section(options.benchmark)] if options.benchmark else []
    check_alike(models)
    chosen: list[Pair] | PairError = []
    if any(analysis.module is patching for analysis in analyses):
        try:
            chosen = _pairs(models, options)
        except PairError as error:
            if options.pairs is not None:
                raise
            chosen = error
    assert options.out is not None
    out = options.out
    beside = next(parent for parent in out.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=beside) as temporary:
        partial = Path(temporary) / out.name
        partial.mkdir()
        inputs = Inputs(dict(models), dict(samples), chosen, options.batch_size, options.prefix)
        text, sample = next(iter(samples.items()))
        frames: dict[tuple[str, str], pd.DataFrame] = {}
        sections = []
        left_out: dict[str, str] = {}
        for analysis in (bar := progress(analyses, unit="analysis")):
            bar.set_description(analysis.title)
            try:
                measured = analysis.measure(inputs)
            except NolnError as error:  # the analysis does not suit these models or texts
                left_out[analysis.title] = str(error)
                sections.append(page.section_data(analysis, [], "", str(error)))
                continue
            frames |= {(analysis.name, name): frame for name, frame in measured.items()}
            made = replace(analysis, tables=tuple(table for table in analysis.tables if table.name in measured))
            shown = [_save(measured, table, partial / f"{analysis.name}-{table.name}") for table in made.tables]
            code = page.python_code(made, names, options, text, sample.tokens.numel())
            sections.append(page.section_data(analysis, shown, code))
        if len(left_out) == len(analyses):
            reasons = "; ".join(f"{title}: {reason}" for title, reason in left_out.items())
            raise ReportError(f"There is nothing to show: no analysis suits these models and texts. {reasons}")
        view = tokens.view(models, samples, options.batch_size)
        html = page.render(models, samples, names, options, cards.make(frames), view, sections)
        (partial / "report.html").write_text(html, encoding="utf-8")
        if options.png:
            write_png(partial)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(out)
    return out / "report.html"


def _pairs(models: Mapping[str, Any], options: Options) -> list[Pair]:
    """Return pairs of prompts for patching that suit the tokenizer and every model's context.

    Raises:
        PairError: those of the file do not suit them, or none can be created.
    """
    tokenizer = models["original"].tokenizer
    chosen = choose_pairs(tokenizer, options.pairs)
    encode_pairs(chosen, tokenizer, min(model.cfg.n_ctx for model in models.values()), options.prefix)
    return chosen


def _save(frames: Mapping[str, pd.DataFrame], table: Table, path: Path) -> dict[str, Any]:
    """Write a table and its figure beside the page, and return what the page shows of them."""
    frame = frames[table.name]
    frame.to_csv(path.with_name(f"{path.name}.csv"), index=False)
    figure: go.Figure | None = None
    if table.plot is not None:
        figure = table.plot(frames[table.plotted or table.name])
        rows = len({axis.domain for axis in figure.select_yaxes()})
        figure.layout.height = figure.layout.height or 200 + 200 * rows
        figure.write_json(path.with_name(f"{path.name}.json"))
    return page.table_data(table, path.name, frame, figure)


def write_png(directory: str | Path, scale: float = 2) -> list[Path]:
    """Write every figure of the report in `directory` as PNG beside its JSON, and return the files.

    `scale` is the number of pixels of the file per pixel of the figure. PNGs require the extra `png`, and Chrome or
    Chromium. Set the environment variable BROWSER_PATH if the browser is not found.

    Raises:
        ReportError: a requirement is missing.
    """
    sources = sorted(Path(directory).glob("*.json"))
    files = [source.with_suffix(".png") for source in sources]
    try:
        plotly.io.write_images([plotly.io.read_json(source) for source in sources], files, scale=scale)
    except (ValueError, RuntimeError) as error:  # plotly's errors for a missing kaleido or browser
        raise ReportError(f"{_PNG_NEEDS} ({str(error).strip().splitlines()[0]})") from error
    return files
