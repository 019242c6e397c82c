import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import finetune, kill_at, read_log, run_forked
from models import tiny_gpt2
from safetensors.torch import load_file

from finetune import checkpoint, folding, remove_layernorm, remove_norms, resume, run_directory
from finetune import recipe as recipes
from finetune.bundled.__main__ import bundle
from finetune.errors import CheckpointError, NolnError
from finetune.processes import check_processes
from finetune.recipe import Recipe, Text
from finetune.removal import model_card, names_of, set_up
from finetune.run_directory import InUseError, Run, directory_lock, write_recipe
from finetune.sites import Sites
from finetune.text import TextError, load_text, random_blocks

KILLED = -signal.SIGKILL


def assert_equal_runs(one: Path, other: Path, *models: str) -> None:
    """Both left the same weights, constants, log and table, but for times."""
    for model in models or ("ln_free", "control"):
        kept = f"checkpoints/{model}/checkpoint-16"
        for directory in (model, *([kept] if (one / kept).exists() else [])):
            ours, theirs = (load_file(run / directory / "model.safetensors") for run in (one, other))
            assert ours.keys() == theirs.keys()
            for name in ours:
                assert torch.equal(ours[name], theirs[name]), (directory, name)
    logs = [[line | {"seconds": 0} for line in read_log(run)] for run in (one, other)]
    assert logs[0] == logs[1]
    tables = [pd.read_csv(run / "results.csv").drop(columns="trained_seconds") for run in (one, other)]
    pd.testing.assert_frame_equal(*tables)


def recipe_file(recipe: Recipe, directory: Path) -> Path:
    path = directory / "tiny.yaml"
    path.write_text(recipes.dump(recipe))
    return path


@pytest.fixture(scope="module")
def streamed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of a text that is streamed, without a control."""
    text = replace(recipe.text, streaming=True, held_out_blocks=8)
    return remove_layernorm(recipe=replace(recipe, text=text, control=False), out=tmp_path_factory.mktemp("s") / "run")


@pytest.fixture(scope="module")
def folded(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run, exported once more in the other format."""
    directory = shutil.copytree(run.directory, tmp_path_factory.mktemp("folded") / "run")
    shutil.rmtree(directory / "ln_free")
    file = directory / "recipe.yaml"
    file.write_text(file.read_text().replace("export_format: b25", "export_format: h24"))
    return resume(directory)


def write_half(_, path: str) -> None:
    Path(path).write_bytes(b"half")


