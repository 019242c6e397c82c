"""The command line: `python -m analysis report [FLAGS]`, `python -m analysis graph PROMPT [FLAGS]`."""

import signal
import sys
from collections.abc import Sequence

from analysis.report.options import GraphOptions, Options
from finetune.__main__ import parse, speak
from finetune.errors import NolnError

USAGE = """\
Compare an LN-free model with the model that it was made from.

  python -m analysis report [FLAGS]
      Run all analyses, and write one HTML page. The models are those of the
      newest complete run in runs/ or, if there is none, the bundled ones;
      flags name others.
  python -m analysis graph PROMPT [FLAGS]
      Draw the circuit behind the logit of the next token as a graph, and check
      it by ablation.

To see all flags, with their defaults:

  python -m analysis report --help
  python -m analysis graph --help
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that `arguments` (None: the process's own) name; errors that the user can fix take one line."""
    speak(sys.stdout, sys.stderr)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(USAGE, end="")
        return
    command = arguments.pop(0)
    if command not in COMMANDS:
        sys.exit(f"error: There is no command {command}: use {' or '.join(COMMANDS)}.")
    try:
        COMMANDS[command](arguments)
    except (NolnError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _report(arguments: list[str]) -> None:
    options = parse(Options, args=arguments, prog="python -m analysis report")

    from analysis import report

    page = report.run(options)
    print(f"The report is {page}; its tables and figures lie beside it.")


def _graph(arguments: list[str]) -> None:
    options = parse(GraphOptions, args=arguments, prog="python -m analysis graph")

    from analysis.graph import page

    print(f"The graph is {page.run(options)}; its tables, GraphML and JSON lie beside it.")


COMMANDS = {"report": _report, "graph": _graph}

if __name__ == "__main__":
    main()
