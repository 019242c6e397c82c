"""Converts a model to a `HookedTransformer` or native `TransformerBridge`, by copying its weights one by one.

`finetune.families` defines what each module reads or writes, and `finetune.folding` folds norms into the weights that
read them. So no family needs its own conversion. Only `_hooked_config` handles config fields with different names.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from finetune.errors import CheckpointError
from finetune.families import ACTIVATIONS, Part, SiteKind, Written, family_of
from finetune.folding import NormState, linear_maps, matrix, norms_of, part_of_column, to_identity

_HOOKED_CONTEXT = 2048
"""The maximum context of a `HookedTransformer` with rotary positions. Each of its layers keeps a positions² mask."""
_NAMES: dict[Part | Written, str] = {
    "embed": "embed",
    "pos_embed": "pos_embed",
    "unembed": "unembed",
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "o": "attn.o",
    "in": "mlp.in",
    "gate": "mlp.gate",
    "out": "mlp.out",
}
"""TransformerBridge's names of linear maps by what they compute. Those of a block are relative to it."""
_HOOKED_NAMES = {
    "embed": ("embed.W_E", ""),
    "pos_embed": ("pos_embed.W_pos", ""),
    **{f"attn.{x}": (f"attn.W_{x.upper()}", f"attn.b_{x.upper()}") for x in "qkvo"},
    **{f"mlp.{x}": (f"mlp.W_{x}", f"mlp.b_{x}") for x in ("in", "gate", "out")},
    "unembed": ("unembed.W_U", "unembed.b_U"),
}
"""HookedTransformer's names of the weights and biases of these linear maps."""
_POST_NORMS: dict[SiteKind | None, str] = {"attn_out": "ln1_post.w", "mlp_out": "ln2_post.w"}


def to_hooked(source: PreTrainedModel, state: NormState, dtype: torch.dtype, centre_writing: bool = False) -> Any:
    """Return `source` as a `HookedTransformer`.

    Raises:
        ImportError: TransformerLens 4, which has no `HookedTransformer`.
        CheckpointError: an activation function or biases that TransformerLens does not have.
    """
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError as error:
        raise ImportError(
            "TransformerLens 4 has no HookedTransformer: use load_bridge, or install TransformerLens 3 with "
            "pip install 'transformer-lens<4'."
        ) from error

    if state == "frozen" and any(norm.writer for norm in norms_of(source)):
        source, state = to_identity(source), "identity"  # folds the post-norms into the writers
    with warnings.catch_warnings():
        # The warning recommends TransformerBridge, but the caller of `load_hooked` has chosen.
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        hooked = HookedTransformer(HookedTransformerConfig(**_hooked_config(source, state, dtype)))
    parameters = dict(hooked.named_parameters())
    with torch.no_grad():
        for block, name, weight, bias in _maps(source, centre_writing):
            weight_name, bias_name = (block + part for part in _HOOKED_NAMES[name])
            if f"{block}attn._W_K" in parameters and name in ("attn.k", "attn.v"):
                weight_name, bias_name = (full.replace("attn.", "attn._") for full in (weight_name, bias_name))
            if name in ("attn.q", "attn.k", "attn.v"):
                weight = weight.unflatten(1, (-1, hooked.cfg.d_head)).movedim(1, 0)
            parameters[weight_name].copy_(weight.reshape(parameters[weight_name].shape))
            if bias is not None:
                if hooked.cfg.gated_mlp and name in ("mlp.gate", "mlp.in"):
                    raise CheckpointError("A HookedTransformer does not have biases into gated MLPs. Use load_bridge.")
                parameters[bias_name].copy_(bias.view_as(parameters[bias_name]))
        if state == "live":
            offset = family_of(source).style.gain_offset
            for norm in norms_of(source):
                if norm.writer is not None:
                    gain: Any = source.get_submodule(norm.path).weight
                    parameters[f"blocks.{norm.layer}.{_POST_NORMS[norm.writer_kind]}"].copy_(gain + offset)
        if (rotary := getattr(source.base_model, "rotary_emb", None)) is not None:
            positions = torch.arange(hooked.cfg.n_ctx, device=source.device)[None]
            cos, sin = rotary(torch.empty(0, device=source.device), positions)
    for layer, made in enumerate(hooked.blocks):
        made.attn.attn_scale = 1 / _scaling(source, layer)
        if rotary is not None:
            made.attn.rotary_cos, made.attn.rotary_sin = cos[0].to(dtype), sin[0].to(dtype)
    return hooked


def to_native_bridge(
    source: PreTrainedModel, state: NormState, dtype: torch.dtype, centre_writing: bool = False
) -> TransformerBridge:
    """Return a GPT-2 as a `TransformerBridge` of TransformerLens's own modules, which can do without norms.

    Raises:
        CheckpointError: TransformerLens does not have the activation function.
    """
    config = TransformerBridgeConfig(**_config(source, state, dtype), architecture="TransformerLensNative")
    bridge = TransformerBridge.boot_native(config, dtype=dtype, device=source.device)
    parameters = bridge.state_dict()
    with torch.no_grad():
        for block, name, weight, bias in _maps(source, centre_writing):
            parameters[f"{block}{name}.weight"].copy_(weight if name in ("embed", "pos_embed") else weight.T)
            if bias is not None:
                parameters[f"{block}{name}.bias"].copy_(bias)
    made: Any
    for layer, made in enumerate(bridge.blocks):
        made.attn.original_component.scale = 1 / _scaling(source, layer)
    return bridge


