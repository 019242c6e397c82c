"""All analyses -> one directory: a self-contained HTML page, tables as CSV, figures as plotly JSON.

`run` takes the names of models and texts, like `python -m analysis report`. `write` takes loaded models and texts. To
add a flag, add a field to `options.Options`. To add an analysis, add a module and an entry in `sections.ANALYSES`. To
add a card, add a function in `cards`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.report.build import ReportError, check, run, write, write_png
    from analysis.report.sections import ANALYSES
    from analysis.texts import Sample, read_text

__all__ = ["ANALYSES", "ReportError", "Sample", "check", "read_text", "run", "write", "write_png"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, because the help of the command line needs only `options`."""
    if name not in __all__:
        raise AttributeError(f"module 'analysis.report' has no attribute {name!r}")
    from analysis.report import build

    return getattr(build, name)


def __dir__() -> list[str]:
    """List public names that are not imported yet, too, so that `python -m pydoc analysis.report` shows them."""
    return sorted({*globals(), *__all__})
