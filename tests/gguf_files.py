"""GGUF files of small models, written as llama.cpp's converter lays them out."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}
_NAMES = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "gemma2": _LLAMA
    | {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "gpt2": {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
}


def write_gguf(path: Path, model: Any, tokenizer: Any = None, quantise: str | None = None, **changes: Any) -> Path:
    """Write `model`; matrices as the type `quantise` where they can be.

    `changes` are keys of the architecture, with `_` for the first point, to add, or to leave out where None, and
    `general_architecture`, `pre` (of the tokenizer) and `tensors`: more of them, or None.
    """
    config = model.config
    kind = config.model_type
    writer = gguf.GGUFWriter(path, changes.pop("general_architecture", kind))
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }
    if kind == "gpt2":
        keys |= {"feed_forward_length": config.n_inner or 4 * config.n_embd}
        keys |= {"attention.layer_norm_epsilon": config.layer_norm_epsilon}
    else:
        keys |= {
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": config.rope_parameters["rope_theta"],
        }
    if kind == "llama":
        keys |= {"rope.dimension_count": config.head_dim, "vocab_size": config.vocab_size}
    if kind == "gemma2":
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
        for field in ("attn_logit_softcapping", "final_logit_softcapping"):
            keys[field] = getattr(config, field)
        keys["attention.sliding_window"] = config.sliding_window
    pre, more = changes.pop("pre", "gpt-2"), changes.pop("tensors", {})
    keys |= {name.replace("_", ".", 1) if name.startswith("rope_") else name: value for name, value in changes.items()}
    for key, value in keys.items():
        if value is not None:
            add = {str: writer.add_string, float: writer.add_float32}.get(type(value), writer.add_uint32)
            add(f"{kind}.{key}", value)
    if tokenizer is not None:
        _write_tokenizer(writer, tokenizer, pre)
    tensors: dict[str, np.ndarray | None] = dict(_tensors(model)) | more
    for name, weight in tensors.items():
        if weight is None:
            continue
        if quantise and weight.ndim == 2 and weight.shape[-1] % 32 == 0:
            type_ = gguf.GGMLQuantizationType[quantise]
            writer.add_tensor(name, gguf.quantize(weight, type_), raw_dtype=type_)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model: Any) -> Any:
    config = model.config
    for name, parameter in model.state_dict().items():
        path, _, suffix = name.rpartition(".")
        if path == "lm_head" and config.tie_word_embeddings:
            continue
        weight = parameter.float().numpy()
        block = ""
        for prefix in ("model.layers.", "transformer.h."):
            if path.startswith(prefix):
                layer, _, path = path.removeprefix(prefix).partition(".")
                block = f"blk.{layer}."
        own = _NAMES[config.model_type][path]
        if config.model_type == "llama" and own in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if own == "attn_q" else config.num_key_value_heads
            # The two halves that rotary turns against each other lie side by side in llama.cpp.
            weight = weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        if config.model_type == "gemma2" and "norm" in own:
            weight = weight + 1
        if config.model_type == "gpt2" and block and weight.ndim == 2:
            weight = weight.T
        yield f"{block}{own}.{suffix}", np.ascontiguousarray(weight)


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, pre: str) -> None:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"] | {added["content"]: added["id"] for added in state["added_tokens"]}
    special = {added["content"] for added in state["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(merges)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
