"""When each site freezes: a recipe's schedule, resolved for a model's depth into a list of events.

1. A cursor starts at `schedule.start` and walks through `schedule.order`.
2. A kind of site has one event a layer, up or down through the layers, or all of them together (`final` has one in
   all); a single site and a class of token have one event. After each the cursor moves on by the gap of its kind.
3. An event acts from its step on: over `fade` steps, `merge_fade` for a class of token, its progress rises from 1/fade
   to 1. At 1 step it jumps, as in the published schedules.
4. With a tolerance the gaps are the least ones, and `Pacing` says while training goes on when each event begins.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import cast, get_args

from finetune.families import Site
from finetune.recipe import Phase, RecipeError, Schedule, SiteKind, TokenClass


@dataclass(frozen=True)
class Event:
    """From `step` on, one site freezes or one class of token is merged, over `fade` steps."""

    step: int
    """The first optimizer step, counted from 0, whose forward sees it."""
    phase: Phase
    layer: int | None
    """The layer of the site; None for the final norm and for classes."""
    fade: int

    @property
    def name(self) -> str:
        """The site's name, `h.LAYER.KIND` or `final`, or `merge CLASS`."""
        if self.phase in get_args(TokenClass):
            return f"merge {self.phase}"
        return Site(cast("SiteKind", self.phase), self.layer).name

    @property
    def end(self) -> int:
        """The first step at which it is complete."""
        return self.step + self.fade - 1

    def progress(self, step: int) -> float:
        """Return how far it has come at `step`, from 0 to 1."""
        return min(max((step - self.step + 1) / self.fade, 0.0), 1.0)


def resolve(schedule: Schedule, sites: Sequence[Site], steps: int) -> list[Event]:
    """Return the events of `schedule` for a model with `sites` and a run of `steps` steps, in order.

    Raises:
        RecipeError: the schedule is longer than the run.
    """
    events = []
    cursor = schedule.start
    for i, entry in enumerate(schedule.order):
        for phase, layers in _groups(schedule, entry, sites):
            # The sum of a scaled schedule's gaps may fall a rounding error short of a whole step.
            step = schedule.at[i] if schedule.at else int(cursor + 1e-6)
            fade = schedule.merge_fade if phase in get_args(TokenClass) else None
            events += [Event(step, phase, layer, fade or schedule.fade) for layer in layers]
            cursor += getattr(schedule.gap, phase)
    frozen = [event.name for event in events if event.phase not in get_args(TokenClass)]
    there = [site.name for site in sites]
    if wrong := [name for name in there if frozen.count(name) != 1] + sorted({*frozen} - {*there}):
        raise RecipeError(
            f"schedule.order must freeze each of this model's {len(there)} sites once, and no others; it does not so "
            f"for {', '.join(wrong)}."
        )
    last = events[-1]
    if last.end >= steps:
        raise RecipeError(
            f"The schedule ends at step {last.end} ({last.name}) with this model's {len(sites)} sites, and the run has "
            f"{steps} steps, 0 to {steps - 1}: raise the steps in the recipe, shorten schedule.gap, schedule.fade or "
            "schedule.start, or scale the whole recipe with --steps."
        )
    return events


def _groups(schedule: Schedule, entry: str, sites: Sequence[Site]) -> list[tuple[Phase, Sequence[int | None]]]:
    """Return what an entry of the order does, one after another: a kind of event and the layers it has at once."""
    if entry.startswith("h."):
        _, layer, kind = entry.split(".")
        return [(cast("Phase", kind), [int(layer)])]
    phase = cast("Phase", entry)
    layers = [None] if phase in get_args(TokenClass) else [site.layer for site in sites if site.kind == phase]
    match getattr(schedule.layers, phase, "up"):
        case "together":
            return [(phase, layers)] if layers else []
        case "down":
            layers.reverse()
    return [(phase, [layer]) for layer in layers]


class Pacing:
    """An adaptive schedule under way: which events begin, as the loss comes back ([H24], section 4).

    `planned` are events at their least distances; those of one step begin together. The next ones begin when the loss,
    smoothed exponentially, is within `tolerance` of what it was before the last ones began, after `max_gap` steps, or
    when what is left of the plan just fits into the run.
    """

    def __init__(self, planned: Sequence[Event], schedule: Schedule, steps: int) -> None:
        assert schedule.tolerance is not None
        self._waiting = [list(group) for _, group in groupby(planned, key=lambda event: event.step)]
        self._tolerance, self._max_gap, self._smoothing = schedule.tolerance, schedule.max_gap, schedule.smoothing
        self._spare = steps - 1 - planned[-1].end
        """Steps by which the plan may still be delayed."""
        self._delay = 0
        self._loss = self._weight = 0.0
        self._before, self._last = math.inf, 0

    def observe(self, loss: float) -> None:
        """Take in a step's training loss."""
        self._loss = self._smoothing * self._loss + (1 - self._smoothing) * loss
        self._weight = self._smoothing * self._weight + (1 - self._smoothing)

    def begin(self, step: int) -> list[Event]:
        """Return the events that begin at `step`: asked once a step, in order."""
        if not self._waiting or step < self._waiting[0][0].step + self._delay:
            return []
        smoothed = self._loss / self._weight
        recovered = smoothed <= self._before + self._tolerance
        if not recovered and self._delay < self._spare and step - self._last < self._max_gap:
            self._delay += 1
            return []
        self._before, self._last = smoothed, step
        return [replace(event, step=step) for event in self._waiting.pop(0)]
