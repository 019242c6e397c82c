from dataclasses import replace

import pytest
from helpers import gpt2_sites
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune import recipe
from finetune.families import FAMILIES
from finetune.recipe import Gaps, Layers, RecipeError, Schedule, files
from finetune.schedule import Event, Pacing, resolve

# Layers; the published first steps of ln_2, QK, V, ln_f, end-of-text, position 0; gaps of ln_2, QK, V.
PUBLISHED = {
    "gpt2-h24": (12, (200, 440, 680, 1040, 1060, 1160), (20, 20, 30)),
    "gpt2-b25": (12, (20, 44, 68, 104, 106, 116), (2, 2, 3)),
    "gpt2-medium-b25": (24, (20, 68, 116, 188, 190, 200), (2, 2, 3)),
    "gpt2-large-b25": (36, (30, 174, 318, 534, 536, 546), (4, 4, 6)),
    "gpt2-xl-b25": (48, (50, 242, 434, 722, 724, 734), (4, 4, 6)),
}
EXTRAPOLATED = {
    "gpt2-fast": ("gpt2", 12),
    "pythia-70m": ("gpt_neox", 6),
    "tinystories-33m": ("gpt_neo", 4),
    "smollm2-135m": ("llama", 30),
    "qwen2.5-0.5b": ("qwen2", 24),
    "llama-3.2-1b": ("llama", 16),
    "gemma-2-2b": ("gemma2", 26),
}
"""Family and layers of the models of recipes that were not run."""
ORDER = ["mlp", "qk", "v", "final", "eot", "position_0"]
EVERY = Gaps(mlp=1, qk=1, v=1, final=1, eot=1, position_0=1)


def steps_of(events: list[Event], phase: str) -> list[int]:
    return [event.step for event in events if event.phase == phase]


