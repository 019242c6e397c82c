"""The families of models whose norms can be removed: the only file that knows the paths of their modules.

A `Family` says, relative to a block, which norms there are and what reads each of them. With a model's depth follows
the one list of its norms and sites, `Family.norms`, from which the schedule, `Sites`, `folding`, the model card and the
loaders of `analysis` take theirs. To add a family, add an entry to `FAMILIES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from finetune.errors import CheckpointError
from finetune.recipe import SiteKind

Part = Literal["q", "k", "v", "in", "unembed"]
"""What a reader computes: queries, keys, values, the input of an MLP's activation function, or logits."""
Written = Literal["embed", "pos_embed", "o", "out"]
"""What a writer adds to the residual stream: embeddings of tokens or positions, or the output of attention or MLP."""

_KIND_OF_PART: dict[Part, SiteKind] = {"q": "qk", "k": "qk", "v": "v", "in": "mlp", "unembed": "final"}


class Site(NamedTuple):
    """One place that divides by a standard deviation: a norm, on one of the paths that read it."""

    kind: SiteKind
    layer: int | None
    """None: the model's final norm."""

    @property
    def name(self) -> str:
        """The name in recipes and logs, `h.LAYER.KIND` or `final`: the same in all families."""
        return self.kind if self.layer is None else f"h.{self.layer}.{self.kind}"


class Reader(NamedTuple):
    """A linear module that reads a norm's output."""

    path: str
    parts: tuple[Part, ...]
    """What its output consists of: equally wide parts, one after another."""

    @property
    def kinds(self) -> tuple[SiteKind, ...]:
        """The kind of site through which it reads each of its parts."""
        return tuple(_KIND_OF_PART[part] for part in self.parts)

    def columns(self, kind: SiteKind, width: int) -> slice:
        """Return which of its `width` output columns are read through sites of `kind`."""
        of_kind = [i for i, its_kind in enumerate(self.kinds) if its_kind == kind]
        part = width // len(self.parts)
        return slice(of_kind[0] * part, (of_kind[-1] + 1) * part)


class Norm(NamedTuple):
    """A norm of a model."""

    path: str
    layer: int | None
    """None: the final norm."""
    readers: tuple[Reader, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        """Its sites, one for each path that reads it. A frozen norm holds the constant of the first."""
        kinds = dict.fromkeys(kind for reader in self.readers for kind in reader.kinds)
        return tuple(Site(kind, self.layer) for kind in kinds)


@dataclass(frozen=True)
class NormSpec:
    """A norm of each block, or the final one: its path, and the parts that each of its readers computes."""

    path: str
    readers: Mapping[str, tuple[Part, ...]]


@dataclass(frozen=True)
class Family:
    """Where the models of one architecture have their norms, and how their configs and modules are called.

    Paths of `norms`, of `writers` and of `attention` are relative to a block, the others to the model.
    """

    architecture: str
    """The class in transformers."""
    blocks: str
    norms: tuple[NormSpec, ...]
    final: NormSpec
    embeddings: Mapping[str, Written]
    writers: Mapping[str, Written]
    attention: str
    """The attention module, whose `scaling` multiplies its scores."""
    eps: str
    """The field of the config that holds the eps of the norms."""
    activation: str
    """The field of the config that holds the MLP's activation function."""
    refusal: Callable[[Any], str | None] = lambda config: None
    """Says of a config what is not supported, or returns None."""

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The class in transformers."""
        return getattr(transformers, self.architecture)

    def norms_of(self, n_layer: int) -> list[Norm]:
        """Return the norms of a model of `n_layer` layers, in the order in which a forward comes to them."""
        norms = [self._norm(spec, layer) for layer in range(n_layer) for spec in self.norms]
        return [*norms, self._norm(self.final, None)]

    def sites_of(self, n_layer: int) -> list[Site]:
        """Return the sites of a model of `n_layer` layers, in the order in which a forward comes to them."""
        return [site for norm in self.norms_of(n_layer) for site in norm.sites]

    def _norm(self, spec: NormSpec, layer: int | None) -> Norm:
        at = "" if layer is None else f"{self.blocks}.{layer}."
        readers = tuple(Reader(at + path, parts) for path, parts in spec.readers.items())
        return Norm(at + spec.path, layer, readers)

    def writers_of(self, n_layer: int) -> list[tuple[int | None, Written, str]]:
        """Return (layer, what it writes, path) of each module that writes to the residual stream."""
        blocks = [
            (layer, written, f"{self.blocks}.{layer}.{path}")
            for layer in range(n_layer)
            for path, written in self.writers.items()
        ]
        return [*((None, written, path) for path, written in self.embeddings.items()), *blocks]


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
}
"""The families by the `model_type` of their configs."""


def family_of(model: nn.Module | PreTrainedConfig, name: str | None = None) -> Family:
    """Return the family of a model or of a config, which an error calls `name` (None: by the path it came from).

    Raises:
        CheckpointError: another architecture, or a variant of a family that is not supported.
    """
    config: Any = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
    name = name or getattr(config, "name_or_path", None) or "The model"
    family = FAMILIES.get(getattr(config, "model_type", ""))
    is_its_class = family is not None and (model is config or isinstance(model, family.model_class))
    if getattr(config, "model_type", None) == "noln-blocks":
        raise CheckpointError(
            f"{name} is a {type(model).__name__}: only the norms of Pre-LN blocks can be removed or folded, and "
            "`python -m finetune pretrain pre-ln` saves these as a GPT2LMHeadModel (`finetune.blocks.to_gpt2`)."
        )
    if family is None or not is_its_class:
        kind = ", ".join(getattr(config, "architectures", None) or []) if model is config else type(model).__name__
        raise CheckpointError(
            f"{name} is a {kind or 'model of an unnamed architecture'}. The norms of these can be removed and folded: "
            f"{', '.join(family.architecture for family in FAMILIES.values())}."
        )
    if refused := family.refusal(config):
        raise CheckpointError(f"{name} has {refused}, which is not supported in a {family.architecture}.")
    return family
