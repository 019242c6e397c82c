"""When each site freezes: a recipe's schedule, resolved for a model's depth into a list of events.

1. A cursor starts at `schedule.start` and goes through `schedule.order`.
2. A kind of site has one event per layer, up or down through the layers, or one for all layers together (`final` has
   only one). A single site or a token class has one event. After each event the cursor advances by the gap of its kind.
3. An event acts from its step on: its progress rises from 1/fade to 1 over `fade` steps (`merge_fade` for a token
   class). If that is 1 step it jumps, as in the published schedules.
4. With a tolerance, the gaps are minimal, and `Pacing` decides during training when each event begins.
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
    """One site freezes, or one token class is merged, from `step` on and over `fade` steps."""

    step: int
    """The first optimizer step, counted from 0, whose forward it affects."""
    phase: Phase
    layer: int | None
    """The layer of the site; None for the final norm and for token classes."""
    fade: int

    @property
    def name(self) -> str:
        """The site's name, `h.LAYER.KIND` or `final`, or `merge CLASS`."""
        if self.phase in get_args(TokenClass):
            return f"merge {self.phase}"
        return Site(cast("SiteKind", self.phase), self.layer).name

    @property
    def end(self) -> int:
        """The first step at which the event is complete."""
        return self.step + self.fade - 1

    def progress(self, step: int) -> float:
        """Return the event's progress at `step`, from 0 to 1."""
        return min(max((step - self.step + 1) / self.fade, 0.0), 1.0)


def resolve(schedule: Schedule, sites: Sequence[Site], steps: int) -> list[Event]:
    """Return the events of `schedule` for a model with `sites` and a run of `steps` steps, in order.

    Raises:
        RecipeError: the schedule is longer than the run, or does not freeze each site exactly once.
    """
    events = []
    cursor = schedule.start
    for i, entry in enumerate(schedule.order):
        for phase, layers in _groups(schedule, entry, sites):
            # Because of rounding, the sum of a scaled schedule's gaps may be slightly less than a whole step.
            step = schedule.at[i] if schedule.at else int(cursor + 1e-6)
            fade = schedule.merge_fade if phase in get_args(TokenClass) else None
            events += [Event(step, phase, layer, fade or schedule.fade) for layer in layers]
            cursor += getattr(schedule.gap, phase)
    frozen = [event.name for event in events if event.phase not in get_args(TokenClass)]
    there = [site.name for site in sites]
    if wrong := [name for name in there if frozen.count(name) != 1] + sorted({*frozen} - {*there}):
        raise RecipeError(
            f"schedule.order must freeze each of this model's {len(there)} sites once, and no others. Correct it for "
            f"{', '.join(wrong)}."
        )
    last = events[-1]
    if last.end >= steps:
        raise RecipeError(
            f"For this model's {len(sites)} sites the schedule ends at step {last.end} ({last.name}), but the run has "
            f"only {steps} steps, 0 to {steps - 1}. Increase steps in the recipe, decrease schedule.gap, schedule.fade "
            "or schedule.start, or scale the whole recipe with --steps."
        )
    return events


def _groups(schedule: Schedule, entry: str, sites: Sequence[Site]) -> list[tuple[Phase, Sequence[int | None]]]:
    """Return the consecutive events of an entry of the order, each as a phase and the layers that it affects."""
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
    """Decides during training when the events of an adaptive schedule begin ([H24], section 4).

    `planned` are the events with the minimal gaps. Events of the same step begin together. The next events begin when
    the exponentially smoothed loss is within `tolerance` of its value before the previous events began, or after
    `max_gap` steps, or when the rest of the plan only just fits into the run.
    """

    def __init__(self, planned: Sequence[Event], schedule: Schedule, steps: int) -> None:
        assert schedule.tolerance is not None
        self._waiting = [list(group) for _, group in groupby(planned, key=lambda event: event.step)]
        self._tolerance, self._max_gap, self._smoothing = schedule.tolerance, schedule.max_gap, schedule.smoothing
        self._spare = steps - 1 - planned[-1].end
        """The number of steps by which the plan can be delayed."""
        self._delay = 0
        self._loss = self._weight = 0.0
        self._before, self._last = math.inf, 0

    def observe(self, loss: float) -> None:
        """Update the smoothed loss with the training loss of one step."""
        self._loss = self._smoothing * self._loss + (1 - self._smoothing) * loss
        self._weight = self._smoothing * self._weight + (1 - self._smoothing)

    def begin(self, step: int) -> list[Event]:
        """Return the events that begin at `step`. Call once per step, in order."""
        if not self._waiting or step < self._waiting[0][0].step + self._delay:
            return []
        smoothed = self._loss / self._weight
        recovered = smoothed <= self._before + self._tolerance
        if not recovered and self._delay < self._spare and step - self._last < self._max_gap:
            self._delay += 1
            return []
        self._before, self._last = smoothed, step
        return [replace(event, step=step) for event in self._waiting.pop(0)]
