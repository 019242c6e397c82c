"""A sweep: many runs of a recipe with fields overridden, over seeds, in one table and one figure.

A sweep file is YAML:

    recipe: micro                                  # the base of every run, unless the run sets another `recipe`
    seeds: [0, 1, 2]
    set: {text.held_out_blocks: 96}                # overrides in every run
    runs: [{kl_weight: 0.0}, {kl_weight: 1.0}]     # overrides of one run each, at every seed
    grid: {schedule.fade: [1, 30]}                 # each run is repeated with every combination of these
    texts: {report: books-report}                  # measured in addition to the recipe's held-out text, called
                                                   # `choose`, on at most text.held_out_blocks blocks each;
                                                   # random-tokens is tokens drawn uniformly, at most 60 blocks

OUT/runs/RUN/       one run directory per run
OUT/results.csv     one row per run
OUT/documents.csv   each model of each run on each document of each text, for resampling
OUT/figure.html     gap to control and JSD to the original against tokens seen

Runs that differ only in how LN is removed share a control: the first of them trains it, and the others wait for it. A
run with a row in the table is not repeated, unless it failed for a reason other than divergence. An interrupted run is
resumed. A run's name is a hash of its whole recipe, so a run is repeated if its recipe changes, or if bf16 was decided
differently where it was run before.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pydantic
import torch
from plotly.subplots import make_subplots

from finetune import evaluate, removal
from finetune import recipe as recipes
from finetune.checkpoints import read_log
from finetune.errors import NolnError
from finetune.names import expanded
from finetune.processes import decided
from finetune.progress import progress
from finetune.recipe import Recipe, RecipeError
from finetune.resuming import resume
from finetune.run_directory import directory_lock, write
from finetune.training import DivergedError

MODELS = ("original", "control", "ln_free")


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Sweep:
    """The contents of a sweep file. See the module's docstring."""

    recipe: str
    seeds: tuple[int, ...] = (0,)
    set: dict[str, Any] = field(default_factory=dict)
    runs: tuple[dict[str, Any], ...] = ({},)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    recipe: Recipe
    base: str
    """The name of the recipe whose fields are overridden."""
    overrides: dict[str, Any]
    texts: dict[str, str]
    directory: Path

    @property
    def name(self) -> str:
        """The name of the run directory and of its row."""
        return self.directory.name

    @property
    def trains_control(self) -> bool:
        """Whether the run trains a control if there is none yet."""
        return self.recipe.control and self.recipe.control_from is None

    @property
    def control_settings(self) -> tuple[Any, ...]:
        """The settings on which the control depends. Runs with equal settings share a control."""
        return self.recipe.control_settings


def load(path: str | Path, out: str | Path) -> list[Job]:
    """Read a sweep file. Return its runs, whose directories are in `out`.

    Raises:
        RecipeError: the file cannot be read, it contains no run or the same run twice, or a run is invalid. The message
            says which.
    """
    path, out = expanded(path), expanded(out)
    sweep = recipes.validate(Sweep, recipes.read_yaml(path, "sweep"), f"sweep {path}")
    if "choose" in sweep.texts:
        raise RecipeError("texts.choose is reserved for the recipe's own held-out text. Choose another name.")
    jobs: dict[Path, Job] = {}
    for run, *values in itertools.product(sweep.runs, *sweep.grid.values()):
        overrides = sweep.set | run | dict(zip(sweep.grid, values, strict=True))
        base = str(overrides.pop("recipe", sweep.recipe))
        if "seed" in overrides:
            raise RecipeError(f"The sweep's run {overrides} sets a seed. Set `seeds` instead, for all runs.")
        for seed in sweep.seeds:
            recipe = recipes.override(recipes.load(base), overrides | {"seed": seed}, f"sweep's run {overrides}")
            fields = recipes.changed_fields(dataclasses.replace(decided(recipe), name="", seed=0))
            if not fields["bf16"]:  # keeps the names of the first runs, none of which used bf16
                del fields["bf16"]
            digest = hashlib.sha256(json.dumps([fields, sweep.texts], sort_keys=True).encode()).hexdigest()
            directory = Path(out).absolute() / "runs" / f"{digest[:8]}-seed{seed}"
            recipe = dataclasses.replace(recipe, also=(*recipe.also, *sweep.texts.values()))
            if directory in jobs:
                raise RecipeError(f"The sweep's runs {jobs[directory].overrides} and {overrides} are the same.")
            jobs[directory] = Job(recipe, base, overrides, sweep.texts, directory)
    if not jobs:
        raise RecipeError(f"The sweep {path} contains no run.")
    return list(jobs.values())


