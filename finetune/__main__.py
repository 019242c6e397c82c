"""The command line: `python -m finetune [run] [RECIPE] [FLAGS]`, `pretrain RECIPE`, `resume RUN`, …: see `USAGE`."""

import argparse
import dataclasses
import math
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, NoReturn, TypeVar

import tyro

from finetune import recipe as recipes
from finetune.errors import NolnError
from finetune.names import expanded
from finetune.recipe import PretrainRecipe, Recipe, Training

if TYPE_CHECKING:
    from finetune.run_directory import Run

USAGE = """\
Fine-tune the norms out of a model.

  python -m finetune [run] [RECIPE] [FLAGS]   train: RECIPE is a shipped name (default micro) or a YAML file
  python -m finetune pretrain RECIPE [FLAGS]  train a model from random weights, its blocks with or without norms
  python -m finetune resume RUN [--anyway]    go on with a run of either kind that was cut off; anyway: although its
                                              recipe, model or text has changed, or checkpoints lack files
  python -m finetune plan [RECIPE] [FLAGS]    what a run would take: memory, tokens, operations, hours
  python -m finetune sweep FILE [FLAGS]       many runs, of what a sweep file overrides, in one table
  python -m finetune list [pretrain]          the shipped recipes, of `run` or of `pretrain`, and what they are
  python -m finetune show RECIPE              print a recipe; one of `pretrain`: show pretrain RECIPE

  python -m finetune run [RECIPE] --help      every field of the recipe, as a flag with its default
  python -m finetune pretrain RECIPE --help
"""


Trains = TypeVar("Trains", bound=Training)


