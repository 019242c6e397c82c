"""One LN-free (or ordinary) model -> TransformerBridge, HookedTransformer, nnsight, plain transformers.

1. The model is loaded with `finetune.checkpoint`, which refuses models that it does not recognise.
2. Its norms are folded into the weights that read them. An LN-free model then has no norms, and an ordinary model has
   norms that only centre and divide (`normalization_type` None, "LNPre" and "RMSPre" in TransformerLens). Gemma 2's
   post-norms keep their gains in an ordinary model.
3. The bridge of a GPT-2, and a `HookedTransformer`, get the weights one by one (`analysis.conversion`). The bridge of
   another family wraps transformers' own modules, and so computes exactly what they do.
4. A few tokens are run through it and through the plain transformers model. If the logits differ, an error is raised.

For a model of `finetune.blocks`, `load_hooked_blocks` inserts hooks into a copy of it, and checks it too.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from nnsight import LanguageModel, NNsight
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import NormalizationBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from analysis.conversion import centre_writing, normalization, to_hooked, to_native_bridge
from analysis.hooked_blocks import HookedBlocks
from analysis.strings import taking_texts, with_padding
from finetune.blocks import BlocksForCausalLM
from finetune.checkpoint import load, load_tokenizer, tokenizer_of
from finetune.errors import CheckpointError, NoTokenizerError
from finetune.families import family_of
from finetune.folding import NormState, norm_state, to_identity, to_unit_gain
from finetune.in_memory import unwrapped
from finetune.names import PUBLISHED

Model = str | Path | nn.Module
"""A short name, a directory, a GGUF file, a Hub id, or a model in memory, which may be compiled or wrapped."""
Tool = Literal["bridge", "hooked"]

_SHAPES = {
    "n_layers": "layers",
    "d_model": "width",
    "n_heads": "heads",
    "d_head": "width of heads",
    "d_mlp": "neurons of MLPs",
    "d_vocab": "vocabulary",
}
"""The fields of TransformerLens's configs that must be equal in models that are compared part by part."""

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The largest difference of logits that the self-check accepts, as a fraction of the largest logit."""


def load_bridge(
    model: Model,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> TransformerBridge:
    """Load `model` as a `TransformerBridge` of TransformerLens 3 or 4.

    An LN-free model is loaded without norms (`cfg.normalization_type` None), an ordinary one with "LNPre" or "RMSPre".
    Only the weights that read a LayerNorm are centred. Value biases are not folded.

    The hook names are those of `HookedTransformer`, except that `attn.hook_result` is missing: use `attn.hook_z` and
    `W_O`. Biases that a family lacks are None. `hook_pos_embed` is missing for rotary positions, and `hook_resid_mid`
    for blocks whose attention and MLP read the same stream. Do not call a single block of a family other than GPT-2:
    it would silently lose rotary positions, which the whole forward passes to it.

    Args:
        model: a short name (`PUBLISHED`, or a bundled one), a directory, a GGUF file, a Hub id, or a model in memory.
        tokenizer: None: that of the checkpoint or of its base. A model in memory does not have one.
        revision: the branch, tag or commit of a Hub id.
        dtype: the dtype of the weights. None: that of a model in memory, otherwise float32.
        device: the device of the result. None: that of a model in memory, otherwise the CPU.

    Raises:
        CheckpointError: the model is not recognised, or its logits differ from those of plain transformers.
    """
    source, state = _read(model, revision)
    tokenizer = _tokenizer(model, tokenizer, revision)
    return _bridge(source, state, tokenizer, dtype or source.dtype).to(
        str(device or source.device), print_details=False
    )


def load_hooked(
    model: Model,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Any:
    """Load `model` as a `HookedTransformer`, which TransformerLens 3 has and TransformerLens 4 does not.

    Arguments and errors are those of `load_bridge`. `pip install "transformer-lens<4"` installs TransformerLens 3. With
    rotary positions, the loaded model takes at most 2,048 tokens, because TransformerLens keeps a mask of positions² in
    each layer. What `load_bridge` returns takes as many tokens as the model itself.

    Raises:
        ImportError: TransformerLens 4 is installed, which has no `HookedTransformer`.
    """
    source, state = _read(model, revision)
    tokenizer = _tokenizer(model, tokenizer, revision)
    return _hooked(source, state, tokenizer, dtype or source.dtype).to(
        str(device or source.device), print_details=False
    )


def load_hooked_blocks(
    model: str | Path | BlocksForCausalLM,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> HookedBlocks:
    """Load a model of `finetune.blocks` with the hook names of `HookedTransformer`, in TransformerLens 3 or 4.

    Args:
        model: a directory, a Hub id, or a model in memory.
        tokenizer: None: that of the checkpoint. A model in memory does not have one.
        revision: the branch, tag or commit of a Hub id.
        dtype: the dtype of the weights. None: that of a model in memory, otherwise float32.
        device: the device of the result. None: that of a model in memory, otherwise the CPU.

    Raises:
        CheckpointError: the model does not exist, cannot be read, or has another architecture; or its logits differ
            from those of `model`.
    """
    source = load(model, revision) if isinstance(model, str | Path) else unwrapped(model)
    if not isinstance(source, BlocksForCausalLM):
        raise CheckpointError(
            f"{source.name_or_path or 'The model'} is a {type(source).__name__}, not a model of finetune.blocks: "
            "use load_bridge."
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
    """Load an LN-free `model` in Identity form, or an ordinary one unchanged.

    Arguments and errors are those of `load_bridge`.
    """
    source, state = _read(model, revision)
    return _transformers(source, state, dtype or source.dtype, device or source.device)


def load_nnsight(
    model: Model,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    *,
    hooked: bool = False,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> LanguageModel | NNsight:
    """Load `model` as an nnsight `LanguageModel` over what `load_transformers` returns, with its module paths.

    If `hooked`, return what `load_hooked` returns, wrapped in `NNsight`, with the module paths of TransformerLens 3.
    Other arguments and errors are those of `load_bridge` and `load_hooked`.

    Raises:
        CheckpointError: also if a `LanguageModel` has no tokenizer.
    """
    source, state = _read(model, revision)
    tokenizer = _tokenizer(model, tokenizer, revision)
    dtype, device = dtype or source.dtype, device or source.device
    if hooked:
        return NNsight(_hooked(source, state, tokenizer, dtype).to(str(device), print_details=False))
    if tokenizer is None:
        raise CheckpointError("nnsight's LanguageModel requires a tokenizer. Pass it together with the model.")
    with warnings.catch_warnings():
        # It will be renamed to TransformersModel; until then, this is its name.
        warnings.filterwarnings("ignore", "LanguageModel is deprecated")
        made = _transformers(source, state, dtype, device)
        return LanguageModel(made, tokenizer=with_padding(tokenizer, source.config.vocab_size))


def load_trio(
    original: Model,
    control: Model | None,
    ln_free: Model,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    *,
    revision: str | None = None,
    tool: Tool = "bridge",
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Load the models that the analyses compare, under the keys `original`, `control` (unless None) and `ln_free`.

    In a family with LayerNorm, the weights that write to the residual stream are centred in all models, so that its
    mean is zero. No logits depend on it. For RMSNorm, which reads the mean, nothing is centred. `revision` is
    that of the original. If the vocabularies differ in size, for example because one is padded, only the shared ids are
    kept. `tool` says whether to load them as `load_bridge` or as `load_hooked` does; other arguments and errors are
    theirs.

    Raises:
        CheckpointError: `ln_free` has live norms, or another model has none; families, sizes or tokenizers differ;
            or an error of `load_bridge`, with the name of the model.
    """
    models = {"original": original, "control": control, "ln_free": ln_free}
    sources: dict[str, tuple[PreTrainedModel, NormState]] = {}
    tokenizers: dict[str, PreTrainedTokenizerBase | None] = {}
    family = None
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
            raise CheckpointError(f"{name} must be a model {'without' if name == 'ln_free' else 'with'} live norms.")
        if family not in (None, family_of(source)):
            raise CheckpointError(
                f"{name} is a {type(source).__name__}, unlike the original. All models must be of one family."
            )
        family = family_of(source)
        sources[name], tokenizers[name] = (source, state), its_tokenizer
    shared = _share_vocabulary({name: source for name, (source, _) in sources.items()}, tokenizers)
    trio: dict[str, Any] = {}
    for name in list(sources):
        source, state = sources.pop(name)  # frees it before the others are converted
        if source.config.vocab_size > shared:
            source = copy.deepcopy(source)
            source.resize_token_embeddings(shared)
        make = _hooked if tool == "hooked" else _bridge
        made = make(source, state, tokenizers[name], dtype or source.dtype, centre=family_of(source).style.centred)
        trio[name] = made.to(str(device or source.device), print_details=False)
    check_alike(trio)
    return trio


