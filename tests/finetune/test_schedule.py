import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune import recipe
from finetune.recipe import Gaps, RecipeError, Schedule
from finetune.schedule import Event, resolve

# Layers; the published first steps of ln_2, QK, V, ln_f, end-of-text, position 0; gaps of ln_2, QK, V.
PUBLISHED = {
    "gpt2-h24": (12, (200, 440, 680, 1040, 1060, 1160), (20, 20, 30)),
    "gpt2-b25": (12, (20, 44, 68, 104, 106, 116), (2, 2, 3)),
    "gpt2-medium-b25": (24, (20, 68, 116, 188, 190, 200), (2, 2, 3)),
    "gpt2-large-b25": (36, (30, 174, 318, 534, 536, 546), (4, 4, 6)),
    "gpt2-xl-b25": (48, (50, 242, 434, 722, 724, 734), (4, 4, 6)),
}
ORDER = ["ln_2", "qk", "v", "ln_f", "eot", "bos"]
EVERY = Gaps(ln_2=1, qk=1, v=1, ln_f=1, eot=1, bos=1)


def steps_of(events: list[Event], phase: str) -> list[int]:
    return [event.step for event in events if event.phase == phase]


def test_every_published_recipe_is_in_the_table():
    assert set(recipe.shipped()) == {*PUBLISHED, "micro"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_freeze_at_the_published_steps(name):
    n_layer, first, gaps = PUBLISHED[name]
    published = recipe.load(name)
    events = resolve(published.schedule, n_layer, published.steps)
    assert tuple(steps_of(events, phase)[0] for phase in ORDER) == first
    for phase, start, gap in zip(("ln_2", "qk", "v"), first, gaps, strict=False):
        assert steps_of(events, phase) == [start + gap * layer for layer in range(n_layer)]
    assert {event.fade for event in events} == {1}


@pytest.mark.parametrize("n_layer", [1, 5, 24])
def test_every_site_freezes_and_every_class_merges_once_at_any_depth(n_layer):
    events = resolve(recipe.load("micro").schedule, n_layer, 1000)
    blocks = [f"h.{i}.{kind}" for kind in ("ln_2", "qk", "v") for i in range(n_layer)]
    assert [event.name for event in events] == [*blocks, "ln_f", "merge eot", "merge bos"]
    assert [event.step for event in events] == sorted(event.step for event in events)


def test_events_follow_the_order_of_the_schedule():
    schedule = Schedule(start=3, gap=EVERY, order=("v", "ln_f", "bos", "qk", "ln_2", "eot"))
    assert [(event.step, event.name) for event in resolve(schedule, 2, 20)] == [
        (3, "h.0.v"),
        (4, "h.1.v"),
        (5, "ln_f"),
        (6, "merge bos"),
        (7, "h.0.qk"),
        (8, "h.1.qk"),
        (9, "h.0.ln_2"),
        (10, "h.1.ln_2"),
        (11, "merge eot"),
    ]


def test_fractions_of_a_gap_add_up():
    for start in range(1, 8):
        tenth = Schedule(start=start, gap=Gaps(ln_2=0.1))
        assert steps_of(resolve(tenth, 21, 20), "ln_2") == [start] * 10 + [start + 1] * 10 + [start + 2]


@pytest.mark.parametrize(("fade", "progress"), [(1, [0, 1, 1, 1, 1]), (3, [0, 1 / 3, 2 / 3, 1, 1])])
def test_progress_of_an_event(fade, progress):
    event = Event(4, "ln_f", None, fade)
    assert [event.progress(step) for step in range(3, 8)] == pytest.approx(progress)
    assert event.progress(event.end) == 1
    assert fade == 1 or event.progress(event.end - 1) < 1


@pytest.mark.parametrize("fade", [1, 4])
def test_a_schedule_longer_than_the_run_is_refused_with_what_to_change(fade):
    schedule = Schedule(start=2, gap=EVERY, fade=fade)
    last = 2 + 3 * 2 + 2 + fade - 1
    assert resolve(schedule, 2, last + 1)[-1].end == last
    with pytest.raises(RecipeError, match=rf"step {last} \(merge bos\).*schedule\.gap.*schedule\.fade.*--steps"):
        resolve(schedule, 2, last)


DEPTHS = {"micro": 6} | {name: n_layer for name, (n_layer, *_) in PUBLISHED.items()}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(DEPTHS)), st.integers(6, 3000))
def test_scaled_recipes_are_the_recipe_in_other_steps(name, steps):
    whole = recipe.load(name)
    scaled = whole.scaled(steps)
    assert scaled.steps == steps
    assert scaled.warmup < steps <= scaled.horizon
    factor = steps / whole.steps
    found = resolve(scaled.schedule, DEPTHS[name], steps)
    for event, original in zip(found, resolve(whole.schedule, DEPTHS[name], whole.steps), strict=True):
        assert event.name == original.name
        assert -1e-3 - 1 < event.step - original.step * factor <= 1 + 1e-3


@pytest.mark.parametrize("name", sorted(DEPTHS))
@pytest.mark.parametrize("steps", [2, 3, 4, 5])
def test_recipes_scaled_to_a_handful_of_steps_are_valid(name, steps):
    events = resolve(recipe.load(name).scaled(steps).schedule, DEPTHS[name], steps)
    assert len(events) == 3 * DEPTHS[name] + 3
    assert len({event.step for event in events}) < steps