@dataclass(frozen=True)
class Options(Generic[Trains]):
    """What a run is told."""

    recipe: Annotated[Trains, tyro.conf.arg(name="")]
    steps: int
    """Optimizer steps of the run. Schedule, warm-up and LR horizon are scaled with them."""
    out: Path | None = None
    """The run directory. None: runs/RECIPE-TIME."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command in `arguments` (None: those of the process). An error that the user can fix prints one line."""
    speak(sys.stdout, sys.stderr)
    arguments = _with_values([_current_flag(word) for word in (sys.argv[1:] if arguments is None else arguments)])
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "run"
    try:
        COMMANDS[command](arguments)
    except (NolnError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        again = "the same command" if command == "sweep" else "`python -m finetune resume RUN`, RUN being its directory"
        print(f"\ninterrupted: what had begun goes on with {again}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def speak(*streams: Any) -> None:
    """Replace characters that a terminal cannot show, such as an ASCII one, instead of raising an error."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def can_print(text: str) -> bool:
    """Return whether the terminal can show `text`."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _current_flag(word: str) -> str:
    """Return a flag with the current name of a schedule's phase in place of a former one."""
    if not word.startswith("--schedule."):
        return word
    flag, equals, value = word.partition("=")
    return f"--{recipes.current_name(flag.removeprefix('--').replace('-', '_'))}{equals}{value}"


def _with_values(arguments: list[str]) -> list[str]:
    """Add values to the flags of optional booleans, because tyro requires them: `--bf16` becomes `--bf16 True`."""
    flags = {f"--{field.name}" for field in dataclasses.fields(Recipe) if field.type == bool | None}
    given = {flag: [flag, "True"] for flag in flags} | {flag.replace("--", "--no-"): [flag, "False"] for flag in flags}
    followed = zip(arguments, [*arguments[1:], ""], strict=False)
    words = [[word] if after in ("None", "True", "False") else given.get(word, [word]) for word, after in followed]
    return [word for expanded in words for word in expanded]


def _run(arguments: list[str]) -> None:
    recipe = recipes.load(arguments.pop(0) if arguments and not arguments[0].startswith("-") else "micro")
    recipe = recipes.with_text(_scaled(recipe, arguments), _given(arguments, "--text"))
    options = tyro.cli(
        Options[Recipe],
        default=Options(recipe, steps=recipe.steps),
        args=arguments,
        prog="python -m finetune run [RECIPE]",
        description="Fine-tune the norms out of a model, beside a control that keeps them.",
    )

    from finetune import removal

    _report(removal.start(options.recipe, options.out))


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is told: flags of a recipe, too."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    steps: int
    """Optimizer steps of the run. Schedule, warm-up and LR horizon are scaled with them."""
    processes: int = 1
    """How many processes share a batch, each on a device of its own."""
    tflops: float | None = None
    """How fast a device is, in 10¹² operations a second, as its maker says: 989 for an H100 in bfloat16."""
    mfu: float = 0.4
    """Which share of that training comes to (model FLOPs utilisation)."""


def _plan(arguments: list[str]) -> None:
    recipe = recipes.load(arguments.pop(0) if arguments and not arguments[0].startswith("-") else "micro")
    recipe = recipes.with_text(_scaled(recipe, arguments), _given(arguments, "--text"))
    options = tyro.cli(
        PlanOptions,
        default=PlanOptions(recipe, steps=recipe.steps),
        args=arguments,
        prog="python -m finetune plan [RECIPE]",
        description="Say what a run would take, from the model's config alone.",
    )

    from finetune import plan

    print(plan.describe(plan.side_by_side(options.recipe, options.processes), options.tflops, options.mfu))


def _pretrain(arguments: list[str]) -> None:
    names = ", ".join(recipes.shipped(PretrainRecipe))
    asks = arguments[:1] in (["-h"], ["--help"])
    if not arguments or (arguments[0].startswith("-") and not asks):
        sys.exit(f"usage: python -m finetune pretrain RECIPE [FLAGS]\nRECIPE is a YAML file or one of {names}")
    recipe = recipes.load_pretraining("pre-ln" if asks else arguments.pop(0))
    recipe = recipes.with_text(_scaled(recipe, arguments), _given(arguments, "--text"))
    options = tyro.cli(
        Options[PretrainRecipe],
        default=Options(recipe, steps=recipe.steps),
        args=arguments,
        prog="python -m finetune pretrain RECIPE",
        description=f"Train a model from random weights. RECIPE is a YAML file or one of {names}.",
    )

    chosen = dataclasses.replace(options.recipe, knobs=recipe.knobs | options.recipe.knobs)

    from finetune import pretrain

    _report(pretrain.start(chosen, options.out))


def _scaled(recipe: Trains, arguments: list[str]) -> Trains:
    """Scale `recipe` before the other flags are read, so that their values are not scaled."""
    steps = _given(arguments, "--steps", int)
    return recipe if steps is None else recipe.scaled(steps)


def _given(arguments: list[str], flag: str, kind: Callable[[str], Any] = str) -> Any:
    """Return the value of `flag`, or None if it is not given."""
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    underscored = f"--{flag.removeprefix('--').replace('-', '_')}"  # tyro accepts either
    only.add_argument(flag, underscored, type=kind, dest="value")
    return only.parse_known_args(arguments)[0].value


def _resume(arguments: list[str]) -> None:
    anyway = "--anyway" in arguments
    directory = _only([word for word in arguments if word != "--anyway"], "resume RUN [--anyway]")
    from finetune.resuming import resume

    _report(resume(directory, anyway))


@dataclass(frozen=True)
class SweepOptions:
    """Run what a sweep file asks for and is not done yet."""

    file: Annotated[Path, tyro.conf.Positional]
    """The sweep file: `finetune/sweep.py` says what is in it."""
    out: Path | None = None
    """Where runs, tables and figure go. None: runs/FILE."""
    processes: int = 1
    """How many runs to do at once."""


def _sweep(arguments: list[str]) -> None:
    options = tyro.cli(SweepOptions, args=arguments, prog="python -m finetune sweep")
    file, out = expanded(options.file), expanded(options.out or Path("runs") / options.file.stem)

    from finetune import sweep

    results = sweep.run(file, out, options.processes)
    results.insert(0, "setting", sweep.settings(results))
    columns = ["setting", "seed", "tokens", "seconds", "gap", "jsd_ln_free", "jsd_control", "error"]
    print(results.reindex(columns=columns).dropna(axis=1, how="all").fillna("").to_string(index=False))
    print(f"Everything is in {out}: results.csv, documents.csv, figure.html and the runs")


def _list(arguments: list[str]) -> None:
    if arguments not in ([], ["pretrain"]):
        _usage("list, or list pretrain", arguments)
    kind: type[Training] = PretrainRecipe if arguments else Recipe
    names = recipes.shipped(kind)
    for name in names:
        print(f"{name:{max(map(len, names))}}  {recipes.about(name, kind)}")


def _show(arguments: list[str]) -> None:
    load: Callable[[str], Training] = recipes.load
    if arguments[:1] == ["pretrain"]:
        load, arguments = recipes.load_pretraining, arguments[1:]
    print(recipes.dump(load(_only(arguments, "show RECIPE, or show pretrain RECIPE"))), end="")


def _only(arguments: list[str], usage: str) -> str:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        _usage(usage, arguments)
    return arguments[0]


def _usage(usage: str, arguments: list[str]) -> NoReturn:
    """Print the usage of a command and exit: successfully if help was requested, else with an error."""
    usage = f"usage: python -m finetune {usage}"
    if arguments in (["-h"], ["--help"]):
        print(usage)
        sys.exit()
    sys.exit(usage)


def _report(run: "Run") -> None:
    """Print the tables of a complete run, one per text, and where everything is."""
    from accelerate import PartialState
    from rich import box
    from rich.console import Console
    from rich.table import Table

    pm = "±" if can_print("±") else "+-"
    if not PartialState().is_main_process:
        return
    # Leave a cell empty if a model would be compared with itself, or if there is no control.
    measures = {"loss": ("loss", None), "gap": ("gap to control", "control"), "jsd": ("JSD to original", "original")}
    measures = {measure: of for measure, of in measures.items() if measure in run.results}
    headings = ["model", *(heading for heading, _ in measures.values()), "tokens", "seconds"]
    counts = {"parameters": "{:,}", "steps_per_second": "{:.2f}"}
    counts = {column: number for column, number in counts.items() if column in run.results}
    headings += [column.replace("_per_", "/") for column in counts]
    console = Console()
    results = run.results if "text" in run.results else run.results.assign(text="held-out")
    for text, rows in results.groupby("text", sort=False):
        documents, tokens = int(rows["documents"].iloc[0]), rows["tokens"].iloc[0]
        table = Table(
            *headings,
            box=box.SIMPLE_HEAD if pm == "±" else box.ASCII2,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )  # fits in 80 columns
        for column in table.columns:
            column.no_wrap = True
        for row in rows.to_dict("records"):
            cells = [
                ""
                if row["model"] == other or math.isnan(row[measure])
                else f"{row[measure]:.4f}" + f" {pm} {row[measure + '_error']:.4f}" * (documents > 1)
                for measure, (_, other) in measures.items()
            ]
            trained = [f"{row['trained_tokens']:,}", f"{row['trained_seconds']:.0f}"] if row["trained_tokens"] else []
            table.add_row(row["model"], *cells, *trained, *(count.format(row[name]) for name, count in counts.items()))
        errors = f"{pm} the standard error over {documents} documents" if documents > 1 else "of one document"
        console.print(f"On {tokens:,} tokens of {text}, {errors}:", markup=False, highlight=False)
        console.print(table)
        console.print()
    console.print(
        f"{'Loss, gap and JSD are' if 'gap' in measures else 'The loss is'} in nats/token; tokens and seconds are of "
        "training."
    )
    what, name = ("LN-free model", "ln_free") if "gap" in measures else ("model", "model")
    console.print(f"Everything is in {run.directory}; the {what} in {run.directory / name}", soft_wrap=True)


COMMANDS = {
    "run": _run,
    "pretrain": _pretrain,
    "resume": _resume,
    "plan": _plan,
    "sweep": _sweep,
    "list": _list,
    "show": _show,
}

if __name__ == "__main__":
    main()
