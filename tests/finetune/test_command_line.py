import contextlib
import importlib.metadata
import itertools
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from helpers import at_call, finetune, read_log, run_forked
from models import tiny_gpt2
from safetensors.torch import load_file

from finetune import recipe as recipes
from finetune.__main__ import main
from finetune.recipe import Recipe, Training
from finetune.run_directory import Run


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick(recipe: Recipe, tmp_path: Path) -> Path:
    """The recipe as a file, without its control."""
    path = tmp_path / "tiny.yaml"
    path.write_text(recipes.dump(replace(recipe, control=False)))
    return path


def call(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def error(*arguments: object) -> str:
    """What the command says on its way out, with the exit code 1 as whatever is not a number has."""
    with pytest.raises(SystemExit) as exit:
        call(*arguments)
    message = exit.value.code
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


class TestWithoutTorch:
    @pytest.mark.parametrize("arguments", [["--help"], ["list"], ["show", "micro"], ["run", "micro", "--help"]])
    def test_answers_at_once(self, arguments: list[str]):
        self.check(f"from finetune.__main__ import main\ntry:\n    main({arguments})\nexcept SystemExit: pass")

    def test_import(self):
        self.check("import finetune")

    def check(self, code: str) -> None:
        heavy = 'import sys; print(sorted({"torch", "transformers", "datasets", "accelerate"} & set(sys.modules)))'
        done = subprocess.run([sys.executable, "-c", f"{code}\n{heavy}"], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"
        assert done.stderr == ""


class TestCommands:
    @pytest.mark.parametrize("arguments", [[], ["--help"]])
    def test_help(self, arguments: list[str], capsys: pytest.CaptureFixture):
        call(*arguments)

        usage = capsys.readouterr().out
        for command in ("run [RECIPE]", "resume RUN", "list [pretrain]", "show [pretrain] RECIPE"):
            assert f"  python -m finetune {command}" in usage
        assert not Path("runs").exists()

    @pytest.mark.parametrize("command", ["", "list", "list pretrain", "run --help", "pretrain --help", "sweep --help"])
    def test_fits_into_80_columns(self, command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("COLUMNS", "80")
        with contextlib.suppress(SystemExit):
            call(*command.split())
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80

    def test_help_of_a_flag_is_one_paragraph(self, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
        """No line is broken before it is full."""
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit):
            call("run", "--help")
        lines = [line.replace("│", " ").rstrip() for line in capsys.readouterr().out.splitlines()]
        pairs = [pair for pair in itertools.pairwise(lines) if all(re.match(" {8}[^ ]", line) for line in pair)]
        assert len(pairs) > 50
        assert all(len(line) + 1 + len(following.split()[0]) > 78 for line, following in pairs)

    @pytest.mark.parametrize(("recipe", "default"), [("pre-ln", "none"), ("micro-neox", "intermediate_size 768")])
    def test_help_says_the_default_of_the_recipe(self, recipe: str, default: str, capsys: pytest.CaptureFixture):
        with pytest.raises(SystemExit):
            call("pretrain", recipe, "--help")
        said = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"where the name is the same. (default: {default})" in said

    def test_help_names_every_field(self, capsys: pytest.CaptureFixture):
        with pytest.raises(SystemExit):
            call("run", "--help")

        help = capsys.readouterr().out
        fields = [field for field in recipes.Recipe.__dataclass_fields__ if field not in ("name", "text", "schedule")]
        for flag in (*fields, "out", "text", "text.held-out", "schedule.gap.mlp", "no-control"):
            assert f"--{flag.replace('_', '-')}" in help, flag

    def test_list_and_show(self, capsys: pytest.CaptureFixture):
        call("list")
        names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
        assert "micro" in names
        for name in names:
            call("show", name)
            assert yaml.safe_load(capsys.readouterr().out)["name"] == name

    @pytest.mark.parametrize("command", ["resume", "show", "list"])
    def test_usage_of_those_without_flags(self, command: str, capsys: pytest.CaptureFixture):
        usage = f"usage: python -m finetune {command}"
        with pytest.raises(SystemExit) as exit:
            call(command, "--help")
        assert exit.value.code is None
        assert capsys.readouterr().out.startswith(usage)
        with pytest.raises(SystemExit, match=usage):
            call(command, "pretrian", "--out")

    def test_script_is_the_module(self):
        (script,) = importlib.metadata.entry_points(group="console_scripts", name="noln-finetune")
        assert script.load() is main


class TestRun:
    def test_flags_override_fields(self, quick: Path):
        call("run", quick, "--out", "run", "--seed", 3, "--lr", "1e-3", "--text.held-out-blocks", 4,
             "--schedule.gap.ln-f", 2, "--steps", 14)  # fmt: skip

        used = recipes.load("run/recipe.yaml")
        assert (used.seed, used.lr, used.text.held_out_blocks, used.schedule.gap.final) == (3, 1e-3, 4, 2)
        assert used.steps == 14

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ([], None),
            (["--bf16"], True),
            (["--no-bf16"], False),
            (["--bf16", "True"], True),
            (["--bf16", "None", "--compile"], None),
            (["--bf16=False"], False),
            (["--bf16", "--steps", "20"], True),
        ],
    )
    @pytest.mark.parametrize("command", ["run", "pretrain"])
    def test_booleans_that_may_be_none_are_flags(
        self, command: str, flags: list[str], expected: bool | None, monkeypatch: pytest.MonkeyPatch
    ):
        module = {"run": "removal", "pretrain": "pretrain"}[command]
        begun: list[Training] = []
        monkeypatch.setattr(f"finetune.{module}.start", lambda recipe, out: begun.append(recipe))
        monkeypatch.setattr("finetune.__main__._report", lambda run: None)
        call(command, "micro", *flags)
        assert begun[0].bf16 is expected

    def test_default_directory(self, quick: Path):
        call(quick, "--steps", 14)

        assert re.fullmatch(r"tiny-\d{8}-\d{6}", next(Path("runs").iterdir()).name)

    def test_steps_scale_the_rest(self, quick: Path):
        """Sites then share steps."""
        call(quick, "--out", "run", "--steps", 8)

        used = recipes.load("run/recipe.yaml")
        assert (used.warmup, used.schedule.start, used.schedule.gap.v) == (1, 1, 0.5)
        frozen = [line["frozen"] for line in read_log(Path("run"))]
        assert len(frozen) == 8
        assert frozen[1] == ["h.0.mlp", "h.1.mlp"]
        assert frozen[5] == ["merge position_0"]

    @pytest.mark.slow
    def test_own_recipe_replays_the_run(self, run: Run, tmp_path: Path):
        call(run.directory / "recipe.yaml", "--out", "again", "--no-control")

        again, first = (load_file(d / "ln_free/model.safetensors") for d in (tmp_path / "again", run.directory))
        for name, tensor in first.items():
            assert torch.equal(again[name], tensor), name

    def test_recipe_says_what_was_run(self, run: Run):
        saved = yaml.safe_load((run.directory / "recipe.yaml").read_text())

        assert saved["seed"] == 0
        assert {"began", "command", "versions", "git", "processes", "device"} == set(saved["run"])
        assert saved["run"]["versions"]["torch"] == torch.__version__

    def test_relative_paths_are_kept_absolute(self, quick: Path, tiny: Path, text: Path):
        shutil.copytree(tiny, "model")
        shutil.copy(text, "text.jsonl")

        call(quick, "--out", "run", "--model", "model", "--text", "text.jsonl")

        used = recipes.load("run/recipe.yaml")
        assert (used.model, used.text.source) == (str(Path("model").absolute()), str(Path("text.jsonl").absolute()))

    @pytest.mark.slow
    def test_no_control(self, quick: Path, capsys: pytest.CaptureFixture):
        call(quick, "--out", "run")

        assert not Path("run/control").exists()
        assert {line["model"] for line in read_log(Path("run"))} == {"ln_free"}
        printed = capsys.readouterr().out
        assert re.search(r"ln_free +\d\.\d{4} ± 0\.\d{4}", printed)
        assert "nan" not in printed
        assert "nan" not in Path("run/ln_free/README.md").read_text()

    @pytest.mark.slow
    def test_another_text_takes_the_place_of_what_is_held_out(self, quick: Path, text: Path):
        """A part of it is held out, unless the recipe names it or another text is named."""
        recipe = yaml.safe_load(quick.read_text())
        recipe["text"] |= {"held_out": "books-validation", "held_out_blocks": 4}
        quick.write_text(yaml.safe_dump(recipe))
        shutil.copy(text, "other.jsonl")

        call(quick, "--out", "1", "--text", "other.jsonl")
        call(quick, "--out", "2", "--text", text)
        call(quick, "--out", "3", "--text", "other.jsonl", "--text.held-out", "books-report")

        held_out = [recipes.load(f"{run}/recipe.yaml").text.held_out for run in (1, 2, 3)]
        assert held_out == [None, "books-validation", "books-report"]

    @pytest.mark.slow
    def test_one_document_has_no_standard_error(self, quick: Path, text: Path, capsys: pytest.CaptureFixture):
        Path("text.txt").write_text(text.read_text())

        call(quick, "--out", "run", "--text", "text.txt", "--control")

        for shown in (capsys.readouterr().out, Path("run/ln_free/README.md").read_text()):
            assert "of one document" in " ".join(shown.split())
            assert "nan" not in shown
            lines = [line for line in shown.splitlines() if re.search(r"control[ |]+\d\.\d{4}", line)]
            assert ["±" in line for line in lines] == [False, True]  # random tokens are many documents

    def test_interrupted(self, quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
        """How to go on is said, in place of a traceback."""
        monkeypatch.setattr("finetune.removal_trainer.RemovalTrainer.train", interrupt)

        with pytest.raises(SystemExit) as exit:
            call(quick, "--out", "run")

        assert exit.value.code == 130
        assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted: ")

    def test_control_of_an_earlier_run(self, quick: Path, run: Run):
        call(quick, "--out", "run", "--control", "--control-from", run.directory / "control")

        assert not Path("run/control").exists()
        ours = (Path("run") / "results.csv").read_text().splitlines()
        theirs = (run.directory / "results.csv").read_text().splitlines()
        for line, other in list(zip(ours, theirs, strict=True))[:2]:
            assert line == other
        assert ours[2].split(",")[:3] == theirs[2].split(",")[:3]


class TestRefused:
    """Each with a line that says what to do, and nothing is left behind."""

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, tmp_path: Path):
        yield
        assert not (tmp_path / "run").exists()
        assert not (tmp_path / "runs").exists()

    def test_unknown_recipe(self):
        assert "micro" in error("no-such-recipe")

    def test_unknown_field(self, quick: Path):
        quick.write_text(quick.read_text() + "stepz: 3\n")
        with pytest.raises(SystemExit, match=r"(?s)error: .*stepz"):
            call(quick, "--out", "run")

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--steps", 1], "schedule.start"),
            (["--steps", 0], "steps"),
            (["--batch", 3], "micro_batch"),
            (["--lr", 1e-9], "min_lr"),
            (["--warmup", 99], "warmup"),
            (["--schedule.gap.v", 7], "schedule"),
            (["--text.held-out-fraction", 2], "held_out_fraction"),
            (["--device", "cuda"], "device"),
            (["--revision", "main"], "revision"),
        ],
    )
    def test_contradiction(self, flags: list, said: str, quick: Path, capsys: pytest.CaptureFixture):
        with pytest.raises(SystemExit) as exit:
            call(quick, "--out", "run", *flags)
        message = exit.value.code if isinstance(exit.value.code, str) else capsys.readouterr().err
        assert said in message
        assert "Traceback" not in message

    def test_unknown_flag(self, quick: Path, capsys: pytest.CaptureFixture):
        with pytest.raises(SystemExit) as exit:
            call(quick, "--out", "run", "--learning-rate", 1)
        assert exit.value.code == 2
        assert "--learning-rate" in capsys.readouterr().err

    def test_missing_model(self, quick: Path):
        assert "no/such-model" in error(quick, "--out", "run", "--model", "no/such-model")

    def test_other_architecture(self, quick: Path, tmp_path: Path):
        (tmp_path / "bert").mkdir()
        config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
        (tmp_path / "bert/config.json").write_text(json.dumps(config))

        assert "BertForMaskedLM" in error(quick, "--out", "run", "--model", "bert")

    @pytest.mark.parametrize("spoil", ["cut", "text", "missing"])
    def test_corrupt_weights(self, spoil: str, quick: Path, tiny: Path):
        weights = Path(shutil.copytree(tiny, "spoilt")) / "model.safetensors"
        match spoil:
            case "cut":
                weights.write_bytes(weights.read_bytes()[:-1000])
            case "text":
                weights.write_text("not a tensor in it")
            case "missing":
                weights.unlink()

        assert "spoilt" in error(quick, "--out", "run", "--model", "spoilt")

    def test_weights_that_are_not_finite(self, quick: Path, tiny: Path, tokenizer):
        model = tiny_gpt2()
        model.transformer.wpe.weight.data[3] = torch.nan
        model.save_pretrained("spoilt")
        tokenizer.save_pretrained("spoilt")

        assert "transformer.wpe.weight" in error(quick, "--out", "run", "--model", "spoilt")

    def test_no_tokenizer(self, quick: Path):
        tiny_gpt2().save_pretrained("bare")

        assert "tokenizer" in error(quick, "--out", "run", "--model", "bare")

    def test_model_without_layernorm(self, quick: Path, run: Run):
        assert "frozen" in error(quick, "--out", "run", "--model", run.directory / "ln_free")

    def test_schedule_too_long_for_a_deeper_model(self, quick: Path, tiny: Path):
        """Said from its config: there are no weights to read."""
        shutil.copytree(tiny, "deep", ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads(Path("deep/config.json").read_text())
        Path("deep/config.json").write_text(json.dumps(config | {"n_layer": 12}))

        message = error(quick, "--out", "run", "--model", "deep")

        assert "37 sites" in message
        assert "--steps" in message

    def test_missing_text(self, quick: Path):
        assert "gone.jsonl" in error(quick, "--out", "run", "--text", "gone.jsonl")

    def test_short_text(self, quick: Path):
        Path("short.txt").write_text("Too short.")

        assert "short.txt" in error(quick, "--out", "run", "--text", "short.txt")

    def test_tokens_beyond_the_vocabulary(self, quick: Path, tokenizer):
        tiny_gpt2(vocab_size=300).save_pretrained("small")
        tokenizer.save_pretrained("small")

        assert "vocabulary of 300" in error(quick, "--out", "run", "--model", "small")

    def test_missing_control(self, quick: Path):
        assert "gone" in error(quick, "--out", "run", "--control", "--control-from", "gone")

    def test_resume_of_what_is_no_run(self):
        assert "recipe.yaml" in error("resume", "nowhere")


class TestDisk:
    def test_existing_directory_is_left_alone(self, quick: Path, tmp_path: Path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/kept").write_text("kept")

        assert "exists" in error(quick, "--out", "run")

        assert [path.read_text() for path in (tmp_path / "run").iterdir()] == ["kept"]

    def test_directory_that_cannot_be_made(self, quick: Path, tmp_path: Path):
        """Below a file, where not even the superuser can make one."""
        (tmp_path / "file").touch()

        assert "file/run" in error(quick, "--out", "file/run")

    @pytest.mark.slow
    def test_full_disk_leaves_the_last_good_checkpoint(self, quick: Path, run: Run, tmp_path: Path):
        full = run_forked(partial(finetune, quick, "--out", "run", first=fill_disk_at_second_checkpoint), tmp_path)

        assert full.code == 1
        assert "Traceback" not in full.output
        assert re.fullmatch(
            r"error: The checkpoint of step 10 cannot be written .*resume.*", full.output.splitlines()[-1]
        )
        saved = tmp_path / "run/checkpoints/ln_free"
        assert [path.name for path in saved.glob("checkpoint-*")] == ["checkpoint-5"]

        assert run_forked(partial(finetune, "resume", "run"), tmp_path).code == 0

        final = "ln_free/model.safetensors"
        assert (tmp_path / "run" / final).read_bytes() == (run.directory / final).read_bytes()

    @pytest.mark.slow
    def test_full_disk_at_export(self, quick: Path, tmp_path: Path):
        full = run_forked(partial(finetune, quick, "--out", "run", first=fill_disk_at_export), tmp_path)

        assert full.code == 1
        assert full.output.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in full.output
        assert not (tmp_path / "run/ln_free").exists()
        assert (tmp_path / "run/checkpoints/ln_free/checkpoint-16").exists()


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def fill_disk_at_second_checkpoint() -> None:
    at_call("finetune.removal_trainer.RemovalTrainer._save_checkpoint", 2, fill_disk)


def fill_disk_at_export() -> None:
    at_call("finetune.checkpoint.save", 1, fill_disk)


def fill_disk(*_: object, **__: object) -> None:
    """Have no file grow beyond what a log or a table needs, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
