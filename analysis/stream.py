"""The residual stream of a loaded model: what is written to it, where it can be observed, and what reads it.

Only this module depends on which parts a model has, so supporting another family requires changes only here. Parts that
not every model has are looked up in the model: a position embedding (rotary ones write nothing), biases of attention, a
point between attention and MLP (parallel blocks have none), post-norms of attention and MLPs, and a soft-cap of the
logits. Activations have the names of TransformerLens's hooks.

If there is a live norm between a head or neuron and the stream (Gemma 2), its output is what reaches the stream: the
head's share of the norm's output, at the scale by which the norm divides the whole. So components add up to the stream.
Logits are those before soft-capping, where they are a sum. `cap` turns them into the logits that the model returns.

Queries, keys, values and the pre-activations of MLPs read the stream as the logits do: through a norm, if there is one,
whose weights are folded, so that it only centres and divides; then through weights and a bias.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.hooked_blocks import HookedBlocks
from finetune.errors import NolnError

_PLACES = {"pre": "before block", "mid": "after the attention of block", "post": "after block"}


class Component(NamedTuple):
    """Something that is written to the residual stream. The heads or neurons of a layer are the parts of one."""

    kind: str
    """`embed`, `pos_embed`, `head`, `b_O` (the bias of attention), `mlp` (including its bias), or `neuron`."""
    layer: int | None
    """None for the embeddings."""
    hook: str
    """The activation that is written; for heads and neurons, through `Stream.weight`. Empty for a bias."""
    scale: str = ""
    """The activation by which a live norm between the component and the stream divides. Empty without such a norm."""

    @property
    def hooks(self) -> tuple[str, ...]:
        """The activations that determine what it writes."""
        return tuple(name for name in (self.hook, self.scale) if name)

    def label(self, part: int) -> str:
        """Return the name of one of its parts: "L2H3", "L2N17", "L2 MLP", "L2 b_O", "embed"."""
        if self.kind in ("head", "neuron"):
            return f"L{self.layer}{self.kind[0].upper()}{part}"
        name = self.kind.upper() if self.kind == "mlp" else self.kind
        return name if self.layer is None else f"L{self.layer} {name}"


class Reader(NamedTuple):
    """A linear map inside a block that reads the residual stream, through a norm if the model has one."""

    kind: str
    """`query`, `key`, `value` or `mlp` (the pre-activations; in gated MLPs both the input and the gate)."""
    part: str
    """The name of the weights: `Q`, `K`, `V`, `in` or `gate`."""
    layer: int
    point: str
    """The point of the residual stream that it reads."""
    hook: str
    """The activation that it computes."""

    def label(self, head: int) -> str:
        """Return the name of one of its heads, or of the MLP: "L2H3 query", "L2 MLP", "L2 MLP gate"."""
        if self.kind == "mlp":
            return f"L{self.layer} MLP" + (" gate" if self.part == "gate" else "")
        return f"L{self.layer}H{head} {self.kind}"


@dataclass(frozen=True)
class Stream:
    """The residual stream of `model`, a model from one of the loaders of `analysis`."""

    model: Any

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """The components that add up to the final residual stream, in the order in which they are written."""
        components = [Component("embed", None, "hook_embed")]
        if hasattr(self.model, "pos_embed"):
            components.append(Component("pos_embed", None, "hook_pos_embed"))
        for layer, block in enumerate(self.model.blocks):
            scale = self._post_norm(layer, "ln1_post")
            components.append(Component("head", layer, f"blocks.{layer}.attn.hook_z", scale))
            if block.attn.b_O is not None:  # a HookedTransformer has zeros if the family has no biases
                components.append(Component("b_O", layer, "", scale))
            components.append(Component("mlp", layer, f"blocks.{layer}.hook_mlp_out"))
        return tuple(components)

    @property
    def heads(self) -> tuple[Component, ...]:
        """The heads, layer by layer."""
        return tuple(component for component in self.components if component.kind == "head")

    @property
    def neurons(self) -> tuple[Component, ...]:
        """The neurons, layer by layer. `components` contains their MLPs instead."""
        return tuple(
            Component("neuron", layer, f"blocks.{layer}.mlp.hook_post", self._post_norm(layer, "ln2_post"))
            for layer in range(self.model.cfg.n_layers)
        )

    def _post_norm(self, layer: int, name: str) -> str:
        """Return the hook name of the scale of a layer's live post-norm `name`, or "" without one."""
        is_there = self.norm is not None and hasattr(self.model.blocks[layer], name)
        return f"blocks.{layer}.{name}.hook_scale" if is_there else ""

    def weight(self, component: Component) -> Float[Tensor, "*part d_model"]:
        """Return the output weights of a component: W_O [head, d_head, d_model], W_out [neuron, d_model], or the bias.

        They are multiplied by `gain` if there is a live norm between the component and the stream.
        """
        weight = self.weight_before_norm(component)
        return weight * self.gain(component) if component.scale else weight

    def weight_before_norm(self, component: Component) -> Float[Tensor, "*part d_model"]:
        """Return the same as `weight`, but without the gain of a norm after it."""
        block = self.model.blocks[component.layer]
        if component.kind == "neuron":
            return block.mlp.W_out
        return block.attn.W_O if component.kind == "head" else block.attn.b_O

    def gain(self, component: Component) -> Float[Tensor, " d_model"]:
        """Return the gain of the live norm between a component and the stream, which divides by `component.scale`."""
        norm = self.model.get_submodule(component.scale.removesuffix(".hook_scale"))
        return norm.w + 1 if getattr(self.model.cfg, "rmsnorm_uses_offset", False) else norm.w

    def skip_gain(self, component: Component) -> Float[Tensor, " 1"] | int:
        """Return the product of the gains of the skips between a component and the final stream. It is 1 in GPT-2.

        Raises:
            NolnError: with post-norm, the final stream is not a sum of components.
        """
        if not isinstance(self.model, HookedBlocks):
            return 1
        layer = -1 if component.layer is None else component.layer
        return self.model.skip_gain(layer, attention=component.kind in ("head", "b_O"))

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """The readers of the residual stream inside the blocks, in order.

        Raises:
            NolnError: the model is one of `finetune.blocks`.
        """
        if isinstance(self.model, HookedBlocks):
            raise NolnError(
                "Readers are not supported in models of finetune.blocks, because their norms are not folded, and there "
                "are skips with gains between components and readers. Use logit_attribution, or pretrain `pre-ln`, "
                "which is saved as a GPT-2."
            )
        readers = []
        for layer, before in enumerate(self.before_blocks):
            for kind in ("query", "key", "value"):
                readers.append(Reader(kind, kind[0].upper(), layer, before, f"blocks.{layer}.attn.hook_{kind[0]}"))
            middle = before.replace("_pre", "_mid")
            point = middle if middle in self.points else before
            is_gated = getattr(self.model.blocks[layer].mlp, "W_gate", None) is not None
            hooks = {"gate": "hook_pre", "in": "hook_pre_linear"} if is_gated else {"in": "hook_pre"}
            readers += [Reader("mlp", part, layer, point, f"blocks.{layer}.mlp.{hook}") for part, hook in hooks.items()]
        return tuple(readers)

    def read_weights(self, reader: Reader) -> tuple[Float[Tensor, "d_model head unit"], Float[Tensor, "head unit"]]:
        """Return a reader's weight and bias, with the norm folded in. An MLP counts as one head.

        With grouped queries, keys and values have fewer heads than queries.
        """
        block = self.model.blocks[reader.layer]
        if reader.kind == "mlp":
            W = getattr(block.mlp, f"W_{reader.part}").unsqueeze(0)
            b = getattr(block.mlp, f"b_{reader.part}", None)
        else:
            # A HookedTransformer stores shared keys and values once, in these attributes, and repeats them on access.
            grouped = "_" if hasattr(block.attn, f"_W_{reader.part}") else ""
            W, b = (getattr(block.attn, f"{grouped}{x}_{reader.part}") for x in "Wb")
        b = W.new_zeros(len(W), W.shape[-1]) if b is None else b.view(len(W), -1)
        return W.movedim(0, 1), b

    def score_scale(self, layer: int) -> float:
        """Return the factor of the products of a layer's queries and keys."""
        attn = self.model.blocks[layer].attn
        if hasattr(attn, "attn_scale"):
            return 1 / attn.attn_scale
        module = attn.original_component
        return 1 / module.scale if hasattr(module, "scale") else getattr(module, "scaling", 1.0)

    def rotary_hooks(self, layer: int) -> tuple[str, ...]:
        """Return the activations with the angles by which a layer's queries and keys are rotated, if there are any."""
        hooks = (f"blocks.{layer}.attn.hook_{function}" for function in ("cos", "sin"))
        return tuple(hook for hook in hooks if hook in self.model.hook_dict)

    def rotate(
        self, layer: int, x: Float[Tensor, "*shape d_head"], position: int, cache: Mapping[str, Tensor]
    ) -> Float[Tensor, "*shape d_head"]:
        """Return queries or keys rotated by the rotary embeddings of a position, or unchanged without these.

        Raises:
            NolnError: the model has norms of queries and keys, after which a score is not a sum.
        """
        attn = self.model.blocks[layer].attn
        if getattr(attn, "q_norm", None) is not None:
            raise NolnError("The model has norms of queries and keys, so attention scores cannot be decomposed.")
        if hooks := self.rotary_hooks(layer):
            cos, sin = (cache[hook][0, position] for hook in hooks)
        elif hasattr(attn, "rotary_cos"):
            cos, sin = attn.rotary_cos[position], attn.rotary_sin[position]
        else:
            return x
        turned, kept = x[..., : len(cos)], x[..., len(cos) :]
        one, other = turned.chunk(2, dim=-1)
        return torch.cat([turned * cos + torch.cat([-other, one], dim=-1) * sin, kept], dim=-1)

    def components_at(self, point: str) -> tuple[Component, ...]:
        """Return the components that add up to a point of the residual stream."""
        number, where = label(point).split()
        layer = int(number)
        return tuple(
            component
            for component in self.components
            if component.layer is None
            or component.layer < layer + (where == "post")
            or (component.layer == layer and where == "mid" and component.kind in ("head", "b_O"))
        )

    @property
    def before_blocks(self) -> tuple[str, ...]:
        """The points before each block."""
        return tuple(f"blocks.{layer}.hook_resid_pre" for layer in range(self.model.cfg.n_layers))

    @property
    def between_blocks(self) -> tuple[str, ...]:
        """The points before the first block and after each block. The i-th (from 0) has i blocks before it."""
        after = (f"blocks.{layer}.hook_resid_post" for layer in range(self.model.cfg.n_layers))
        return (self.before_blocks[0], *after)

    @property
    def final(self) -> str:
        """The last point, which the final norm and the unembedding read."""
        return self.between_blocks[-1]

    @cached_property
    def points(self) -> tuple[str, ...]:
        """All points in order: before each block, after its attention if there is such a point, and at the end."""
        hooks = self.model.hook_dict
        pairs = ((before, before.replace("_pre", "_mid")) for before in self.before_blocks)
        return (*(point for pair in pairs for point in pair if point in hooks), self.final)

    @property
    def norm(self) -> str | None:
        """The kind of the final norm: "LN", "RMS", or None. `require_folded_norm` checks that it is folded."""
        kind = self.model.cfg.normalization_type
        return kind if kind is None else kind.removesuffix("Pre")

    def require_folded_norm(self) -> None:
        """Raise ValueError if the final norm has weights that are not folded into the unembedding."""
        if (kind := self.model.cfg.normalization_type) not in (None, "LNPre", "RMSPre"):
            raise ValueError(
                f"The final norm is of type {kind}; only a folded LayerNorm (LNPre), a folded RMSNorm (RMSPre) or none "
                "is known: load the model with analysis.load_bridge, load_hooked or load_hooked_blocks."
            )

    def centre(self, x: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
        """Return `x` in the form that the final norm divides: minus its mean for LayerNorm."""
        return x - x.mean(-1, keepdim=True) if self.norm == "LN" else x

    def scale(self, square_norm: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the divisor of the final norm for a centred vector with this squared norm, or 1 without a norm."""
        if self.norm is None:
            return torch.ones_like(square_norm)
        return (square_norm.clamp(min=0) / self.model.cfg.d_model + self.model.cfg.eps).sqrt()

    def measured_scale(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos 1"]:
        """Return the divisor of the model's own final norm, in its own precision, for `resid`, or 1 without a norm."""
        if self.norm is None:
            return torch.ones_like(resid[..., :1])
        scales: list[Tensor] = []
        with self.model.hooks(fwd_hooks=[("ln_final.hook_scale", lambda scale, hook: scales.append(scale))]):
            self.model.ln_final(resid)
        return scales[0]

    def unembed(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos vocab"]:
        """Return the logits of final residual vectors, before soft-capping."""
        return self.model.unembed(resid if self.norm is None else self.model.ln_final(resid))

    def uncapped(
        self, logits: Float[Tensor, "batch pos vocab"], resid: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos vocab"]:
        """Return the logits before soft-capping, given the model's logits and its final residual vectors."""
        return logits if self._soft_cap is None else self.unembed(resid)

    def cap(self, logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return soft-capped logits, c · tanh(logits / c), or the logits themselves without a soft-cap."""
        return logits if self._soft_cap is None else self._soft_cap * (logits / self._soft_cap).tanh()

    @property
    def _soft_cap(self) -> float | None:
        cap = getattr(self.model.cfg, "output_logits_soft_cap", None)
        return cap if cap is not None and cap > 0 else None


def label(point: str) -> str:
    """Return a point of the residual stream as a label for an axis: "3 mid"."""
    return point.removeprefix("blocks.").replace(".hook_resid_", " ")


def place(point: str) -> str:
    """Return a point of the residual stream in words: "after the attention of block 3"."""
    layer, where = label(point).split()
    return f"{_PLACES[where]} {layer}"