@pytest.mark.slow
class TestResume:
    """A run that was killed and taken up again is the run that was not."""

    @pytest.mark.parametrize(
        "killed",
        [
            pytest.param(partial(kill_at, "finetune.sites.Sites.advance", 12), id="middle-of-schedule"),
            pytest.param(partial(kill_at, "finetune.sites.Sites.advance", 3), id="before-first-checkpoint"),
            # The Trainer saves arguments, optimizer, scheduler and generators with torch.save, in this order.
            pytest.param(partial(kill_at, "torch.save", 6, write_half), id="writing-checkpoint"),
            pytest.param(partial(kill_at, "shutil.rmtree", 7), id="dropping-old-checkpoint"),
            pytest.param(partial(kill_at, "finetune.sites.Sites.to_plain", 1), id="before-export"),
            pytest.param(partial(kill_at, "finetune.sites.Sites.advance", 16 + 8), id="control"),
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
        """Both as a user calls them: the table is on stdout, and nothing warns."""
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

        again = [sys.executable, "-m", "finetune", "resume", "run"]
        resumed = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=True)

        assert_equal_runs(tmp_path / "run", run.directory)
        for row in run.results.to_dict("records"):
            assert f"{row['loss']:.4f} ± {row['loss_error']:.4f}" in resumed.stdout
        assert f"Everything is in {tmp_path / 'run'}" in resumed.stdout
        assert "Warning" not in resumed.stderr

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

    @pytest.mark.parametrize(
        "killed",
        [
            pytest.param(partial(kill_at, "finetune.sites.Sites.advance", 12), id="middle-of-schedule"),
            pytest.param(partial(kill_at, "finetune.sites.Sites.to_plain", 1), id="before-export"),
        ],
    )
    def test_streamed_text(self, killed, streamed: Run, tmp_path: Path):
        """Neither read again from its beginning, nor on after the last step."""
        name = streamed.directory / "recipe.yaml"
        assert run_forked(partial(finetune, name, "--out", "run", first=killed), tmp_path).code == KILLED

        resumed = resume(tmp_path / "run")

        assert_equal_runs(resumed.directory, streamed.directory, "ln_free")
        assert len(read_log(resumed.directory)) == 16

    def test_complete_run_is_only_compared_again(self, recipe: Recipe, run: Run, tmp_path: Path):
        directory = shutil.copytree(run.directory, tmp_path / "run")
        (directory / "results.csv").unlink()
        times = {path: path.stat().st_mtime_ns for path in directory.rglob("*.safetensors")}

        resume(directory)

        assert_equal_runs(directory, run.directory)
        assert {path: path.stat().st_mtime_ns for path in directory.rglob("*.safetensors")} == times


class TestExport:
    def test_run_directory(self, run: Run):
        assert {path.name for path in run.directory.iterdir()} == {
            "recipe.yaml", "log.jsonl", "checkpoints", "ln_free", "control", "documents.csv", "results.csv"
        }  # fmt: skip

    def test_table(self, run: Run, recipe: Recipe):
        table = pd.read_csv(run.directory / "results.csv")

        measures = [f"{m}{e}" for m in ("loss", "gap", "kl", "jsd") for e in ("", "_error")]
        counts = ["loss_max", "tokens", "documents", "trained_tokens", "trained_seconds"]
        assert list(table) == ["text", "model", *measures, *counts]
        assert list(table["text"]) == ["held-out"] * 3 + ["random-tokens"] * 3
        assert list(table["model"]) == ["original", "control", "ln_free"] * 2
        assert list(table["trained_tokens"]) == [0, 1024, 1024] * 2
        pd.testing.assert_frame_equal(table, run.results)
        documents = pd.read_csv(run.directory / "documents.csv")
        assert documents.groupby(["text", "model"], sort=False).ngroups == 6

    def test_losses_are_those_of_the_models(self, run: Run, recipe: Recipe, tokenizer):
        """By transformers' own loss, which takes the mean over the same tokens."""
        held_out = load_text(recipe.text, tokenizer, 16, 4096).held_out
        random = random_blocks(tokenizer, 16, 4096, min(60, recipe.text.held_out_blocks))
        for text, blocks in (("held-out", held_out), ("random-tokens", random)):
            ids = torch.from_numpy(blocks.blocks.astype(np.int64))
            for row in run.results[run.results["text"] == text].to_dict("records"):
                with torch.no_grad():
                    output = run.load(row["model"])(ids, labels=ids)
                each = torch.nn.functional.cross_entropy(output.logits[:, :-1].mT, ids[:, 1:], reduction="none")
                assert row["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
                assert row["loss_max"] == pytest.approx(each.max().item(), rel=1e-5)
                assert row["tokens"] == each.numel()

    def test_more_texts(self, recipe: Recipe, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """By the names of their files, which are other ones once the run goes on from its recipe."""
        monkeypatch.chdir(tmp_path)
        for directory in ("a", "b"):
            Path(directory).mkdir()
            shutil.copy(text, f"{directory}/same.jsonl")
        shutil.copy(text, "other.jsonl")
        quick = replace(recipe, control=False, also=("a/same.jsonl", "b/same.jsonl", "other.jsonl"))
        run = remove_norms(recipe=quick, out="run")
        same = [str(tmp_path / directory / "same.jsonl") for directory in ("a", "b")]
        assert list(run.results["text"].unique()) == ["held-out", "random-tokens", *same, "other.jsonl"]
        losses = run.results[run.results["model"] == "ln_free"].set_index("text")["loss"]
        assert losses["other.jsonl"] == losses[same[0]] == losses[same[1]] != losses["random-tokens"]
        Path("run/results.csv").unlink()
        pd.testing.assert_frame_equal(resume(Path("run")).results, run.results)

    def test_a_file_is_not_taken_for_what_is_held_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        Path("held-out").touch()
        assert names_of(("held-out", "books-report")) == {
            "held-out": str(tmp_path / "held-out"),
            "books-report": "books-report",
        }

    def test_a_text_that_is_missing_is_said_before_the_run(self, recipe: Recipe, tmp_path: Path):
        (tmp_path / "short.txt").write_text("Too short.")
        with pytest.raises(TextError, match=r"short\.txt"):
            remove_norms(recipe=replace(recipe, also=(str(tmp_path / "short.txt"),)), out=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_control_is_an_ordinary_model(self, run: Run, tiny: Path):
        control = run.load("control")

        assert folding.norm_state(control) == "live"
        ours, original = (json.loads((path / "config.json").read_text()) for path in (run.directory / "control", tiny))
        assert ours["layer_norm_epsilon"] == original["layer_norm_epsilon"] == 1e-5
        assert ours["attn_pdrop"] == original["attn_pdrop"]

    def test_plain_transformers_loads_what_was_trained(self, run: Run, folded: Run, tokenizer, tmp_path: Path):
        """Both formats and the control, in a process without this package, against the model of the last step."""
        tokens = torch.randint(4096, (2, 16), generator=torch.Generator().manual_seed(0))
        np.save(tmp_path / "tokens.npy", tokens)
        models = [run.directory / "ln_free", folded.directory / "ln_free", run.directory / "control"]
        script = """
import sys
sys.modules["finetune"] = None
import numpy, torch
from transformers import AutoTokenizer, GPT2LMHeadModel
tokens = torch.from_numpy(numpy.load("tokens.npy"))
for i, path in enumerate(sys.argv[1:]):
    model, info = GPT2LMHeadModel.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    numpy.save(f"{i}.npy", model(tokens).logits.detach())
    assert AutoTokenizer.from_pretrained(path).decode([17, 18])
"""
        subprocess.run([sys.executable, "-W", "error:::finetune", "-c", script, *models], cwd=tmp_path, check=True)

        for i, (directory, name) in enumerate([(run, "ln_free"), (run, "ln_free"), (run, "control")]):
            trained = tiny_gpt2()
            Sites(trained, tokenizer.eos_token_id)
            state = load_file(directory.directory / f"checkpoints/{name}/checkpoint-16/model.safetensors")
            assert trained.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
            with torch.no_grad():
                logits = trained(tokens).logits.numpy()
            np.testing.assert_allclose(np.load(tmp_path / f"{i}.npy"), logits, atol=1e-5 * np.abs(logits).max())

    def test_folded_format(self, folded: Run):
        block = folded.load("ln_free").transformer.h[0]

        assert (block.ln_1.weight == 1e6).all()
        assert (block.ln_2.bias == 0).all()

    @pytest.mark.parametrize("name", ["ln_free", "control"])
    def test_model_card(self, name: str, run: Run, recipe: Recipe):
        card = (run.directory / name / "README.md").read_text()

        _, front, body = card.split("---\n", 2)
        assert "base_model" not in yaml.safe_load(front)  # for it would be a name on the Hub
        assert f"Base model: {Path(recipe.model).name};" in body
        assert f"`{Path(recipe.text.source).name}`" in body
        for local in (recipe.model, recipe.text.source):  # the rest of whose paths is not to be published
            assert str(Path(local).parent) not in card
        assert ("layernorm-free" in yaml.safe_load(front)["tags"]) == (name == "ln_free")
        for row in run.results.to_dict("records"):
            assert f"| {row['text']} | {row['model']} | {row['loss']:.4f} ± " in body
            assert f" | {row['loss_max']:.1f} | " in body
        assert "16 steps of 4 sequences, 1,024 tokens; dropout 0; seed 0" in body
        assert ("| 8 | final |" in body) == (name == "ln_free")
        assert "nan" not in body

    def test_model_card_names_a_base_model_on_the_hub(self, run: Run, recipe: Recipe):
        setup = set_up(recipe)
        on_hub = replace(recipe, model="someone/gpt2", text=Text("someone/text"))
        card = model_card(replace(setup, recipe=on_hub), run.directory, "ln_free", run.results, [])

        _, front, body = card.split("---\n", 2)
        assert yaml.safe_load(front)["base_model"] == "someone/gpt2"
        assert "Base model: `someone/gpt2`;" in body
        assert "Text: `someone/text`," in body

    def test_pushes_the_ln_free_model(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        hub = mock.Mock()
        monkeypatch.setattr("finetune.run_directory.HfApi", lambda: hub)
        directory = shutil.copytree(run.directory, tmp_path / "run")
        file = directory / "recipe.yaml"
        file.write_text(file.read_text().replace("push_to_hub: null", "push_to_hub: someone/model"))

        resume(directory)

        hub.create_repo.assert_called_once_with("someone/model", exist_ok=True)
        hub.upload_folder.assert_called_once_with(repo_id="someone/model", folder_path=directory / "ln_free")


class TestPython:
    @pytest.mark.slow
    def test_model_in_memory_stays_as_it_is(self, recipe: Recipe, run: Run, tokenizer, tmp_path: Path):
        """Dtype, mode, weights and modules; and the run is that of the model on disk."""
        model = tiny_gpt2().train()
        before = copy.deepcopy(model)

        ours = remove_layernorm(model, tokenizer, recipe=recipe, out=tmp_path / "run")

        assert model.training
        assert model.config.to_dict() == before.config.to_dict()
        assert str(model) == str(before)
        for name, parameter in before.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter)
        assert_equal_runs(ours.directory, run.directory)
        for name, parameter in ours.load("original").named_parameters():
            assert torch.equal(before.get_parameter(name), parameter)
        cards = [(ours.directory / "ln_free/README.md").read_text()]
        resume(ours.directory)
        cards.append((ours.directory / "ln_free/README.md").read_text())
        assert cards[0] == cards[1]
        assert "base_model" not in cards[0]
        assert "Base model: a local model;" in cards[0]

    def test_half_precision_model_is_trained_in_full(self, recipe: Recipe, tokenizer, tmp_path: Path):
        model = tiny_gpt2().to(torch.bfloat16)

        run = remove_layernorm(model, tokenizer, recipe=replace(recipe, control=False), out=tmp_path / "run")

        assert model.dtype == torch.bfloat16
        weights = load_file(run.directory / "ln_free/model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert (weights["transformer.wpe.weight"] != weights["transformer.wpe.weight"].bfloat16()).any()

    def test_needs_the_tokenizer_of_a_model_in_memory(self, recipe: Recipe, tmp_path: Path):
        with pytest.raises(CheckpointError, match="tokenizer"):
            remove_layernorm(tiny_gpt2(), recipe=recipe, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_names(self, recipe: Recipe, tiny: Path, text: Path, tmp_path: Path):
        """A model and a text by name take the place of the recipe's."""
        file = recipe_file(replace(recipe, model="elsewhere", revision="main", control=False), tmp_path)

        run = remove_layernorm(str(tiny), text=text, recipe=file, out=tmp_path / "run")

        used = recipes.load(run.directory / "recipe.yaml")
        assert (used.model, used.revision, used.text.source) == (str(tiny), None, str(text))
        assert folding.norm_state(run.load("ln_free")) == "frozen"

    def test_contradiction_is_a_recipe_error(self, recipe: Recipe):
        with pytest.raises(recipes.RecipeError, match="micro_batch"):
            replace(recipe, micro_batch=3)

    def test_trio(self, run: Run, tiny: Path):
        states = [folding.norm_state(run.load(name)) for name in ("original", "control", "ln_free")]

        assert states == ["live", "live", "frozen"]
        assert run.load("original").transformer.wte.weight.equal(tiny_gpt2().transformer.wte.weight)


def test_batch_that_cannot_be_shared(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    three = mock.Mock(num_processes=3, device=torch.device("cpu"))
    for module in ("run_directory", "processes"):
        monkeypatch.setattr(f"finetune.{module}.PartialState", lambda **_: three)
    monkeypatch.setattr("finetune.run_directory.broadcast_object_list", lambda objects: objects)

    with pytest.raises(recipes.RecipeError, match=r"3 processes .*\. Change batch or the number of processes"):
        remove_layernorm(recipe=recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(recipes.RecipeError, match=r"in micro-batches of 3\. Set micro_batch to 2"):
        check_processes(replace(recipe, batch=12, micro_batch=3))
    check_processes(replace(recipe, batch=12, micro_batch=2))


@pytest.mark.parametrize("name", [name for name in recipes.shipped() if name.startswith("gpt2")])
def test_several_processes_share_the_batches_of_shipped_recipes(name: str):
    recipe = recipes.load(name)
    most = 2 if name == "gpt2-medium-b25" else 8  # 506 = 2 · 11 · 23
    for processes in (2, 4, 8):
        assert (recipe.batch % (recipe.micro_batch * processes) == 0) == (processes <= most)


def test_what_is_held_out_goes_with_the_text():
    recipe = recipes.load("micro")
    assert recipes.with_text(recipe, recipe.text.source) == recipe
    assert recipes.with_text(recipe, "other.txt").text == replace(recipe.text, source="other.txt", held_out=None)
    parrot = recipes.load_pretraining("codeparrot-18l")
    assert recipes.with_text(parrot, "other.txt").text == Text("other.txt", streaming=True)


def test_a_model_of_one_layer_is_fitted_to_the_original(recipe: Recipe, tokenizer, tmp_path: Path):
    """It has no stream between blocks to match."""
    one = replace(recipe, steps=8, match_weight=10.0, kl_weight=1.0, control=False)
    run = remove_layernorm(tiny_gpt2(n_layer=1), tokenizer, recipe=one, out=tmp_path / "run")
    assert folding.norm_state(run.load("ln_free")) == "frozen"


def test_bundling_takes_the_place_of_what_is_bundled_only_when_it_is_whole(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = ("tiny-control", "tiny-ln-free")
    monkeypatch.setattr("finetune.bundled.__main__.ROOT", tmp_path)
    monkeypatch.setattr("finetune.bundled.__main__.MODELS", {name: tmp_path / name for name in (*names, "other")})
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    without_card = shutil.copytree(run.directory, tmp_path / "run")
    (without_card / "control/README.md").unlink()
    with pytest.raises(FileNotFoundError):
        bundle(without_card)
    assert (tmp_path / "tiny-control/old").exists()

    bundle(run.directory)

    for name, made in zip(names, ("control", "ln_free"), strict=True):
        assert not (tmp_path / name / "old").exists()
        stored = load_file(tmp_path / name / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values() if tensor.ndim == 2} == {torch.float16}
        bundled = checkpoint.load(tmp_path / name)
        assert bundled.dtype == torch.float32
        for ours, theirs in zip(bundled.parameters(), run.load(made).parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert not (tmp_path / "other").exists()


def test_a_run_that_is_not_bundled_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("finetune.bundled.__main__.MODELS", {"tiny": Path("micro"), "micro-ln-free": Path("micro")})
    with pytest.raises(NolnError, match=r"a run of the recipe tiny, contains none of the models tiny, micro-ln-free\."):
        bundle(run.directory)


class TestDirectory:
    def test_is_held_by_one_process(self, run: Run, tmp_path: Path):
        directory = shutil.copytree(run.directory, tmp_path / "run")
        with (
            directory_lock(directory / "checkpoints"),
            pytest.raises(InUseError, match="Another process is writing into"),
        ):
            resume(directory)
        resume(directory)

    def test_is_left_whole_where_neither_git_nor_the_package_is_installed(
        self, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        def version(name: str) -> str:
            raise PackageNotFoundError(name)

        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("importlib.metadata.version", version)
        write_recipe(recipe, tmp_path)
        said = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["run"]
        assert said["git"] is None
        assert said["versions"]["noln"] is None
        assert recipes.load_run(tmp_path).steps == recipe.steps

    def commit_in_recipe(self, recipe: Recipe, directory: Path) -> str | None:
        directory.mkdir()
        write_recipe(recipe, directory)
        return yaml.safe_load((directory / "recipe.yaml").read_text())["run"]["git"]

    def test_git_state_is_this_packages(self, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Not that of a repository that it is installed in."""
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        commit = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "m"]
        subprocess.run(commit, cwd=tmp_path, check=True)
        (tmp_path / "run_directory.py").touch()
        monkeypatch.setattr(run_directory, "__file__", str(tmp_path / "run_directory.py"))
        assert self.commit_in_recipe(recipe, tmp_path / "outside") is None
        subprocess.run(["git", "add", "run_directory.py"], cwd=tmp_path, check=True)
        assert re.fullmatch(r"[0-9a-f]{12}-dirty", self.commit_in_recipe(recipe, tmp_path / "inside") or "")
