"""Random models for the tests, one entry a family.

Every parameter of a `random_model` matters: it is moved away from where it starts, biases from 0 and gains from 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from finetune import families
from finetune.blocks import BlocksForCausalLM, block_config

FROZEN_EPS = 1e12
"""Dwarfs any variance: with it a norm divides by its root."""


@dataclass(frozen=True)
class Family:
    make: Callable[..., Any]
    """Takes fields of the config, and returns the model as it is initialised."""
    small: dict[str, Any]
    """The fields that differ from the config's own defaults, unless a test says otherwise."""
    eps: str
    """The field that holds the eps of the norms."""


def _of(model_type: str, **small: Any) -> Family:
    """Return a family of transformers' models, by the names that their configs share where they share them."""
    family = families.FAMILIES[model_type]

    def make(**config: Any) -> Any:
        return family.model_class(family.model_class.config_class(**config))

    return Family(make, small | dict.fromkeys(("bos_token_id", "eos_token_id"), 0), eps=family.eps)


_SMALL = {
    "vocab_size": 23,
    "max_position_embeddings": 11,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
}
_GROUPED = _SMALL | {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Grouped queries: each key and value serves two heads."""

FAMILIES = {
    "gpt2": _of(
        "gpt2",
        vocab_size=23,
        n_positions=11,
        n_embd=12,
        n_layer=2,
        n_head=3,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    ),
    "gpt_neox": _of("gpt_neox", **_SMALL | {"hidden_size": 24}, rotary_pct=0.5),
    "gpt_neo": _of(
        "gpt_neo",
        vocab_size=23,
        max_position_embeddings=11,
        hidden_size=12,
        num_layers=2,
        num_heads=3,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
    ),
    "llama": _of("llama", **_GROUPED),
    "mistral": _of("mistral", **_GROUPED, sliding_window=4),
    "qwen2": _of("qwen2", **_GROUPED),
    "gemma": _of("gemma", **_GROUPED, head_dim=6, pad_token_id=0, attention_bias=True),
    "gemma2": _of("gemma2", **_GROUPED, head_dim=6, pad_token_id=0, sliding_window=4, query_pre_attn_scalar=6),
    "blocks": Family(
        lambda block, **knobs: BlocksForCausalLM(block_config(block, **knobs)),
        {"vocab_size": 23, "n_positions": 11, "n_embd": 12, "n_layer": 2, "n_head": 3},
        eps="norm_epsilon",
    ),
}


def random_model(
    family: str = "gpt2",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    std: float = 0.3,
    frozen: bool = False,
    **config: Any,
) -> Any:
    """Return a model whose parameters are `std` away from where they start, in evaluation mode.

    `config` holds fields of the family's config. A `frozen` one is LN-free in the format b25: each norm divides by a
    constant of its own, between 0.8 and 1.8. The global random numbers stay as they are.
    """
    its = FAMILIES[family]
    config = its.small | ({its.eps: FROZEN_EPS} if frozen else {}) | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = its.make(**config)
        for parameter in model.parameters():
            parameter.data += std * torch.randn_like(parameter)
        if frozen:
            offset = families.FAMILIES[family].style.gain_offset
            for norm in model.modules():
                if "Norm" in type(norm).__name__:
                    gain = norm.weight.data + offset
                    norm.weight.data = gain * FROZEN_EPS**0.5 / (0.8 + torch.rand(())) - offset
    return model.to(dtype).eval()


def tiny_gpt2(**config: Any) -> GPT2LMHeadModel:
    """Return a GPT-2 for the tokenizer of `micro`, with GPT-2's own dropout."""
    shape = {"vocab_size": 4096, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
    return random_model("gpt2", std=0.2, **shape | dropout | config)