def check_alike(models: Mapping[str, Any]) -> None:
    """Check that loaded models can be compared part by part.

    Raises:
        CheckpointError: two of them differ in layers, widths or vocabulary. The message says in which.
    """
    (first, reference), *others = models.items()
    for name, model in others:
        differ = [
            f"{word} ({getattr(model.cfg, field)} against {getattr(reference.cfg, field)})"
            for field, word in _SHAPES.items()
            if getattr(model.cfg, field, None) != getattr(reference.cfg, field, None)
        ]
        if differ:
            raise CheckpointError(
                f"{name} differs from {first} in {', '.join(differ)}. Compare models of one architecture and size."
            )


def _share_vocabulary(sources: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> int:
    """Return how many token ids the models share, and check that these mean the same in all models.

    Raises:
        CheckpointError: an id does not stand for the same token as in the original.
    """
    sizes = {name: source.config.vocab_size for name, source in sources.items()}
    shared = min(sizes.values())
    known = {name: tokenizer for name, tokenizer in tokenizers.items() if tokenizer is not None}
    (first, reference), *others = list(known.items()) or [("", None)]
    for name, tokenizer in others:
        if tokenizer is reference:
            continue
        ids = list(range(min(shared, len(reference), len(tokenizer))))
        pairs = zip(ids, *(made.convert_ids_to_tokens(ids) for made in (tokenizer, reference)), strict=True)
        if different := [pair for pair in pairs if pair[1] != pair[2]]:
            token, here, there = different[0]
            raise CheckpointError(
                f"{name} has a different tokenizer from {first}: {len(different):,} of {len(ids):,} tokens differ, "
                f"such as {token}, which is {here!r} instead of {there!r}."
            )
    if max(sizes.values()) > shared:
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        warnings.warn(
            f"The vocabularies differ in size ({listed}). The first {shared:,} tokens are compared.", stacklevel=3
        )
    return shared


def _read(model: Model, revision: str | None) -> tuple[PreTrainedModel, NormState]:
    """Return the plain model and the state of its norms."""
    source: Any = load(model, revision) if isinstance(model, str | Path) else unwrapped(model)
    if isinstance(source, BlocksForCausalLM):
        raise CheckpointError(
            f"{source.name_or_path or 'The model'} is a model of finetune.blocks. Use analysis.load_hooked_blocks."
        )
    state = norm_state(source)
    published = None if isinstance(model, nn.Module) else PUBLISHED.get(str(model))
    if published is not None and (published.format is None) != (state == "live"):
        raise CheckpointError(f"{model} has {state} norms, but its format must be {published.format}.")
    return source, state


def _tokenizer(
    model: Model, tokenizer: str | Path | PreTrainedTokenizerBase | None, revision: str | None
) -> PreTrainedTokenizerBase | None:
    """Return the given tokenizer, else that of the checkpoint or its base, else None."""
    if tokenizer is not None or isinstance(model, nn.Module):
        return tokenizer_of(tokenizer)
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
    centre: bool = False,
) -> Any:
    return _finish(to_hooked(source, state, dtype, centre), source, tokenizer, dtype)


