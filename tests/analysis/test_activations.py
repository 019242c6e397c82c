"""Activation functions go by several names, and TransformerLens does not have all of them."""

import dataclasses

import pytest
import torch
from contract import TOOLS
from models import random_model
from transformers.activations import ACT2CLS, ACT2FN

import analysis
from finetune import checkpoint, families, recipe, removal
from finetune.errors import CheckpointError

FIELDS = {"gpt2": "activation_function", "gpt_neo": "activation_function", "gpt_neox": "hidden_act"}
FIELDS |= {"llama": "hidden_act", "gemma2": "hidden_activation"}


@pytest.mark.parametrize("name", families.ACTIVATIONS)
def test_synonyms_are_the_same_function(name):
    x = torch.linspace(-30, 30, 10_001)
    torch.testing.assert_close(ACT2FN[name](x), ACT2FN[families.ACTIVATIONS[name]](x), rtol=1e-6, atol=1e-5)


def test_no_synonym_is_missing():
    x = torch.linspace(-30, 30, 10_001)
    for name in set(ACT2CLS) - {"prelu", "xielu"}:  # which have parameters
        same = [
            known
            for known in ("gelu", "gelu_new", "relu", "silu")
            if (ACT2FN[name](x) - ACT2FN[known](x)).abs().max() < 1e-5
        ]
        assert same == [families.ACTIVATIONS[name]] if name in families.ACTIVATIONS else not same, name


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("family", FIELDS)
@pytest.mark.parametrize("name", families.ACTIVATIONS)
@torch.no_grad()
def test_a_model_loads_under_each_name(name, family, tool):
    plain = random_model(family, frozen=True, **{FIELDS[family]: name})
    tokens = torch.arange(11)[None]
    torch.testing.assert_close(TOOLS[tool](plain)(tokens), plain(tokens).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("activation", ["quick_gelu", "tanh", "relu2"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_only_the_tools_that_lack_one_refuse_it(family, activation):
    plain = random_model(family, frozen=True, **{FIELDS[family]: activation})
    tokens = torch.arange(11)[None]
    for tool, load in TOOLS.items():
        if family != "gpt2" and tool == "bridge":
            torch.testing.assert_close(load(plain)(tokens), plain(tokens).logits, rtol=1e-3, atol=1e-3)
        else:
            with pytest.raises(CheckpointError, match=f"does not have the activation {activation}, only gelu"):
                load(plain)
    assert analysis.load_transformers(plain)(tokens).logits.isfinite().all()
    nnsight = analysis.load_nnsight(plain, checkpoint.load_tokenizer("micro"))
    with nnsight.trace(tokens):
        logits = nnsight.output.logits.save()
    assert logits.shape == (1, 11, 23)


@pytest.mark.parametrize(("family", "activation"), [("gpt2", "quick_gelu"), ("llama", "mish")])
def test_what_will_not_load_is_known_before_training(family, activation, tmp_path):
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times.\n" * 500)
    text = recipe.Text(str(tmp_path / "text.txt"), held_out_fraction=0.1)
    made = dataclasses.replace(recipe.load("micro"), context=8, also=(), text=text)
    tokenizer = checkpoint.load_tokenizer("micro")
    with pytest.warns(UserWarning, match=rf"TransformerLens does not have the activation {activation}: .*load_hooked"):
        removal.set_up(made, random_model(family, vocab_size=4096, **{FIELDS[family]: activation}), tokenizer)
