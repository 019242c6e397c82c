import copy
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import finetune, read_log, run_forked
from models import tiny_gpt2
from test_objective import random_head, with_autograd
from test_trainer import assert_close, fitted, in_two_processes, last_state
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import TrainingArguments

from finetune import recipe as recipes
from finetune.cover import Cover
from finetune.objective import NextTokenLoss, auxiliary_loss, next_token_loss, spread_loss
from finetune.recipe import Recipe, RecipeError, Text
from finetune.removal import _trainer, remove_layernorm, set_up
from finetune.removal_trainer import RemovalTrainer
from finetune.sites import Sites
from finetune.text import Blocks, load_blocks, token_ids
from finetune.training import DivergedError, in_order

KINDS = ("uniform", "unigram-2", "shuffled", "corrupted", "renamed", "repeated", "runs")


@pytest.fixture(scope="module")
def short(recipe: Recipe) -> Recipe:
    """The recipe fitted to the original with half of the blocks cover, without a control."""
    return replace(recipe, control=False, kl_weight=0.5, match_weight=2.0, aux_weight=0.3, cover=0.5, cover_kinds=KINDS)


def without_times(log: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in log]


def cover_of(recipe: Recipe, ids: np.ndarray | None = None) -> Cover:
    setup = set_up(recipe)
    return Cover(recipe, np.arange(4096) if ids is None else ids, setup.text.train)


def blocks_of_run(recipe: Recipe) -> tuple[Dataset, Dataset]:
    """The blocks of a whole run without and with cover."""
    text = set_up(recipe).text.train
    ordered = in_order(text, recipe)
    return ordered, Cover(recipe, np.arange(4096), text).over(ordered)