def _bridge(
    source: PreTrainedModel,
    state: NormState,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    centre: bool = False,
) -> TransformerBridge:
    if isinstance(source, GPT2LMHeadModel):
        return _finish(to_native_bridge(source, state, dtype, centre), source, tokenizer, dtype)
    folded: Any = to_unit_gain(source) if state == "live" else to_identity(source)
    if centre:
        centre_writing(folded)
    folded = folded.to(dtype).eval()
    folded.set_attn_implementation("eager")  # other implementations do not compute attention probabilities
    name = source.config.name_or_path or source.config.model_type
    bridge = build_bridge_from_module(folded, type(source).__name__, hf_config=folded.config, model_name=name)
    for module in bridge.modules():
        if isinstance(module, NormalizationBridge):
            module.use_native_layernorm_autograd = True  # its own arithmetic does not support nn.Identity
    for field, value in normalization(source, state).items():
        setattr(bridge.cfg, field, value)
    return _finish(bridge, source, tokenizer, dtype)


def _finish(made: Any, source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype) -> Any:
    """Set the tokenizer of `made`, check `made`, and return it."""
    made = taking_texts(made)
    if tokenizer is not None:
        made.take_tokenizer(tokenizer)
    _check(made, source, dtype)
    return made.eval()


@torch.no_grad()
def _check(logits: Callable[[Tensor], Tensor], source: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raise CheckpointError unless `logits` of a few tokens are those of `source`."""
    length = min(16, source.config.max_position_embeddings)
    tokens = torch.linspace(0, source.config.vocab_size - 1, length, device=source.device).long()[None]
    training = source.training
    expected, found = source.eval()(tokens).logits.double(), logits(tokens).double()
    source.train(training)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    tolerance = max(_TOLERANCE[dtype], _TOLERANCE[source.dtype])
    if not error <= tolerance:
        raise CheckpointError(
            f"The loaded model's logits differ from those of plain transformers by {error:.2g} of the largest, more "
            f"than {tolerance:g}, the tolerance of {dtype}. These weights cannot be used in this tool."
        )
