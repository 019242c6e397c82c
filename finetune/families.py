"""The families of models whose norms can be removed. No other file contains the paths of their modules.

A `Family` defines the norms of a block and the modules that read each norm. Given a model's depth, `Family.norms_of`
lists all of its norms and sites; the schedule, `Sites`, `folding`, the model card and the loaders of `analysis` all use
that list. To add a family, add an entry to `FAMILIES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from finetune.errors import CheckpointError
from finetune.fake_norm import NormStyle
from finetune.recipe import SiteKind

Part = Literal["q", "k", "v", "in", "gate", "unembed"]
"""What a reader computes: queries, keys, values, an MLP's input projection, its gate projection, or logits."""
Written = Literal["embed", "pos_embed", "o", "out"]
"""What a writer adds to the residual stream: token or position embeddings, or the output of attention or an MLP."""

_LAYER_NORM = NormStyle()
_KIND_OF_PART: dict[Part, SiteKind] = {
    "q": "qk",
    "k": "qk",
    "v": "v",
    "in": "mlp",
    "gate": "mlp",
    "unembed": "final",
}


class Site(NamedTuple):
    """One place that divides by a standard deviation or an RMS: one of the paths that read a norm."""

    kind: SiteKind
    layer: int | None
    """None for the model's final norm."""

    @property
    def name(self) -> str:
        """The name in recipes and logs, `h.LAYER.KIND` or `final`. It is the same in all families."""
        return self.kind if self.layer is None else f"h.{self.layer}.{self.kind}"


class Reader(NamedTuple):
    """A linear module that reads a norm's output."""

    path: str
    parts: tuple[Part, ...]
    """The equally wide parts of its output, in order."""
    by_head: bool = False
    """Whether the parts alternate head by head."""

    @property
    def kinds(self) -> tuple[SiteKind, ...]:
        """For each part, the kind of site through which it is read."""
        return tuple(_KIND_OF_PART[part] for part in self.parts)