class TestPlaces:
    @pytest.mark.parametrize(("share", "every"), [(0.05, 20), (0.1, 10), (0.25, 4), (0.5, 2)])
    def test_one_block_in_so_many(self, short: Recipe, share: float, every: int):
        cover = cover_of(replace(short, cover=share, steps=100))
        numbers = [cover.number(i) for i in range(400)]
        assert [i for i in range(400) if numbers[i] is not None] == [*range(every - 1, 400, every)]
        assert [number for number in numbers if number is not None] == [*range(400 // every)]

    def test_the_share_is_exact_where_binary_fractions_are_not(self, short: Recipe):
        assert math.floor(100 * 0.29) == 28
        cover = cover_of(replace(short, cover=0.29, steps=100))
        covered = np.cumsum([cover.number(i) is not None for i in range(400)])
        assert [*covered] == [(i + 1) * 29 // 100 for i in range(400)]

    def test_within_a_span(self, short: Recipe):
        cover = cover_of(replace(short, cover_span=(0.25, 0.5)))
        assert [i for i in range(64) if cover.number(i) is not None] == [*range(17, 32, 2)]

    def test_text_elsewhere_is_the_controls(self, short: Recipe):
        """At every other position, in the same order; and where there is cover each kind has its turn."""
        text, covered = blocks_of_run(short)
        assert len(covered) == len(text) == 64
        for i in range(64):
            assert covered[i]["is_cover"].item() is (i % 2 == 1)
            if i % 2 == 0:
                assert torch.equal(covered[i]["input_ids"], text[i]["input_ids"])
        for i in (1, 3, 5):
            cover = cover_of(short)
            ids = text[i]["input_ids"].numpy()
            drawn = cover.draw(KINDS[i // 2], ids, np.random.default_rng([0, i]))
            assert np.array_equal(covered[i]["input_ids"], drawn)

    def test_depends_on_seed_and_position_alone(self, short: Recipe):
        one = cover_of(replace(short, cover_kinds=("uniform",)))
        again = cover_of(replace(short, cover_kinds=("uniform",), micro_batch=1, lr=1e-3))
        other = cover_of(replace(short, cover_kinds=("uniform",), seed=1))
        block = {"input_ids": torch.arange(16)}
        drawn = [cover.at(i, block)["input_ids"] for i in (5, 7) for cover in (one, again, other)]
        assert torch.equal(drawn[0], drawn[1])
        assert torch.equal(drawn[3], drawn[4])
        assert len({tuple(ids.tolist()) for ids in drawn}) == 4


class TestKinds:
    @pytest.fixture
    def block(self) -> np.ndarray:
        return np.random.default_rng(5).integers(100, 140, 4000)

    def draw(self, short: Recipe, kind: str, block: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
        drawn = cover_of(replace(short, cover_kinds=(kind,)), ids).draw(kind, block, np.random.default_rng(1))
        assert drawn.shape == block.shape
        assert drawn.dtype == np.int64
        return drawn

    def test_uniform_draws_every_token_of_the_tokenizer_and_no_other(self, short: Recipe, block: np.ndarray):
        ids = np.arange(0, 200, 2)
        counts = np.bincount(self.draw(short, "uniform", block, ids), minlength=200)
        assert not counts[1::2].any()
        assert counts[::2].min() > 15
        assert counts[::2].max() < 75

    def test_unigram_draws_as_often_as_the_training_text_has_it(self, short: Recipe, block: np.ndarray):
        train = set_up(short).text.train.blocks.ravel()
        counts = np.bincount(train, minlength=4096) + 1
        common = counts.argmax()
        for kind, temperature in (("unigram", 1), ("unigram-2", 2), ("unigram-0.5", 0.5)):
            weights = counts ** (1 / temperature)
            expected = weights[common] / weights.sum()
            part = (self.draw(short, kind, block) == common).mean()
            assert part == pytest.approx(expected, abs=4 * math.sqrt(expected / len(block))), kind

    def test_shuffled_has_the_tokens_of_the_text(self, short: Recipe, block: np.ndarray):
        drawn = self.draw(short, "shuffled", block)
        assert not np.array_equal(drawn, block)
        assert np.array_equal(np.sort(drawn), np.sort(block))

    def test_corrupted_keeps_a_part_of_the_text(self, short: Recipe, block: np.ndarray):
        assert (self.draw(short, "corrupted-0.3", block) != block).mean() == pytest.approx(0.3, abs=0.04)
        assert 0.02 < (self.draw(short, "corrupted", block) != block).mean() < 0.98

    def test_renamed_keeps_what_is_equal_to_what(self, short: Recipe, block: np.ndarray):
        drawn = self.draw(short, "renamed", block)
        names = dict(zip(block, drawn, strict=True))
        assert [names[token] for token in block] == drawn.tolist()
        assert len(set(names.values())) == len(names) == 40
        assert (drawn != block).mean() > 0.9

    def test_prompt_is_text_behind_the_first_token_of_prompts(self, short: Recipe, block: np.ndarray):
        recipe = replace(short, cover_kinds=("prompt",))
        setup = set_up(recipe)
        drawn = Cover(recipe, np.arange(4096), setup.text.train, 7).draw("prompt", block, np.random.default_rng(0))
        assert drawn.dtype == block.dtype
        assert drawn[0] == 7
        assert np.array_equal(drawn[1:], block[:-1])
        with pytest.raises(RecipeError, match="neither a beginning-of-sequence nor an end-of-text token"):
            Cover(recipe, np.arange(4096), setup.text.train)

    def test_a_run_begins_prompts_with_the_tokens_of_its_tokenizer(self, short: Recipe, tmp_path: Path):
        setup = set_up(replace(short, cover_kinds=("prompt",)))
        assert setup.tokenizer.bos_token_id is not None
        trainer = _trainer(setup, tmp_path, "ln_free", setup.events)
        blocks = [trainer.train_dataset[i] for i in range(4)]
        firsts = {bool(block["is_cover"]): int(block["input_ids"][0]) for block in blocks}
        assert firsts[True] == setup.tokenizer.bos_token_id != firsts[False]

    def test_repeated_has_a_period(self, short: Recipe, block: np.ndarray):
        cover = cover_of(short)
        periods = []
        for seed in range(40):
            drawn = cover.draw("repeated", block, np.random.default_rng(seed))
            periods.append(next(p for p in range(1, 34) if np.array_equal(drawn[p:], drawn[:-p])))
        assert min(periods) == 1
        assert 16 < max(periods) <= 32

    def test_runs_are_of_several_kinds(self, short: Recipe, block: np.ndarray):
        drawn = self.draw(short, "runs", block)
        same = drawn == block
        assert 0.05 < same.mean() < 0.95
        assert np.abs(np.diff(same.astype(int))).sum() > 10

    def test_a_block_of_one_token(self, short: Recipe):
        for kind in KINDS:
            self.draw(short, kind, np.array([7]))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cover": -0.1}, "cover is -0.1"),
        ({"cover": 0.8}, "at most 0.75"),
        ({"kl_weight": 0.0, "match_weight": 0.0}, "Set kl_weight or match_weight"),
        ({"cover_kinds": ("uniform", "noise")}, "noise"),
        ({"cover_kinds": ("unigram-0",)}, "unigram-0"),
        ({"cover_kinds": ()}, "empty"),
        ({"cover_span": (0.5, 0.5)}, "cover_span is 0.5, 0.5"),
        ({"cover": 0.0, "spread_weight": 1.0, "spread_on": "cover"}, "spread_on is cover"),
        ({"spread_weight": -1.0}, "spread_weight is -1.0"),
    ],
)
def test_contradictions_are_refused(fields: dict, said: str, short: Recipe):
    with pytest.raises(RecipeError, match=said):
        replace(short, **fields)


class TestObjective:
    @pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
    def test_cover_has_no_next_token(self, kl_weight: float):
        """The loss is the mean over blocks of each one's own, which on cover is KL alone; so are its gradients."""
        model, teacher = random_head(0), random_head(1)
        tokens = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(9))
        is_cover = torch.tensor([False, True, False])
        rows = [[type(head)(head.residual[i : i + 1], head.unembedding) for head in (model, teacher)] for i in range(3)]

        loss = next_token_loss(model, tokens, teacher, kl_weight, None, is_cover)

        def of(row: int, weight: float) -> torch.Tensor:
            return with_autograd(rows[row][0], tokens[row : row + 1], rows[row][1], weight)

        expected = (of(0, kl_weight) + kl_weight * of(1, 1.0) + of(2, kl_weight)) / 3
        torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(loss.cross_entropy, (of(0, 0.0) + of(2, 0.0)) / 3, rtol=1e-12, atol=0)
        torch.testing.assert_close(loss.kl, (of(0, 1.0) + of(2, 1.0)) / 3, rtol=1e-12, atol=0)
        torch.testing.assert_close(loss.cover_kl, of(1, 1.0) / 3, rtol=1e-12, atol=0)
        gradients = torch.autograd.grad(loss.total, [*model])
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, [*model]), rtol=1e-10, atol=1e-15)
        if kl_weight == 0:
            assert not gradients[0][1].any()

    def test_the_teachers_cross_entropy_is_on_the_same_text(self):
        model, teacher = random_head(0), random_head(1)
        tokens = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(9))
        logits = F.linear(teacher.residual[:, :-1], teacher.unembedding)
        surprise = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(3, 4).mean(1)
        loss = next_token_loss(model, tokens, teacher, 1.0)
        torch.testing.assert_close(loss.teacher_cross_entropy, surprise.mean(), rtol=1e-12, atol=0)
        assert loss.cover_kl == 0
        loss = next_token_loss(model, tokens, teacher, 1.0, None, torch.tensor([True, False, False]))
        torch.testing.assert_close(loss.teacher_cross_entropy, surprise[1:].sum() / 3, rtol=1e-12, atol=0)

    def test_auxiliary_loss_is_on_text_alone(self):
        std, classes = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) + 1, torch.zeros(4, 3).long()
        std.requires_grad_()
        is_cover = torch.tensor([False, True, True, False])
        loss = auxiliary_loss(std, classes, is_cover)
        torch.testing.assert_close(loss, auxiliary_loss(std[[0, 3]], classes[[0, 3]]) / 2)
        assert not torch.autograd.grad(loss, std)[0][[1, 2]].any()
        assert auxiliary_loss(std, classes, torch.ones(4, dtype=torch.bool)) == 0


