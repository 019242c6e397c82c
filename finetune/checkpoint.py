"""The LN-free checkpoint: write it, recognise it, read it as linear maps.

An LN-free checkpoint is an ordinary `GPT2LMHeadModel` whose LNs have an eps that dwarfs any variance, so that
they divide by the constant √eps = 1e6 and are linear:

    LN(x) = (x − μ)/√(σ² + eps) ⊙ weight + bias = (x − μ) ⊙ scale + bias,  scale = weight/√eps

Formats, with γ and β of the LN and σ̄ the constant in place of its σ:
    b25  every LN has weight = γ · 1e6/σ̄, bias = β (Baroni et al. 2025, arXiv 2507.02559)
    h24  γ, β and σ̄ are folded into the weights that read, block LNs have weight = 1e6, bias = 0; `ln_f` is as
         in b25, because GPT-2 ties embedding and unembedding (Heimersheim 2024, arXiv 2409.13710)
Identity form, in memory only: the centring is folded too, every LN is `nn.Identity`, and `lm_head` is untied
and has a bias.
"""

import copy
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils import logging

from finetune.blocks import BlockError, BlocksConfig, BlocksForCausalLM, Norm
from finetune.bundled import resolve_model
from finetune.errors import NolnError

CausalLM = GPT2LMHeadModel | BlocksForCausalLM
"""What a checkpoint holds: a GPT-2, LN-free or not, or a model of other blocks, which `finetune.pretrain` trains."""
Format = Literal["b25", "h24"]
NormState = Literal["live", "frozen", "identity"]

FROZEN_EPS = 1e12
_LEAST_FROZEN_EPS = 1e10  # dwarfs any variance: those of GPT-2's residual streams stay below 1e5
_LARGEST_LIVE_WEIGHT = 1e3  # γ is around 1, at most tens; the formats have 1e6, times γ/σ̄

_CONFIG_FILES = ["config.json", "generation_config.json"]
_WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
_TOKENIZER_FILES = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
]


class CheckpointError(NolnError):
    """A model that cannot be read or written as asked; the message says what is wrong and what to do."""


class NoTokenizerError(CheckpointError):
    """A model without a tokenizer beside it."""


class _Site(NamedTuple):
    """A norm and the one weight that reads its output."""

    name: str
    norm: Any
    """`nn.LayerNorm` or `nn.Identity`."""
    reader_name: str
    reader: Any
    """`Conv1D`, whose weight is [d_in, d_out], or `nn.Linear`, whose weight is [d_out, d_in]."""


def _sites(model: GPT2LMHeadModel) -> Iterator[_Site]:
    block: Any
    for i, block in enumerate(model.transformer.h):
        at = f"transformer.h.{i}"
        yield _Site(f"{at}.ln_1", block.ln_1, f"{at}.attn.c_attn", block.attn.c_attn)
        yield _Site(f"{at}.ln_2", block.ln_2, f"{at}.mlp.c_fc", block.mlp.c_fc)
    yield _Site("transformer.ln_f", model.transformer.ln_f, "lm_head", model.lm_head)


def require_gpt2(model: nn.Module) -> GPT2LMHeadModel:
    """Return `model`, which must be a GPT-2: only its LNs can be removed or folded.

    Raises:
        CheckpointError: another architecture.
    """
    if isinstance(model, BlocksForCausalLM):
        raise CheckpointError(
            f"{model.name_or_path or 'A model'} is a {type(model).__name__}, no GPT-2: only the LayerNorm of Pre-LN "
            "blocks can be removed or folded, and "
            "`python -m finetune pretrain pre-ln` saves these as a GPT2LMHeadModel (`finetune.blocks.to_gpt2`)."
        )
    if not isinstance(model, GPT2LMHeadModel) or model.config.add_cross_attention:
        raise CheckpointError(f"A {type(model).__name__} is not a GPT2LMHeadModel without cross-attention.")
    return model


def norm_state(model: nn.Module) -> NormState:
    """Return whether the norms of `model` are live, frozen (divide by √eps) or `nn.Identity`.

    The modules decide, not the config: they compute the logits. Those of other blocks than GPT-2's are live where any
    norm is left, of queries and keys too.

    Raises:
        CheckpointError: another architecture, weights that are not finite, a mixture, or the weights of one
            kind of LN under the eps of the other.
    """
    if not isinstance(model, BlocksForCausalLM):
        require_gpt2(model)
    for name, parameter in model.named_parameters():
        if not torch.stack(parameter.aminmax()).isfinite().all():  # 100 times as fast as asking each value
            raise CheckpointError(
                f"{name} holds infinities or NaN. LN-free formats have norm weights of about 1e6, which "
                "do not fit float16: keep them in float32 or bfloat16, and cast to float16 only after `to_identity`."
            )
    if isinstance(model, BlocksForCausalLM):
        return "live" if any(isinstance(module, Norm) for module in model.modules()) else "identity"
    states = {site.name: _state(site.name, site.norm) for site in _sites(require_gpt2(model))}
    groups = {state: [name for name in states if states[name] == state] for state in set(states.values())}
    if len(groups) > 1:
        raise CheckpointError(f"The norms are a mixture, neither LN-free nor an ordinary model's: {groups}.")
    return states["transformer.ln_f"]


