import copy
import gc
import json
import math
import os
import shutil
import socket
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from helpers import Finished, finetune, read_log, run_all_forked, run_forked
from models import random_model, tiny_gpt2
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.backends import registry
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, TrainingArguments

from finetune import recipe as recipes
from finetune import removal
from finetune.objective import NextTokenLoss, next_token_loss
from finetune.processes import check_processes, decided
from finetune.recipe import Recipe, Text
from finetune.removal import fit, remove_norms, set_up
from finetune.removal_trainer import RemovalTrainer
from finetune.run_directory import Run
from finetune.sites import Sites
from finetune.training import CAUSAL, DivergedError, attend_without_masks, checkpoints, training_arguments


def fitted(recipe: Recipe, directory: Path, name: str = "ln_free") -> dict[str, torch.Tensor]:
    """Fit as a run does; return the weights, constants and running sums of the last step."""
    setup = set_up(recipe)
    fit(setup, directory, name, setup.events if name == "ln_free" else [])
    return last_state(directory, name)


def last_state(directory: Path, name: str = "ln_free") -> dict[str, torch.Tensor]:
    return load_file(checkpoints(directory / "checkpoints" / name)[-1] / "model.safetensors")


def losses(directory: Path, name: str = "ln_free") -> list[float]:
    return [line["loss"] for line in read_log(directory, name)]


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], relative: float) -> None:
    """Each tensor is the other's, to a part of the largest number in it."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        difference = (tensor - other[name]).detach()
        if name.endswith("c_attn.bias"):
            # No pattern depends on the keys' bias: its gradient is rounding alone, of which Adam makes whole steps.
            difference[len(difference) // 3 : len(difference) * 2 // 3] = 0
        elif name.endswith("query_key_value.bias"):  # the same, by each of the three heads
            difference.view(3, 3, -1)[:, 1] = 0
        assert difference.abs().max() <= relative * tensor.abs().max(), name


@pytest.fixture(scope="module")
def short(recipe: Recipe) -> Recipe:
    """The recipe without a control and with one checkpoint, at the end."""
    return replace(recipe, control=False, save_every=99)


class TestLog:
    def test_a_line_a_step(self, run: Run):
        for model in ("ln_free", "control"):
            log = read_log(run.directory, model)
            assert [line["step"] for line in log] == list(range(16))
            assert [line["tokens"] for line in log] == [64 * step for step in range(1, 17)]
            assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in log)
            seconds = [line["seconds"] for line in log]
            assert seconds == sorted(seconds)
            parts = {"loss", "kl", "distance", "aux"}
            assert {"model", "step", "tokens", *parts, "lr", "grad_norm", "frozen", "seconds"} == set(log[1])

    def test_frozen_at_the_steps_of_the_schedule(self, run: Run):
        events = {line["step"]: line["frozen"] for line in read_log(run.directory, "ln_free") if line["frozen"]}
        sites = ["h.0.mlp", "h.1.mlp", "h.0.qk", "h.1.qk", "h.0.v", "h.1.v", "final", "merge eot", "merge position_0"]
        assert events == {step: [site] for step, site in enumerate(sites, start=2)}
        assert not any(line["frozen"] for line in read_log(run.directory, "control"))

    def test_stds_at_the_interval(self, run: Run):
        log = read_log(run.directory, "ln_free")
        assert [line["step"] for line in log if "std" in line] == [0, 4, 8, 12]
        assert all(std["frozen"] is None for std in log[0]["std"].values())
        middle = log[4]["std"]
        assert [site for site in middle if middle[site]["frozen"]] == ["h.0.qk", "h.0.mlp", "h.1.mlp"]

        ordinary, bos, eot = log[12]["std"]["h.0.v"]["frozen"]
        assert ordinary == bos == eot
        state = last_state(run.directory)
        assert ordinary == state["transformer.h.0.ln_1.divisors.1.frozen"][0].item()

    def test_live_stds_are_those_of_the_inputs(self, recipe: Recipe, run: Run):
        """At step 0, by a hook on what LayerNorm would see, token class by token class."""
        setup = set_up(recipe)
        order = np.random.default_rng(0).permutation(len(setup.text.train))[:4]
        ids = torch.stack([setup.text.train[i]["input_ids"] for i in order])
        seen = []
        setup.model.transformer.ln_f.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        setup.model(ids)
        std = seen[0].var(-1, correction=0).add(1e-5).sqrt()
        eot = ids == 0
        eot[:, 0] = False
        ordinary = ~eot
        ordinary[:, 0] = False
        expected = [std[ordinary].mean().item(), std[:, 0].mean().item(), std[eot].mean().item()]

        live = read_log(run.directory, "ln_free")[0]["std"]["final"]["live"]

        assert [math.nan if number is None else number for number in live] == pytest.approx(
            expected, rel=1e-5, nan_ok=True
        )


class TestAgainstPlainFineTuning:
    def test_control_is_plain_fine_tuning(self, recipe: Recipe, run: Run):
        """The whole loop once more: the untouched model, its own loss, torch's AdamW, LR and clipping by hand."""
        setup = set_up(recipe)
        model = copy.deepcopy(setup.model).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        order = np.random.default_rng(recipe.seed).permutation(len(setup.text.train))
        groups = [
            {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.01},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
        expected = []
        for step in range(16):
            ids = torch.stack([setup.text.train[i]["input_ids"] for i in order[4 * step : 4 * step + 4]])
            loss = model(ids, labels=ids).loss
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            cosine = (1 + math.cos(math.pi * (step - 2) / 14)) / 2
            lr = 3e-3 * step / 2 if step < 2 else 1e-3 + (3e-3 - 1e-3) * cosine
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            expected.append((loss.item(), norm, lr))

        log = [(line["loss"], line["grad_norm"], line["lr"]) for line in read_log(run.directory, "control")]

        np.testing.assert_allclose(log, expected, rtol=1e-4)
        assert_close(run.load("control").state_dict(), model.state_dict(), 1e-3)

    def test_ln_free_sees_the_same_text(self, run: Run):
        """Before the first site freezes, and while the warm-up has not begun, nothing tells the two apart."""
        ln_free, control = (read_log(run.directory, name) for name in ("ln_free", "control"))

        for step in (0, 1):
            assert ln_free[step]["loss"] == control[step]["loss"]
            assert ln_free[step]["grad_norm"] == control[step]["grad_norm"]
        assert ln_free[2]["loss"] != control[2]["loss"]
        assert [line["lr"] for line in ln_free] == [line["lr"] for line in control]


def trainer(recipe: Recipe, directory: Path, teacher: GPT2LMHeadModel | None = None) -> RemovalTrainer:
    setup = set_up(recipe)
    for module in setup.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    sites = Sites(setup.model, setup.tokenizer.eos_token_id)
    log = directory / "log.jsonl"
    return RemovalTrainer(sites, recipe, setup.events, setup.text.train, directory, log, "ln_free", teacher)


class TestOptimizer:
    def test_matrices_alone_decay(self, short: Recipe, tmp_path: Path):
        ours = trainer(replace(short, weight_decay=0.3, betas=(0.8, 0.95)), tmp_path)
        groups = ours.create_optimizer().param_groups

        names = {id(parameter): name for name, parameter in ours.model.named_parameters()}
        decayed, kept = ([names.pop(id(p)) for p in group["params"]] for group in groups)
        assert not names
        assert all(name.endswith(("weight",)) and "ln_" not in name for name in decayed)
        assert len(decayed) == 2 + 2 * 4
        assert "transformer.ln_f.weight" in kept
        assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
        assert {group["betas"] for group in groups} == {(0.8, 0.95)}

    def test_cosine_ends_at_the_horizon(self, short: Recipe, tmp_path: Path):
        """Which lies beyond the run: a later one leaves the end of the cosine away."""
        fitted(replace(short, lr_horizon=30), tmp_path)

        rates = [line["lr"] for line in read_log(tmp_path)]

        assert rates[:3] == pytest.approx([0, 1.5e-3, 3e-3])
        assert rates[15] == pytest.approx(1e-3 + 2e-3 * (1 + math.cos(math.pi * 13 / 28)) / 2)

    def test_no_clipping(self, short: Recipe, tmp_path: Path):
        """Clip 0; the norm is logged nevertheless."""
        unclipped = fitted(replace(short, clip=0.0), tmp_path / "0")
        barely = fitted(replace(short, clip=1e9), tmp_path / "1")

        assert_close(unclipped, barely, 1e-6)
        assert all(line["grad_norm"] > 0 for line in read_log(tmp_path / "0"))

    def test_dropout_is_off(self, short: Recipe, tiny: Path, tmp_path: Path):
        """Whatever the model's config says: the same weights as without, though the generator is another."""
        config = tiny / "config.json"
        assert '"resid_pdrop": 0.1' in config.read_text()
        fitted(short, tmp_path)

        assert (tmp_path / "ln_free/config.json").exists()
        setup = set_up(short)
        sites = Sites(copy.deepcopy(setup.model).eval(), 0)
        order = np.random.default_rng(0).permutation(len(setup.text.train))[:4]
        ids = torch.stack([setup.text.train[i]["input_ids"] for i in order])
        assert sites.model(ids, labels=ids).loss.item() == pytest.approx(losses(tmp_path)[0], rel=1e-5)


@pytest.mark.slow
class TestSameWeights:
    """However the work is split, ordered or saved on, the outcome is the same."""

    def test_micro_batches(self, short: Recipe, run: Run, tmp_path: Path):
        whole = fitted(replace(short, micro_batch=4), tmp_path)

        assert_close(whole, last_state(run.directory), 1e-3)
        np.testing.assert_allclose(losses(tmp_path), losses(run.directory), rtol=1e-5)

    def test_gradient_checkpointing(self, short: Recipe, run: Run, tmp_path: Path):
        """Running means too: a recomputed forward does not count twice."""
        recomputed = fitted(replace(short, gradient_checkpointing=True), tmp_path)

        assert_close(recomputed, last_state(run.directory), 1e-6)

    def test_gradient_checkpointing_with_the_auxiliary_loss(self, short: Recipe, tmp_path: Path):
        recipe = replace(short, aux_weight=1.0)
        plain = fitted(recipe, tmp_path / "plain")
        recomputed = fitted(replace(recipe, gradient_checkpointing=True), tmp_path / "recomputed")

        assert_close(recomputed, plain, 1e-6)
        assert all(line["aux"] > 0 for line in read_log(tmp_path / "plain"))

    def test_bf16(self, short: Recipe, run: Run, tmp_path: Path):
        """Matrix products are rounded; weights and statistics are float32, and near those without."""
        state = fitted(replace(short, bf16=True), tmp_path)

        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        assert all((tensor != tensor.bfloat16()).any() for name, tensor in state.items() if "std_sum" in name)
        assert losses(tmp_path) != losses(run.directory)
        np.testing.assert_allclose(losses(tmp_path), losses(run.directory), rtol=5e-3)

    def test_bf16_teacher_is_the_model_itself(self, short: Recipe, tmp_path: Path):
        """Rounded where the model is: while every norm is live there is nothing to learn from it."""
        fitted(replace(short, bf16=True, kl_weight=1.0, match_weight=1.0), tmp_path)

        first = read_log(tmp_path)[0]
        assert first["kl"] < 1e-6
        assert first["distance"] < 1e-6
        assert first["loss"] == pytest.approx(first["teacher_loss"], abs=1e-5)


AMX, AVX512, NEITHER = ({"amx_bf16": amx, "avx512_bf16": avx} for amx, avx in ((1, 1), (0, 1), (0, 0)))


@pytest.mark.parametrize(
    ("given", "capabilities", "expected"),
    [(None, AMX, True), (None, AVX512, True), (None, NEITHER, False), (False, AMX, False), (True, NEITHER, True)],
)
def test_bf16_is_chosen_where_the_processor_is_made_for_it(
    short: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: bool | None,
    capabilities: dict[str, int],
    expected: bool,
):
    """And the choice is the run's, wherever it goes on or is replayed."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(removal, "complete", lambda setup, directory: setup.recipe)
    recipe = removal.start(replace(short, bf16=given), tmp_path / "run")

    assert recipe.bf16 is expected
    assert recipes.load(tmp_path / "run/recipe.yaml").bf16 is expected
    assert training_arguments(recipe, tmp_path).bf16 is expected


def test_fsdp_of_accelerate_shards(short: Recipe, monkeypatch: pytest.MonkeyPatch):
    """The recipe says so, and accelerate is not told a second time."""
    assert not decided(short).shard
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert decided(short).shard
    check_processes(short)
    assert "ACCELERATE_USE_FSDP" not in os.environ


@pytest.mark.parametrize(("capabilities", "expected"), [(AMX, True), (AVX512, False)])
def test_a_run_that_did_not_say_goes_on_as_it_began(
    short: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capabilities: dict[str, int],
    expected: bool,
):
    """Earlier versions wrote `bf16: null`, and took it where there was AMX."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    PartialState(cpu=True)
    assert training_arguments(replace(short, bf16=None), tmp_path).bf16 is expected


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


def in_two_processes(function: Callable[[], None], cwd: Path) -> list[Finished]:
    """Call `function` in two processes, each told what torchrun tells it."""
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return run_all_forked([(function, shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"], cwd)


class TestTwoProcesses:
    @pytest.mark.slow
    def test_equal_one_that_accumulates(self, short: Recipe, tmp_path: Path):
        """Weights, constants and log of both models, with a teacher, all penalties, a guard, every class of token."""
        recipe = replace(short, control=True, kl_weight=0.5, match_weight=2.0, aux_weight=0.3, std_decay=0.5)
        recipe = replace(recipe, spread_weight=0.2, spread_live=True, guard=1.5)
        alone = {name: fitted(recipe, tmp_path / "alone", name) for name in ("ln_free", "control")}
        file = tmp_path / "tiny.yaml"
        file.write_text(recipes.dump(recipe))

        ends = in_two_processes(partial(finetune, file, "--out", "two"), tmp_path)

        assert [end.code for end in ends] == [0, 0], ends
        assert sum("Everything is in" in end.output for end in ends) == 1
        for name, state in alone.items():
            assert_close(last_state(tmp_path / "two", name), state, 1e-6)
            logs = [read_log(tmp_path / run, name) for run in ("alone", "two")]
            for ours, theirs in zip(*logs, strict=True):
                assert (ours["tokens"], ours["frozen"], ours["lr"]) == (
                    theirs["tokens"],
                    theirs["frozen"],
                    theirs["lr"],
                )
                for key in {"loss", "kl", "distance", "aux", "grad_norm", "spread", "guarded"} & ours.keys():
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6)
        assert (tmp_path / "two/results.csv").exists()

    @pytest.mark.slow
    def test_sharded_equal_one(self, short: Recipe, tmp_path: Path):
        """As above; each process holds half of the bytes, and a run goes on exactly, or in one process."""
        recipe = replace(
            short, control=True, kl_weight=0.5, match_weight=2.0, aux_weight=0.3, std_decay=0.5, shard=True
        )
        recipe = replace(recipe, spread_weight=0.2, spread_live=True, longest_embedding=0.9, guard=1.5, save_every=10)
        alone = remove_norms(recipe=recipe, out=tmp_path / "alone")
        file = tmp_path / "tiny.yaml"
        file.write_text(recipes.dump(recipe))

        ends = in_two_processes(partial(finetune, file, "--out", "two", first=weigh), tmp_path)

        assert [end.code for end in ends] == [0, 0], ends
        for name in ("ln_free", "control"):
            assert_close(last_state(tmp_path / "two", name), last_state(alone.directory, name), 1e-6)
            logs = [read_log(run, name) for run in (alone.directory, tmp_path / "two")]
            for ours, theirs in zip(*logs, strict=True):
                for key in {"loss", "kl", "distance", "aux", "grad_norm", "spread", "guarded"} & ours.keys():
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6)
            held = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
            theirs = tiny_gpt2().num_parameters() * 4
            own = theirs
            if name == "ln_free":  # untied
                own += tiny_gpt2().get_input_embeddings().weight.nbytes
            of = {"weights": own, "gradients": own, "optimizer": 2 * own, "teacher": theirs * (name == "ln_free")}
            for part, size in of.items():
                assert held[0][part] + held[1][part] == pytest.approx(size, rel=1e-3), part
                assert held[0][part] == pytest.approx(held[1][part], rel=0.01), part
        columns = ["loss", "kl", "jsd"]
        one, two = (each[columns] for each in (alone.results, pd.read_csv(tmp_path / "two/results.csv")))
        np.testing.assert_allclose(two, one, atol=1e-5)

        cut = [shutil.copytree(tmp_path / "two", tmp_path / name) for name in ("again", "by one")]
        for directory in cut:
            for left in ("ln_free", "control", "checkpoints/ln_free/checkpoint-16", "checkpoints/control"):
                shutil.rmtree(directory / left)
        ends = in_two_processes(partial(finetune, "resume", "again"), tmp_path)
        assert [end.code for end in ends] == [0, 0], ends
        for name in ("ln_free", "control"):
            assert_close(last_state(cut[0], name), last_state(tmp_path / "two", name), 0)
        setup = set_up(recipe)
        fit(setup, cut[1], "ln_free", setup.events)
        assert_close(last_state(cut[1]), last_state(alone.directory), 1e-6)

    def test_statistics_are_summed_not_copied(self, tmp_path: Path):
        """Each rank has seen stds of its own, and both get the mean over all tokens."""
        ends = in_two_processes(observe_and_update, tmp_path)

        assert [end.code for end in ends] == [0, 0], ends
        own, both = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)), strict=True)
        assert (own[0] - own[1]).abs().max() > 0.01
        assert torch.equal(both[0], both[1])
        sites = Sites(tiny_gpt2(), 0)
        sites.model(torch.cat([rank_tokens(0), rank_tokens(1)]))
        sites.observe()
        sites.update(0.9)
        torch.testing.assert_close(both[0], running_stds(sites), rtol=1e-6, atol=0)