@pytest.mark.slow
class TestRun:
    def test_cross_entropy_is_of_text_in_the_log(self, short: Recipe, tmp_path: Path):
        """At step 0, where both are the original."""
        fitted(short, tmp_path)
        text, _ = blocks_of_run(short)
        model = set_up(short).model
        expected = np.mean([model(ids := text[i]["input_ids"][None], labels=ids).loss.item() for i in (0, 2)])
        log = read_log(tmp_path)
        assert log[0]["loss"] == pytest.approx(expected, rel=1e-5)
        assert log[0]["teacher_loss"] == pytest.approx(expected, rel=1e-5)
        assert log[0]["cover_kl"] == pytest.approx(0, abs=1e-6)
        assert all(line["text"] == 0.5 and line["cover_kl"] > 1e-4 for line in log[3:])

    @pytest.mark.parametrize("micro_batch", [1, 4])
    def test_however_it_is_spread_over_micro_batches(self, micro_batch: int, short: Recipe, tmp_path: Path):
        """Of micro-batches of one, half are all text and half all cover."""
        # σ̂ of the auxiliary loss is the micro-batch's own.
        short = replace(short, aux_weight=0.0)
        assert_close(
            fitted(replace(short, micro_batch=micro_batch), tmp_path / "other"), fitted(short, tmp_path / "two"), 1e-4
        )
        for ours, theirs in zip(read_log(tmp_path / "other"), read_log(tmp_path / "two"), strict=True):
            for key in ("loss", "kl", "cover_kl", "teacher_loss", "distance", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6)

    def test_the_model_card_says_so(self, short: Recipe, tmp_path: Path):
        recipe = replace(short, cover_kinds=("uniform", "runs"), spread_weight=0.5, cover_span=(0.25, 1.0))
        card = (remove_layernorm(recipe=recipe, out=tmp_path / "run").directory / "ln_free/README.md").read_text()
        assert "Cover: 50 % of the blocks between fractions 0.25 and 1 of the run were not text but tokens" in card
        assert "kinds uniform, runs, on which the\n  original's predictions were the only target\n" in card
        assert "weight 0.5\n" in card

    def test_a_step_without_cover_says_so(self, short: Recipe, tmp_path: Path):
        fitted(replace(short, cover=0.125), tmp_path)
        log = read_log(tmp_path)
        assert [line["cover_kl"] is None for line in log] == [step % 2 == 0 for step in range(16)]
        assert [line["text"] for line in log] == [1.0, 0.75] * 8

    @pytest.mark.parametrize("streaming", [False, True])
    def test_resumes_exactly(self, streaming: bool, short: Recipe, tmp_path: Path):
        recipe = replace(short, text=replace(short.text, streaming=streaming, held_out_blocks=8), spread_weight=0.1)
        whole = fitted(recipe, tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        shutil.rmtree(tmp_path / "cut/ln_free")
        shutil.rmtree(tmp_path / "cut/checkpoints/ln_free/checkpoint-16")
        assert_close(fitted(recipe, tmp_path / "cut"), whole, 0)
        logs = [without_times(read_log(tmp_path / name)) for name in ("whole", "cut")]
        assert logs[0] == logs[1]

    def test_the_control_never_sees_it(self, short: Recipe, tmp_path: Path):
        with_cover = fitted(short, tmp_path / "with", "control")
        assert_close(fitted(replace(short, cover=0.0), tmp_path / "without", "control"), with_cover, 0)
        logs = [without_times(read_log(tmp_path / name)) for name in ("with", "without")]
        assert logs[0] == logs[1]
        assert "text" not in logs[0][0]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_two_processes_equal_one(self, streaming: bool, short: Recipe, tmp_path: Path):
        """Micro-batches of one: at every step one process has the text and the other the cover."""
        recipe = replace(short, text=replace(short.text, streaming=streaming, held_out_blocks=8), batch=2)
        recipe = replace(recipe, micro_batch=1, aux_weight=0.0, cover_stds=False)
        alone = fitted(recipe, tmp_path / "alone")
        file = tmp_path / "tiny.yaml"
        file.write_text(recipes.dump(recipe))

        ends = in_two_processes(partial(finetune, file, "--out", "two"), tmp_path)

        assert [end.code for end in ends] == [0, 0], ends
        assert_close(last_state(tmp_path / "two"), alone, 1e-6)
        for ours, theirs in zip(read_log(tmp_path / "alone"), read_log(tmp_path / "two"), strict=True):
            for key in ("loss", "kl", "cover_kl", "teacher_loss", "distance", "text", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6)

    def test_a_stream_is_covered_anew_each_time(self, short: Recipe):
        recipe = replace(short, text=replace(short.text, streaming=True, held_out_blocks=8), cover_kinds=("uniform",))
        text, covered = blocks_of_run(recipe)
        taken = [[block for block, _ in zip(blocks, range(40), strict=False)] for blocks in (text, covered, covered)]
        for i, (block, one, other) in enumerate(zip(*taken, strict=True)):
            assert torch.equal(one["input_ids"], other["input_ids"])
            assert one["is_cover"].item() is (i % 2 == 1)
            assert torch.equal(one["input_ids"], block["input_ids"]) is (i % 2 == 0)

    @pytest.mark.parametrize("counted", [True, False])
    def test_stds_with_and_without_cover(self, counted: bool, short: Recipe, tmp_path: Path):
        fitted(replace(short, cover_stds=counted), tmp_path)
        model, (_, covered) = set_up(short).model, blocks_of_run(short)
        ids = torch.stack([covered[i]["input_ids"] for i in (range(4) if counted else (0, 2))])
        std = model.transformer(ids, output_hidden_states=True).hidden_states[1].std(-1, correction=0)
        expected = std[:, 0].square().add(1e-5).sqrt().mean().item()
        assert read_log(tmp_path)[0]["std"]["h.1.qk"]["live"][1] == pytest.approx(expected, rel=1e-5)


def fit_compiled(recipe: Recipe) -> None:
    quickly = partial(TrainingArguments, torch_compile_backend="aot_eager")
    with mock.patch("finetune.training.TrainingArguments", quickly):
        fitted(recipe, Path("compiled"))
    counted = {"graphs": counters["stats"]["unique_graphs"], "breaks": list(counters["graph_break"])}
    Path("counted.json").write_text(json.dumps(counted))


@pytest.mark.slow
def test_compiled(short: Recipe, tokenizer, tmp_path: Path):
    """As many graphs as without cover and penalty, with loss and teacher, and the same model as not compiled."""
    tiny_gpt2(n_layer=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = replace(short, model=str(tmp_path / "model"), spread_weight=0.1).scaled(12)
    end = run_forked(partial(fit_compiled, replace(recipe, compile=True)), tmp_path)
    assert end.code == 0, end.output
    assert json.loads((tmp_path / "counted.json").read_text()) == {"graphs": 4, "breaks": []}
    assert_close(last_state(tmp_path / "compiled"), fitted(recipe, tmp_path / "eager"), 1e-3)


def trainer(recipe: Recipe, directory: Path) -> RemovalTrainer:
    """A trainer with a teacher and no cover."""
    setup = set_up(recipe)
    sites = Sites(copy.deepcopy(setup.model), setup.tokenizer.eos_token_id)
    log = directory / "log.jsonl"
    return RemovalTrainer(sites, recipe, setup.events, setup.text.train, directory, log, "ln_free", setup.model)


class TestGuard:
    """Against divergence, where there is a teacher."""

    def spoil(self, monkeypatch: pytest.MonkeyPatch, ours: RemovalTrainer, *parts: str) -> None:
        """Have `parts` of the loss rise by 20 nats at step 12 and after it."""

        def spoilt(*args: object) -> NextTokenLoss:
            loss = next_token_loss(*args)
            late = ours.state.global_step >= 12
            return loss._replace(**{part: getattr(loss, part) + 20 for part in parts if late})

        monkeypatch.setattr("finetune.objective.next_token_loss", spoilt)

    def test_harder_text_does_not_stop_a_run(self, short: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        ours = trainer(replace(short, cover=0.0), tmp_path)
        self.spoil(monkeypatch, ours, "cross_entropy", "teacher_cross_entropy")
        ours.train()
        log = read_log(tmp_path)
        assert len(log) == 16
        assert log[12]["loss"] > log[11]["loss"] + 15

    def test_a_loss_above_the_teachers_does(self, short: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        ours = trainer(replace(short, cover=0.0), tmp_path)
        self.spoil(monkeypatch, ours, "cross_entropy")
        with pytest.raises(
            DivergedError, match=r"minus the original's on the same tokens is \d\d\.\d+ .*step 14.*rise=3"
        ):
            ours.train()

    def test_a_run_that_diverges(self, short: Recipe, tmp_path: Path):
        with pytest.raises(DivergedError, match="minus the original's"):
            fitted(replace(short, lr=10.0, min_lr=10.0, clip=0.0, max_outlier=math.inf), tmp_path)

    def test_cover_that_is_not_finite(self, short: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        ours = trainer(replace(short, cover=0.0), tmp_path)
        monkeypatch.setattr(
            "finetune.objective.next_token_loss",
            lambda *args: next_token_loss(*args)._replace(cover_kl=torch.tensor(math.nan)),
        )
        with pytest.raises(DivergedError, match="nan nats/token at step 0"):
            ours.train()

    def test_a_resumed_run_knows_the_first_steps(self, short: Recipe, tmp_path: Path):
        fitted(short, tmp_path)
        ours = trainer(replace(short, cover=0.0), tmp_path)
        ours._record.on_train_begin(
            ours.args, SimpleNamespace(global_step=16, max_steps=16, is_local_process_zero=False), ours.control
        )
        log = read_log(tmp_path)[:10]
        assert ours._record._first == [line["loss"] - line["teacher_loss"] for line in log]
        assert abs(ours._record._first[0]) < 1e-5


class TestSpread:
    @pytest.fixture
    def sites(self) -> Sites:
        sites = Sites(tiny_gpt2(), 0)
        sites.keep_live_graph()
        for name in sites:
            sites[name].frozen.fill_(0.7)
            sites[name].alpha.fill_(1.0)
            sites[name].merged.fill_(1.0)
        return sites

    @pytest.mark.parametrize("of", [None, torch.tensor([True, False, True])])
    @pytest.mark.parametrize("constant", [False, True])
    def test_is_of_live_stds_over_constants(self, constant: bool, of: torch.Tensor | None, sites: Sites):
        for norm in sites.norms:
            norm.constant = constant and norm.has_readers
        sites["h.1.v"].frozen.fill_(1.3)
        sites["final"].alpha.fill_(0.25)
        tokens = torch.randint(0, 4096, (3, 16), generator=torch.Generator().manual_seed(3))
        seen = {}
        for i, block in enumerate(sites.model.transformer.h):
            block.ln_1.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__((i, 1), args[0]))
            block.ln_2.register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__((i, 2), args[0]))
        sites.model.transformer.ln_f.register_forward_pre_hook(lambda _, args: seen.__setitem__("f", args[0]))
        sites.model(tokens)

        def squares(key: object, constant: float, alpha: float = 1.0) -> torch.Tensor:
            std = seen[key].var(-1, correction=0).add(1e-5).sqrt()
            square = alpha * (std / constant).log().square()
            return square if of is None else square * of.unsqueeze(-1)

        expected = [squares(key, 0.7) for key in ((0, 1), (0, 1), (0, 2), (1, 1), (1, 2))]
        expected = torch.stack([*expected, squares((1, 1), 1.3), squares("f", 0.7, 0.25)]).mean()
        spread = spread_loss(*sites.spread(of))
        torch.testing.assert_close(spread, expected, rtol=1e-5, atol=0)
        weight = sites.model.transformer.h[0].mlp.c_proj.weight
        gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (spread, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)

    def test_draws_live_stds_to_the_constants(self, short: Recipe, tmp_path: Path):
        last = {}
        for weight in (1e-6, 100.0):
            fitted(replace(short, spread_weight=weight), tmp_path / str(weight))
            last[weight] = read_log(tmp_path / str(weight))[-1]["spread"]
        assert 0 < last[100.0] < 0.8 * last[1e-6]


class TestRandomTokens:
    def test_as_a_text(self, tokenizer):
        blocks = load_blocks(Text(source="random-tokens"), tokenizer, 256, 4096, most=120)
        assert isinstance(blocks, Blocks)
        assert blocks.blocks.shape == (120, 256)
        counts = np.bincount(blocks.blocks.ravel(), minlength=4096)
        assert counts.mean() == 7.5
        assert counts.var() == pytest.approx(7.5, rel=0.15)  # Poisson's, nearly
        again = load_blocks(Text(source="random-tokens"), tokenizer, 256, 4096)
        assert np.array_equal(again.blocks[:4], blocks.blocks[:4])
        assert len(again) == 240
        assert np.array_equal(blocks.document_ids(np.array([0, 5]))[:, 0], [0, 5])

    def test_ids_that_the_tokenizer_has(self, tokenizer):
        assert np.array_equal(token_ids(tokenizer, 5000), np.arange(4096))
        assert np.array_equal(token_ids(tokenizer, 100), np.arange(100))