def _state(name: str, norm: nn.Module) -> NormState:
    if isinstance(norm, nn.Identity):
        return "identity"
    if not isinstance(norm, nn.LayerNorm):
        raise CheckpointError(f"{name} is a {type(norm).__name__}: only nn.LayerNorm and nn.Identity are known.")
    frozen, largest = norm.eps >= _LEAST_FROZEN_EPS, norm.weight.abs().max().item()
    if frozen != (largest > _LARGEST_LIVE_WEIGHT):
        kind, eps = ("an ordinary", 1e-5) if frozen else ("an LN-free", FROZEN_EPS)
        raise CheckpointError(
            f"{name} has weights up to {largest:.3g}, like {kind} model's, under an eps of {norm.eps:g}: set "
            f"layer_norm_epsilon to {eps:g} in its config.json."
        )
    return "frozen" if frozen else "live"


@torch.no_grad()
def _fold(site: _Site, centre: bool) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
    """Return the reader's weight and bias with the norm's scale and bias folded in; its centring if `centre`.

    Folded in float64, on the CPU as not every device has it; returned in the reader's dtype and place.
    """
    norm, reader = site.norm, site.reader
    weight = reader.weight.to("cpu", torch.float64, copy=True)
    if isinstance(reader, nn.Linear):
        weight = weight.T
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
    model: GPT2LMHeadModel,
) -> Iterator[tuple[str, Float[Tensor, "d_model d_out"], Float[Tensor, " d_out"]]]:
    """Yield (name, weight, bias) of each block's `c_attn` and `c_fc` and of `lm_head`, norms folded in.

    The residual stream x is mapped to x @ weight + bias where norms are frozen or Identity; where they are
    live, (x − μ)/σ is mapped. One map is made at a time, so that a large model is not copied whole.
    """
    for site in _sites(model):
        if isinstance(site.norm, nn.Identity):
            weight = site.reader.weight.detach()
            if isinstance(site.reader, nn.Linear):
                weight = weight.T
            bias = weight.new_zeros(weight.shape[1]) if site.reader.bias is None else site.reader.bias.detach()
        else:
            weight, bias = _fold(site, centre=True)
        yield site.reader_name, weight, bias


