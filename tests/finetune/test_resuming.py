"""Resuming after accidents: checkpoints and logs that a power cut has damaged, and runs that are not what they were."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch
from helpers import finetune, kill_at, read_log, run_forked
from safetensors.torch import load_file, save_file

import finetune as finetune_package
from finetune import recipe as recipes
from finetune import remove_norms, resume
from finetune.begun_with import ChangedError
from finetune.checkpoints import checkpoints, discard
from finetune.errors import CheckpointError, NolnError
from finetune.recipe import Recipe
from finetune.run_directory import Run, make, new_directory

KILLED = -signal.SIGKILL
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def moved(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and a text of this module's own, to be changed."""
    directory = tmp_path_factory.mktemp("own")
    return shutil.copytree(tiny, directory / "model"), Path(shutil.copy(text, directory / "text.jsonl"))


@pytest.fixture(scope="module")
def own(recipe: Recipe, moved: tuple[Path, Path]) -> Recipe:
    model, text = moved
    return replace(recipe, model=str(model), text=replace(recipe.text, source=str(text)), control=False)


@pytest.fixture(scope="module")
def killed(own: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed before step 12, with checkpoints of the steps 5 and 10."""
    directory = tmp_path_factory.mktemp("killed")
    (directory / "tiny.yaml").write_text(recipes.dump(own))
    kill = partial(kill_at, "finetune.sites.Sites.advance", 13)
    assert run_forked(partial(finetune, "tiny.yaml", "--out", "run", first=kill), directory).code == KILLED
    assert [path.name for path in checkpoints(directory / "run/checkpoints/ln_free")] == [
        "checkpoint-5",
        "checkpoint-10",
    ]
    return directory / "run"


@pytest.fixture
def cut(killed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(killed, tmp_path / "run")


@pytest.fixture(scope="module")
def uncut(own: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return remove_norms(recipe=own, out=tmp_path_factory.mktemp("uncut") / "run")


def assert_same(run: Run, uncut: Run) -> None:
    ours, theirs = (load_file(each.directory / "ln_free/model.safetensors") for each in (run, uncut))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    logs = [[line | {"seconds": 0, "teacher_seconds": 0} for line in read_log(each.directory)] for each in (run, uncut)]
    assert logs[0] == logs[1]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero_the_end(path: Path) -> None:
    """As some file systems leave what had not been written yet: as long as it was, and zero."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def spoil_line(path: Path, number: int, to: Callable[[bytes], bytes]) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number] = to(lines[number])
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", halve),
        ("model.safetensors", zero_the_end),
        ("trainer_state.json", empty),
        ("trainer_state.json", Path.unlink),
        ("optimizer.pt", halve),
        ("optimizer.pt", Path.unlink),
        ("scheduler.pt", zero_the_end),
        ("rng_state.pth", empty),
        ("log.jsonl", halve),
        ("files.json", empty),
    ],
)
def test_the_checkpoint_before_a_damaged_one_is_taken(file: str, damage, cut: Path, uncut: Run, capsys):
    damage(cut / "checkpoints/ln_free/checkpoint-10" / file)
    run = resume(cut)
    said = capsys.readouterr().out
    assert f"checkpoint-10: {file} is {'missing' if damage is Path.unlink else 'damaged'}" in said
    assert "continues from checkpoint-5" in said
    assert_same(run, uncut)
    assert [path.name for path in checkpoints(cut / "checkpoints/ln_free")] == ["checkpoint-15", "checkpoint-16"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_checkpoint_of_an_earlier_version_is_checked_by_opening_it(file: str, cut: Path, uncut: Run, capsys):
    for checkpoint in checkpoints(cut / "checkpoints/ln_free"):
        for name in ("files.json", "log.jsonl"):
            (checkpoint / name).unlink()
    (cut / "checkpoints/begun_with.json").unlink()
    halve(cut / "checkpoints/ln_free/checkpoint-10" / file)
    run = resume(cut)
    assert f"checkpoint-10: {file} is damaged" in capsys.readouterr().out
    assert_same(run, uncut)


@pytest.mark.parametrize(
    "damage",
    [
        partial(spoil_line, number=2, to=lambda line: b"x" + line),
        partial(spoil_line, number=7, to=lambda line: bytes(len(line) - 1) + b"\n"),
        partial(spoil_line, number=3, to=lambda line: line[:30] + b"\n"),
        empty,
        halve,
        Path.unlink,
    ],
)
def test_a_damaged_log_is_taken_from_the_checkpoint(damage, cut: Path, uncut: Run, capsys):
    damage(cut / "log.jsonl")
    run = resume(cut)
    assert "log.jsonl is damaged. Its copy in checkpoint-10 is used" in capsys.readouterr().out
    assert_same(run, uncut)


def test_half_a_line_at_the_end_is_no_damage(cut: Path, uncut: Run, capsys):
    with (cut / "log.jsonl").open("a") as file:
        file.write('{"model": "ln_fr')
    run = resume(cut)
    assert "damaged" not in capsys.readouterr().out
    assert_same(run, uncut)


def test_a_damaged_log_of_a_complete_run(uncut: Run, tmp_path: Path, capsys):
    directory = shutil.copytree(uncut.directory, tmp_path / "run")
    spoil_line(directory / "log.jsonl", 1, lambda line: line[:9] + b"\n")
    assert resume(directory).results.equals(uncut.results)
    assert "log.jsonl is damaged. Its copy in checkpoints/ln_free/checkpoint-16 is used" in capsys.readouterr().out
    shutil.rmtree(directory / "checkpoints")
    assert resume(directory).results.equals(uncut.results)
    assert "log.jsonl is damaged. 1 of its lines are skipped" in capsys.readouterr().out


def kill_in_the_control() -> None:
    mock.patch.stopall()  # here checkpoints do not stay
    kill_at("finetune.sites.Sites.advance", 16 + 8)


def test_a_finished_fit_leaves_no_checkpoints(own: Recipe, tmp_path: Path, run: Run, uncut: Run, monkeypatch, capsys):
    """While the control is trained, too; the rest goes on, and a damaged log is mended, all the same."""
    monkeypatch.setattr("finetune.removal.discard", discard)
    (tmp_path / "tiny.yaml").write_text(recipes.dump(replace(own, control=True)))
    ended = run_forked(partial(finetune, "tiny.yaml", "--out", "run", first=kill_in_the_control), tmp_path)
    assert ended.code == KILLED, ended.output
    directory = tmp_path / "run"
    weights = [path.relative_to(directory).as_posix() for path in directory.rglob("*.safetensors")]
    assert sorted(weights) == ["checkpoints/control/checkpoint-5/model.safetensors", "ln_free/model.safetensors"]
    shutil.copytree(
        uncut.directory / "checkpoints/ln_free/checkpoint-16", directory / "checkpoints/ln_free/checkpoint-16"
    )
    (directory / "checkpoints/ln_free/checkpoint-16/log.jsonl").unlink()  # as if killed before it was removed

    again = resume(directory)

    pd.testing.assert_frame_equal(*(each.results.drop(columns="trained_seconds") for each in (again, run)))
    assert {path.parent.name for path in directory.rglob("*.safetensors")} == {"ln_free", "control"}
    spoil_line(directory / "log.jsonl", 1, lambda line: line[:9] + b"\n")
    capsys.readouterr()
    assert resume(directory).results.equals(again.results)
    assert "log.jsonl is damaged. Its copy in checkpoints/control is used" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [Path.unlink, halve])
