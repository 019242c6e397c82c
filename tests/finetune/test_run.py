import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import at_call, finetune, kill_at, read_log, run_forked, tiny_gpt2
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from finetune import checkpoint, recipe as recipes
from finetune.recipe import Recipe
from finetune.run import Run, remove_layernorm
from finetune.sites import Sites

KILLED = -signal.SIGKILL


def assert_equal_runs(one: Path, other: Path) -> None:
    """Both left the same weights, constants, log and table, but for times."""
    for file in (
        *(f"{name}/model.safetensors" for name in ("ln_free", "control")),
        *(f"checkpoints/{name}/checkpoint-16/model.safetensors" for name in ("ln_free", "control")),
    ):
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (file, name)
    logs = [[line | {"seconds": 0} for line in read_log(run)] for run in (one, other)]
    assert logs[0] == logs[1]
    tables = [pd.read_csv(run / "results.csv").drop(columns="trained_seconds") for run in (one, other)]
    pd.testing.assert_frame_equal(*tables)


def recipe_file(recipe: Recipe, directory: Path) -> Path:
    path = directory / "tiny.yaml"
    path.write_text(recipes.dump(recipe))
    return path


def write_half(_, path: str) -> None:
    Path(path).write_bytes(b"half")


class TestResume:
    """A run that was killed and taken up again is the run that was not."""

    @pytest.mark.parametrize(
        "killed",
        [
            pytest.param(partial(kill_at, "finetune.sites.Sites.advance", 12), id="middle-of-schedule"),
            pytest.param(partial(kill_at, "finetune.sites.Sites.advance", 3), id="before-first-checkpoint"),
            # The Trainer saves arguments, optimizer, scheduler and generators with torch.save, in this order.
            pytest.param(partial(kill_at, "torch.save", 6, write_half), id="writing-checkpoint"),
            pytest.param(partial(kill_at, "transformers.TrainerState.save_to_json", 2), id="checkpoint-all-but-whole"),
            pytest.param(partial(kill_at, "shutil.rmtree", 4, None), id="dropping-old-checkpoint"),
            pytest.param(partial(kill_at, "finetune.sites.Sites.to_plain", 1), id="before-export"),
            pytest.param(partial(kill_at, "finetune.run.fit", 2), id="before-control"),
            pytest.param(partial(kill_at, "finetune.sites.Sites.advance", 16 + 8), id="control"),
            pytest.param(partial(kill_at, "finetune.evaluate.compare", 1), id="before-table"),
        ],
    )
    def test_killed_and_resumed_equals_uninterrupted(self, killed, recipe: Recipe, run: Run, tmp_path: Path):
        name = recipe_file(recipe, tmp_path)
        assert run_forked(partial(finetune, name, "--out", "run", first=killed), tmp_path).code == KILLED
        assert not (tmp_path / "run" / "results.csv").exists()

        resumed = run_forked(partial(finetune, "resume", "run"), tmp_path)

        assert resumed.code == 0, resumed.output
        assert_equal_runs(tmp_path / "run", run.directory)

    def test_killed_from_outside(self, recipe: Recipe, run: Run, tmp_path: Path):
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune", recipe_file(recipe, tmp_path), "--out", "run"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not (tmp_path / "run/checkpoints/ln_free/checkpoint-5").exists() and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == KILLED

        assert run_forked(partial(finetune, "resume", "run"), tmp_path).code == 0

        assert_equal_runs(tmp_path / "run", run.directory)

    def test_leftovers_are_passed_over(self, recipe: Recipe, run: Run, tmp_path: Path):
        """Half-written checkpoints, under another name or their own, and half a line of the log."""
        directory = shutil.copytree(run.directory, tmp_path / "run")
        for name in ("ln_free", "control", "results.csv"):
            move = shutil.rmtree if (directory / name).is_dir() else os.remove
            move(directory / name)
        saved = directory / "checkpoints/ln_free"
        (saved / "checkpoint-16/trainer_state.json").unlink()
        shutil.copytree(saved / "checkpoint-16", saved / "partial/checkpoint-16")
        shutil.rmtree(directory / "checkpoints/control")
        log = directory / "log.jsonl"
        log.write_text(log.read_text()[:-20])

        assert_equal_runs(resume(directory).directory, run.directory)

    def test_streamed_text(self, recipe: Recipe, tmp_path: Path):
        """From the middle, and after the last step: a stream has no end that would stop it."""
        streamed = replace(recipe, text=replace(recipe.text, streaming=True, held_out_blocks=8), control=False)
        whole = remove_layernorm(recipe=streamed, out=tmp_path / "whole").directory
        final = "checkpoints/ln_free/checkpoint-16/model.safetensors"
        for last in (10, 16):
            part = shutil.copytree(whole, tmp_path / f"from-{last}")
            shutil.rmtree(part / "ln_free")
            if last < 16:
                shutil.rmtree(part / "checkpoints/ln_free/checkpoint-16")
                shutil.rmtree(part / "checkpoints/ln_free/checkpoint-15")
                shutil.copytree(TestResume.checkpoint_10(streamed, tmp_path), part / "checkpoints/ln_free/checkpoint-10")
            resume(part)
            assert load_file(part / final)["transformer.wte.weight"].equal(
                load_file(whole / final)["transformer.wte.weight"]
            )
            assert [line["loss"] for line in read_log(part)] == [line["loss"] for line in read_log(whole)]
