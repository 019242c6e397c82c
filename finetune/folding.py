"""The frozen form and the Identity form of a norm: recognising, writing, folding and converting them.

A frozen norm has an eps that dwarfs any variance, so it divides by the constant √eps = 1e6 and is linear:

    LN(x) = (x − μ)/√(σ² + eps) ⊙ weight + bias = (x − μ) ⊙ scale + bias,  scale = weight/√eps

RMSNorm is the same without μ and bias. In Gemma the norm multiplies by 1 + weight. A post-norm, which normalises the
output of a module, is folded backwards into that module.

An ordinary checkpoint of the model's own class can represent frozen norms. There are two formats. With γ and β of the
norm, and σ̄ the constant that replaces its σ:
    b25  every norm has weight = γ · 1e6/σ̄, bias = β (Baroni et al. 2025, arXiv 2507.02559)
    h24  γ, β and σ̄ are folded into the reading weights, and block norms have weight = 1e6, bias = 0; the final norm is
         as in b25, because GPT-2 ties embedding and unembedding (Heimersheim 2024, arXiv 2409.13710)
The Identity form exists only in memory. There the centring is folded as well, every norm is `nn.Identity`, and the
unembedding is untied and has a bias.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from finetune.blocks import BlocksForCausalLM
from finetune.blocks import Norm as BlocksNorm
from finetune.errors import CheckpointError
from finetune.families import Family, Norm, Reader, family_of
from finetune.names import Format

NormState = Literal["live", "frozen", "identity"]
Model = TypeVar("Model", bound=PreTrainedModel)

FROZEN_EPS = 1e12
_LEAST_FROZEN_EPS = 1e10  # dwarfs any variance: those of GPT-2's residual streams stay below 1e5
_LARGEST_LIVE_WEIGHT = 1e3  # γ is around 1, at most tens; frozen norms have weights of 1e6, times γ/σ̄


def norms_of(model: PreTrainedModel) -> list[Norm]:
    """Return the norms of a model of a supported family, in the order of a forward.

    Raises:
        CheckpointError: the architecture is not supported.
    """
    return family_of(model).norms_of(model.config.num_hidden_layers)


def norm_state(model: nn.Module) -> NormState:
    """Return whether the norms of `model` are live, frozen (divide by √eps) or `nn.Identity`.

    This depends on the modules, which compute the logits, rather than on the config. A model of `finetune.blocks` is
    live if it has any norm, including norms of queries and keys.

    Raises:
        CheckpointError: the architecture is not supported, weights are not finite, norms are in different states, or a
            norm has the weights of one state and the eps of the other.
    """
    norms = [] if isinstance(model, BlocksForCausalLM) else norms_of(model)  # type: ignore[arg-type]
    if isinstance(next(model.parameters()), FakeTensor):
        return "live"  # shapes without values, from `plan`
    for name, parameter in model.named_parameters():
        if not torch.stack(parameter.aminmax()).isfinite().all():  # 100 times as fast as testing each value
            raise CheckpointError(
                f"{name} contains infinities or NaN. LN-free formats have norm weights of about 1e6, which "
                "do not fit float16. Keep them in float32 or bfloat16, and cast to float16 only after `to_identity`."
            )
    if isinstance(model, BlocksForCausalLM):
        return "live" if any(isinstance(module, BlocksNorm) for module in model.modules()) else "identity"
    family = family_of(model)
    states = {norm.path: _state(norm.path, model.get_submodule(norm.path), family) for norm in norms}
    groups = {state: [name for name in states if states[name] == state] for state in set(states.values())}
    if len(groups) > 1:
        raise CheckpointError(
            f"The model is neither LN-free nor ordinary: its norms are in different states: {groups}."
        )
    return groups.popitem()[0]


def _state(name: str, norm: Any, family: Family) -> NormState:
    if isinstance(norm, nn.Identity):
        return "identity"
    if type(norm).__name__ != family.norm_class:
        known = f"Only {family.norm_class} and nn.Identity are supported in a {family.architecture}"
        raise CheckpointError(f"{name} is a {type(norm).__name__}. {known}.")
    eps, largest = _eps(norm, family), norm.weight.abs().max().item()
    frozen = eps >= _LEAST_FROZEN_EPS
    if frozen != (largest > _LARGEST_LIVE_WEIGHT):
        kind, right = ("an ordinary", 1e-5) if frozen else ("an LN-free", FROZEN_EPS)
        raise CheckpointError(
            f"{name} has weights up to {largest:.3g}, like {kind} model's, but an eps of {eps:g}. Set {family.eps} to "
            f"{right:g} in its config.json."
        )
    return "frozen" if frozen else "live"


def _eps(norm: nn.Module, family: Family) -> float:
    return getattr(norm, family.style.eps)


def check_can_be_saved(model: nn.Module) -> None:
    """Check that `model`, once saved, will be loaded as the same function.

    Raises:
        CheckpointError: the config's eps differs from that of the norms; or the model is in Identity form, which
            transformers cannot load; or as in `norm_state`.
    """
    state = norm_state(model)
    if isinstance(model, BlocksForCausalLM):
        return
    if state == "identity":
        raise CheckpointError("The Identity form cannot be loaded again. Save the model that it was made from.")
    family, config = family_of(model), model.config
    for norm in norms_of(model):  # type: ignore[arg-type]
        if (eps := _eps(model.get_submodule(norm.path), family)) != getattr(config, family.eps):
            raise CheckpointError(
                f"{norm.path} has an eps of {eps:g}, but the saved model would be loaded with that of the config, "
                f"{getattr(config, family.eps):g}. Set config.{family.eps}."
            )


@torch.no_grad()
def freeze(model: PreTrainedModel, constants: Mapping[str, Float[Tensor, ""]]) -> None:
    """Freeze every norm of an ordinary model in place, in format b25. `constants` maps names of sites to constants.

    A norm that is read on several paths has one scale, that of its first site. With r the ratio of that site's constant
    to another's, the weight W that reads on the other path becomes r·W, and its bias b becomes b + (1−r)·βW. If values
    have no bias, (1−r)·βW is passed through the output projection and added to its bias, because attention weights sum
    to 1. This is computed in float64 and rounded once.
    """
    family = family_of(model)
    for norm in norms_of(model):
        module: Any = model.get_submodule(norm.path)
        std = constants[norm.sites[0].name].double()
        for reader in norm.readers:
            linear: Any = model.get_submodule(reader.path)
            ratios = torch.stack([std / constants[site.name].double() for site in norm.sites])
            ratio = ratios[list(norm.paths(reader))][part_of_column(model, reader)]
            if (ratio == 1).all():
                continue
            weight = matrix(linear).double()
            if (beta := getattr(module, "bias", None)) is not None:
                left = (1 - ratio) * (beta.double() @ weight)
                if linear.bias is None:
                    linear = _output_projection(model, norm)
                    left = left @ matrix(linear).double()
                _write(linear.bias, linear.bias.double() + left)
            _write(matrix(model.get_submodule(reader.path)), weight * ratio)
        _write(module.weight, _gain(module, family) * (math.sqrt(FROZEN_EPS) / std) - family.style.gain_offset)
        setattr(module, family.style.eps, FROZEN_EPS)
    setattr(model.config, family.eps, FROZEN_EPS)


def _write(parameter: Tensor, value: Float[Tensor, "*shape"]) -> None:
    parameter.copy_(value.to(parameter.dtype))


def _gain(norm: Any, family: Family) -> Float[Tensor, " d"]:
    """Return a norm's gain in float64, on the CPU because not every device supports float64."""
    return norm.weight.detach().to("cpu", torch.float64) + family.style.gain_offset


