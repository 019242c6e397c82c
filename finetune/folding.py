"""The frozen form and the Identity form of a norm: recognise, write, fold and convert them.

A frozen norm has an eps that dwarfs any variance, so that it divides by the constant √eps = 1e6 and is linear:

    LN(x) = (x − μ)/√(σ² + eps) ⊙ weight + bias = (x − μ) ⊙ scale + bias,  scale = weight/√eps

An ordinary checkpoint of the model's own class can hold that. There are two formats, with γ and β of the norm and σ̄ the
constant in place of its σ:
    b25  every norm has weight = γ · 1e6/σ̄, bias = β (Baroni et al. 2025, arXiv 2507.02559)
    h24  γ, β and σ̄ are folded into the weights that read, block norms have weight = 1e6, bias = 0; the final norm is
         as in b25, because GPT-2 ties embedding and unembedding (Heimersheim 2024, arXiv 2409.13710)
In the Identity form, which exists in memory only, the centring is folded too, every norm is `nn.Identity`, and the
unembedding is untied and has a bias.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.blocks import BlocksForCausalLM
from finetune.blocks import Norm as BlocksNorm
from finetune.errors import CheckpointError
from finetune.families import Norm, family_of
from finetune.names import Format

NormState = Literal["live", "frozen", "identity"]
Model = TypeVar("Model", bound=PreTrainedModel)

FROZEN_EPS = 1e12
_LEAST_FROZEN_EPS = 1e10  # dwarfs any variance: those of GPT-2's residual streams stay below 1e5
_LARGEST_LIVE_WEIGHT = 1e3  # γ is around 1, at most tens; the formats have 1e6, times γ/σ̄


def norms_of(model: PreTrainedModel) -> list[Norm]:
    """Return the norms of a model of a known family, in the order in which a forward comes to them.

    Raises:
        CheckpointError: another architecture.
    """
    return family_of(model).norms_of(model.config.num_hidden_layers)


def norm_state(model: nn.Module) -> NormState:
    """Return whether the norms of `model` are live, frozen (divide by √eps) or `nn.Identity`.

    The modules decide, not the config: they compute the logits. Those of `finetune.blocks` are live where any norm is
    left, of queries and keys too.

    Raises:
        CheckpointError: another architecture, weights that are not finite, a mixture, or the weights of one
            kind of norm under the eps of the other.
    """
    norms = [] if isinstance(model, BlocksForCausalLM) else norms_of(model)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if not torch.stack(parameter.aminmax()).isfinite().all():  # 100 times as fast as asking each value
            raise CheckpointError(
                f"{name} holds infinities or NaN. LN-free formats have norm weights of about 1e6, which "
                "do not fit float16: keep them in float32 or bfloat16, and cast to float16 only after `to_identity`."
            )
    if isinstance(model, BlocksForCausalLM):
        return "live" if any(isinstance(module, BlocksNorm) for module in model.modules()) else "identity"
    eps = family_of(model).eps
    states = {norm.path: _state(norm.path, model.get_submodule(norm.path), eps) for norm in norms}
    groups = {state: [name for name in states if states[name] == state] for state in set(states.values())}
    if len(groups) > 1:
        raise CheckpointError(f"The norms are a mixture, neither LN-free nor an ordinary model's: {groups}.")
    return groups.popitem()[0]


def _state(name: str, norm: nn.Module, eps_field: str) -> NormState:
    if isinstance(norm, nn.Identity):
        return "identity"
    if not isinstance(norm, nn.LayerNorm):
        raise CheckpointError(f"{name} is a {type(norm).__name__}: only nn.LayerNorm and nn.Identity are known.")
    frozen, largest = norm.eps >= _LEAST_FROZEN_EPS, norm.weight.abs().max().item()
    if frozen != (largest > _LARGEST_LIVE_WEIGHT):
        kind, eps = ("an ordinary", 1e-5) if frozen else ("an LN-free", FROZEN_EPS)
        raise CheckpointError(
            f"{name} has weights up to {largest:.3g}, like {kind} model's, under an eps of {norm.eps:g}: set "
            f"{eps_field} to {eps:g} in its config.json."
        )
    return "frozen" if frozen else "live"


def check_can_be_saved(model: nn.Module) -> None:
    """Check that what is saved of `model` is loaded as the same function.

    Raises:
        CheckpointError: the config's eps is not that of the norms, the model is in Identity form, which transformers
            cannot load, or what `norm_state` raises.
    """
    state = norm_state(model)
    if isinstance(model, BlocksForCausalLM):
        return
    if state == "identity":
        raise CheckpointError("The Identity form cannot be loaded again: save the model that it was made from.")
    family, config = family_of(model), model.config
    for norm in norms_of(model):  # type: ignore[arg-type]
        if (eps := model.get_submodule(norm.path).eps) != getattr(config, family.eps):
            raise CheckpointError(
                f"{norm.path} has an eps of {eps:g}, but what is saved would be loaded with that of the config, "
                f"{getattr(config, family.eps):g}: set config.{family.eps}."
            )


@torch.no_grad()
def freeze(model: PreTrainedModel, constants: Mapping[str, Float[Tensor, ""]]) -> None:
    """Freeze every norm of an ordinary model in place, as b25, at the constant of each site in `constants`, by name.

    A norm that is read on several paths has one scale: that of its first site. With r the ratio of that site's constant
    to another's, the columns of that other path become r·W, and their bias b + (1−r)·βW. Computed in float64 and
    rounded once.
    """

    def put(parameter: Tensor, value: Float[Tensor, "*shape"]) -> None:
        parameter.copy_(value.to(parameter.dtype))

    family = family_of(model)
    for norm in norms_of(model):
        module: Any = model.get_submodule(norm.path)
        first, *others = norm.sites
        std = constants[first.name].double()
        for reader in norm.readers:
            for site in others:
                linear: Any = model.get_submodule(reader.path)
                weight, bias = matrix(linear), linear.bias
                columns = reader.columns(site.kind, weight.shape[1])
                ratio, before = std / constants[site.name].double(), weight[:, columns].double()
                put(bias[columns], bias[columns].double() + (1 - ratio) * (module.bias.double() @ before))
                put(weight[:, columns], before * ratio)
        put(module.weight, module.weight.double() * (math.sqrt(FROZEN_EPS) / std))
        module.eps = FROZEN_EPS
    setattr(model.config, family.eps, FROZEN_EPS)


def matrix(linear: Any) -> Float[Tensor, "d_in d_out"]:
    """Return the weight of a `Conv1D`, or that of an `nn.Linear` transposed: a view of the parameter."""
    return linear.weight.detach().T if isinstance(linear, nn.Linear) else linear.weight.detach()


def _put(linear: Any, weight: Float[Tensor, "d_in d_out"], bias: Float[Tensor, " d_out"]) -> None:
    """Give a reader a weight and a bias of its own: it may have shared the one and lacked the other."""
    weight = weight.T if isinstance(linear, nn.Linear) else weight
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    linear.bias = nn.Parameter(bias.clone())


@torch.no_grad()
def _fold(norm: Any, reader: Any, centre: bool) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
    """Return the reader's weight and bias with the norm's scale and bias folded in; its centring if `centre`.

    Folded in float64, on the CPU as not every device has it; returned in the reader's dtype and place.
    """
    weight = matrix(reader).to("cpu", torch.float64, copy=True)
    scale = norm.weight.to("cpu", torch.float64)
    if norm.eps >= _LEAST_FROZEN_EPS:
        scale = scale / math.sqrt(norm.eps)
    bias = norm.bias.to("cpu", torch.float64) @ weight
    if reader.bias is not None:
        bias += reader.bias.cpu()
    weight *= scale[:, None]
    if centre:
        weight -= weight.mean(dim=0)
    return weight.to(reader.weight), bias.to(reader.weight)


def linear_maps(
    model: PreTrainedModel,
) -> Iterator[tuple[str, Float[Tensor, "d_model d_out"], Float[Tensor, " d_out"]]]:
    """Yield (path, weight, bias) of every module that reads a norm, norms folded in.

    The residual stream x is mapped to x @ weight + bias where norms are frozen or Identity; where they are
    live, (x − μ)/σ is mapped. One map is made at a time, so that a large model is not copied whole.
    """
    for norm in norms_of(model):
        module = model.get_submodule(norm.path)
        for reader in norm.readers:
            linear: Any = model.get_submodule(reader.path)
            if isinstance(module, nn.Identity):
                weight = matrix(linear)
                bias = weight.new_zeros(weight.shape[1]) if linear.bias is None else linear.bias.detach()
            else:
                weight, bias = _fold(module, linear, centre=True)
            yield reader.path, weight, bias


def to_identity(model: Model) -> Model:
    """Return the Identity form of an LN-free model, in the dtype of the model, which stays as it is.

    Weights are folded in float64 and rounded once. The result forwards and generates like any model of its class, but
    cannot be saved as one: `from_pretrained` would put new norms in.

    Raises:
        CheckpointError: the norms are live, or what `norm_state` raises.
    """
    if norm_state(model) == "live":
        raise CheckpointError("The LNs of this model are live: it has no Identity form before they are removed.")
    folded = copy.deepcopy(model)
    for path, weight, bias in linear_maps(model):
        _put(folded.get_submodule(path), weight, bias)
    for norm in norms_of(model):
        folded.set_submodule(norm.path, nn.Identity())
    folded.config.tie_word_embeddings = False
    return folded


@torch.no_grad()
def convert(model: Model, format: Format) -> Model:
    """Return a copy of an LN-free model in the format asked for.

    An h24 model is a b25 model already, with γ = σ̄ and β = 0 in its blocks.

    Raises:
        CheckpointError: the norms are not frozen, or what `norm_state` raises.
    """
    if (state := norm_state(model)) != "frozen":
        raise CheckpointError(f"The norms of this model are {state}: only frozen ones can be written as {format}.")
    converted = copy.deepcopy(model)
    if format == "h24":
        for norm in norms_of(converted):
            if norm.layer is None:
                continue
            module: Any = converted.get_submodule(norm.path)
            for reader in norm.readers:
                linear: Any = converted.get_submodule(reader.path)
                weight, bias = _fold(module, linear, centre=False)
                matrix(linear).copy_(weight)
                linear.bias.copy_(bias)
            module.weight.fill_(math.sqrt(module.eps))
            module.bias.zero_()
    return converted
