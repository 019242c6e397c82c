"""The command line: `python -m finetune [run] [RECIPE] [FLAGS]`, `pretrain RECIPE`, `resume RUN`, …: see `USAGE`."""

import argparse
import dataclasses
import math
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, NoReturn, TypeVar

import docstring_parser
import tyro
from docstring_parser import Docstring, DocstringStyle

from finetune import recipe as recipes
from finetune.errors import NolnError
from finetune.names import expanded
from finetune.recipe import PretrainRecipe, Recipe, Training

if TYPE_CHECKING:
    from finetune.run_directory import Run

USAGE = """\
Remove the norms of a language model by fine-tuning.

  python -m finetune run [RECIPE] [FLAGS]
      Remove the norms, and train a control that keeps them. RECIPE is the name
      of a shipped recipe (by default micro) or a YAML file. The word "run" may
      be omitted before a recipe.
  python -m finetune resume RUN [--anyway]
      Continue an interrupted run from its last checkpoint. RUN is its
      directory. With --anyway, continue even if its recipe, model or text has
      changed or a checkpoint is incomplete.
  python -m finetune plan [RECIPE] [FLAGS]
      Estimate the memory, tokens, operations and hours of a run.
  python -m finetune sweep FILE [FLAGS]
      Do the runs that a sweep file lists, and compare them in one table.
  python -m finetune list [pretrain]
      List the shipped recipes of run, or those of pretrain.
  python -m finetune show [pretrain] RECIPE
      Print a recipe as YAML.
  python -m finetune pretrain RECIPE [FLAGS]
      Train a model from random weights, with or without norms in its blocks.

Every field of a recipe is a flag. To see them all, with their values:

  python -m finetune run RECIPE --help

To begin, remove LayerNorm from the bundled model, in some minutes:

  python -m finetune run micro
"""

SITES = """
  A site is a place that divides by the std of a residual vector: the norm that
  the MLP of a block reads (mlp), that which attention reads, on the path to
  queries and keys (qk) and on the path to values (v), and the final norm
  (final). A site is live as long as it divides by each token's own std, and
  freezes when a constant takes its place.
"""
"""The terms that the help of a recipe's flags uses. Each line is indented, or tyro would join them."""

Asked = TypeVar("Asked")
Trains = TypeVar("Trains", bound=Training)


