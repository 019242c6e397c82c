"""`micro_batch: auto`: the largest that fits, tried before anything is trained."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import PartialState
from helpers import finetune, pretrain_recipe
from safetensors.torch import load_file
from test_trainer import in_two_processes
from torch import Tensor

from finetune import recipe as recipes
from finetune import remove_norms
from finetune.pretrain import PretrainTrainer, pretrain
from finetune.processes import check_shares, with_micro_batch
from finetune.recipe import Recipe, RecipeError
from finetune.removal_trainer import RemovalTrainer

FULL = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def room_for(most: int, kind: Any = RemovalTrainer, tried: list[int] | None = None) -> Any:
    """Have memory for micro-batches of `most` sequences; `tried` takes the sizes of all forwards."""
    compute_loss = kind.compute_loss

    def limited(self: Any, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        size = len(inputs["input_ids"])
        if tried is not None:
            tried.append(size)
        if size > most:
            raise FULL
        return compute_loss(self, model, inputs, *args, **kwargs)

    return mock.patch.object(kind, "compute_loss", limited)


def attempt(most: int) -> Callable[[int], None]:
    def of_size(size: int) -> None:
        if size > most:
            raise FULL

    return of_size


@pytest.fixture
def auto(recipe: Recipe) -> Recipe:
    return replace(recipe, micro_batch="auto", control=False, kl_weight=1.0, cover=0.25)


@pytest.mark.parametrize(("batch", "most", "found"), [(12, 99, 12), (12, 11, 6), (12, 5, 4), (12, 1, 1), (7, 6, 1)])
def test_the_largest_divisor_that_fits(batch: int, most: int, found: int, auto: Recipe):
    assert with_micro_batch(replace(auto, batch=batch), attempt(most)).micro_batch == found


def test_what_is_said_stays(recipe: Recipe):
    assert with_micro_batch(recipe, attempt(0)) is recipe


def test_where_nothing_fits_and_where_something_else_is_wrong(auto: Recipe, tmp_path: Path):
    with room_for(0), pytest.raises(RecipeError, match="Not even one sequence fits"):
        remove_norms(recipe=auto, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()

    def broken(size: int) -> None:
        raise RuntimeError("the device is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        with_micro_batch(auto, broken)


def test_processes_have_to_share_the_batch(auto: Recipe):
    check_shares(auto, 4)
    with pytest.raises(RecipeError, match="cannot be shared by 3 processes in micro-batches of auto"):
        check_shares(auto, 3)


@pytest.mark.slow
def test_a_run_is_that_of_the_size_which_it_records(auto: Recipe, tmp_path: Path):
    tried: list[int] = []
    with room_for(2, tried=tried):
        run = remove_norms(recipe=auto, out=tmp_path / "auto")
    assert tried[:3] == [4, 2, 2]  # the second step has moments, too
    recorded = recipes.load(run.directory / "recipe.yaml")
    assert recorded.micro_batch == 2
    given = remove_norms(recipe=replace(auto, micro_batch=2), out=tmp_path / "given")
    ours, theirs = (load_file(path / "ln_free/model.safetensors") for path in (run.directory, given.directory))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_pretraining(text: Path, tmp_path: Path):
    recipe = replace(pretrain_recipe(text), micro_batch="auto", bf16=True, gradient_checkpointing=True)
    with room_for(3, PretrainTrainer):
        run = pretrain(recipe, out=tmp_path / "auto")
    assert recipes.load_pretraining(run.directory / "recipe.yaml").micro_batch == 2
    given = pretrain(replace(recipe, micro_batch=2), out=tmp_path / "given")
    ours, theirs = (load_file(path / "model/model.safetensors") for path in (run.directory, given.directory))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def room_by_rank() -> None:
    """Have memory for two sequences in the first process, and for one in the second."""
    room_for(2 - PartialState(cpu=True).process_index).start()


@pytest.mark.slow
def test_processes_agree(auto: Recipe, tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(recipes.dump(auto))
    ends = in_two_processes(partial(finetune, "tiny.yaml", "--out", "two", first=room_by_rank), tmp_path)
    assert [end.code for end in ends] == [0, 0], ends
    assert recipes.load(tmp_path / "two/recipe.yaml").micro_batch == 1


def test_as_a_flag(auto: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "tiny.yaml").write_text(recipes.dump(replace(auto, micro_batch=4)))
    finetune("plan", tmp_path / "tiny.yaml", "--micro-batch", "auto")
    assert "with micro-batches of 1 × 16 tokens" in capsys.readouterr().out
