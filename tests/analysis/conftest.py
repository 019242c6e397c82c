import dataclasses
import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from analysis import load_trio, prompts, report
from analysis.texts import read_text
from finetune import checkpoint


@pytest.fixture(scope="session")
def ln_free(tmp_path_factory) -> str:
    """The bundled model with its LNs frozen at a std of 1: no good one, but of its shape and with its tokenizer."""
    model = checkpoint.load("micro")
    model.config.layer_norm_epsilon = checkpoint.FROZEN_EPS
    for name, module in model.named_modules():
        if "ln_" in name:
            module.eps = checkpoint.FROZEN_EPS
            module.weight.data *= 1e6
    directory = tmp_path_factory.mktemp("models") / "ln_free"
    checkpoint.save(model, directory, checkpoint.load_tokenizer("micro"))
    return str(directory)


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
    pairs.write_text(json.dumps([dataclasses.asdict(pair) for pair in prompts.read_pairs(prompts.MICRO)[:2]]))
    return report.write(micro_trio, samples, out, names=names, pairs=pairs).parent


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, str]:
    """Directories of a trio of small models with the tokenizer of `micro`."""
    directories = {}
    for name, eps in (("original", 1e-5), ("control", 1e-5), ("ln_free", checkpoint.FROZEN_EPS)):
        torch.manual_seed(len(directories))
        shape = {"vocab_size": 4096, "n_positions": 32, "n_embd": 16, "n_head": 2, "n_layer": 2}
        model = GPT2LMHeadModel(GPT2Config(**shape, layer_norm_epsilon=eps, bos_token_id=0, eos_token_id=0))
        for path, parameter in model.named_parameters():
            parameter.data.normal_(float("ln_" in path and path.endswith("weight")), 0.3)
            if eps > 1 and "ln_" in path and path.endswith("weight"):
                parameter.data *= 1e6
        directories[name] = str(tmp_path_factory.mktemp("tiny") / name)
        checkpoint.save(model, directories[name], checkpoint.load_tokenizer("micro"))
    return directories
