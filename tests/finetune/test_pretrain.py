import json
import math
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import finetune, kill_at, pretrain_recipe, read_log, run_forked
from safetensors.torch import load_file
from test_trainer import in_two_processes
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from finetune import blocks, checkpoint, folding, resume
from finetune import recipe as recipes
from finetune.__main__ import main
from finetune.blocks import BlocksForCausalLM
from finetune.bundled import MODELS
from finetune.errors import CheckpointError
from finetune.objective import NextTokenLoss, next_token_loss
from finetune.pretrain import pretrain, set_up
from finetune.recipe import PretrainRecipe, RecipeError, Text
from finetune.removal import set_up as set_up_removal
from finetune.run_directory import Run
from finetune.training import DivergedError

SHIPPED = recipes.shipped(PretrainRecipe)
NAMES = get_args(recipes.Block)


@pytest.fixture(scope="module")
def recipe(text: Path) -> PretrainRecipe:
    return pretrain_recipe(text)


@pytest.fixture(scope="module")
def pre_ln(recipe: PretrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return pretrain(recipe, out=tmp_path_factory.mktemp("runs") / "pre-ln")


@pytest.fixture(scope="module")
def nonorm(recipe: PretrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return pretrain(replace(recipe, block="skipless-nonorm"), out=tmp_path_factory.mktemp("runs") / "nonorm")


def last_state(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "checkpoints/model/checkpoint-12/model.safetensors")


def trained(recipe: PretrainRecipe, directory: Path) -> BlocksForCausalLM:
    """The model of the last step, as the trainer saved it."""
    model = set_up(recipe).model.eval()
    assert set(model.load_state_dict(last_state(directory), strict=False).missing_keys) <= {"unembed.weight"}
    return model


def assert_equal_runs(one: Path, other: Path) -> None:
    """Both left the same weights, log and table, but for times."""
    for directory in ("model", "checkpoints/model/checkpoint-12"):
        ours, theirs = (load_file(run / directory / "model.safetensors") for run in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    logs = [[line | {"seconds": 0} for line in read_log(run)] for run in (one, other)]
    assert logs[0] == logs[1]
    times = ["trained_seconds", "steps_per_second"]
    pd.testing.assert_frame_equal(*(pd.read_csv(run / "results.csv").drop(columns=times) for run in (one, other)))


NORMS = {f"{norm}.{part}" for norm in ("ln1", "ln2") for part in ("weight", "bias")}
MATRICES = {f"{matrix}.{part}" for matrix in ("attn.qk", "mlp.fc", "mlp.proj") for part in ("weight", "bias")}
VALUES = {f"attn.{matrix}.{part}" for matrix in "vo" for part in ("weight", "bias")}
SHAPED = {f"attn.{gain}.value" for gain in ("alpha", "beta", "gamma")} | {"attn_gain.value", "mlp_gain.value"}
QK_NORMS = {"attn.q_norm.weight", "attn.k_norm.weight"}
IN_BLOCK_1 = {
    "pre-ln": NORMS | MATRICES | VALUES,
    "post-ln": NORMS | MATRICES | VALUES,
    "parallel": {"ln1.weight", "ln1.bias"} | MATRICES | VALUES,
    "v-skipinit": NORMS | MATRICES | VALUES | SHAPED | {"mlp_skip_gain.value"},
    "skipless": NORMS | MATRICES | SHAPED | {"mlp_skip_gain.value"},
    "skipless-parallel": {"ln1.weight", "ln1.bias"} | MATRICES | SHAPED,
    "skipless-nonorm": MATRICES | SHAPED | QK_NORMS | {"mlp_skip_gain.value"},
    "skipless-parallel-nonorm": MATRICES | SHAPED | QK_NORMS,
    "op": MATRICES | VALUES | QK_NORMS,
}


class TestShipped:
    @pytest.mark.parametrize("name", SHIPPED)
    def test_load_and_come_back_from_what_is_dumped(self, name: str, tmp_path: Path):
        shipped = recipes.load_pretraining(name)
        assert shipped.name == name
        (tmp_path / "recipe.yaml").write_text(recipes.dump(shipped, run={"command": "x"}))
        assert recipes.load_run(tmp_path) == shipped

    def test_every_block_has_one(self):
        assert tuple(blocks.BLOCKS) == NAMES
        assert {recipes.load_pretraining(name).block for name in set(SHIPPED) - {"micro", "codeparrot-18l"}} == set(
            NAMES
        )
        for name in NAMES:
            shipped = recipes.load_pretraining(name)
            assert shipped.block == name
            assert 2.9e6 < shipped.steps * shipped.batch * shipped.n_positions < 3.1e6

    @pytest.mark.parametrize("name", NAMES)
    def test_parameters(self, name: str, text: Path):
        model = set_up(replace(recipes.load_pretraining(name), text=Text(str(text), held_out_fraction=0.2))).model
        names = dict(model.named_parameters())
        prefix = "blocks.1."
        assert {key.removeprefix(prefix) for key in names if key.startswith(prefix)} == IN_BLOCK_1[name]
        assert names["blocks.5.mlp.fc.weight"].shape == (768, 192)
        assert "blocks.6.mlp.fc.weight" not in names

    def test_micro_is_the_bundled_models_shape_and_recipe(self, text: Path):
        micro = recipes.load_pretraining("micro")
        model = set_up(replace(micro, text=Text(str(text), held_out_fraction=0.2))).model
        bundled = checkpoint.load("micro")
        ours = blocks.to_gpt2(model)
        assert ours.config.activation_function == bundled.config.activation_function
        assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
            name: tensor.shape for name, tensor in bundled.state_dict().items()
        }
        assert micro.steps * micro.batch * micro.n_positions == 23_756_800
        assert (micro.lr, micro.min_lr, micro.warmup, micro.clip, micro.betas) == (2e-3, 2e-4, 100, 1.0, (0.9, 0.95))

    def test_codeparrot_is_the_published_setting(self, text: Path):
        """But for its size, tokenizer and text, which are not here."""
        published = recipes.load_pretraining("codeparrot-18l")
        assert (published.n_layer, published.n_embd, published.n_head, published.n_positions) == (18, 768, 12, 128)
        assert (published.batch, published.steps, published.lr, published.lr_decay) == (128, 40_000, 1e-3, "linear")
        assert (published.warmup, published.betas, published.weight_decay) == (2000, (0.9, 0.999), 0.1)
        assert (published.clip, published.lr_horizon) == (1.0, None)
        assert published.min_lr == 1e-7  # the `lr_end` of the released code's polynomial schedule
        assert published.text.source == "huggingface-course/codeparrot-ds-train"
        here = {"tokenizer": "micro", "text": Text(str(text), held_out_fraction=0.2), "n_layer": 2, "n_embd": 24}
        model = set_up(replace(published, **here)).model
        assert {name for name, _ in model.blocks[1].named_parameters()} == {
            *("ln1.weight", "ln2.weight", "attn.qk.weight", "attn.qk.bias", "attn.v.weight", "attn.o.weight"),
            *("mlp.fc.weight", "mlp.proj.weight"),
        }
        assert model.blocks[1].ln1.kind == "rmsnorm"
        x = torch.linspace(-2, 2, 9)
        assert model.blocks[1].mlp.act(x).equal(x.relu())
        assert model.blocks[1].mlp.proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


class TestFit:
    @pytest.mark.parametrize("run", ["pre_ln", "nonorm"])
    def test_loss_falls_on_a_repeated_text(self, run: str, request: pytest.FixtureRequest):
        losses = [line["loss"] for line in read_log(request.getfixturevalue(run).directory)]
        assert losses[0] == pytest.approx(math.log(4096), rel=0.02)
        assert losses[-1] < losses[0] - 0.5

    @pytest.mark.parametrize("lr_decay", ["cosine", "linear"])
    def test_is_plain_training(self, lr_decay: str, recipe: PretrainRecipe, tmp_path: Path):
        """The whole loop once more: the model's own loss, torch's AdamW, LR and clipping by hand."""
        recipe = replace(recipe, block="skipless", lr_decay=lr_decay, weight_decay=0.3)
        setup = set_up(recipe)
        model, train = setup.model.train(), setup.text.train
        rng = np.random.default_rng(0)
        order = np.concatenate([rng.permutation(12) for _ in range(4)])
        groups = [
            {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.3},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        expected = []
        for step in range(12):
            ids = torch.stack([train[i]["input_ids"] for i in order[4 * step : 4 * step + 4]])
            loss = model(ids, labels=ids).loss
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            left = 1 - (step - 2) / 10
            fall = left if lr_decay == "linear" else (1 - math.cos(math.pi * left)) / 2
            lr = 1e-2 * step / 2 if step < 2 else 1e-3 + 9e-3 * fall
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            expected.append((loss.item(), norm, lr))

        run = pretrain(recipe, out=tmp_path / "run")

        log = [(line["loss"], line["grad_norm"], line["lr"]) for line in read_log(run.directory)]
        np.testing.assert_allclose(log, expected, rtol=1e-3)

    def test_weights_are_the_seeds_alone(self, recipe: PretrainRecipe):
        torch.manual_seed(5)
        first = set_up(recipe).model.embed.weight
        after = torch.rand(1)
        torch.manual_seed(5)
        assert torch.equal(torch.rand(1), after)  # what else the caller draws is not disturbed
        assert torch.equal(set_up(recipe).model.embed.weight, first)
        assert not torch.equal(set_up(replace(recipe, seed=1)).model.embed.weight, first)

    @pytest.mark.parametrize("other", [{"micro_batch": 4}, {"gradient_checkpointing": True}, {"log_every": 1}])
    def test_outcome_does_not_depend_on_how_it_is_come_by(
        self, other: dict, recipe: PretrainRecipe, nonorm: Run, tmp_path: Path
    ):
        """Signals at every step among them: they disturb nothing."""
        run = pretrain(replace(recipe, block="skipless-nonorm", **other), out=tmp_path / "run")
        for name, tensor in last_state(nonorm.directory).items():
            difference = (last_state(run.directory)[name] - tensor).abs()
            if other.keys() == {"log_every"}:
                assert not difference.any(), name
            elif not name.endswith("qk.bias"):  # the gradient of the keys' is rounding alone, of which Adam makes steps
                assert difference.max() <= 1e-3 * tensor.abs().max(), name

    @pytest.mark.slow
    def test_two_processes_equal_one(self, recipe: PretrainRecipe, nonorm: Run, tmp_path: Path):
        """Signals too, which one process measures alone."""
        (tmp_path / "tiny.yaml").write_text(recipes.dump(replace(recipe, block="skipless-nonorm")))

        ends = in_two_processes(partial(finetune, "pretrain", "tiny.yaml", "--out", "two"), tmp_path)

        assert [end.code for end in ends] == [0, 0], ends
        assert sum("Everything is in" in end.output for end in ends) == 1
        for name, tensor in last_state(nonorm.directory).items():
            torch.testing.assert_close(last_state(tmp_path / "two")[name], tensor, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(read_log(tmp_path / "two"), read_log(nonorm.directory), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert ours.get("signals") == (
                theirs.get("signals") and pytest.approx(theirs["signals"], rel=1e-2, abs=1e-4)
            )

    def test_diverged(self, recipe: PretrainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        spoilt = lambda *args, **kwargs: NextTokenLoss(*(p * math.nan for p in next_token_loss(*args, **kwargs)))  # noqa: E731
        monkeypatch.setattr("finetune.objective.next_token_loss", spoilt)

        with pytest.raises(DivergedError, match=r"at step 0.*none yet.*longer warmup") as error:
            pretrain(recipe, out=tmp_path / "run")

        assert "froze" not in str(error.value)


class TestSignals:
    def test_at_the_interval(self, pre_ln: Run):
        log = read_log(pre_ln.directory)
        assert [line["step"] for line in log if "signals" in line] == [0, 4, 8]
        assert set(log[1]) == {"model", "step", "tokens", "loss", "lr", "grad_norm", "seconds"}
        assert [line["tokens"] for line in log] == [64 * step for step in range(1, 13)]

    def test_are_those_of_the_weights_on_held_out_text(self, recipe: PretrainRecipe, nonorm: Run):
        setup = set_up(replace(recipe, block="skipless-nonorm"))
        ids = torch.from_numpy(setup.text.held_out.blocks.astype(np.int64))
        with torch.no_grad(), blocks.signals(setup.model) as expected:
            setup.model(ids)

        first, *_, last = (line["signals"] for line in read_log(nonorm.directory) if "signals" in line)

        assert first == pytest.approx(expected, rel=1e-4, abs=1e-6)
        kinds = {name.rpartition(".")[2] for name in first}
        assert kinds >= {
            "entropy",
            "kurtosis",
            "rms",
            "feature_correlation_rms",
            "input_correlation",
            "max_median_ratio",
        }
        assert first["blocks.1.attn.beta"] == 1.0
        assert last["blocks.1.attn.beta"] != 1.0

    def test_are_float32_where_products_are_bf16(self, recipe: PretrainRecipe, tmp_path: Path):
        runs = [pretrain(replace(recipe, steps=3, bf16=bf16), out=tmp_path / str(bf16)) for bf16 in (False, True)]
        plain, mixed = (read_log(run.directory)[0] for run in runs)
        assert mixed["signals"] == plain["signals"]
        assert mixed["grad_norm"] != plain["grad_norm"]


@pytest.mark.slow
class TestResume:
    @pytest.mark.parametrize(
        ("killed", "block"),
        [
            (partial(kill_at, "finetune.pretrain.PretrainTrainer.compute_loss", 2 * 7 + 1), "skipless-nonorm"),
            (partial(kill_at, "finetune.pretrain.PretrainTrainer.compute_loss", 2), "skipless-nonorm"),
            (partial(kill_at, "finetune.pretrain.export", 1), "pre-ln"),
        ],
        ids=["middle", "before-first-checkpoint", "before-export"],
    )
    def test_killed_and_resumed_equals_uninterrupted(
        self, killed, block: str, recipe: PretrainRecipe, pre_ln: Run, nonorm: Run, tmp_path: Path
    ):
        (tmp_path / "tiny.yaml").write_text(recipes.dump(replace(recipe, block=block)))
        command = partial(finetune, "pretrain", "tiny.yaml", "--out", "run", first=killed)
        assert run_forked(command, tmp_path).code == -signal.SIGKILL
        assert not (tmp_path / "run/model").exists()

        resumed = run_forked(partial(finetune, "resume", "run"), tmp_path)

        assert resumed.code == 0, resumed.output
        assert_equal_runs(tmp_path / "run", (pre_ln if block == "pre-ln" else nonorm).directory)

    def test_complete_run_is_only_measured_again(self, pre_ln: Run, tmp_path: Path):
        directory = shutil.copytree(pre_ln.directory, tmp_path / "run")
        (directory / "results.csv").unlink()
        weights = directory / "model/model.safetensors"
        before = weights.stat().st_mtime_ns

        pd.testing.assert_frame_equal(resume(directory).results, pre_ln.results)

        assert weights.stat().st_mtime_ns == before


class TestExport:
    TOKENS = torch.randint(4096, (3, 16), generator=torch.Generator().manual_seed(0))

    def test_run_directory(self, pre_ln: Run):
        assert {path.name for path in pre_ln.directory.iterdir()} == {
            *("recipe.yaml", "log.jsonl", "checkpoints", "model", "documents.csv", "results.csv")
        }

    def test_pre_ln_is_an_ordinary_gpt2(self, recipe: PretrainRecipe, pre_ln: Run):
        model, info = GPT2LMHeadModel.from_pretrained(pre_ln.directory / "model", output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            expected = trained(recipe, pre_ln.directory)(self.TOKENS).logits
            torch.testing.assert_close(model(self.TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
        assert isinstance(pre_ln.load("model"), GPT2LMHeadModel)
        assert json.loads((pre_ln.directory / "model/config.json").read_text())["model_type"] == "gpt2"

    def test_other_blocks_come_back_through_the_auto_class(self, recipe: PretrainRecipe, nonorm: Run):
        expected = trained(replace(recipe, block="skipless-nonorm"), nonorm.directory)
        for model in (AutoModelForCausalLM.from_pretrained(nonorm.directory / "model"), nonorm.load("model")):
            assert isinstance(model, BlocksForCausalLM)
            with torch.no_grad():
                assert torch.equal(model.eval()(self.TOKENS).logits, expected(self.TOKENS).logits)
        assert AutoTokenizer.from_pretrained(nonorm.directory / "model").decode([17, 18])
        assert checkpoint.load_tokenizer(nonorm.directory / "model").eos_token_id == 0

    @pytest.mark.parametrize("name", ["pre_ln", "nonorm"])
    def test_table(self, name: str, recipe: PretrainRecipe, request: pytest.FixtureRequest):
        """Its loss by transformers' own, over the same tokens."""
        run = request.getfixturevalue(name)
        model = run.load("model")
        ids = torch.from_numpy(set_up(recipe).text.held_out.blocks.astype(np.int64))
        with torch.no_grad():
            expected = model(ids, labels=ids).loss.item()

        (row,) = run.results.to_dict("records")

        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        assert row["tokens"] == ids[:, 1:].numel()
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        assert row["trained_tokens"] == 12 * 64
        assert row["steps_per_second"] == pytest.approx(12 / row["trained_seconds"])
        documents = pd.read_csv(run.directory / "documents.csv")
        assert list(documents) == ["model", "document", "tokens", "loss", "loss_max"]
        assert np.average(documents["loss"], weights=documents["tokens"]) == pytest.approx(row["loss"])

    @pytest.mark.parametrize("name", ["pre_ln", "nonorm"])
    def test_card(self, name: str, request: pytest.FixtureRequest):
        run = request.getfixturevalue(name)
        _, front, body = (run.directory / "model/README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(front)["tags"] == ["gpt2" if name == "pre_ln" else "noln-blocks", "interpretability"]
        assert f"{run.results['loss'][0]:.4f} ± " in body
        assert "12 steps of 4 sequences, 768 tokens; dropout 0; seed 0" in body
        assert ("import finetune.blocks" in body) == (name == "nonorm")


class TestCheckpoints:
    def test_norm_state(self, pre_ln: Run, nonorm: Run):
        """No norms in the blocks, but the first and the final one are there and divide."""
        assert folding.norm_state(pre_ln.load("model")) == "live"
        assert folding.norm_state(nonorm.load("model")) == "live"
        shape = {"vocab_size": 9, "n_embd": 4, "n_head": 2, "n_layer": 1, "n_positions": 4}
        bare = blocks.block_config("skipless-nonorm", first_norm="none", final_norm="none", **shape)
        assert folding.norm_state(BlocksForCausalLM(bare)) == "identity"

    def test_layernorm_cannot_be_removed_from_other_blocks(self, nonorm: Run, pre_ln: Run, text: Path):
        removal = replace(recipes.load("micro-b25"), text=Text(str(text), held_out_fraction=0.2))
        with pytest.raises(CheckpointError, match=r"nonorm/model.*Pre-LN.*pretrain pre-ln"):
            set_up_removal(replace(removal, model=str(nonorm.directory / "model")))
        assert set_up_removal(replace(removal, model=str(pre_ln.directory / "model"))).model.config.n_layer == 2

    def test_config_that_does_not_hold(self, nonorm: Run, tmp_path: Path):
        directory = shutil.copytree(nonorm.directory / "model", tmp_path / "model")
        config = json.loads((directory / "config.json").read_text())
        for spoilt in ({"n_head": 3}, {"norm": "batch"}):
            (directory / "config.json").write_text(json.dumps(config | spoilt))
            with pytest.raises(CheckpointError, match=r"config\.json"):
                checkpoint.load(directory)


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _in_tmp_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)

    @pytest.fixture
    def file(self, recipe: PretrainRecipe) -> str:
        Path("tiny.yaml").write_text(recipes.dump(recipe))
        return "tiny.yaml"

    def test_end_to_end(self, file: str, capsys: pytest.CaptureFixture):
        flags = "--steps 6 --seed 3 --block op --n-layer 1 --knobs vp_bias False --text.held-out-blocks 4 --out run"
        main(["pretrain", file, *flags.split()])

        used = recipes.load_pretraining("run/recipe.yaml")
        assert (used.steps, used.warmup, used.seed, used.block, used.n_layer) == (6, 1, 3, "op", 1)
        assert used.knobs == {"vp_bias": False}
        assert "blocks.0.attn.v.bias" not in load_file("run/model/model.safetensors")
        assert set(yaml.safe_load(Path("run/recipe.yaml").read_text())["run"]) >= {"versions", "git", "command"}
        printed = capsys.readouterr().out
        assert f"{pd.read_csv('run/results.csv')['loss'][0]:.4f} ± " in printed
        assert f"the model in {Path('run/model').absolute()}" in printed

    def test_knobs_join_those_of_the_recipe(self, file: str):
        """Whatever types the recipe's are of."""
        recipe = yaml.safe_load(Path(file).read_text())
        knobs = {"norm": "rmsnorm", "softcap": None, "attn_gain": 1, "mlp_bias": False}
        Path(file).write_text(yaml.safe_dump(recipe | {"knobs": knobs, "steps": 3}))
        said = "softcap 30 attn_gain 0.5 final_norm none vp_bias false eos_token_id None"
        main(["pretrain", file, "--out", "run", "--knobs", *said.split()])
        changed = {"softcap": 30, "attn_gain": 0.5, "final_norm": "none", "vp_bias": False, "eos_token_id": None}
        assert recipes.load_pretraining("run/recipe.yaml").knobs == knobs | changed
        config = checkpoint.load_config("run/model")
        assert (config.norm, config.softcap, config.attn_gain, config.final_norm) == ("rmsnorm", 30, 0.5, "none")

    def test_own_recipe_replays_the_run(self, pre_ln: Run):
        main(["pretrain", str(pre_ln.directory / "recipe.yaml"), "--out", "again"])
        assert_equal_runs(Path("again"), pre_ln.directory)

    def test_another_text_takes_the_place_of_what_is_held_out(self, file: str, text: Path):
        """A part of it is held out, unless another text is named."""
        recipe = yaml.safe_load(Path(file).read_text())
        Path(file).write_text(yaml.safe_dump(recipe | {"text": {"held_out": "books-validation"}, "steps": 3}))
        blocks = ["--text.held-out-blocks", "4", "--text.held-out-fraction", "0.1"]
        main(["pretrain", file, "--text", str(text), *blocks, "--out", "1"])
        main(["pretrain", file, "--text", str(text), *blocks, "--text.held-out", "books-report", "--out", "2"])
        assert [recipes.load_pretraining(f"{i}/recipe.yaml").text.held_out for i in (1, 2)] == [None, "books-report"]
        assert recipes.load_pretraining("1/recipe.yaml").text.source == str(text)

    def test_list_and_show(self, capsys: pytest.CaptureFixture):
        main(["list", "pretrain"])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == SHIPPED
        assert all(line.endswith(".") for line in lines)
        assert lines[SHIPPED.index("pre-ln")].endswith(
            "  GPT-2's block, the one of micro: what the other blocks are compared with."
        )
        main(["show", "pretrain", "skipless"])
        assert yaml.safe_load(capsys.readouterr().out)["block"] == "skipless"

    def test_help_names_recipes_and_fields(self, capsys: pytest.CaptureFixture):
        with pytest.raises(SystemExit):
            main(["pretrain", "--help"])
        help = capsys.readouterr().out.replace("\n", " ")
        for name in (*SHIPPED, "--n-embd", "--knobs", "--lr-decay", "--text.held-out", "--tokenizer", "--out"):
            assert name in help, name

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ([], "skipless-parallel-nonorm"),
            (["gpt2-b25"], "skipless-parallel-nonorm"),
            (["removal.yaml"], "finetune run"),
            (["tiny.yaml", "--n-head", "3"], "n_head"),
            (["tiny.yaml", "--block", "skipless-nonorm", "--knobs", "norm", "ln"], "knobs.norm"),
            (["tiny.yaml", "--knobs", "norms", "ln"], "do not have the knobs norms"),
            (["tiny.yaml", "--knobs", "norm", "batch"], "norm"),
            (["tiny.yaml", "--knobs", "n_layer", "3"], "knobs contains n_layer"),
            (["tiny.yaml", "--knobs", "norm"], "alternate"),
            (["tiny.yaml", "--knobs", "norm", "[1,2]"], "norm"),
            (["tiny.yaml", "--n-layer", "0"], "n_layer"),
            (["tiny.yaml", "--n-positions", "1"], "n_positions is 1; at least 2"),
            (["--steps", "1"], "pretrain RECIPE"),
            (["tiny.yaml", "--lr-decay", "linear", "--min-lr", "0.01"], "lr_decay"),
            (["tiny.yaml", "--tokenizer", "no/such"], "no/such"),
            (["tiny.yaml", "--vocab-size", "300"], "vocabulary of 300"),
            (["tiny.yaml", "--text", "gone.txt"], "gone.txt"),
            (["tiny.yaml", "--batch", "3"], "micro_batch"),
        ],
    )
    def test_refused(self, arguments: list[str], said: str, file: str, capsys: pytest.CaptureFixture):
        """By a line that says what to do, with nothing left behind."""
        Path("removal.yaml").write_text(recipes.dump(recipes.load("micro")))
        with pytest.raises(SystemExit) as exit:
            main(["pretrain", *arguments, *(["--out", "run"] if arguments else [])])
        message = exit.value.code if isinstance(exit.value.code, str) else capsys.readouterr().err
        assert said in message
        assert "Traceback" not in message
        assert not Path("run").exists()

    def test_removal_refuses_its_recipe(self, file: str):
        with pytest.raises(RecipeError, match="finetune pretrain"):
            recipes.load(file)


def test_tokenizer_of_a_directory_is_kept_absolute(recipe: PretrainRecipe, tmp_path: Path, monkeypatch):
    shutil.copytree(MODELS["micro"], tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.chdir(tmp_path)
    run = pretrain(replace(recipe, tokenizer="tokenizer", steps=3), out="run")
    assert recipes.load_pretraining(run.directory / "recipe.yaml").tokenizer == str(tmp_path / "tokenizer")


def test_text_by_name_takes_the_place_of_the_recipes(recipe: PretrainRecipe, text: Path, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(recipes.dump(replace(recipe.scaled(3), text=Text("gone", held_out="gone"))))
    run = pretrain(tmp_path / "mine.yaml", text, tmp_path / "run")
    used = recipes.load_pretraining(run.directory / "recipe.yaml").text
    assert (used.source, used.held_out) == (str(text), None)
