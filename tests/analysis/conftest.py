import dataclasses
import json

import pytest
from models import random_model

from analysis import load_trio, prompts, report
from analysis.texts import read_text
from finetune import checkpoint
from finetune.bundled import MODELS


@pytest.fixture(scope="session")
def ln_free() -> str:
    """A directory: the page names it by its end."""
    return str(MODELS["micro-ln-free"])


@pytest.fixture(scope="session")
def micro_trio(ln_free):
    return load_trio("micro", "micro", ln_free)


@pytest.fixture(scope="session")
def made(micro_trio, tmp_path_factory):
    """The directory of a report of all analyses on one block of two texts."""
    out = tmp_path_factory.mktemp("reports") / "made"
    samples = {name: read_text(name, micro_trio["original"], 256) for name in ("books-report", "shifted-peps")}
    names = {"original": "micro", "control": "micro", "ln_free": "models/ln_free"}
    pairs = out.parent / "pairs.json"
    swapped = [
        dataclasses.replace(pair, correct=pair.wrong, wrong=pair.correct) for pair in prompts.read_pairs(prompts.MICRO)
    ]  # which no model gets right
    pairs.write_text(json.dumps([dataclasses.asdict(pair) for pair in swapped[:2]]))
    return report.write(micro_trio, samples, out, names=names, pairs=pairs).parent


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, str]:
    """Directories of a trio of small models with the tokenizer of `micro`."""
    directories = {}
    shape = {"vocab_size": 4096, "n_positions": 32, "n_embd": 16, "n_head": 2}
    for seed, name in enumerate(("original", "control", "ln_free")):
        model = random_model(seed=seed, frozen=name == "ln_free", **shape)
        directories[name] = str(tmp_path_factory.mktemp("tiny") / name)
        checkpoint.save(model, directories[name], checkpoint.load_tokenizer("micro"))
    return directories
