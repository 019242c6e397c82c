"""A model in memory is used, unwrapped or refused, and never passed over for the recipe's."""

import copy
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from models import random_model, tiny_gpt2
from torch import nn
from transformers import BertConfig, BertLMHeadModel, GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM

import analysis
from finetune import remove_norms
from finetune.errors import CheckpointError
from finetune.folding import norm_state
from finetune.in_memory import plain_copy, unwrapped
from finetune.recipe import Recipe

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


class Mine(GPT2LMHeadModel):
    """A subclass that computes the same."""

    def about(self) -> str:
        return "mine"


class Doubled(LlamaForCausalLM):
    """A subclass that computes something else."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class LowRank(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.a, self.b = base, nn.Linear(12, 2), nn.Linear(2, 36)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.b(self.a(x))


class PeftLike(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model, self.config = model, model.config

    def merge_and_unload(self) -> Any:
        return self.base_model


def subclassed(model: Any, kind: type) -> Any:
    made = copy.deepcopy(model)
    made.__class__ = kind
    return made


def with_adapter(model: Any) -> Any:
    model.transformer.h[0].attn.c_attn = LowRank(model.transformer.h[0].attn.c_attn)
    return model


def patched(model: Any) -> Any:
    model.forward = MethodType(lambda self, *_, **__: GPT2LMHeadModel.forward(self, TOKENS), model)
    return model


def untied(model: Any) -> Any:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    return model


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


USED = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled-in-place": compiled_in_place,
    "data-parallel": nn.DataParallel,
    "compiled-data-parallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "data-parallel-compiled": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}
REFUSED = {
    "headless": (lambda: random_model().transformer, "GPT2Model, which has no unembedding. Pass the GPT2LMHeadModel"),
    "headless-llama": (lambda: random_model("llama").model, "LlamaModel, .* Pass the LlamaForCausalLM"),
    "headless-compiled": (lambda: torch.compile(random_model("gpt_neox").gpt_neox), "GPTNeoXModel, .* no unembedding"),
    "classifier": (lambda: GPT2ForSequenceClassification(random_model().config), "GPT2ForSequenceClassification"),
    "other-kind": (lambda: BertLMHeadModel(BertConfig(**_TINY_BERT)), "BertLMHeadModel"),
    "no-transformer": (lambda: nn.Linear(2, 2), "is a Linear"),
    "peft": (lambda: PeftLike(random_model()), r"PeftLike with adapters.*merge_and_unload\(\)"),
    "state-dict": (lambda: random_model().state_dict(), "is a OrderedDict|is a dict"),
    "meta": (lambda: random_model().to("meta"), "meta"),
}
_TINY_BERT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 9,
}
LOADERS = [
    analysis.load_bridge,
    analysis.load_hooked,  # which refuses a model before it asks for TransformerLens 3
    analysis.load_nnsight,
    analysis.load_transformers,
    analysis.load_hooked_blocks,
]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("wrap", USED)
def test_wrappers_are_taken_off(wrap: str, family: str):
    model = random_model(family)
    inner = unwrapped(USED[wrap](model))
    assert inner is model
    assert type(plain_copy(inner)) is type(model)
    assert torch.equal(plain_copy(inner)(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused(case: str, recipe: Recipe, tokenizer, tmp_path: Path):
    make, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        remove_norms(make(), tokenizer, recipe=recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for load in LOADERS:
        with pytest.raises(CheckpointError):
            load(make())
    with pytest.raises(CheckpointError, match=message):
        analysis.load_trio(make(), None, random_model(frozen=True))


def test_a_subclass_that_computes_the_same_is_used():
    model = random_model()
    made = plain_copy(subclassed(model, Mine).to(torch.bfloat16).train())
    assert (type(made), made.dtype, made.training) == (GPT2LMHeadModel, torch.float32, True)
    torch.testing.assert_close(made.lm_head.weight, model.lm_head.weight.bfloat16().float())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: subclassed(random_model("llama"), Doubled), "Doubled does not compute the same as a LlamaForCausalLM"),
        (lambda: patched(random_model()), "does not compute the same as a GPT2LMHeadModel"),
        (lambda: with_adapter(random_model()), r"differs .* in 8 weights.*c_attn.*Merge adapters"),
        (lambda: untied(random_model()), "tie_word_embeddings to False"),
    ],
)
def test_a_model_that_its_class_and_config_do_not_describe_is_refused(make, message: str):
    with pytest.raises(CheckpointError, match=message):
        plain_copy(make())


def test_a_wrapped_model_is_the_one_that_is_trained(recipe: Recipe, tokenizer, tmp_path: Path):
    model = nn.DataParallel(tiny_gpt2(n_layer=1))
    run = remove_norms(model, tokenizer, recipe=replace(recipe, steps=8, control=False), out=tmp_path / "run")
    assert run.load("ln_free").config.n_layer == 1
    assert norm_state(run.load("ln_free")) == "frozen"
    assert torch.equal(run.load("original").lm_head.weight, model.module.lm_head.weight)


@pytest.mark.parametrize("wrap", ["compiled", "data-parallel"])
def test_loaders_take_wrappers_off(wrap: str):
    model = random_model("llama", frozen=True)
    expected = model(TOKENS).logits
    torch.testing.assert_close(analysis.load_transformers(USED[wrap](model))(TOKENS).logits, expected)
    torch.testing.assert_close(analysis.load_bridge(USED[wrap](model))(TOKENS), expected, atol=1e-3, rtol=1e-3)
    trio = analysis.load_trio(USED[wrap](random_model("llama")), None, USED[wrap](model))
    assert list(trio) == ["original", "ln_free"]
    blocks = random_model("blocks", block="pre-ln")
    torch.testing.assert_close(analysis.load_hooked_blocks(USED[wrap](blocks))(TOKENS), blocks(TOKENS).logits)