def test_every_published_recipe_is_in_the_table():
    assert set(recipe.shipped()) == {*PUBLISHED, *EXTRAPOLATED, "micro", "micro-b25", "micro-llama"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_freeze_at_the_published_steps(name):
    n_layer, first, gaps = PUBLISHED[name]
    published = recipe.load(name)
    events = resolve(published.schedule, gpt2_sites(n_layer), published.steps)
    assert tuple(steps_of(events, phase)[0] for phase in ORDER) == first
    for phase, start, gap in zip(("mlp", "qk", "v"), first, gaps, strict=False):
        assert steps_of(events, phase) == [start + gap * layer for layer in range(n_layer)]
    assert {event.fade for event in events} == {1}


@pytest.mark.parametrize("n_layer", [1, 5, 24])
def test_every_site_freezes_and_every_class_merges_once_at_any_depth(n_layer):
    events = resolve(recipe.load("micro").schedule, gpt2_sites(n_layer), 1000)
    blocks = [f"h.{i}.{kind}" for kind in ("mlp", "qk", "v") for i in range(n_layer)]
    assert [event.name for event in events] == [*blocks, "final", "merge eot", "merge position_0"]
    assert [event.step for event in events] == sorted(event.step for event in events)


def test_events_follow_the_order_of_the_schedule():
    schedule = Schedule(start=3, gap=EVERY, order=("v", "final", "position_0", "qk", "mlp", "eot"))
    assert [(event.step, event.name) for event in resolve(schedule, gpt2_sites(2), 20)] == [
        (3, "h.0.v"),
        (4, "h.1.v"),
        (5, "final"),
        (6, "merge position_0"),
        (7, "h.0.qk"),
        (8, "h.1.qk"),
        (9, "h.0.mlp"),
        (10, "h.1.mlp"),
        (11, "merge eot"),
    ]


def test_a_kind_goes_up_or_down_through_the_layers_or_all_at_once():
    schedule = Schedule(start=3, gap=EVERY, layers=Layers(mlp="down", qk="together"), order=("mlp", "qk", "v", "final"))
    assert [(event.step, event.name) for event in resolve(schedule, gpt2_sites(2), 20)] == [
        (3, "h.1.mlp"),
        (4, "h.0.mlp"),
        (5, "h.0.qk"),
        (5, "h.1.qk"),
        (6, "h.0.v"),
        (7, "h.1.v"),
        (8, "final"),
    ]


def test_single_sites_in_any_order():
    order = ("h.1.v", "final", "h.0.mlp", "qk", "h.1.mlp", "position_0", "h.0.v")
    schedule = Schedule(start=2, gap=Gaps(v=5, final=1, mlp=2), order=order)
    assert [(event.step, event.name) for event in resolve(schedule, gpt2_sites(2), 20)] == [
        (2, "h.1.v"),
        (7, "final"),
        (8, "h.0.mlp"),
        (10, "h.0.qk"),
        (10, "h.1.qk"),
        (10, "h.1.mlp"),
        (12, "merge position_0"),
        (12, "h.0.v"),
    ]
    assert schedule.classes == ("position_0",)


@pytest.mark.parametrize(
    ("order", "wrong"),
    [
        (("mlp", "qk", "h.0.v", "final"), "h.1.v"),
        (("mlp", "h.0.mlp", "qk", "v", "final"), "h.0.mlp"),
        (("mlp", "qk", "v", "h.2.v", "final"), "h.2.v"),
    ],
)
def test_an_order_that_does_not_freeze_every_site_once_is_refused(order, wrong):
    with pytest.raises(RecipeError, match=f"once.*{wrong}"):
        resolve(Schedule(start=1, gap=Gaps(), order=order), gpt2_sites(2), 9)


def test_explicit_steps_replace_start_and_gaps():
    order = ("h.1.v", "mlp", "qk", "h.0.v", "final")
    events = resolve(Schedule(start=1, gap=EVERY, order=order, at=(2, 2, 5, 9, 9)), gpt2_sites(2), 10)
    assert [event.step for event in events] == [2, 2, 2, 5, 5, 9, 9]


def paced(losses: list[float], steps: int, **settings: float) -> list[tuple[int, str]]:
    """What begins when, with `losses` by step, of a schedule with an event at 2, two at 3 and one at 5."""
    planned = [Event(2, "final", None, 1), Event(3, "qk", 0, 1), Event(3, "qk", 1, 1), Event(5, "eot", None, 1)]
    schedule = Schedule(start=2, gap=EVERY, **settings)
    pacing = Pacing(planned, schedule, steps)
    begun = []
    for step in range(steps):
        begun += [(event.step, event.name) for event in pacing.begin(step)]
        pacing.observe(losses[min(step, len(losses) - 1)])
    return begun


def test_an_adaptive_schedule_keeps_its_least_gaps_while_the_loss_is_back():
    assert paced([3.0], 30, tolerance=0.0) == [(2, "final"), (3, "h.0.qk"), (3, "h.1.qk"), (5, "merge eot")]


def test_an_adaptive_schedule_waits_for_the_loss():
    losses = [3.0, 3.0, 3.5, 3.2, 3.1, 3.04, 3.5, 3.5, 3.5, 3.08, 3.0]
    found = paced(losses, 30, tolerance=0.05, smoothing=0)
    assert found == [(2, "final"), (6, "h.0.qk"), (6, "h.1.qk"), (10, "merge eot")]


def test_an_adaptive_schedule_looks_at_the_smoothed_loss():
    losses = [3.0, 3.0, 4.0, 3.0]
    smoothed = [3.0, 3.0]
    numerator = 3.0 * (1 - 0.5**2)
    for step in range(2, 12):
        numerator = 0.5 * numerator + 0.5 * losses[min(step, 3)]
        smoothed.append(numerator / (1 - 0.5 ** (step + 1)))
    back = next(step for step in range(3, 12) if smoothed[step - 1] <= 3.05)
    assert paced(losses, 30, tolerance=0.05, smoothing=0.5)[1] == (back, "h.0.qk")


def test_an_adaptive_schedule_waits_no_longer_than_its_longest_gap():
    found = paced([3.0, 3.0, 5.0], 30, tolerance=0.1, max_gap=7)
    assert [step for step, _ in found] == [2, 9, 9, 11]


def test_an_adaptive_schedule_ends_in_time():
    assert [step for step, _ in paced([3.0, 3.0, 5.0], 12, tolerance=0.1)] == [2, 9, 9, 11]


def test_fractions_of_a_gap_add_up():
    for start in range(1, 8):
        tenth = Schedule(start=start, gap=Gaps(mlp=0.1))
        assert steps_of(resolve(tenth, gpt2_sites(21), 20), "mlp") == [start] * 10 + [start + 1] * 10 + [start + 2]


@pytest.mark.parametrize(("fade", "progress"), [(1, [0, 1, 1, 1, 1]), (3, [0, 1 / 3, 2 / 3, 1, 1])])
def test_progress_of_an_event(fade, progress):
    event = Event(4, "final", None, fade)
    assert [event.progress(step) for step in range(3, 8)] == pytest.approx(progress)
    assert event.progress(event.end) == 1
    assert fade == 1 or event.progress(event.end - 1) < 1


def test_classes_merge_at_a_pace_of_their_own():
    schedule = Schedule(start=2, gap=EVERY, fade=3, merge_fade=5)
    fades = {event.phase: event.fade for event in resolve(schedule, gpt2_sites(2), 99)}
    assert fades == {"mlp": 3, "qk": 3, "v": 3, "final": 3, "eot": 5, "position_0": 5}
    assert (
        resolve(schedule, gpt2_sites(2), 99)[-1].end
        == resolve(replace(schedule, merge_fade=1), gpt2_sites(2), 99)[-1].end + 4
    )


@pytest.mark.parametrize("fade", [1, 4])
def test_a_schedule_longer_than_the_run_is_refused_with_what_to_change(fade):
    schedule = Schedule(start=2, gap=EVERY, fade=fade)
    last = 2 + 3 * 2 + 2 + fade - 1
    assert resolve(schedule, gpt2_sites(2), last + 1)[-1].end == last
    with pytest.raises(RecipeError, match=rf"step {last} \(merge position_0\).*schedule\.gap.*schedule\.fade.*--steps"):
        resolve(schedule, gpt2_sites(2), last)


DEPTHS = {"micro": 6} | {name: n_layer for name, (n_layer, *_) in PUBLISHED.items()}


@pytest.mark.parametrize("name", EXTRAPOLATED)
def test_recipes_that_were_not_run_fit_their_models_and_say_so(name):
    family, n_layer = EXTRAPOLATED[name]
    shipped = recipe.load(name)
    events = resolve(shipped.schedule, FAMILIES[family].sites_of(n_layer), shipped.steps)
    assert "merge position_0" in [event.name for event in events]
    assert (
        max(event.end for event in events) < 0.9 * shipped.steps
    )  # what is left is for learning to live without norms
    text = (files.RECIPES / f"{name}.yaml").read_text()
    assert "; never run." in text
    for processes in (1, 2, 4, 8):
        assert shipped.batch % (shipped.micro_batch * processes) == 0


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(DEPTHS)), st.integers(6, 3000))
def test_scaled_recipes_are_the_recipe_in_other_steps(name, steps):
    whole = recipe.load(name)
    scaled = whole.scaled(steps)
    assert scaled.steps == steps
    assert scaled.warmup < steps <= scaled.horizon
    factor = steps / whole.steps
    found = resolve(scaled.schedule, gpt2_sites(DEPTHS[name]), steps)
    for event, original in zip(found, resolve(whole.schedule, gpt2_sites(DEPTHS[name]), whole.steps), strict=True):
        assert event.name == original.name
        assert -1e-3 - 1 < event.step - original.step * factor <= 1 + 1e-3


@pytest.mark.parametrize("name", sorted(DEPTHS))
@pytest.mark.parametrize("steps", [2, 3, 4, 5])
def test_recipes_scaled_to_a_handful_of_steps_are_valid(name, steps):
    events = resolve(recipe.load(name).scaled(steps).schedule, gpt2_sites(DEPTHS[name]), steps)
    assert len(events) == 3 * DEPTHS[name] + 3
    assert len({event.step for event in events}) < steps