def test_without_a_whole_checkpoint_a_run_stops(damage, cut: Path, uncut: Run, capsys):
    for checkpoint in checkpoints(cut / "checkpoints/ln_free"):
        damage(checkpoint / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"No checkpoint .* checkpoint-5: optimizer\.pt is .*--anyway"):
        resume(cut)
    run = resume(cut, anyway=True)
    start = "checkpoint-10" if damage is Path.unlink else "the first step"
    assert f"continues from {start}." in capsys.readouterr().out
    assert [line["step"] for line in read_log(cut)] == list(range(16))
    if damage is halve:
        assert_same(run, uncut)


def change_text(run: Path, model: Path, text: Path) -> str:
    lines = text.read_text().splitlines(keepends=True)
    text.write_text("".join([*lines[:30], json.dumps({"text": "Something else altogether."}) + "\n", *lines[31:]]))
    return "the training text was .* tokens and is .* tokens"


def change_a_word(run: Path, model: Path, text: Path) -> str:
    lines = text.read_text().splitlines(keepends=True)
    text.write_text("".join([lines[1], lines[0], *lines[2:]]))
    return "the training text has changed"


def change_weights(run: Path, model: Path, text: Path) -> str:
    weights = load_file(model / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.bias"][3] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return "the model's weights have changed"


def change_config(run: Path, model: Path, text: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    return "the model's activation_function was gelu_new and is relu"


def change_recipe(run: Path, model: Path, text: Path, field: str = "batch", old: str = "4", new: str = "8") -> str:
    content = (run / "recipe.yaml").read_text()
    assert f"{field}: {old}\n" in content
    (run / "recipe.yaml").write_text(content.replace(f"{field}: {old}\n", f"{field}: {new}\n"))
    return f"{field} was {old} and is {new}"


def forget(run: Path, model: Path, text: Path) -> str:
    (run / "checkpoints/begun_with.json").unlink()
    return r"begun_with\.json is missing"


def halve_memory(run: Path, model: Path, text: Path) -> str:
    halve(run / "checkpoints/begun_with.json")
    return r"begun_with\.json cannot be read"


@pytest.mark.parametrize(
    "change",
    [
        *(change_text, change_a_word, change_weights, change_config, change_recipe, forget, halve_memory),
        partial(change_recipe, field="seed", old="0", new="1"),
        partial(change_recipe, field="weight_decay", old="0.01", new="0.5"),
    ],
)
def test_a_run_that_is_not_what_it_was_stops(change, cut: Path, moved: tuple[Path, Path], tmp_path: Path, capsys):
    kept = [shutil.copytree(moved[0], tmp_path / "model"), shutil.copy(moved[1], tmp_path / "text")]
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    try:
        message = change(cut, *moved)
        with pytest.raises(ChangedError, match=message):
            resume(cut)
        touched = {"recipe.yaml", "begun_with.json", ".lock"}
        assert all(path.read_bytes() == content for path, content in before.items() if path.name not in touched)
        resume(cut, anyway=True)
        assert "continuing although the run has changed" in capsys.readouterr().out
        resume(cut)
    finally:
        shutil.copytree(kept[0], moved[0], dirs_exist_ok=True)
        shutil.copy(kept[1], moved[1])


def test_what_changes_no_weights_may_change(cut: Path, moved: tuple[Path, Path], uncut: Run, tmp_path: Path):
    """Where model and text lie, how often the log is written, and what is done with the model."""
    for field, old, new in (("save_every", "5", "4"), ("max_rise", "3.0", "9.0"), ("name", "tiny", "other")):
        change_recipe(cut, *moved, field=field, old=old, new=new)
    model, text = shutil.copytree(moved[0], tmp_path / "elsewhere"), shutil.copy(moved[1], tmp_path / "other.jsonl")
    content = (cut / "recipe.yaml").read_text()
    (cut / "recipe.yaml").write_text(content.replace(str(moved[0]), str(model)).replace(str(moved[1]), str(text)))
    assert_same(resume(cut), uncut)


@pytest.mark.parametrize("change", [change_text, change_weights])
def test_a_stream_that_is_not_what_it_was_stops(change, own: Recipe, moved: tuple[Path, Path], tmp_path: Path):
    model, text = shutil.copytree(moved[0], tmp_path / "model"), Path(shutil.copy(moved[1], tmp_path / "text.jsonl"))
    stream = replace(own.text, source=str(text), streaming=True, held_out_blocks=8)
    run = remove_norms(recipe=replace(own, model=str(model), text=stream), out=tmp_path / "run")
    change(run.directory, model, text)
    with pytest.raises(ChangedError, match=r"bytes and is|weights have changed"):
        resume(run.directory)
    resume(run.directory, anyway=True)


def test_the_command_says_it_in_a_line(cut: Path, moved: tuple[Path, Path]):
    change_recipe(cut, *moved, field="lr", old="0.003", new="0.002")
    stopped = run_forked(partial(finetune, "resume", cut), cut.parent)
    assert stopped.code == 1
    assert "error: " in stopped.output
    assert "lr was 0.003 and is 0.002" in stopped.output
    assert "Traceback" not in stopped.output
    assert run_forked(partial(finetune, "resume", cut, "--anyway"), cut.parent).code == 0


def test_what_is_sealed_is_on_the_disk(own: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every file of a checkpoint, before the checkpoint has its name."""
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    run = remove_norms(recipe=own, out=tmp_path / "run")
    last = checkpoints(run.directory / "checkpoints/ln_free")[-1]
    partial_directory = last.parent / "partial" / last.name
    assert {str(partial_directory / path.name) for path in last.iterdir()} <= synced
    assert str(last.parent) in synced


@pytest.mark.parametrize("what", ["log.jsonl", "checkpoints", "checkpoints/ln_free/checkpoint-10"])
def test_links_out_of_a_run_directory_are_not_followed(what: str, cut: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    (cut / what).rename(elsewhere)
    (cut / what).symlink_to(elsewhere)
    with pytest.raises(NolnError, match=r"is a symbolic link out of the run directory"):
        resume(cut)
    (cut / what).unlink()
    elsewhere.rename(cut / what)
    (tmp_path / "linked").symlink_to(cut)
    resume(tmp_path / "linked")


def test_runs_of_the_same_second_have_directories_of_their_own(
    own: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("finetune.run_directory.time.strftime", lambda _: "now")
    made = [make(new_directory(replace(own, name="../up/tiny"), None), None) for _ in range(3)]
    assert [path.relative_to(tmp_path).as_posix() for path in made] == [
        "runs/..-up-tiny-now",
        "runs/..-up-tiny-now-2",
        "runs/..-up-tiny-now-3",
    ]


@pytest.mark.parametrize("cache", ["/proc/nowhere", "file/cache"])
def test_a_cache_or_an_out_that_cannot_be_written_is_named(
    cache: str, own: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    place = Path(cache) if cache.startswith("/") else tmp_path / cache
    with pytest.raises(NolnError, match=rf"The run directory {place}/run cannot be created.*--out"):
        make(place / "run", place / "run")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place)
    with pytest.raises(NolnError, match=rf"The cache {place} cannot be written to.*HF_DATASETS_CACHE"):
        remove_norms(recipe=own, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_takes_only_ascii(encoding: str, uncut: Run, tmp_path: Path):
    environment = os.environ | {
        "PYTHONIOENCODING": encoding,
        "PYTHONPATH": str(Path(finetune_package.__file__).parents[1]),
    }
    for command in (["resume", uncut.directory], ["list"], ["list", "pretrain"], ["run", "--help"], ["show", "micro"]):
        ended = subprocess.run(
            [sys.executable, "-m", "finetune", *command],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        assert b"Traceback" not in ended.stderr
        if command[0] == "resume":
            assert (" +- " if encoding == "ascii" else " ± ") in ended.stdout.decode(encoding)


def test_a_tilde_in_any_path_of_a_run(own: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(own.model, tmp_path / "model")
    shutil.copy(own.text.source, tmp_path / "text.jsonl")
    (tmp_path / "tiny.yaml").write_text(recipes.dump(replace(own, control=True, control_from="~/model")))
    run = remove_norms("~/model", text="~/text.jsonl", recipe="~/tiny.yaml", out="~/runs/mine")
    assert run.directory == tmp_path / "runs/mine"
    assert resume("~/runs/mine").results.equals(run.results)
    assert recipes.load(run.directory / "recipe.yaml").control_from == str(tmp_path / "model")
