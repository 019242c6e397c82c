"""Random models for the tests, one entry a family.

Every parameter of a `random_model` matters: it is moved away from where it starts, biases from 0 and gains from 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

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


FAMILIES = {
    "gpt2": Family(
        lambda **config: GPT2LMHeadModel(GPT2Config(**config)),
        {"vocab_size": 23, "n_positions": 11, "n_embd": 12, "n_layer": 2, "n_head": 3}
        | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        | dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
        eps="layer_norm_epsilon",
    ),
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
            for norm in model.modules():
                if isinstance(norm, nn.LayerNorm):
                    norm.weight.data *= FROZEN_EPS**0.5 / (0.8 + torch.rand(()))
    return model.to(dtype).eval()


def tiny_gpt2(**config: Any) -> GPT2LMHeadModel:
    """Return a GPT-2 for the tokenizer of `micro`, with GPT-2's own dropout."""
    shape = {"vocab_size": 4096, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
    return random_model("gpt2", std=0.2, **shape | dropout | config)
