import dataclasses
import inspect
import re
import subprocess
import sys

import pytest

from finetune import NolnError, recipe
from finetune.recipe import Gaps, Layers, PretrainRecipe, Recipe, RecipeError, Schedule, Text
from finetune.recipe.fields import SHAPES_CONTROL

B25 = recipe.load("micro-b25")
TWICE = ("mlp", "mlp", "qk", "v", "final", "eot", "position_0")
CONTRADICTIONS = {
    "schedule.order lacks v": lambda: Schedule(start=1, gap=Gaps(), order=("mlp", "qk", "final", "eot", "position_0")),
    "schedule.order contains qkv": lambda: Schedule(start=1, gap=Gaps(), order=("mlp", "qkv", "v", "final")),
    "schedule.order contains final.0": lambda: Schedule(start=1, gap=Gaps(), order=("mlp", "qk", "v", "final.0")),
    "schedule.max_gap": lambda: Schedule(start=1, gap=Gaps(), tolerance=0.1, max_gap=0),
    "schedule.smoothing": lambda: Schedule(start=1, gap=Gaps(), tolerance=0.1, smoothing=1),
    "schedule.at and schedule.tolerance cannot be combined": lambda: Schedule(
        start=1, gap=Gaps(), tolerance=0.1, at=(1, 2, 3, 4, 5, 6)
    ),
    "schedule.at needs one step for each": lambda: Schedule(start=1, gap=Gaps(), at=(1, 2, 3)),
    "schedule.at needs one step for each entry of": lambda: Schedule(start=1, gap=Gaps(), at=(1, 2, 3, 4, 6, 5)),
    "kl_weight": lambda: dataclasses.replace(B25, kl_weight=1.1),
    "schedule.order contains an entry twice": lambda: Schedule(start=1, gap=Gaps(), order=TWICE),
    "schedule.fade": lambda: Schedule(start=1, gap=Gaps(), fade=0),
    "schedule.merge_fade": lambda: Schedule(start=1, gap=Gaps(), merge_fade=0),
    "schedule.start": lambda: Schedule(start=0.9, gap=Gaps()),
    "schedule.gap.qk": lambda: Gaps(qk=-1),
    "text.held_out_fraction": lambda: Text(held_out_fraction=1.0),
    "text.held_out_blocks": lambda: Text(held_out_blocks=0),
    "text.train_blocks": lambda: Text(train_blocks=0),
    "text.train_blocks and text.streaming": lambda: Text(train_blocks=1, streaming=True),
}
CONTRADICTING_FIELDS = {
    "shard and lora_rank": {"shard": True, "lora_rank": 4},
    "With shard, micro_batch": {"shard": True, "micro_batch": "auto"},
    "steps": {"steps": 0},
    "batch": {"batch": 16, "micro_batch": 3},
    "micro_batch": {"micro_batch": 0},
    "min_lr": {"min_lr": 1.0},
    "lora_rank": {"lora_rank": -1},
    "lora_alpha": {"lora_alpha": 0.0},
    "lora_targets": {"lora_rank": 4, "lora_targets": ["embeddings"]},
    "std_decay": {"std_decay": 1.0},
    "warmup": {"warmup": B25.steps},
    "lr_horizon": {"lr_horizon": B25.steps - 1},
    "schedule.start": {"steps": 8, "warmup": 1},
    "control_from": {"control_from": "runs/earlier", "control": False},
    "log_every": {"log_every": 0},
    "save_every": {"save_every": 0},
}


def write(tmp_path, **fields):
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.dump(B25) + "".join(f"{key}: {value}\n" for key, value in fields.items()))
    return path


@pytest.mark.parametrize("name", recipe.shipped())
def test_shipped_recipes_load_and_come_back_from_what_is_dumped(name, tmp_path):
    shipped = recipe.load(name)
    assert shipped.name == name
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.dump(shipped, run={"command": "x", "versions": {"torch": "2"}}))
    assert recipe.load(path) == shipped


@pytest.mark.parametrize(("batch", "name"), [(512, "gpt2-b25"), (506, "gpt2-medium-b25"), (480, "gpt2-h24")])
def test_published_tokens_a_step(batch, name):
    assert recipe.load(name).batch == batch


@pytest.mark.parametrize("field", CONTRADICTIONS)
def test_parts_that_contradict_themselves_are_refused(field):
    with pytest.raises(RecipeError, match=re.escape(field)):
        CONTRADICTIONS[field]()


@pytest.mark.parametrize("field", CONTRADICTING_FIELDS)
def test_contradictions_are_refused_by_the_field_to_change(field):
    with pytest.raises(RecipeError, match=re.escape(field)):
        dataclasses.replace(B25, **CONTRADICTING_FIELDS[field])


@pytest.mark.parametrize("field", CONTRADICTING_FIELDS)
def test_contradictions_in_a_file_name_the_file_and_the_field(field, tmp_path):
    path = write(tmp_path, **{key: str(value).lower() for key, value in CONTRADICTING_FIELDS[field].items()})
    with pytest.raises(RecipeError, match=rf"(?s)mine\.yaml.*{re.escape(field)}"):
        recipe.load(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("stepps: 3", "stepps"),
        ("steps: many", "steps"),
        ("steps: 2.5", "steps"),
        ("lr: [1]", "lr"),
        ("schedule: {start: 2, gap: {ln2: 3}}", "schedule.gap.ln2"),
        ("schedule: {start: 2, gap: {}, order: [mlp, qkv]}", "schedule.order"),
        ("text: books", "text"),
        ("device: tpu", "device"),
        ("export_format: h25", "export_format"),
        ("7: 8", "7"),
    ],
)
def test_fields_unknown_or_of_a_wrong_type_are_named(content, said, tmp_path):
    with pytest.raises(RecipeError, match=rf"(?s)mine\.yaml.*{re.escape(said)}"):
        recipe.load(write(tmp_path, **dict([content.split(": ", 1)])))


