"""When each site freezes: a recipe's schedule, resolved for a model's depth into a list of events.

1. A cursor starts at `schedule.start` and walks through the phases in `schedule.order`.
2. A phase that freezes a kind of site has one event a layer, from the first layer to the last (`ln_f` has one in all);
   a phase that merges a class of token has one event. After each event the cursor moves on by the phase's gap.
3. An event acts from its step on: over `fade` steps its progress rises from 1/fade to 1. At 1 step it jumps, as in the
   published schedules.
"""

from dataclasses import dataclass
from typing import get_args

from finetune.recipe import Phase, RecipeError, Schedule, TokenClass


@dataclass(frozen=True)
class Event:
    """From `step` on, one site freezes or one class of token is merged, over `fade` steps."""

    step: int
    """The first optimizer step, counted from 0, whose forward sees it."""
    phase: Phase
    layer: int | None
    """The layer of the site; None for `ln_f` and for classes."""
    fade: int

    @property
    def name(self) -> str:
        """The site's name, `h.LAYER.KIND` or `ln_f`, or `merge CLASS`."""
        if self.phase in get_args(TokenClass):
            return f"merge {self.phase}"
        return self.phase if self.layer is None else f"h.{self.layer}.{self.phase}"

    @property
    def end(self) -> int:
        """The first step that sees it complete."""
        return self.step + self.fade - 1

    def progress(self, step: int) -> float:
        """Return how far it has come at `step`, from 0 to 1."""
        return min(max((step - self.step + 1) / self.fade, 0.0), 1.0)


def resolve(schedule: Schedule, n_layer: int, steps: int) -> list[Event]:
    """Return the events of `schedule` for a model of `n_layer` layers and a run of `steps` steps, in order.

    Raises:
        RecipeError: the schedule is longer than the run.
    """
    events = []
    cursor = schedule.start
    for phase in schedule.order:
        for layer in range(n_layer) if phase in ("ln_2", "qk", "v") else (None,):
            # The sum of a scaled schedule's gaps may fall a rounding error short of a whole step.
            events.append(Event(int(cursor + 1e-6), phase, layer, schedule.fade))
            cursor += getattr(schedule.gap, phase)
    last = events[-1]
    if last.end >= steps:
        raise RecipeError(
            f"The schedule ends at step {last.end} ({last.name}) with this model's {n_layer} layers, and the run has "
            f"{steps} steps, 0 to {steps - 1}: raise the steps in the recipe, shorten schedule.gap, schedule.fade or "
            "schedule.start, or scale the whole recipe with --steps."
        )
    return events
