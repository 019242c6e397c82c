import json
import lzma
from pathlib import Path
from unittest import mock

import pytest
from helpers import keep_checkpoints
from models import tiny_gpt2
from transformers import AutoTokenizer

from finetune.bundled import MODELS, TEXTS
from finetune.recipe import Gaps, Recipe, Schedule, Text
from finetune.removal import remove_layernorm
from finetune.run_directory import Run


@pytest.fixture(scope="session", autouse=True)
def _checkpoints_stay():
    keep_checkpoints()
    yield
    mock.patch.stopall()


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS["micro"])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """The directory of a tiny model with the tokenizer of micro."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    tiny_gpt2().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of sixty short documents, some 300 blocks of the tiny model."""
    with lzma.open(TEXTS["books-validation"], "rt") as books:
        book = json.loads(books.readline())["text"]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": book[i : i + 200]}) + "\n" for i in range(0, 12_000, 200)))
    return path


@pytest.fixture(scope="session")
def recipe(tiny: Path, text: Path) -> Recipe:
    """Sixteen steps for the tiny model: an event at each of the steps 2 to 10, checkpoints at 5, 10, 15 and 16."""
    return Recipe(
        name="tiny",
        model=str(tiny),
        text=Text(source=str(text), held_out_fraction=0.1),
        steps=16,
        batch=4,
        micro_batch=2,
        lr=3e-3,
        min_lr=1e-3,
        warmup=2,
        schedule=Schedule(start=2, gap=Gaps(mlp=1, qk=1, v=1, final=1, eot=1)),
        save_every=5,
        log_every=4,
        device="cpu",
        bf16=False,
    )


@pytest.fixture(scope="session")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The recipe, run without a break."""
    return remove_layernorm(recipe=recipe, out=tmp_path_factory.mktemp("runs") / "tiny")
