"""All analyses -> one directory: a self-contained HTML page, tables as CSV, figures as plotly JSON.

`run` names the models and texts, as `python -m analysis report` does; `write` takes them loaded. To add a flag, add a
field to `options.Options`; an analysis, a module and an entry in `sections.ANALYSES`; a card, a function in `cards`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.report.build import ReportError, check, run, write, write_png
    from analysis.report.sections import ANALYSES
    from analysis.texts import Sample, read_text

__all__ = ["ANALYSES", "ReportError", "Sample", "check", "read_text", "run", "write", "write_png"]


def __getattr__(name: str) -> Any:
    """Import what is public when it is first used: to show its help, the command line needs `options` alone."""
    if name not in __all__:
        raise AttributeError(f"module 'analysis.report' has no attribute {name!r}")
    from analysis.report import build

    return getattr(build, name)


def __dir__() -> list[str]:
    """List public names before they are imported too: `python -m pydoc analysis.report` shows them."""
    return sorted({*globals(), *__all__})