def weigh() -> None:
    """Note down how many bytes of a fit this process holds when a checkpoint is saved."""
    step, save = RemovalTrainer.training_step, RemovalTrainer._save_checkpoint
    found: dict[str, int] = {}

    def held(tensors: Any) -> int:
        parts = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
        return sum(part.numel() * part.element_size() for part in parts)

    def stepped(self: RemovalTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        found["gradients"] = held(parameter.grad for parameter in self.model.parameters())
        return loss

    def saved(self: RemovalTrainer, *args: Any) -> None:
        states = self.optimizer.state_dict()["state"].values()
        found["weights"] = held(self.model.parameters())
        found["optimizer"] = held(tensor for state in states for tensor in state.values() if tensor.dim())
        found["teacher"] = 0 if self.teacher is None else held(self.teacher.parameters())
        Path(f"{self._record.name}-{dist.get_rank()}.json").write_text(json.dumps(found))
        save(self, *args)

    mock.patch.object(RemovalTrainer, "training_step", stepped).start()
    mock.patch.object(RemovalTrainer, "_save_checkpoint", saved).start()


def rank_tokens(rank: int) -> torch.Tensor:
    tokens = torch.randint(1, 4096, (1 + 2 * rank, 16), generator=torch.Generator().manual_seed(rank))
    tokens[:, 5] = 0
    return tokens


def running_stds(sites: Sites) -> torch.Tensor:
    return torch.stack([sites[name].running_std() for name in sites])


def observe_and_update() -> None:
    """One rank of two: save what it saw alone, and what it has after the reduction."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    sites = Sites(tiny_gpt2(), 0)
    sites.model(rank_tokens(rank))
    sites.observe()
    stds = torch.stack([norm.live_std.detach() for norm in sites.norms for _ in norm.divisors]).unsqueeze(1)
    members = torch.stack([sites.classes.index == c for c in range(3)])
    own = (stds * members).sum((2, 3)) / members.sum((1, 2))
    sites.update(0.9)
    torch.save([own, running_stds(sites)], f"{rank}.pt")
    dist.destroy_process_group()


class TestDivergence:
    @pytest.mark.parametrize(
        ("spoil", "said", "steps"),
        [
            (lambda loss: loss * math.nan, "nan nats/token at step 12;", 12),
            (lambda loss: loss + 3.5, "at step 14, and for 3 steps in a row it was more than max_rise=3 above", 14),
        ],
        ids=["nan", "exploded"],
    )
    def test_stops_before_the_weights_move(
        self,
        spoil: Callable,
        said: str,
        steps: int,
        recipe: Recipe,
        run: Run,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        ours = trainer(recipe, tmp_path)
        before = {}

        def spoilt(*args: Any) -> NextTokenLoss:
            loss = next_token_loss(*args)
            if ours.state.global_step < 12:
                return loss
            before.update({name: tensor.clone() for name, tensor in ours.model.state_dict().items()})
            return NextTokenLoss(*map(spoil, loss))

        monkeypatch.setattr("finetune.objective.next_token_loss", spoilt)
        with pytest.raises(DivergedError, match=said) as error:
            ours.train()

        for name, tensor in ours.model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert "merge position_0" in str(error.value)
        saved = checkpoints(tmp_path)
        assert [path.name for path in saved] == ["checkpoint-5", "checkpoint-10"]
        assert str(saved[-1]) in str(error.value)
        assert len(read_log(tmp_path)) == steps
        again = trainer(recipe, tmp_path)
        monkeypatch.undo()
        again.train(resume_from_checkpoint=str(saved[-1]))
        assert_close(again.model.state_dict(), last_state(run.directory) | tied(again.model), 1e-6)

    def test_a_loss_that_comes_back_within_two_steps_is_none(
        self, short: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Nor is one that comes again: in a row is what counts, when the run was taken up in between too."""
        short = replace(short, save_every=1)
        high, ours = {4, 5, 7, 8}, trainer(short, tmp_path)
        monkeypatch.setattr(
            "finetune.objective.next_token_loss",
            lambda *args: NextTokenLoss(
                *(part + 50.0 * (ours.state.global_step in high) for part in next_token_loss(*args))
            ),
        )
        ours.train()
        high |= {6}
        ours = trainer(short, tmp_path)
        for path in checkpoints(tmp_path):
            shutil.rmtree(path)
        with pytest.raises(DivergedError, match=r"at step 6, and for 3 steps in a row"):
            ours.train()
        ours = trainer(short, tmp_path)
        with pytest.raises(DivergedError, match=r"at step 6, and for 3 steps in a row"):
            ours.train(resume_from_checkpoint=str(checkpoints(tmp_path)[-1]))

    def test_spoilt_gradient_is_never_saved(self, recipe: Recipe, tmp_path: Path):
        """The loss of step 9 is good, its gradient is not, and a checkpoint is due."""
        ours = trainer(recipe, tmp_path)
        ours.model.transformer.wpe.weight.register_hook(
            lambda gradient: gradient * math.nan if ours.state.global_step == 9 else gradient
        )

        with pytest.raises(DivergedError, match=r"step 9.*merge eot"):
            ours.train()

        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-5"]

    def test_within_the_first_steps(self, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(
            "finetune.objective.next_token_loss",
            lambda *args: NextTokenLoss(*(part * math.nan for part in next_token_loss(*args))),
        )

        with pytest.raises(DivergedError, match=r"at step 0.*none yet"):
            trainer(recipe, tmp_path).train()


def tied(model: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    """What a state dict holds twice and a file once."""
    return {"lm_head.weight": model.lm_head.weight}


class TestDataOrder:
    def order(self, recipe: Recipe, directory: Path) -> list[int]:
        """The numbers of the blocks, as the data loader gives them."""
        ours = trainer(recipe, directory)
        blocks = {block.tobytes(): i for i, block in enumerate(set_up(recipe).text.train.blocks)}
        return [
            blocks[ids.numpy().astype(np.uint16).tobytes()]
            for batch in ours.get_train_dataloader()
            for ids in batch["input_ids"]
        ]

    def test_is_the_seeds_alone(self, short: Recipe, tmp_path: Path):
        first = self.order(short, tmp_path)

        assert len(set(first)) == len(first) == 16 * 4
        assert self.order(replace(short, micro_batch=1, lr=1e-3), tmp_path) == first
        assert self.order(replace(short, seed=1), tmp_path) != first
        assert self.order(short.scaled(32), tmp_path)[:64] == first

    def test_every_pass_is_a_permutation(self, short: Recipe, text: Path, tmp_path: Path):
        lines = text.read_text().splitlines(keepends=True)
        (tmp_path / "few.jsonl").write_text("".join(lines[:6]))
        few = replace(short, text=Text(source=str(tmp_path / "few.jsonl"), held_out_fraction=0.2))

        order = self.order(few, tmp_path)

        n = len(set(order))
        assert n < 32
        passes = [order[start : start + n] for start in range(0, len(order), n)]
        assert all(sorted(one) == list(range(n)) for one in passes[:-1])
        assert passes[0] != passes[1]
        assert len(order) == 16 * 4


def fit_compiled(recipe: Recipe) -> None:
    """Fit compiled to `compiled`, traced as ever but not turned into C++, which takes a minute; count the graphs."""
    masks = set()

    def noting_masks(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        for node in (node for part in parts for node in part.graph.nodes):
            if node.target is nn.functional.scaled_dot_product_attention:
                masks.add(None if node.kwargs["attn_mask"] is None and node.kwargs["is_causal"] is True else str(node))
        return aot_eager(graph, inputs)

    aot_eager: Any = registry.lookup_backend("aot_eager")
    quickly = partial(TrainingArguments, torch_compile_backend="aot_eager")
    with (
        mock.patch("finetune.training.TrainingArguments", quickly),
        mock.patch.dict(registry._COMPILER_FNS, {"aot_eager": noting_masks}),
    ):
        fitted(recipe, Path("compiled"))
    counted = {"graphs": counters["stats"]["unique_graphs"], "breaks": list(counters["graph_break"])}
    counted["masks"] = list(masks)
    Path("counted.json").write_text(json.dumps(counted))


WITHOUT_MASKS = [
    *(("gpt2", {}), ("gpt_neox", {}), ("llama", {}), ("qwen2", {}), ("gemma", {})),
    *(("mistral", {"sliding_window": None}), ("mistral", {"sliding_window": 12})),
]
WITH_THEIR_OWN = [
    *(
        ("mistral", {}),
        ("mistral", {"sliding_window": 11}),
        ("gpt_neo", {}),
        ("gemma2", {}),
        ("blocks", {"block": "op"}),
    ),
    *(("gpt2", {"attn_implementation": "eager"}), ("gemma2", {"attn_logit_softcapping": None})),
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "config"), WITHOUT_MASKS)
def test_attention_without_masks_is_the_same(family: str, config: dict[str, Any], tmp_path: Path):
    """And no checkpoint knows of it."""
    model = random_model(family, **config)
    tokens = torch.randint(23, (3, 11), generator=torch.Generator().manual_seed(0))
    expected = model(tokens, use_cache=False).logits

    attend_without_masks(model, 11)

    assert model.config._attn_implementation == CAUSAL
    with mock.patch("transformers.masking_utils.sdpa_mask", side_effect=AssertionError("a mask was made")):
        assert torch.equal(model(tokens, use_cache=False).logits, expected)
    model.save_pretrained(tmp_path)
    assert CAUSAL not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("family", "config"), WITH_THEIR_OWN)
def test_attention_that_needs_a_mask_stays(family: str, config: dict[str, Any]):
    """A window no longer than the text, a soft-cap, a local layer, or a model that transformers does not have."""
    model = random_model(family, **config)
    before = model.config._attn_implementation
    attend_without_masks(model, 11)
    assert model.config._attn_implementation == before != CAUSAL


def test_student_teacher_and_control_attend_without_masks(short: Recipe, tmp_path: Path, monkeypatch):
    """And what they leave attends as it would."""
    trainers: list[RemovalTrainer] = []
    train = RemovalTrainer.train
    monkeypatch.setattr(RemovalTrainer, "train", lambda self, *args: (trainers.append(self), train(self, *args))[1])
    saved = []
    monkeypatch.setattr(removal.checkpoint, "save", lambda model, *_: saved.append(model))
    setup = set_up(replace(short, kl_weight=1.0))
    for name, events in (("ln_free", setup.events), ("control", [])):
        fit(setup, tmp_path, name, events)
    models = [trainers[0].sites.model, trainers[0].teacher, trainers[1].sites.model]
    assert [model.config._attn_implementation for model in models] == [CAUSAL] * 3
    assert [model.config._attn_implementation for model in saved] == ["sdpa"] * 2
    assert setup.model.config._attn_implementation == "sdpa"


def test_one_fit_is_freed_before_the_next(short: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights, moments and gradients of both would not fit where one's do."""
    alive: list[list[bool]] = []
    made: list[weakref.ref] = []
    init = RemovalTrainer.__init__

    def noting(self: RemovalTrainer, *args: Any, **kwargs: Any) -> None:
        alive.append([ref() is not None for ref in made])
        init(self, *args, **kwargs)
        made.extend(weakref.ref(part) for part in (self, self.sites.model, self.teacher) if part is not None)

    monkeypatch.setattr(RemovalTrainer, "__init__", noting)
    gc.disable()  # it is not to be by chance
    try:
        removal.start(replace(short, control=True, kl_weight=1.0), tmp_path / "run")
    finally:
        gc.enable()
    assert alive == [[], [False] * 3]


def test_gradients_are_held_once(short: Recipe, tmp_path: Path):
    handler = trainer(short, tmp_path).accelerator.ddp_handler
    assert handler.gradient_as_bucket_view
    assert not handler.broadcast_buffers


@pytest.mark.slow
@pytest.mark.parametrize(("gradient_checkpointing", "kl_weight"), [(False, 0.5), (True, 0.0)])
def test_compiled_once_and_once_more(
    gradient_checkpointing: bool, kl_weight: float, short: Recipe, tokenizer, tmp_path: Path
):
    """Over a whole schedule: at the first step, and when every norm becomes a constant; loss and teacher once."""
    tiny_gpt2(n_layer=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = replace(
        short,
        model=str(tmp_path / "model"),
        gradient_checkpointing=gradient_checkpointing,
        aux_weight=0.1,
        kl_weight=kl_weight,
    ).scaled(12)

    # In a process of its own: not where shapes are checked, which breaks graphs.
    end = run_forked(partial(fit_compiled, replace(recipe, compile=True)), tmp_path)

    assert end.code == 0, end.output
    counted = {"graphs": 4 if kl_weight else 3, "breaks": [], "masks": [None]}
    assert json.loads((tmp_path / "counted.json").read_text()) == counted
    assert_close(last_state(tmp_path / "compiled"), fitted(recipe, tmp_path / "eager"), 1e-3)
    for line, other in zip(read_log(tmp_path / "compiled"), read_log(tmp_path / "eager"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["aux"] == pytest.approx(other["aux"], rel=1e-3)


class TestTeacher:
    def test_kl_and_distance_are_to_the_original(self, short: Recipe, tmp_path: Path):
        """At the first steps, where nothing is frozen, there is none; at the last they are what the forwards say."""
        recipe = replace(short, kl_weight=0.7, match_weight=2.0)
        fitted(recipe, tmp_path)
        log = read_log(tmp_path)
        assert [line["kl"] for line in log[:1]] == pytest.approx([0], abs=1e-6)
        assert [line["distance"] for line in log[:1]] == pytest.approx([0], abs=1e-6)
        assert all(line["kl"] > 1e-4 and line["distance"] > 1e-4 for line in log[3:])
        assert all(0 < line["teacher_seconds"] <= line["seconds"] for line in log)

    def test_the_loss_is_what_the_forwards_say(self, short: Recipe, tmp_path: Path):
        """By torch's own losses on all logits at once; one site is frozen, or there would be no distance."""
        recipe = replace(short, kl_weight=0.7, match_weight=2.0)
        original = set_up(recipe).model
        ours = trainer(recipe, tmp_path, teacher=original)
        ours.lr_scheduler = SimpleNamespace(get_last_lr=lambda: [recipe.lr / 2])  # so the weight is halved too
        ours.sites["h.0.v"].alpha.fill_(1.0)
        ids = torch.stack([ours.train_dataset[i]["input_ids"] for i in range(3)])

        loss = ours.compute_loss(ours.model, {"input_ids": ids})

        own = ours.model.transformer(ids, output_hidden_states=True)
        theirs = original.transformer(ids, output_hidden_states=True)
        log_probs, expected = (
            (out.last_hidden_state[:, :-1] @ original.transformer.wte.weight.T).log_softmax(-1).flatten(0, 1)
            for out in (own, theirs)
        )
        kl = nn.functional.kl_div(log_probs, expected, log_target=True, reduction="batchmean")
        cross_entropy = nn.functional.nll_loss(log_probs, ids[:, 1:].flatten())
        one, other = (out.hidden_states[1].double() for out in (own, theirs))  # two blocks: only the first's is matched
        one, other = ((x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True) for x in (one, other))
        distance = (one - other).square().mean()
        assert distance > 0.01
        assert loss.item() == pytest.approx((0.3 * cross_entropy + 0.7 * kl + distance).item(), rel=1e-4)

    def test_the_teacher_learns_nothing(self, short: Recipe, tmp_path: Path):
        original = set_up(short).model
        before = copy.deepcopy(original.state_dict())
        trainer(replace(short, kl_weight=1.0).scaled(4), tmp_path, teacher=original).train()
        for name, tensor in original.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    def test_the_control_has_none(self, recipe: Recipe, tmp_path: Path):
        fitted(replace(recipe, kl_weight=1.0), tmp_path, "control")
        assert all(line["kl"] == 0 and "teacher_seconds" not in line for line in read_log(tmp_path))


@pytest.mark.slow
class TestAdaptive:
    def test_waits_for_the_loss_and_can_be_replayed(self, short: Recipe, tmp_path: Path):
        schedule = replace(short.schedule, tolerance=0.02, max_gap=4, smoothing=0.5)
        adaptive = replace(short, steps=30, schedule=schedule)
        state = fitted(adaptive, tmp_path / "adaptive")
        begun = [(line["step"], name) for line in read_log(tmp_path / "adaptive") for name in line["frozen"]]
        names = [event.name for event in set_up(adaptive).events]
        assert [name for _, name in begun] == names
        gaps = np.diff([step for step, _ in begun])
        assert set(gaps) <= {1, 2, 3, 4}
        assert max(gaps) > 1
        replay = recipes.load(tmp_path / "adaptive" / "replay.yaml")
        assert replay.schedule.tolerance is None
        assert_close(fitted(replay, tmp_path / "replay"), state, 0)

    def test_a_resumed_run_takes_the_same_decisions(self, short: Recipe, tmp_path: Path):
        schedule = replace(short.schedule, tolerance=0.02, max_gap=4, smoothing=0.5)
        adaptive = replace(short, steps=30, schedule=schedule, save_every=10)
        whole = fitted(adaptive, tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        for left in ("ln_free", "checkpoints/ln_free/checkpoint-30"):
            shutil.rmtree(tmp_path / "cut" / left)
        assert_close(fitted(adaptive, tmp_path / "cut"), whole, 0)
        logs = [read_log(tmp_path / name) for name in ("whole", "cut")]
        assert [line["frozen"] for line in logs[0]] == [line["frozen"] for line in logs[1]]


class TestReports:
    def test_tensorboard(self, short: Recipe, tmp_path: Path):
        accumulator = pytest.importorskip(
            "tensorboard.backend.event_processing.event_accumulator", reason="an optional extra"
        )
        fitted(replace(short, report_to=("tensorboard",)), tmp_path)

        events = next(tmp_path.rglob("events.out.tfevents*")).parent
        reader = accumulator.EventAccumulator(str(events))
        reader.Reload()
        reported = {event.step: event.value for event in reader.Scalars("train/loss")}
        assert list(reported) == [4, 8, 12, 16]
        assert reported[4] == pytest.approx(np.mean(losses(tmp_path)[:4]), rel=1e-4)
