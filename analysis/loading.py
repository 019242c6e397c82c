"""One LN-free (or ordinary) GPT-2 -> HookedTransformer, TransformerBridge, nnsight, plain transformers.

1. The model is read with `finetune.checkpoint`, which refuses what it does not recognise.
2. Its norms are folded into the weights that read: an LN-free model is left without any norm, an ordinary one with
   LNs that only centre and divide (`normalization_type` None and "LNPre" in TransformerLens).
3. The weights are put one by one into an empty model of the tool.
4. A few tokens are run through it and through the plain transformers model; a difference raises.

A model of `finetune.blocks` is none of these: `load_hooked_blocks` puts hooks into a copy of it, and checks it too.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from nnsight import LanguageModel, NNsight
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from analysis.hooked_blocks import HookedBlocks
from finetune.blocks import BlocksForCausalLM
from finetune.checkpoint import load, load_tokenizer
from finetune.errors import CheckpointError, NoTokenizerError
from finetune.families import Part, Written, family_of
from finetune.folding import NormState, linear_maps, matrix, norm_state, norms_of, to_identity
from finetune.names import PUBLISHED

Model = str | Path | nn.Module
"""A short name, a directory, a Hub id, or a model in memory."""
Tool = Literal["hooked", "bridge"]

_TL4 = int(version("transformer-lens").split(".")[0]) >= 4


_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of the logits that the self-check lets pass, as a fraction of the largest logit."""
_ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")
"""What TransformerLens and transformers have under one name."""
_NAMES: dict[Part | Written, str] = {
    "embed": "embed",
    "pos_embed": "pos_embed",
    "unembed": "unembed",
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "o": "attn.o",
    "in": "mlp.in",
    "out": "mlp.out",
}
"""TransformerBridge's names of linear maps, within a block where they belong to one, by what they compute."""
_HOOKED_NAMES = {
    "embed": ("embed.W_E", ""),
    "pos_embed": ("pos_embed.W_pos", ""),
    **{f"attn.{x}": (f"attn.W_{x.upper()}", f"attn.b_{x.upper()}") for x in "qkvo"},
    **{f"mlp.{x}": (f"mlp.W_{x}", f"mlp.b_{x}") for x in ("in", "out")},
    "unembed": ("unembed.W_U", "unembed.b_U"),
}
"""HookedTransformer's names of their weights and biases."""