class Norm(NamedTuple):
    """A norm of a model. It has readers or, if it is a post-norm, a writer."""

    path: str
    layer: int | None
    """None for the final norm."""
    readers: tuple[Reader, ...]
    writer: str | None
    """The module whose output the norm normalises before it is added to the residual stream."""
    writer_kind: SiteKind | None
    """The kind of site of a post-norm; None for other norms."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """Its sites, one per path that reads it. A frozen norm contains the constant of the first."""
        if self.writer_kind is not None:
            return (Site(self.writer_kind, self.layer),)
        kinds = dict.fromkeys(kind for reader in self.readers for kind in reader.kinds)
        return tuple(Site(kind, self.layer) for kind in kinds)

    def paths(self, reader: Reader) -> tuple[int, ...]:
        """Return, for each part of `reader`, the index of the site through which it is read."""
        kinds = [site.kind for site in self.sites]
        return tuple(kinds.index(kind) for kind in reader.kinds)


@dataclass(frozen=True)
class NormSpec:
    """A norm of each block, or the final norm: its path, and the parts that each of its readers computes.

    A post-norm has a `writer` and a `kind` instead of readers.
    """

    path: str
    readers: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    writer: str | None = None
    kind: SiteKind | None = None


@dataclass(frozen=True)
class Family:
    """The norms of one architecture, and the names that its modules and configs use.

    The paths in `norms`, `writers` and `attention` are relative to a block, the others to the model.
    """

    architecture: str
    """The class in transformers."""
    blocks: str
    norms: tuple[NormSpec, ...]
    final: NormSpec
    embeddings: Mapping[str, Written]
    writers: Mapping[str, Written]
    attention: str
    """The attention module. Its attribute `scaling` (1 if absent) multiplies its scores."""
    eps: str
    """The config field with the eps of the norms."""
    activation: str
    """The config field with the MLP's activation function."""
    norm_class: str = "LayerNorm"
    """The class of the norms."""
    style: NormStyle = _LAYER_NORM
    packed_by_head: bool = False
    """Whether a packed QKV contains the queries, keys and values of head 0, then those of head 1, …"""
    refusal: Callable[[Any], str | None] = lambda config: None
    """Returns what is not supported in a config, or None."""

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The class in transformers."""
        return getattr(transformers, self.architecture)

    @property
    def base_class(self) -> type[PreTrainedModel]:
        """The class in transformers without the unembedding."""
        return getattr(transformers, self.architecture.replace("LMHead", "").replace("ForCausalLM", "Model"))

    def norms_of(self, n_layer: int) -> list[Norm]:
        """Return the norms of a model with `n_layer` layers, in the order of a forward."""
        norms = [self._norm(spec, layer) for layer in range(n_layer) for spec in self.norms]
        return [*norms, self._norm(self.final, None)]

    def sites_of(self, n_layer: int) -> list[Site]:
        """Return the sites of a model with `n_layer` layers, in the order of a forward."""
        return [site for norm in self.norms_of(n_layer) for site in norm.sites]

    def _norm(self, spec: NormSpec, layer: int | None) -> Norm:
        at = "" if layer is None else f"{self.blocks}.{layer}."
        readers = tuple(
            Reader(at + path, parts, self.packed_by_head and len(parts) > 1) for path, parts in spec.readers.items()
        )
        return Norm(at + spec.path, layer, readers, spec.writer and at + spec.writer, spec.kind)

    def writers_of(self, n_layer: int) -> list[tuple[int | None, Written, str]]:
        """Return (layer, kind of output, path) of each module that writes to the residual stream."""
        blocks = [
            (layer, written, f"{self.blocks}.{layer}.{path}")
            for layer in range(n_layer)
            for path, written in self.writers.items()
        ]
        return [*((None, written, path) for path, written in self.embeddings.items()), *blocks]


_ATTENTION: dict[str, tuple[Part, ...]] = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
}
_GATED_MLP: dict[str, tuple[Part, ...]] = {"mlp.gate_proj": ("gate",), "mlp.up_proj": ("in",)}


def _llama(architecture: str, norm_class: str, **others: Any) -> Family:
    """Return a family with Llama's modules: RMSNorm, separate projections, a gated MLP, no position embeddings."""
    entry: dict[str, Any] = {
        "norms": (NormSpec("input_layernorm", _ATTENTION), NormSpec("post_attention_layernorm", _GATED_MLP)),
        "activation": "hidden_act",
        "style": NormStyle(centred=False, eps="variance_epsilon"),
    }
    return Family(
        architecture=architecture,
        blocks="model.layers",
        final=NormSpec("model.norm", {"lm_head": ("unembed",)}),
        embeddings={"model.embed_tokens": "embed"},
        writers={"self_attn.o_proj": "o", "mlp.down_proj": "out"},
        attention="self_attn",
        eps="rms_norm_eps",
        norm_class=norm_class,
        **entry | others,
    )


_GEMMA_NORM = NormStyle(centred=False, gain_offset=1.0)