@dataclass(frozen=True)
class Options(Generic[Trains]):
    """The options of a run."""

    recipe: Annotated[Trains, tyro.conf.arg(name="")]
    steps: int
    """The number of optimizer steps. Schedule, warm-up and LR horizon are scaled with it."""
    out: Path | None = None
    """The run directory, which must not exist. None: runs/RECIPE-TIME."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command in `arguments` (None: those of the process). An error that the user can fix prints one line."""
    speak(sys.stdout, sys.stderr)
    arguments = _with_values([_current_flag(word) for word in (sys.argv[1:] if arguments is None else arguments)])
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(USAGE, end="")
        return
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "run"
    try:
        COMMANDS[command](arguments)
    except (NolnError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        again = "the same command" if command == "sweep" else "`python -m finetune resume RUN`; RUN is its directory"
        print(f"\ninterrupted: continue with {again}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def parse(kind: type[Asked], **options: Any) -> Asked:
    """Parse flags with `tyro.cli`, joining the lines of each field's docstring into one paragraph of help."""
    read = docstring_parser.parse_from_object

    def joined(obj: Any, style: DocstringStyle = DocstringStyle.AUTO) -> Docstring:
        docstring = read(obj, style)
        for field in docstring.params:
            field.description = " ".join((field.description or "").split())
        return docstring

    docstring_parser.parse_from_object = joined
    try:
        return tyro.cli(kind, **options)
    finally:
        docstring_parser.parse_from_object = read


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
    options = parse(
        Options[Recipe],
        default=Options(recipe, steps=recipe.steps),
        args=arguments,
        prog="python -m finetune run [RECIPE]",
        description="Remove the norms of a model by fine-tuning, and train a control that keeps them." + SITES,
    )

    from finetune import removal

    _report(removal.start(options.recipe, options.out))


@dataclass(frozen=True)
class PlanOptions:
    """The options of a plan, including the fields of a recipe."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    steps: int
    """The number of optimizer steps. Schedule, warm-up and LR horizon are scaled with it."""
    processes: int = 1
    """The number of processes that share a batch, each on its own device."""
    tflops: float | None = None
    """The peak speed of a device in 10¹² operations per second, such as 989 for an H100 in bfloat16. With it, the plan
    includes the hours of training."""
    mfu: float = 0.4
    """The share of that speed which training reaches (model FLOPs utilisation)."""


def _plan(arguments: list[str]) -> None:
    recipe = recipes.load(arguments.pop(0) if arguments and not arguments[0].startswith("-") else "micro")
    recipe = recipes.with_text(_scaled(recipe, arguments), _given(arguments, "--text"))
    options = parse(
        PlanOptions,
        default=PlanOptions(recipe, steps=recipe.steps),
        args=arguments,
        prog="python -m finetune plan [RECIPE]",
        description="Estimate what a run of a recipe would take, from the model's config alone.",
    )

    from finetune import plan

    print(plan.describe(plan.side_by_side(options.recipe, options.processes), options.tflops, options.mfu))


def _pretrain(arguments: list[str]) -> None:
    names = ", ".join(recipes.shipped(PretrainRecipe))
    asks = arguments[:1] in (["-h"], ["--help"])
    if not arguments or (arguments[0].startswith("-") and not asks):
        sys.exit(
            "usage: python -m finetune pretrain RECIPE [FLAGS]\n\n"
            + textwrap.fill(
                f"RECIPE is a YAML file or one of {names}. `list pretrain` describes them.", 80, break_on_hyphens=False
            )
        )
    recipe = recipes.load_pretraining("pre-ln" if asks else arguments.pop(0))
    recipe = recipes.with_text(_scaled(recipe, arguments), _given(arguments, "--text"))
    options = parse(
        Options[PretrainRecipe],
        default=Options(recipe, steps=recipe.steps),
        args=arguments,
        prog="python -m finetune pretrain RECIPE",
        description="Train a model from random weights. RECIPE is a YAML file or one of:\n"
        + textwrap.fill(names, 78, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False),
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
    """Do the runs of a sweep file that are not done yet, and compare them in a table."""

    file: Annotated[Path, tyro.conf.arg(metavar="FILE"), tyro.conf.Positional]
    """The sweep file, a YAML file in the format that `python -m pydoc finetune.sweep` describes."""
    out: Path | None = None
    """The directory for runs, tables and a figure. None: runs/ and the name of the file without .yaml."""
    processes: int = 1
    """The number of runs to do at the same time."""


def _sweep(arguments: list[str]) -> None:
    options = parse(SweepOptions, args=arguments, prog="python -m finetune sweep")
    file, out = expanded(options.file), expanded(options.out or Path("runs") / options.file.stem)

    from finetune import sweep

    results = sweep.run(file, out, options.processes)
    results.insert(0, "setting", sweep.settings(results))
    columns = ["setting", "seed", "tokens", "seconds", "gap", "jsd_ln_free", "jsd_control", "error"]
    print(results.reindex(columns=columns).dropna(axis=1, how="all").fillna("").to_string(index=False))
    print(f"Everything is in {out}: results.csv, documents.csv, figure.html and the runs")


def _list(arguments: list[str]) -> None:
    if arguments not in ([], ["pretrain"]):
        _usage("list [pretrain]", arguments)
    kind: type[Training] = PretrainRecipe if arguments else Recipe
    names = recipes.shipped(kind)
    for name in names:
        print(f"{name:{max(map(len, names))}}  {recipes.about(name, kind)}")  # in 80 columns


def _show(arguments: list[str]) -> None:
    load: Callable[[str], Training] = recipes.load
    if arguments[:1] == ["pretrain"]:
        load, arguments = recipes.load_pretraining, arguments[1:]
    print(recipes.dump(load(_only(arguments, "show [pretrain] RECIPE"))), end="")


def _only(arguments: list[str], usage: str) -> str:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        _usage(usage, arguments)
    return arguments[0]


def _usage(usage: str, arguments: list[str]) -> NoReturn:
    """Print the usage of a command and exit, with status 0 if the arguments ask for help."""
    usage = f"usage: python -m finetune {usage}\n\n`python -m finetune --help` says what it does."
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