def normalization(source: PreTrainedModel, state: NormState) -> dict[str, Any]:
    """Return the fields of TransformerLens's configs for norms whose weights are folded, or for no norms."""
    family = family_of(source)
    if state != "live":
        return {"normalization_type": None, "eps": 0.0}
    return {
        "normalization_type": "LNPre" if family.style.centred else "RMSPre",
        "eps": getattr(source.get_submodule(norms_of(source)[-1].path), family.style.eps),
    }


def centre_writing(model: PreTrainedModel) -> None:
    """Subtract the mean over `d_model` from what every module writes to the residual stream, in place."""
    with torch.no_grad():
        for _, _, path in family_of(model).writers_of(model.config.num_hidden_layers):
            writer: Any = model.get_submodule(path)
            written = [writer.weight if isinstance(writer, nn.Embedding) else matrix(writer)]
            written += [] if getattr(writer, "bias", None) is None else [writer.bias]
            for weight in written:
                weight.sub_(weight.mean(-1, keepdim=True))


def _config(source: PreTrainedModel, state: NormState, dtype: torch.dtype) -> dict[str, Any]:
    """Return the fields that `HookedTransformerConfig` and `TransformerBridgeConfig` share."""
    config, family = source.config, family_of(source)
    activation = getattr(config, family.activation)
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"TransformerLens does not have the activation {activation}, only {', '.join(ACTIVATIONS)}. Use "
            f"load_nnsight or load_transformers{'' if config.model_type == 'gpt2' else ', or load_bridge'}."
        )
    into_mlp = next(reader.path for norm in norms_of(source) for reader in norm.readers if reader.parts == ("in",))
    return {
        "model_name": config.name_or_path or config.model_type,
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "d_head": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "d_mlp": matrix(source.get_submodule(into_mlp)).shape[1],
        "d_vocab": config.vocab_size,
        "n_ctx": config.max_position_embeddings,
        "act_fn": ACTIVATIONS[activation],
        **normalization(source, state),
        "init_weights": False,
        "dtype": dtype,
        "device": str(source.device),
    }


def _hooked_config(source: PreTrainedModel, state: NormState, dtype: torch.dtype) -> dict[str, Any]:
    """Return the fields of a `HookedTransformerConfig`."""
    hooked, config, norms = _config(source, state, dtype), source.config, norms_of(source)
    # The same function in one kernel instead of eight. TransformerBridge uses it by default.
    hooked["act_fn"] = hooked["act_fn"].replace("gelu_new", "gelu_pytorch_tanh")
    if (rotary := getattr(source.base_model, "rotary_emb", None)) is not None:
        hooked |= {"positional_embedding_type": "rotary", "rotary_dim": 2 * len(rotary.inv_freq)}
        hooked["n_ctx"] = min(hooked["n_ctx"], _HOOKED_CONTEXT)
    window = getattr(config, "window_size", None) or getattr(config, "sliding_window", None)
    kinds = getattr(config, "attention_layers", None) or getattr(config, "layer_types", None)
    kinds = kinds or ["local" if window else "global"] * config.num_hidden_layers
    is_local = [kind in ("local", "sliding_attention") for kind in kinds]
    if any(is_local):
        types = ["local" if local else "global" for local in is_local]
        hooked |= {"use_local_attn": True, "attn_types": types, "window_size": window}
    queries, keys = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    return hooked | {
        "n_key_value_heads": None if keys == queries else keys,
        "gated_mlp": any("gate" in reader.parts for norm in norms for reader in norm.readers),
        "parallel_attn_mlp": getattr(config, "use_parallel_residual", False),
        "use_normalization_before_and_after": state == "live" and any(norm.writer for norm in norms),
        "attn_scores_soft_cap": getattr(config, "attn_logit_softcapping", None) or -1.0,
        "output_logits_soft_cap": getattr(config, "final_logit_softcapping", None) or -1.0,
    }


def _scaling(source: PreTrainedModel, layer: int) -> float:
    """Return the factor of a layer's attention scores."""
    family = family_of(source)
    attention = source.get_submodule(f"{family.blocks}.{layer}.{family.attention}")
    return getattr(attention, "scaling", 1.0)


def _maps(
    source: PreTrainedModel, centre: bool
) -> Iterator[tuple[str, str, Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"] | None]]:
    """Yield (block, name, weight, bias) of every linear map, one by one, with norms folded in. Names are the bridge's.

    If `centre`, the mean over `d_model` is subtracted from what is written to the residual stream.
    """

    def centred(weight: Float[Tensor, "*d_in d_model"]) -> Float[Tensor, "*d_in d_model"]:
        return weight - weight.mean(-1, keepdim=True) if centre else weight

    family = family_of(source)
    for layer, written, path in family.writers_of(source.config.num_hidden_layers):
        writer: Any = source.get_submodule(path)
        weight = writer.weight if isinstance(writer, nn.Embedding) else matrix(writer)
        if (scale := getattr(writer, "embed_scale", None)) is not None:
            weight = weight * scale.to(weight)
        bias = getattr(writer, "bias", None)
        yield _block(layer), _NAMES[written], centred(weight), None if bias is None else centred(bias)
    readers = {reader.path: (norm.layer, reader) for norm in norms_of(source) for reader in norm.readers}
    for path, weight, bias in linear_maps(source):
        layer, reader = readers[path]
        columns = part_of_column(source, reader)
        for i, part in enumerate(reader.parts):
            yield _block(layer), _NAMES[part], weight[:, columns == i], None if bias is None else bias[columns == i]


def _block(layer: int | None) -> str:
    return "" if layer is None else f"blocks.{layer}."