def _not_causal(config: Any) -> str | None:
    return "bidirectional attention" if getattr(config, "use_bidirectional_attention", None) else None


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        blocks="transformer.h",
        norms=(NormSpec("ln_1", {"attn.c_attn": ("q", "k", "v")}), NormSpec("ln_2", {"mlp.c_fc": ("in",)})),
        final=NormSpec("transformer.ln_f", {"lm_head": ("unembed",)}),
        embeddings={"transformer.wte": "embed", "transformer.wpe": "pos_embed"},
        writers={"attn.c_proj": "o", "mlp.c_proj": "out"},
        attention="attn",
        eps="layer_norm_epsilon",
        activation="activation_function",
        refusal=lambda config: "cross-attention" if config.add_cross_attention else None,
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        blocks="gpt_neox.layers",
        norms=(
            NormSpec("input_layernorm", {"attention.query_key_value": ("q", "k", "v")}),
            NormSpec("post_attention_layernorm", {"mlp.dense_h_to_4h": ("in",)}),
        ),
        final=NormSpec("gpt_neox.final_layer_norm", {"lm_head": ("unembed",)}),
        embeddings={"gpt_neox.embed_in": "embed"},
        writers={"attention.dense": "o", "mlp.dense_4h_to_h": "out"},
        attention="attention",
        eps="layer_norm_eps",
        activation="hidden_act",
        packed_by_head=True,
        # If the constants of the two paths differ, the effect of β on the V path is folded into a bias.
        refusal=lambda config: None if config.attention_bias else "attention without biases",
    ),
    "gpt_neo": Family(
        architecture="GPTNeoForCausalLM",
        blocks="transformer.h",
        norms=(
            NormSpec(
                "ln_1",
                {
                    "attn.attention.q_proj": ("q",),
                    "attn.attention.k_proj": ("k",),
                    "attn.attention.v_proj": ("v",),
                },
            ),
            NormSpec("ln_2", {"mlp.c_fc": ("in",)}),
        ),
        final=NormSpec("transformer.ln_f", {"lm_head": ("unembed",)}),
        embeddings={"transformer.wte": "embed", "transformer.wpe": "pos_embed"},
        writers={"attn.attention.out_proj": "o", "mlp.c_proj": "out"},
        attention="attn.attention",
        eps="layer_norm_epsilon",
        activation="activation_function",
    ),
    "llama": _llama("LlamaForCausalLM", "LlamaRMSNorm"),
    "mistral": _llama("MistralForCausalLM", "MistralRMSNorm"),
    "qwen2": _llama("Qwen2ForCausalLM", "Qwen2RMSNorm"),
    "gemma": _llama(
        "GemmaForCausalLM", "GemmaRMSNorm", activation="hidden_act", style=_GEMMA_NORM, refusal=_not_causal
    ),
    "gemma2": _llama(
        "Gemma2ForCausalLM",
        "Gemma2RMSNorm",
        norms=(
            NormSpec("input_layernorm", _ATTENTION),
            NormSpec("post_attention_layernorm", writer="self_attn.o_proj", kind="attn_out"),
            NormSpec("pre_feedforward_layernorm", _GATED_MLP),
            NormSpec("post_feedforward_layernorm", writer="mlp.down_proj", kind="mlp_out"),
        ),
        activation="hidden_activation",
        style=_GEMMA_NORM,
        refusal=_not_causal,
    ),
}
"""The families, by the `model_type` of their configs."""

ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_new"),
    "relu": "relu",
    **dict.fromkeys(("silu", "swish"), "silu"),
}
"""The names of activation functions in TransformerLens, by their names in transformers."""

_QK_NORMS = "norms of queries and keys, which share the config's eps with the other norms"
REFUSED = {
    **dict.fromkeys(("qwen3", "olmo2", "gemma3", "gemma3_text"), _QK_NORMS),
    "opt": "no eps in its config, which the format of frozen norms needs",
}
"""Why other well-known architectures are not supported, by `model_type`."""


def family_of(model: nn.Module | PreTrainedConfig, name: str | None = None) -> Family:
    """Return the family of a model or config. Messages call it `name` (None: the path that it was loaded from).

    Raises:
        CheckpointError: the architecture, or this variant of a family, is not supported.
    """
    config: Any = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
    name = name or getattr(config, "name_or_path", None) or "The model"
    model_type = getattr(config, "model_type", "")
    family = FAMILIES.get(model_type)
    if family is None or not (model is config or isinstance(model, family.model_class)):
        kind = ", ".join(getattr(config, "architectures", None) or []) if model is config else type(model).__name__
        raise CheckpointError(f"{name} is a {kind or model_type or 'model of another kind'}{why_not(config)}")
    if refused := family.refusal(config):
        raise CheckpointError(f"{name} has {refused}, which is not supported in a {family.architecture}.")
    return family


def why_not(config: Any) -> str:
    """Return the end of a sentence that begins with the architecture of an unsupported model."""
    model_type = getattr(config, "model_type", None)
    if model_type == "noln-blocks":
        return (
            ". Only the norms of Pre-LN blocks can be removed or folded, and `python -m finetune pretrain pre-ln` "
            "saves such a model as a GPT2LMHeadModel (`finetune.blocks.to_gpt2`)."
        )
    reason = REFUSED.get(str(model_type))
    if getattr(config, "is_encoder_decoder", False):
        reason = "an encoder, and only decoders are supported"
    elif getattr(config, "vision_config", None) is not None:
        reason = "a vision tower, and only language models are supported"
    elif any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        reason = "a mixture of experts, which is not supported"
    known = f"Supported architectures: {', '.join(family.architecture for family in FAMILIES.values())}."
    return f", which has {reason}. {known}" if reason else f". {known}"
