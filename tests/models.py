"""Random models for the tests, one entry a family.

Every parameter of a `random_model` matters: it is moved away from where it starts, biases from 0 and gains from 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
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
    shapes: st.SearchStrategy[dict[str, Any]]
    """Fields that make a model of another, awkward shape, which still takes 11 tokens below 23."""


def _of(model_type: str, shapes: st.SearchStrategy[dict[str, Any]], **small: Any) -> Family:
    """Return a family of transformers' models, by the names that their configs share where they share them."""
    family = families.FAMILIES[model_type]

    def make(**config: Any) -> Any:
        return family.model_class(family.model_class.config_class(**config))

    return Family(make, small | dict.fromkeys(("bos_token_id", "eos_token_id"), 0), family.eps, shapes)


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


def _shapes(**fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Draw each field from its values; a value that is a dict is several fields at once."""

    def flatten(drawn: dict[str, Any]) -> dict[str, Any]:
        together = [value for value in drawn.values() if isinstance(value, dict)]
        alone = {name: value for name, value in drawn.items() if not isinstance(value, dict)}
        return {name: value for part in [alone, *together] for name, value in part.items()}

    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in fields.items()}).map(flatten)


def _widths(names: tuple[str, ...], *values: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(names, row, strict=True)) for row in values]


_ANY = {"vocab_size": [23, 64], "tie_word_embeddings": [True, False]}
_COMMON = _ANY | {"num_hidden_layers": [1, 3], "intermediate_size": [5, 31]}
_GROUPS = ("hidden_size", "num_attention_heads", "num_key_value_heads")
_OWN_HEAD_DIM = _COMMON | {
    "width": _widths((*_GROUPS, "head_dim"), (9, 3, 1, 4), (15, 3, 3, 2), (16, 4, 2, 6), (7, 1, 1, 8))
}

FAMILIES = {
    "gpt2": _of(
        "gpt2",
        _shapes(
            **_ANY,
            width=_widths(("n_embd", "n_head"), (7, 1), (15, 3), (10, 2)),
            n_inner=[None, 5],
            n_layer=[1, 3],
        ),
        vocab_size=23,
        n_positions=11,
        n_embd=12,
        n_layer=2,
        n_head=3,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    ),
    "gpt_neox": _of(
        "gpt_neox",
        _shapes(
            **_COMMON,
            width=_widths(("hidden_size", "num_attention_heads"), (20, 1), (36, 3), (24, 2)),
            rotary_pct=[0.5, 1.0],
            use_parallel_residual=[True, False],
        ),
        **_SMALL | {"hidden_size": 24},
        rotary_pct=0.5,
    ),
    "gpt_neo": _of(
        "gpt_neo",
        _shapes(
            **_ANY,
            width=_widths(("hidden_size", "num_heads"), (7, 1), (15, 3), (10, 2)),
            intermediate_size=[None, 5],
            window_size=[2, 256],
        ),
        vocab_size=23,
        max_position_embeddings=11,
        hidden_size=12,
        num_layers=2,
        num_heads=3,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
    ),
    "llama": _of("llama", _shapes(**_OWN_HEAD_DIM, attention_bias=[True, False]), **_GROUPED),
    "mistral": _of("mistral", _shapes(**_OWN_HEAD_DIM, sliding_window=[None, 3]), **_GROUPED, sliding_window=4),
    "qwen2": _of("qwen2", _shapes(**_COMMON, width=_widths(_GROUPS, (10, 1, 1), (12, 3, 1), (16, 4, 4))), **_GROUPED),
    "gemma": _of(
        "gemma",
        _shapes(**_OWN_HEAD_DIM, attention_bias=[True, False]),
        **_GROUPED,
        head_dim=6,
        pad_token_id=0,
        attention_bias=True,
    ),
    "gemma2": _of(
        "gemma2",
        _shapes(**_OWN_HEAD_DIM, final_logit_softcapping=[None, 3.0], attn_logit_softcapping=[None, 5.0]),
        **_GROUPED,
        head_dim=6,
        pad_token_id=0,
        sliding_window=4,
        query_pre_attn_scalar=6,
    ),
    "blocks": Family(
        lambda block, **knobs: BlocksForCausalLM(block_config(block, **knobs)),
        {"vocab_size": 23, "n_positions": 11, "n_embd": 12, "n_layer": 2, "n_head": 3},
        "norm_epsilon",
        st.just({}),
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