def run(path: str | Path, out: str | Path, processes: int = 1) -> pd.DataFrame:
    """Do the runs of a sweep file that are not done yet. Return the table of all its runs.

    Raises:
        RecipeError: as in `load`. Nothing has been run.
        InUseError: another process is running this sweep.
    """
    jobs, out = load(path, out), expanded(out)
    with directory_lock(out):
        return _run_jobs(jobs, out, processes)


def _run_jobs(jobs: list[Job], out: Path, processes: int) -> pd.DataFrame:
    rows, documents = (_read_table(out / name) for name in ("results.csv", "documents.csv"))
    if "error" in rows:  # a run that diverged would diverge again; other failures may not recur
        rows = rows[rows["error"].isna() | rows["error"].astype(str).str.startswith(DivergedError.__name__)]
    done = {*rows.get("run", ())}
    if not documents.empty:
        documents = documents[documents["run"].isin(done)]  # the process may have stopped before it wrote a run's row
    controls = {job.control_settings: job.directory / "control" for job in jobs if (job.directory / "control").is_dir()}
    to_do = [job for job in jobs if job.name not in done]
    with progress(total=len(to_do), desc="sweep", unit="run", disable=not to_do) as bar:
        for job, (row, measured) in _do_each(to_do, controls, processes):
            if (job.directory / "control").is_dir():  # for later runs
                controls[job.control_settings] = job.directory / "control"
            rows = pd.concat([rows, pd.DataFrame([row])], ignore_index=True)
            documents = pd.concat([documents, measured], ignore_index=True)
            write(out / "documents.csv", documents.to_csv(index=False))
            write(out / "results.csv", rows.to_csv(index=False))
            bar.update()
    order = {job.name: i for i, job in enumerate(jobs)}
    rows = rows.sort_values("run", key=lambda names: names.map(order), ignore_index=True)
    # In the order of the sweep file, rather than in the order in which the runs were completed.
    write(out / "results.csv", rows.to_csv(index=False))
    rows = rows[rows["run"].isin(order)]
    if not (complete := rows[rows["error"].isna()] if "error" in rows else rows).empty:
        write(out / "figure.html", plot(complete).to_html(config={"showSendToCloud": False}))
    return rows