def load_hooked(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Any:
    """Load `model` as a `HookedTransformer` of TransformerLens 3.

    Without LN where the model is LN-free (`cfg.normalization_type` None), with "LNPre" where it is ordinary. Nothing
    is centred but what the weights read, and value biases are not folded.

    Args:
        model: a short name (`PUBLISHED`, or a bundled one), a directory, a Hub id, or a model in memory.
        tokenizer: that of the checkpoint or of its base where None; a model in memory has none of its own.
        revision: branch, tag or commit of a Hub id.
        dtype: of the weights; that of a model in memory, float32 otherwise.
        device: where to put the result; where a model in memory is, the CPU otherwise.

    Raises:
        CheckpointError: what is not recognised, or logits that differ from those of plain transformers.
        ImportError: TransformerLens 4, which has no `HookedTransformer`.
    """
    source, state = _read(model, revision)
    tokenizer = _tokenizer(model, tokenizer, revision)
    return _hooked(source, state, tokenizer, dtype or source.dtype).to(device or source.device, print_details=False)


def load_bridge(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> TransformerBridge:
    """Load `model` as a `TransformerBridge` of TransformerLens 3 or 4, otherwise like `load_hooked`.

    It has the hook names of `HookedTransformer` but `attn.hook_result`: use `attn.hook_z` and `W_O`.
    """
    source, state = _read(model, revision)
    tokenizer = _tokenizer(model, tokenizer, revision)
    return _bridge(source, state, tokenizer, dtype or source.dtype).to(device or source.device, print_details=False)


def load_hooked_blocks(
    model: str | Path | BlocksForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> HookedBlocks:
    """Load a model of `finetune.blocks` with the hook names of `HookedTransformer`, in TransformerLens 3 or 4.

    Args:
        model: a directory, a Hub id, or a model in memory.
        tokenizer: that of the checkpoint where None; a model in memory has none of its own.
        revision: branch, tag or commit of a Hub id.
        dtype: of the weights; that of a model in memory, float32 otherwise.
        device: where to put the result; where a model in memory is, the CPU otherwise.

    Raises:
        CheckpointError: nothing there, unreadable, another architecture, or logits that differ from those of `model`.
    """
    source = model if isinstance(model, BlocksForCausalLM) else load(model, revision)
    if not isinstance(source, BlocksForCausalLM):
        raise CheckpointError(
            f"{model} is a {type(source).__name__}, not a model of finetune.blocks: use load_hooked or load_bridge."
        )
    tokenizer = _tokenizer(model, tokenizer, revision)
    made: Any = copy.deepcopy(source)
    made = made.to(device or source.device, dtype or source.dtype)
    hooked = HookedBlocks(made, tokenizer)
    _check(hooked, made, made.dtype)
    return hooked


def load_transformers(
    model: Model,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """Load an LN-free `model` in Identity form, an ordinary one as it is.

    Arguments and errors are those of `load_hooked`.
    """
    source, state = _read(model, revision)
    return _transformers(source, state, dtype or source.dtype, device or source.device)


def load_nnsight(
    model: Model,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    hooked: bool = False,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> LanguageModel | NNsight:
    """Load `model` as an nnsight `LanguageModel` over what `load_transformers` returns, with its module paths.

    Where `hooked`, as what `load_hooked` returns wrapped in `NNsight`, with TransformerLens's module paths. Other
    arguments and errors are those of `load_hooked`.

    Raises:
        CheckpointError: also where a `LanguageModel` has no tokenizer.
    """
    source, state = _read(model, revision)
    tokenizer = _tokenizer(model, tokenizer, revision)
    dtype, device = dtype or source.dtype, device or source.device
    if hooked:
        return NNsight(_hooked(source, state, tokenizer, dtype).to(device, print_details=False))
    if tokenizer is None:
        raise CheckpointError("nnsight's LanguageModel needs a tokenizer: give it beside the model.")
    with warnings.catch_warnings():
        # It is going to be called TransformersModel; until then this is the name that is known.
        warnings.filterwarnings("ignore", "LanguageModel is deprecated")
        return LanguageModel(_transformers(source, state, dtype, device), tokenizer=copy.deepcopy(tokenizer))


def load_trio(
    original: Model,
    control: Model | None,
    ln_free: Model,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    revision: str | None = None,
    tool: Tool | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Load the models that the analyses compare, under the keys `original`, `control` (unless None) and `ln_free`.

    In all of them the weights that write to the residual stream are centred, so that its mean is zero; no logits
    depend on it. `revision` is that of the original. `tool` is "hooked" where TransformerLens has
    `HookedTransformer`, otherwise "bridge". Other arguments and errors are those of `load_hooked`.

    Raises:
        CheckpointError: LN in `ln_free`, or none in the others; or what `load_hooked` raises, with which model it is.
    """
    make = {"hooked": _hooked, "bridge": _bridge}[tool or ("bridge" if _TL4 else "hooked")]
    models = {"original": original, "control": control, "ln_free": ln_free}
    trio = {}
    for name, model in models.items():
        if model is None:
            continue
        its_revision = revision if name == "original" else None
        try:
            source, state = _read(model, its_revision)
            its_tokenizer = _tokenizer(model, tokenizer, its_revision)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        if (state == "live") != (name != "ln_free"):
            raise CheckpointError(f"{name} is to be a model {'without' if name == 'ln_free' else 'with'} live LN.")
        made = make(source, state, its_tokenizer, dtype or source.dtype, centre_writing=True)
        trio[name] = made.to(device or source.device, print_details=False)
    return trio


def _read(model: Model, revision: str | None) -> tuple[PreTrainedModel, NormState]:
    """Return the plain model and the state of its norms."""
    source: Any = model if isinstance(model, nn.Module) else load(model, revision)
    if isinstance(source, BlocksForCausalLM):
        raise CheckpointError(
            f"{source.name_or_path or 'The model'} has blocks of another kind. Use analysis.load_hooked_blocks."
        )
    state = norm_state(source)
    published = None if isinstance(model, nn.Module) else PUBLISHED.get(str(model))
    if published is not None and (published.format is None) != (state == "live"):
        raise CheckpointError(f"{model} has {state} norms, but its format is to be {published.format}.")
    return source, state


def _tokenizer(
    model: Model, tokenizer: PreTrainedTokenizerBase | None, revision: str | None
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer given, else that of the checkpoint or of its base, else None."""
    if tokenizer is not None or isinstance(model, nn.Module):
        return tokenizer
    try:
        return load_tokenizer(model, revision)
    except NoTokenizerError:
        return None


def _transformers(
    source: PreTrainedModel, state: NormState, dtype: torch.dtype, device: str | torch.device
) -> PreTrainedModel:
    made: Any = copy.deepcopy(source) if state == "live" else to_identity(source)
    made = made.to(dtype).eval()
    _check(lambda tokens: made(tokens).logits, source, dtype)
    return made.to(device)


def _hooked(
    source: PreTrainedModel,
    state: NormState,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    centre_writing: bool = False,
) -> Any:
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError as error:
        raise ImportError("TransformerLens 4 has no HookedTransformer: use load_bridge.") from error

    with warnings.catch_warnings():
        # It says to use TransformerBridge: whoever calls `load_hooked` has chosen.
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        config = _config(source, state, dtype)
        # The same function in one kernel instead of eight; TransformerBridge takes it by itself.
        config["act_fn"] = config["act_fn"].replace("gelu_new", "gelu_pytorch_tanh")
        hooked = HookedTransformer(HookedTransformerConfig(**config))
    parameters = dict(hooked.named_parameters())
    with torch.no_grad():
        for block, name, weight, bias in _maps(source, centre_writing):
            weight_name, bias_name = (block + part for part in _HOOKED_NAMES[name])
            if name in ("attn.q", "attn.k", "attn.v"):
                weight = weight.unflatten(1, (hooked.cfg.n_heads, -1)).movedim(1, 0)
            parameters[weight_name].copy_(weight.view_as(parameters[weight_name]))
            if bias is not None:
                parameters[bias_name].copy_(bias.view_as(parameters[bias_name]))
    for layer, block in enumerate(hooked.blocks):
        block.attn.attn_scale = 1 / _scaling(source, layer)
    return _finish(hooked, source, tokenizer, dtype)


def _bridge(
    source: PreTrainedModel,
    state: NormState,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    centre_writing: bool = False,
) -> TransformerBridge:
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
    return _finish(bridge, source, tokenizer, dtype)


def _config(source: PreTrainedModel, state: NormState, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `HookedTransformerConfig` and `TransformerBridgeConfig` call alike."""
    config, family, norms = source.config, family_of(source), norms_of(source)
    activation = getattr(config, family.activation)
    if activation not in _ACTIVATIONS:
        raise CheckpointError(f"The activation {activation} is not one of {', '.join(_ACTIVATIONS)}.")
    into_mlp = next(reader.path for norm in norms for reader in norm.readers if reader.parts == ("in",))
    return {
        "model_name": config.name_or_path or config.model_type,
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "d_head": config.hidden_size // config.num_attention_heads,
        "d_mlp": matrix(source.get_submodule(into_mlp)).shape[1],
        "d_vocab": config.vocab_size,
        "n_ctx": config.max_position_embeddings,
        "act_fn": activation,
        "normalization_type": "LNPre" if state == "live" else None,
        "eps": source.get_submodule(norms[-1].path).eps if state == "live" else 0.0,
        "init_weights": False,
        "dtype": dtype,
        "device": str(source.device),
    }


def _scaling(source: PreTrainedModel, layer: int) -> float:
    """Return what multiplies a layer's attention scores."""
    family = family_of(source)
    attention: Any = source.get_submodule(f"{family.blocks}.{layer}.{family.attention}")
    return attention.scaling


def _maps(
    source: PreTrainedModel, centre_writing: bool
) -> Iterator[tuple[str, str, Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"] | None]]:
    """Yield (block, name, weight, bias) of every linear map, one by one, norms folded in; names are the bridge's.

    What writes to the residual stream has its output's mean over `d_model` taken out if `centre_writing`.
    """

    def centred(weight: Float[Tensor, "*d_in d_model"]) -> Float[Tensor, "*d_in d_model"]:
        return weight - weight.mean(-1, keepdim=True) if centre_writing else weight

    family = family_of(source)
    for layer, written, path in family.writers_of(source.config.num_hidden_layers):
        writer: Any = source.get_submodule(path)
        weight = writer.weight if isinstance(writer, nn.Embedding) else matrix(writer)
        bias = getattr(writer, "bias", None)
        yield _block(layer), _NAMES[written], centred(weight), None if bias is None else centred(bias)
    readers = {reader.path: (norm.layer, reader.parts) for norm in norms_of(source) for reader in norm.readers}
    for path, weight, bias in linear_maps(source):
        layer, parts = readers[path]
        chunks = zip(parts, weight.chunk(len(parts), dim=1), bias.chunk(len(parts)), strict=True)
        for part, its_weight, its_bias in chunks:
            yield _block(layer), _NAMES[part], its_weight, its_bias


def _block(layer: int | None) -> str:
    return "" if layer is None else f"blocks.{layer}."


def _finish(made: Any, source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype) -> Any:
    """Give `made` its tokenizer, check it and return it.

    TransformerLens's own way to set a tokenizer reads it again by name, from the Hub if it is not a path.
    """
    if tokenizer is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
        made.cfg.tokenizer_prepends_bos = tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
        made.tokenizer = tokenizer
    _check(made, source, dtype)
    return made.eval()


@torch.no_grad()
def _check(logits: Callable[[Tensor], Tensor], source: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raise unless `logits` of a few tokens are those of `source`."""
    length = min(16, source.config.n_positions)
    tokens = torch.linspace(0, source.config.vocab_size - 1, length, device=source.device).long()[None]
    training = source.training
    expected, found = source.eval()(tokens).logits.double(), logits(tokens).double()
    source.train(training)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    tolerance = max(_TOLERANCE[dtype], _TOLERANCE[source.dtype])
    if not error <= tolerance:
        raise CheckpointError(
            f"The loaded model's logits differ from plain transformers' by {error:.2g} of the largest, more than "
            f"the {tolerance:g} of {dtype}: these weights cannot be used in this tool as they are."
        )