@pytest.mark.parametrize("content", ["", "- 1\n- 2\n", "just words", "a: [", "a: b: c", "\x00"])
def test_what_is_no_yaml_of_fields_is_refused_by_its_name(content, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        recipe.load(path)


def test_what_cannot_be_read_is_refused_by_its_name(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "directory.yaml").mkdir()
    for name in ("binary", "directory", "missing"):
        with pytest.raises(RecipeError, match=rf"{name}\.yaml"):
            recipe.load(tmp_path / f"{name}.yaml")


def test_a_name_that_is_not_shipped_is_answered_with_those_that_are():
    with pytest.raises(RecipeError, match=", ".join(recipe.shipped())):
        recipe.load("gpt3")


def test_a_file_is_called_after_its_name_and_its_numbers_may_lack_the_point(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.dump(B25).replace("name: micro-b25\n", "").replace("lr: 0.00015", "lr: 6e-4"))
    assert recipe.load(path) == dataclasses.replace(B25, name="mine", lr=6e-4)


def test_scaling_to_the_same_steps_changes_nothing_and_to_none_is_refused():
    assert B25.scaled(B25.steps) == B25
    h24 = recipe.load("gpt2-h24").scaled(120)
    assert (h24.warmup, h24.lr_horizon, h24.schedule.start, h24.schedule.gap.eot) == (10, 200, 20, 10)
    for steps in (1, 0, -3):
        with pytest.raises(RecipeError, match="steps"):
            B25.scaled(steps)


def test_scaling_scales_fades():
    faded = dataclasses.replace(B25, schedule=dataclasses.replace(B25.schedule, fade=6, merge_fade=12))
    assert faded.scaled(60).schedule.fade == 3
    assert faded.scaled(60).schedule.merge_fade == 6
    assert faded.scaled(8).schedule.fade == faded.scaled(8).schedule.merge_fade == 1
    assert B25.scaled(60).schedule.merge_fade is None


def test_recipes_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        B25.steps = 3


def test_every_field_is_said_to_shape_the_control_or_not():
    assert {*SHAPES_CONTROL} == {field.name for field in dataclasses.fields(Recipe)}


def test_controls_are_the_same_whatever_says_how_layernorm_is_removed_or_what_is_kept_of_a_run():
    removal = {"std_decay": 0.5, "std_mean": "harmonic", "export_format": "h24"}
    removal |= {"kl_weight": 0.5, "match_weight": 2.0, "aux_weight": 0.3}
    kept = {"name": "other", "log_every": 3, "save_every": 7, "report_to": ("wandb",), "push_to_hub": "me/mine"}
    schedule = dataclasses.replace(B25.schedule, fade=6)
    same = dataclasses.replace(B25, schedule=schedule, **removal, **kept)
    assert same.control_settings == B25.control_settings
    for field, value in {"seed": 1, "weight_decay": 0.5, "text": Text("books-report"), "control_from": "run"}.items():
        assert dataclasses.replace(same, **{field: value}).control_settings != B25.control_settings


def test_errors_are_those_that_the_user_can_mend():
    assert issubclass(RecipeError, NolnError)


def test_recipes_load_without_torch():
    code = "import sys, finetune.recipe as r; r.load('micro'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", [Recipe, PretrainRecipe, Schedule, Gaps, Layers, Text])
def test_every_field_is_described_where_pydoc_shows_it(kind: type):
    described = {line.partition(":")[0] for line in inspect.getdoc(kind).splitlines()}
    assert {field.name for field in dataclasses.fields(kind)} <= described


def test_former_names_of_phases_are_read(tmp_path):
    assert Gaps(ln_2=2, ln_f=3, bos=4) == Gaps(mlp=2, final=3, position_0=4)
    assert Layers(ln_2="down") == Layers(mlp="down")
    order = ("h.0.ln_2", "h.1.ln_2", "qk", "v", "ln_f", "eot", "bos")
    now = ("h.0.mlp", "h.1.mlp", "qk", "v", "final", "eot", "position_0")
    assert Schedule(start=1, gap=Gaps(), order=order).order == now
    former = recipe.dump(B25).replace("mlp:", "ln_2:").replace("final", "ln_f")
    former = re.sub(r"\bposition_0\b", "bos", former)
    assert "ln_2: 2" in former
    (tmp_path / "recipe.yaml").write_text(former)
    assert recipe.load(tmp_path / "recipe.yaml") == B25
    overridden = recipe.override(B25, {"schedule.gap.ln_2": 1, "schedule.layers": {"ln_2": "down"}}, "recipe")
    assert (overridden.schedule.gap.mlp, overridden.schedule.layers.mlp) == (1, "down")
    with pytest.raises(RecipeError, match=r"schedule\.gap\.ln_3 is not a field"):
        recipe.override(B25, {"schedule.gap.ln_3": 1}, "recipe")