def _output_projection(model: PreTrainedModel, norm: Norm) -> Any:
    """Return the output projection of the attention that reads `norm`."""
    writers = family_of(model).writers_of(model.config.num_hidden_layers)
    return model.get_submodule(next(path for layer, written, path in writers if layer == norm.layer and written == "o"))


def matrix(linear: Any) -> Float[Tensor, "d_in d_out"]:
    """Return the weight of a `Conv1D`, or that of an `nn.Linear` transposed: a view of the parameter."""
    return linear.weight.detach().T if isinstance(linear, nn.Linear) else linear.weight.detach()


def part_of_column(model: PreTrainedModel, reader: Reader) -> Int[Tensor, " d_out"]:
    """Return, for each output column of a reader, the index in `reader.parts` of its part."""
    groups = model.config.num_attention_heads if reader.by_head else 1
    width = matrix(model.get_submodule(reader.path)).shape[1] // (groups * len(reader.parts))
    return torch.arange(len(reader.parts)).repeat_interleave(width).repeat(groups)


def _put(linear: Any, weight: Float[Tensor, "d_in d_out"], bias: Float[Tensor, " d_out"] | None) -> None:
    """Give a reader its own weight and bias: its weight may have been shared, and it may have had no bias."""
    weight = weight.T if isinstance(linear, nn.Linear) else weight
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    linear.bias = None if bias is None else nn.Parameter(bias.clone())


@torch.no_grad()
def _fold(
    norm: Any, reader: Any, family: Family, centre: bool
) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"] | None]:
    """Return the reader's weight and bias with the norm's scale and bias folded in, and its centring if `centre`.

    They are folded in float64 on the CPU, and returned in the reader's dtype and on its device.
    """
    weight = matrix(reader).to("cpu", torch.float64, copy=True)
    bias = None if reader.bias is None else reader.bias.detach().to("cpu", torch.float64)
    if (beta := getattr(norm, "bias", None)) is not None:
        through = beta.detach().to("cpu", torch.float64) @ weight
        bias = through if bias is None else bias + through
    weight *= _scale(norm, family)[:, None]
    if centre and family.style.centred:
        weight -= weight.mean(dim=0)
    return weight.to(reader.weight), None if bias is None else bias.to(reader.weight)