def to_identity(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Return the Identity form of an LN-free model, in the dtype of the model, which stays as it is.

    Weights are folded in float64 and rounded once. The result forwards and generates like any
    `GPT2LMHeadModel`, but cannot be saved as one: `from_pretrained` would put new LNs in.

    Raises:
        CheckpointError: the LNs are live, or what `norm_state` raises.
    """
    if norm_state(require_gpt2(model)) == "live":
        raise CheckpointError("The LNs of this model are live: it has no Identity form before they are removed.")
    folded = copy.deepcopy(model)
    for site, (_, weight, bias) in zip(_sites(folded), linear_maps(model), strict=True):
        if isinstance(site.reader, nn.Linear):
            weight = weight.T
        site.reader.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        site.reader.bias = nn.Parameter(bias.clone())
    block: Any
    for block in folded.transformer.h:
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
    folded.transformer.ln_f = nn.Identity()  # type: ignore[assignment]
    folded.config.tie_word_embeddings = False
    return folded


@torch.no_grad()
def convert(model: GPT2LMHeadModel, format: Format) -> GPT2LMHeadModel:
    """Return a copy of an LN-free model in the format asked for.

    An h24 model is a b25 model already, with γ = σ̄ and β = 0 in its blocks.

    Raises:
        CheckpointError: the norms are not frozen, or what `norm_state` raises.
    """
    if (state := norm_state(require_gpt2(model))) != "frozen":
        raise CheckpointError(f"The norms of this model are {state}: only frozen ones can be written as {format}.")
    converted = copy.deepcopy(model)
    if format == "h24":
        for site in list(_sites(converted))[:-1]:
            weight, bias = _fold(site, centre=False)
            site.reader.weight.copy_(weight)
            site.reader.bias.copy_(bias)
            site.norm.weight.fill_(math.sqrt(site.norm.eps))
            site.norm.bias.zero_()
    return converted


def save(
    model: CausalLM,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
) -> None:
    """Write `model`, its tokenizer and its model card as a directory, whole or not at all.

    Raises:
        CheckpointError: the directory exists, the config's eps is not that of the norms (another model would
            be loaded), or the model is in Identity form, which transformers cannot load.
    """
    directory = Path(directory)
    if directory.exists():
        raise CheckpointError(f"{directory} exists and is not written over: move it away or name another.")
    state = norm_state(model)
    if state == "identity" and isinstance(model, GPT2LMHeadModel):
        raise CheckpointError("The Identity form cannot be loaded again: save the model that it was made from.")
    for site in _sites(model) if isinstance(model, GPT2LMHeadModel) else ():
        if site.norm.eps != model.config.layer_norm_epsilon:
            raise CheckpointError(
                f"{site.name} has an eps of {site.norm.eps:g}, but what is saved would be loaded with that "
                f"of the config, {model.config.layer_norm_epsilon:g}: set config.layer_norm_epsilon."
            )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
            partial = Path(temporary) / directory.name
            with without_bars():
                model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            if card is not None:
                (partial / "README.md").write_text(card, encoding="utf-8")
            partial.rename(directory)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be written: {error}. Make room, or name another.") from error


def load_config(name_or_path: str | Path, revision: str | None = None) -> GPT2Config | BlocksConfig:
    """Read the config of a GPT-2 or of other blocks: a bundled name, a directory or a Hub id; no weights are fetched.

    Raises:
        CheckpointError: nothing there, unreadable, or another architecture.
    """
    directory = _local(name_or_path, revision, _CONFIG_FILES)
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The config.json of {name_or_path} cannot be read: {error}.") from error
    if config.get("model_type") == BlocksConfig.model_type:
        try:
            return BlocksConfig.from_dict(config)
        except (BlockError, StrictDataclassError) as error:
            raise CheckpointError(f"The config.json of {name_or_path} does not hold: {error}") from error
    architectures = config.get("architectures") or ["GPT2LMHeadModel"]
    if config.get("model_type") != "gpt2" or "GPT2LMHeadModel" not in architectures:
        raise CheckpointError(
            f"{name_or_path} is a {', '.join(architectures)} of type {config.get('model_type')}; only "
            f"GPT2LMHeadModel of type gpt2 and BlocksForCausalLM of type {BlocksConfig.model_type} can be loaded."
        )
    return GPT2Config.from_dict(config)


def load(name_or_path: str | Path, revision: str | None = None, dtype: torch.dtype | None = None) -> CausalLM:
    """Load a GPT-2, LN-free or not, or a model of other blocks, on the CPU, for evaluation.

    It is called by a bundled name, a directory or a Hub id.

    Only safetensors are read, and no remote code is run. From a directory nothing is looked up. The weights
    are float32 unless `dtype` says otherwise, whatever the files hold.

    Raises:
        CheckpointError: nothing there, files missing or corrupt, another architecture, or what `norm_state`
            raises.
    """
    config = load_config(name_or_path, revision)
    kind: Any = BlocksForCausalLM if isinstance(config, BlocksConfig) else GPT2LMHeadModel
    directory = _local(name_or_path, revision, _CONFIG_FILES + _WEIGHT_FILES)
    model: CausalLM
    info: dict[str, Any]
    try:
        with without_bars():
            model, info = kind.from_pretrained(
                directory,
                dtype=dtype or torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"The weights of {name_or_path} cannot be read: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{name_or_path} lacks {len(missing)} weights: {', '.join(missing[:5])}…")
    norm_state(model)
    return model


def load_tokenizer(name_or_path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model.

    Raises:
        NoTokenizerError: no tokenizer in it.
        CheckpointError: nothing there.
    """
    directory = _local(name_or_path, revision, _CONFIG_FILES + _TOKENIZER_FILES)
    if not any((directory / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise NoTokenizerError(f"{name_or_path} has no tokenizer: load that of the model it was made from.")
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' bars of files that are read and written in a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _local(name_or_path: str | Path, revision: str | None, files: list[str]) -> Path:
    """Return the directory of a bundled name, a path, or a Hub id, whose `files` are downloaded if not cached."""
    name = resolve_model(str(name_or_path))
    if Path(name).is_dir():
        if revision is not None:
            raise CheckpointError(f"{name_or_path} is a directory, which has no revision {revision}.")
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(f"{name_or_path} is no directory, nor can it be had from the Hub: {error}") from error
