"""Converting a model whose blocks are GPT-2's to a `GPT2LMHeadModel`."""

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from finetune.blocks.config import BlockError, BlocksConfig
from finetune.blocks.model import BlocksForCausalLM

_FIXED_BY_GPT2 = (
    *("norm", "final_norm", "norm_position", "qk_norm", "softcap", "parallel"),
    *("attn_skip_gain", "attn_gain", "mlp_skip_gain", "mlp_gain", "train_attn_gains", "train_mlp_gains"),
    *("attn_identity_gain", "attn_softmax_gain", "attn_centre_gain", "train_attn_matrix_gains"),
    *("value_skip_gain", "proj_skip_gain"),
)
"""The knobs that must have their defaults in GPT-2's block."""
_GPT2_NAMES = {
    "ln_1": ["ln1"],
    "ln_2": ["ln2"],
    "attn.c_attn": ["attn.qk", "attn.v"],
    "attn.c_proj": ["attn.o"],
    "mlp.c_fc": ["mlp.fc"],
    "mlp.c_proj": ["mlp.proj"],
}
"""Our modules, by GPT-2's names, within a block."""


def other_than_gpt2(config: BlocksConfig) -> list[str]:
    """Return the knobs in which a block differs from GPT-2's. There are none if `to_gpt2` can convert it."""
    default = BlocksConfig()
    other = [name for name in _FIXED_BY_GPT2 if getattr(config, name) != getattr(default, name)]
    other += ["first_norm"] * (config.first_norm not in (None, "ln"))
    other += ["negative_slope"] * (config.activation_function == "leaky_relu" and config.negative_slope != 0)
    return other


@torch.no_grad()
def to_gpt2(model: BlocksForCausalLM) -> GPT2LMHeadModel:
    """Return a Pre-LN model as a `GPT2LMHeadModel` with the same logits, in its dtype and on its device.

    Raises:
        BlockError: the block is not GPT-2's.
    """
    config = model.config
    if other := other_than_gpt2(config):
        raise BlockError(
            f"The block differs from GPT-2's in {', '.join(other)}. Only `pre-ln` blocks with LN can be converted."
        )
    same = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "initializer_range", "use_cache"]
    same += ["bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"]
    knobs: dict[str, Any] = {name: getattr(config, name) for name in same}
    knobs |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    relu = config.activation_function == "leaky_relu"
    knobs |= {"activation_function": "relu" if relu else config.activation_function}
    gpt2: Any = GPT2LMHeadModel(GPT2Config(layer_norm_epsilon=config.norm_epsilon, **knobs))

    ours = model.state_dict()
    theirs = {f"transformer.ln_f.{part}": ours[f"ln_final.{part}"] for part in ("weight", "bias")}
    for name, our_name in (("transformer.wte", "embed"), ("transformer.wpe", "pos_embed"), ("lm_head", "unembed")):
        theirs[f"{name}.weight"] = ours[f"{our_name}.weight"]
    for layer in range(config.n_layer):
        for name, our_names in _GPT2_NAMES.items():
            at = [f"blocks.{layer}.{our_name}" for our_name in our_names]
            weights = [ours[f"{our_name}.weight"] for our_name in at]
            biases = [
                ours.get(f"{our_name}.bias", w.new_zeros(len(w))) for our_name, w in zip(at, weights, strict=True)
            ]
            theirs[f"transformer.h.{layer}.{name}.weight"] = (
                torch.cat(weights).T if weights[0].ndim == 2 else weights[0]
            )
            theirs[f"transformer.h.{layer}.{name}.bias"] = torch.cat(biases)
    gpt2 = gpt2.to(model.device, model.dtype)
    gpt2.load_state_dict(theirs)
    return gpt2.train(model.training)