def _scale(norm: Any, family: Family) -> Float[Tensor, " d"]:
    """Return the factor of a norm in float64: gain/√eps of a frozen norm, the gain of a live one."""
    frozen = _eps(norm, family) >= _LEAST_FROZEN_EPS
    return _gain(norm, family) / (math.sqrt(_eps(norm, family)) if frozen else 1)


def linear_maps(
    model: PreTrainedModel,
) -> Iterator[tuple[str, Float[Tensor, "d_model d_out"], Float[Tensor, " d_out"] | None]]:
    """Yield (path, weight, bias or None) of every module that reads a norm, with the norm folded in.

    If norms are frozen or Identity, the module maps the residual stream x to x @ weight + bias. If they are live, it
    maps (x − μ)/σ, or x/RMS, in this way. One map is created at a time, to avoid a copy of a whole large model.
    """
    family = family_of(model)
    for norm in norms_of(model):
        module = model.get_submodule(norm.path)
        for reader in norm.readers:
            linear: Any = model.get_submodule(reader.path)
            if isinstance(module, nn.Identity):
                yield reader.path, matrix(linear), None if linear.bias is None else linear.bias.detach()
            else:
                yield reader.path, *_fold(module, linear, family, centre=True)


@torch.no_grad()
def _fold_backwards(model: PreTrainedModel, norm: Norm) -> None:
    """Fold the scale of a post-norm into the module whose output it normalises, in place."""
    if norm.writer is None or isinstance(module := model.get_submodule(norm.path), nn.Identity):
        return
    writer: Any = model.get_submodule(norm.writer)
    scale = _scale(module, family_of(model)).to(writer.weight.device)
    _write(matrix(writer), matrix(writer).double() * scale)
    if writer.bias is not None:
        _write(writer.bias, writer.bias.double() * scale)


def to_identity(model: Model) -> Model:
    """Return the Identity form of an LN-free model, in the model's dtype. The model itself is not changed.

    Weights are folded in float64 and rounded once. The result forwards and generates like any model of its class, but
    it cannot be saved as one, because `from_pretrained` would create new norms.

    Raises:
        CheckpointError: the norms are live; or as in `norm_state`.
    """
    if norm_state(model) == "live":
        raise CheckpointError("The norms of this model are live. It has no Identity form until they are removed.")
    folded = copy.deepcopy(model)
    for path, weight, bias in linear_maps(model):
        _put(folded.get_submodule(path), weight, bias)
    for norm in norms_of(model):
        _fold_backwards(folded, norm)
        folded.set_submodule(norm.path, nn.Identity())
    folded.config.tie_word_embeddings = False
    return folded


@torch.no_grad()
def to_unit_gain(model: Model) -> Model:
    """Return a copy of an ordinary model whose norms only centre and divide. Gains and biases are in the readers.

    Post-norms, which have no readers, keep their gains.
    """
    folded, family = copy.deepcopy(model), family_of(model)
    for path, weight, bias in linear_maps(model):
        _put(folded.get_submodule(path), weight, bias)
    for norm in norms_of(folded):
        module: Any = folded.get_submodule(norm.path)
        if norm.readers:
            module.weight.fill_(1 - family.style.gain_offset)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
    folded.config.tie_word_embeddings = False
    return folded


def check_format(model: PreTrainedModel, format: Format) -> None:
    """Check that a model can be written in `format` once its norms are removed.

    Raises:
        CheckpointError: the format is h24, which folds the bias of a norm into that of a reader, and a reader has no
            bias.
    """
    for norm in norms_of(model) if format == "h24" else ():
        if norm.layer is None or getattr(model.get_submodule(norm.path), "bias", None) is None:
            continue
        for reader in norm.readers:
            if model.get_submodule(reader.path).bias is None:
                raise CheckpointError(
                    f"{reader.path} has no bias into which the format h24 can fold that of {norm.path}. Use b25."
                )


@torch.no_grad()
def convert(model: Model, format: Format) -> Model:
    """Return a copy of an LN-free model in `format`.

    An h24 model is also a b25 model, with γ = σ̄ and β = 0 in its blocks, so converting it to b25 changes nothing.

    Raises:
        CheckpointError: the norms are not frozen; or as in `check_format` or `norm_state`.
    """
    check_format(model, format)
    if (state := norm_state(model)) != "frozen":
        raise CheckpointError(f"The norms of this model are {state}. Only frozen norms can be written as {format}.")
    converted, family = copy.deepcopy(model), family_of(model)
    if format == "h24":
        for norm in norms_of(converted):
            if norm.layer is None:
                continue
            module: Any = converted.get_submodule(norm.path)
            for reader in norm.readers:
                linear: Any = converted.get_submodule(reader.path)
                weight, bias = _fold(module, linear, family, centre=False)
                _write(matrix(linear), weight)
                if bias is not None:
                    linear.bias.copy_(bias)
            _fold_backwards(converted, norm)
            module.weight.fill_(math.sqrt(_eps(module, family)) - family.style.gain_offset)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
    return converted
