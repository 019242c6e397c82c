"""The command line: `python -m analysis report [FLAGS]`."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from finetune.errors import NolnError

USAGE = """\
Compare an LN-free model with what it was made from.

  python -m analysis report [FLAGS]   all analyses of the newest complete run in runs/, or of named models, on one page

  python -m analysis report --help    every flag with its default
"""


@dataclass(frozen=True)
class Options:
    """Compare an original model, a control and an LN-free model, and write tables, figures and one HTML page."""

    original: str | None = None
    """The model that LN was removed from: a short name, a directory, or a Hub id. None: that of the newest run."""
    ln_free: str | None = None
    """The LN-free model. None: that of the newest run."""
    control: str | None = None
    """The model fine-tuned in the same way with LN kept. None: that of the newest run, or none at all where the other
    models are named."""
    revision: str | None = None
    """The revision of an original on the Hub. None: that of the newest run."""
    text: tuple[str, ...] = ("books-report", "shifted-peps")
    """Texts to compare the models on: bundled names, files, directories, or Hub data sets. The first one serves the
    analyses that look at one text."""
    pairs: Path | None = None
    """A JSON file of prompt pairs for patching, a list of objects with the texts clean, corrupt, correct and wrong.
    None: pairs that come with the package or, where the tokenizer cuts their words, some made for it."""
    tokens: int = 8_192
    """Tokens of each text, at most, in blocks spread evenly over it."""
    out: Path | None = None
    """The directory to write. None: reports/TIME."""
    only: tuple[str, ...] = ()
    """The analyses to run, by their module's names. Empty: all."""
    batch_size: int = 8
    """Blocks in one forward, at most. No number depends on it."""
    png: bool = False
    """Also write the figures as PNG; needs the extra `png`, and Chrome or Chromium."""
    benchmark: tuple[str, ...] = ()
    """Tasks of EleutherAI's lm-evaluation-harness, such as hellaswag: NAME, on its data on the Hub, or NAME=FILE.jsonl,
    a file with the fields of those data in their place; needs the extra `eval`. Empty: none."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that `arguments` (None: the process's own) name; what the user can mend is said in a line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(USAGE, end="")
        return
    command = arguments.pop(0)
    if command not in COMMANDS:
        sys.exit(f"error: there is no command {command}; there is {', '.join(COMMANDS)}")
    try:
        COMMANDS[command](arguments)
    except (NolnError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _report(arguments: list[str]) -> None:
    options = tyro.cli(Options, args=arguments, prog="python -m analysis report")

    from analysis import report

    page = report.run(**vars(options))
    print(f"The report is {page}; its tables and figures lie beside it.")


COMMANDS = {"report": _report}

if __name__ == "__main__":
    main()