def _do_each(
    jobs: list[Job], controls: dict[tuple[Any, ...], Path], processes: int
) -> Iterator[tuple[Job, tuple[dict[str, Any], pd.DataFrame]]]:
    """Do `jobs`, in this process or in several. Yield each with its result as soon as it is done."""
    if processes == 1:
        for job in jobs:
            yield job, do(job, controls.get(job.control_settings))
        return
    os.environ["TQDM_DISABLE"] = "1"  # for the child processes, whose bars would overwrite each other
    waiting, running = jobs.copy(), dict[Future, Job]()
    # The pool never gets more jobs than it has processes, because queued jobs would still run after one raises.
    with ProcessPoolExecutor(
        processes, get_context("spawn"), _share_cores, (processes,), max_tasks_per_child=1
    ) as pool:
        while waiting or running:
            for job in waiting.copy():
                in_training = {other.control_settings for other in running.values() if other.trains_control}
                must_wait = job.trains_control and job.control_settings in in_training - {*controls}
                if len(running) < processes and not must_wait:
                    waiting.remove(job)
                    running[pool.submit(do, job, controls.get(job.control_settings))] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def _share_cores(processes: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def do(job: Job, control: Path | None) -> tuple[dict[str, Any], pd.DataFrame]:
    """Do a run, with an existing `control` or, if that is None, its own. Return its row and its table of documents."""
    row: dict[str, Any] = {"recipe": job.base, "seed": job.recipe.seed}
    overridden = {f"override.{name}": json.dumps(value) for name, value in job.overrides.items()}
    try:
        if job.directory.is_dir():
            result = resume(job.directory)
        else:
            recipe = job.recipe if control is None else dataclasses.replace(job.recipe, control_from=str(control))
            result = removal.start(recipe, job.directory)
    except NolnError as error:
        failed = {"run": job.name, "error": f"{type(error).__name__}: {error}"}
        return row | failed | overridden, pd.DataFrame()
    names = removal.names_of(job.recipe.also)
    texts = {"choose": removal.HELD_OUT} | {suffix: names[source] for suffix, source in job.texts.items()}
    measured = dict(list(pd.read_csv(job.directory / "documents.csv").groupby("text")))
    documents = {suffix: measured[name].drop(columns="text") for suffix, name in texts.items()}
    spent = result.results.set_index("model").loc["ln_free"].iloc[0]
    log = read_log(job.directory / "log.jsonl")
    tables = {suffix: evaluate.compare(frame).set_index("model") for suffix, frame in documents.items()}
    choose = tables["choose"]
    row |= {
        "tokens": spent["trained_tokens"],
        "seconds": spent["trained_seconds"],
        "gap": choose["gap"]["ln_free"],
        "jsd_ln_free": choose["jsd"]["ln_free"],
        "jsd_control": choose["jsd"].get("control"),
    }
    for suffix in ("choose", "report", *(suffix for suffix in tables if suffix not in ("choose", "report"))):
        for model in MODELS:
            row[f"loss_{model}_{suffix}"] = tables[suffix]["loss"].get(model) if suffix in tables else None
    row |= {
        f"jsd_{model}_{suffix}": table["jsd"].get(model)
        for suffix, table in tables.items()
        for model in ("control", "ln_free")
        if suffix != "choose"
    }
    row |= {"teacher_seconds": sum(line.get("teacher_seconds", 0) for line in log), "run": job.name}
    return row | overridden, pd.concat(
        [frame.assign(run=job.name, text=suffix) for suffix, frame in documents.items()], ignore_index=True
    )


def summarise(results: pd.DataFrame, names: Sequence[str] | None = None) -> pd.DataFrame:
    """Average a table of runs over seeds. Return one row per setting (the overrides), in the order of the table.

    Columns: setting (`names`, or the overrides that differ between runs); runs, tokens and seconds. For each measure
    `loss` (LN-free minus original, on `choose`), `gap` (to the control) and `jsd` (to the original), in nats/token: the
    mean; `…_error`, its standard error over seeds; `…_change`, the mean difference to the first setting at the same
    seeds; and `…_change_error`, the standard error of that. Differences are more precise than means, because settings
    with the same seed train on the same text.
    """
    results = results.assign(
        setting=settings(results),
        loss=results["loss_ln_free_choose"] - results["loss_original_choose"],
        jsd=results["jsd_ln_free"],
    )
    groups = [group.set_index("seed") for _, group in results.groupby("setting", sort=False)]
    rows = []
    for group, name in zip(groups, names or [group["setting"].iloc[0] for group in groups], strict=True):
        row = {
            "setting": name,
            "runs": len(group),
            "tokens": group["tokens"].mean(),
            "seconds": group["seconds"].mean(),
        }
        for measure in ("loss", "gap", "jsd"):
            change = group[measure] - groups[0][measure]
            row |= {measure: group[measure].mean(), f"{measure}_error": group[measure].sem()}
            row |= {f"{measure}_change": change.mean(), f"{measure}_change_error": change.sem()}
        rows.append(row)
    return pd.DataFrame(rows)


def settings(results: pd.DataFrame) -> list[str]:
    """Return the overrides of each run of a table, except those that are the same in all runs."""
    columns = ["recipe", *(column for column in results if column.startswith("override."))]
    varied = [column for column in columns if results[column].nunique(dropna=False) > 1]
    return [
        ", ".join(f"{name.removeprefix('override.')} {row[name]}" for name in varied if row[name] == row[name])
        for _, row in results.iterrows()
    ]


def plot(results: pd.DataFrame) -> go.Figure:
    """Plot gap to control and JSD to the original, in nats/token, against tokens seen: means over seeds ± error."""
    figure = make_subplots(1, 2, subplot_titles=["Gap to control", "JSD to original"])
    for _, row in summarise(results).iterrows():
        for column, measure in enumerate(("gap", "jsd"), start=1):
            figure.add_trace(
                go.Scatter(
                    x=[row["tokens"]],
                    y=[row[measure]],
                    error_y={"array": [row[f"{measure}_error"]]},
                    name=row["setting"],
                    legendgroup=row["setting"],
                    showlegend=column == 1,
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(type="log", title="tokens seen")
    figure.update_yaxes(title="nats/token", rangemode="tozero")
    return figure


def plot_settings(summary: pd.DataFrame) -> go.Figure:
    """Plot the table of `summarise`, one line per setting: loss above the original and JSD to it, ± standard errors."""
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=["Loss above the original", "JSD to original"])
    for column, measure in enumerate(("loss", "jsd"), start=1):
        figure.add_trace(
            go.Scatter(
                x=summary[measure],
                y=summary["setting"],
                error_x={"array": summary[f"{measure}_error"]},
                mode="markers",
                showlegend=False,
            ),
            row=1,
            col=column,
        )
    figure.update_xaxes(title="nats/token")
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_layout(colorway=["#D55E00"], margin={"t": 40, "b": 50, "r": 20})  # one model in both
    return figure


def _read_table(path: Path) -> pd.DataFrame:
    """Read a table, if it exists. Overrides are kept as JSON strings."""
    if not path.exists() or not path.read_text().strip():
        return pd.DataFrame()
    overridden = [column for column in pd.read_csv(path, nrows=0) if column.startswith("override.")]
    return pd.read_csv(path, dtype=dict.fromkeys(overridden, str))
