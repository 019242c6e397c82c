"""Progress bars on a terminal and in Jupyter; in a file or a CI log, one line every ten seconds instead."""

import builtins
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm
from tqdm.std import tqdm as tqdm_of_terminals

EVERY = 10.0
"""Seconds from one line to the next."""


def progress(iterable: Iterable[Any] | None = None, desc: str | None = None, **options: Any) -> "tqdm[Any]":
    """Return a progress bar or, where a bar cannot be drawn, an object that prints lines. It takes tqdm's arguments.

    The last line is always printed unless `leave` is False. TQDM_DISABLE=1 in the environment silences both.
    """
    if not options.get("disable"):
        options.pop("disable", None)  # given as False, it would override TQDM_DISABLE
    is_drawn = sys.stderr.isatty() or hasattr(builtins, "__IPYTHON__")
    return (tqdm if is_drawn else _Lines)(iterable, desc, **options)


class _Lines(tqdm_of_terminals):
    """Prints lines in place of a bar, without moving the cursor."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._printed: float | None = None
        self._due = time.monotonic() + EVERY
        super().__init__(*arguments, **options)
        if self.total:
            self.bar_format = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print a line if one is due. tqdm calls this far more often, and with an empty message to wipe the bar."""
        if msg is None and time.monotonic() >= self._due:
            self._print()

    def clear(self, nolock: bool = False) -> None:
        """Leave what was printed."""

    def close(self) -> None:
        """Print the last line, unless it was printed already."""
        if not getattr(self, "disable", True) and self.leave and self.n != self._printed:
            self._print()
        self.leave = False  # or an empty line would follow
        super().close()

    def _print(self) -> None:
        self.fp.write(f"{self}\n")
        self.fp.flush()
        self._printed, self._due = self.n, time.monotonic() + EVERY
