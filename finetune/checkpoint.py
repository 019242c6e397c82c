"""Reading and writing models: names, the Hub, configs, weights, tokenizers. Nothing here knows what a norm is.

Only safetensors and GGUF are read, and no remote code is run. What a checkpoint is checked for, `folding` says.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from finetune import families, folding, gguf_file, model_files, names
from finetune.blocks import BlocksConfig, BlocksForCausalLM
from finetune.errors import CheckpointError, NoTokenizerError
from finetune.folding import convert, linear_maps, norm_state, to_identity  # noqa: F401  their former home

_CONFIG_FILES = ["config.json", "generation_config.json"]
_WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
_VOCABULARIES = ["tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "tekken.json"]
_TOKENIZER_FILES = [
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("merges.txt", *_VOCABULARIES),
]


def save(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: str | None = None,
) -> None:
    """Write `model`, its tokenizer and its model card as a directory, whole or not at all.

    Raises:
        CheckpointError: the directory exists or cannot be written, or what `folding.check_can_be_saved` raises.
    """
    directory = names.expanded(directory)
    if directory.exists():
        raise CheckpointError(f"{directory} already exists and is not overwritten: move it away or name another.")
    folding.check_can_be_saved(model)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
            partial = Path(temporary) / directory.name
            with no_progress_bars():
                model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            if card is not None:
                (partial / "README.md").write_text(card, encoding="utf-8")
            partial.rename(directory)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be written: {error}. Make room, or name another.") from error


def load_config(name_or_path: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """Read the config of a model: a short name, a directory, a GGUF file or a Hub id; no weights are fetched.

    Raises:
        CheckpointError: the model does not exist or cannot be read, or neither `families` nor `blocks` has its
            architecture.
    """
    if file := gguf_of(name_or_path, revision):
        return gguf_file.load_config(file)
    directory = _local(name_or_path, revision, _CONFIG_FILES)
    config = model_files.read_json(directory / "config.json", name_or_path)
    model_type = config.get("model_type")
    invalid = model_files.reading(f"The config.json of {name_or_path}", "Correct that field.")
    if model_type == BlocksConfig.model_type:
        with invalid:
            return BlocksConfig.from_dict(config)
    family = families.FAMILIES.get(model_type) if isinstance(model_type, str) else None
    architectures = config.get("architectures") or [family and family.architecture]
    if family is None or not isinstance(architectures, list) or family.architecture not in architectures:
        named = ", ".join(map(str, architectures)) if isinstance(architectures, list) else architectures
        kind = f"{named} of type {model_type}"
        raise CheckpointError(f"{name_or_path} is a {kind}{families.why_not(SimpleNamespace(**config))}")
    model_files.check_config(config, name_or_path)
    config_class: Any = family.model_class.config_class
    with invalid:
        made: PreTrainedConfig = config_class.from_dict(config)
    return made


def load(name_or_path: str | Path, revision: str | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a model of a known family, LN-free or not, or one of `finetune.blocks`, on the CPU, for evaluation.

    It is named by a short name (`finetune.names`), a directory, a GGUF file or a Hub id.

    Only safetensors and GGUF are read, and no remote code is run. From a directory nothing is looked up. The weights
    are float32 unless `dtype` says otherwise, whatever the files hold.

    Raises:
        CheckpointError: nothing there, files missing or corrupt, another architecture, or what
            `folding.norm_state` raises.
    """
    if file := gguf_of(name_or_path, revision):
        with no_progress_bars(), _quiet():
            model = gguf_file.load(file, dtype)
        folding.norm_state(model)
        return model
    config = load_config(name_or_path, revision)
    blocks = isinstance(config, BlocksConfig)
    kind: Any = BlocksForCausalLM if blocks else families.family_of(config, str(name_or_path)).model_class
    directory = _local(name_or_path, revision, _CONFIG_FILES + _WEIGHT_FILES)
    shapes = {} if blocks else model_files.shapes_of(config, kind, name_or_path)
    model_files.check_weights(directory, name_or_path, kind, shapes)
    info: dict[str, Any]
    remedy = "Copy the files again from the model's source."
    with model_files.reading(f"The weights of {name_or_path}", remedy), no_progress_bars(), _quiet():
        model, info = kind.from_pretrained(
            directory,
            dtype=dtype or torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    model_files.check_loaded(info, name_or_path, getattr(config, "tie_word_embeddings", False))
    folding.norm_state(model)  # raises where it is neither one thing nor the other
    return model


def load_tokenizer(name_or_path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model or in its GGUF file; for a published model without, its base's.

    Raises:
        NoTokenizerError: no tokenizer in it.
        CheckpointError: nothing there.
    """
    if file := gguf_of(name_or_path, revision):
        return gguf_file.load_tokenizer(file)
    directory = _local(name_or_path, revision, _CONFIG_FILES + _TOKENIZER_FILES)
    if not (any(any(directory.glob(file)) for file in _VOCABULARIES) or _needs_no_vocabulary(directory)):
        if published := names.PUBLISHED.get(str(name_or_path)):
            return load_tokenizer(published.base)
        raise NoTokenizerError(f"{name_or_path} has no tokenizer: load that of the model it was made from.")
    with model_files.reading(f"The tokenizer of {name_or_path}", "Copy its files again from the model's source."):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def tokenizer_of(tokenizer: str | Path | PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that is given, which may be named; None for None.

    Raises:
        NoTokenizerError, CheckpointError: as `load_tokenizer`, or it is something else.
    """
    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if isinstance(tokenizer, str | Path):
        return load_tokenizer(tokenizer)
    remedy = (
        "PreTrainedTokenizerFast(tokenizer_object=...) makes one of a Tokenizer" if hasattr(tokenizer, "to_str") else ""
    )
    raise CheckpointError(
        f"The tokenizer is a {type(tokenizer).__name__}: pass a name, a directory, or a tokenizer of transformers"
        f"{remedy and f' ({remedy})'}."
    )


def _needs_no_vocabulary(directory: Path) -> bool:
    """Return whether a tokenizer is of a class that has a vocabulary without a file, as ByT5's, of bytes."""
    try:
        name = json.loads((directory / "tokenizer_config.json").read_bytes())["tokenizer_class"]
        kind = getattr(transformers, name)
    except Exception:  # whatever is in the file, or missing for what it names
        return False
    return isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase) and not kind.vocab_files_names


def gguf_of(name_or_path: str | Path, revision: str | None = None) -> Path | None:
    """Return the GGUF file that a name stands for, or None if it stands for something else.

    Raises:
        CheckpointError: a revision of a file.
    """
    path = names.expanded(names.resolve(name_or_path)[0])
    if not gguf_file.is_gguf(path):
        return None
    if revision is not None:
        raise CheckpointError(f"{name_or_path} is a file, which has no revision {revision}.")
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' own table of what does not fit, which is said in a line."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars, of files that are read and written in a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _local(name_or_path: str | Path, revision: str | None, files: list[str]) -> Path:
    """Return the directory of a short name, a path, or a Hub id, whose `files` are downloaded if not cached."""
    name, revision = names.resolve(name_or_path, revision)
    if (directory := names.expanded(name)).is_dir():
        if revision is not None:
            raise CheckpointError(f"{name_or_path} is a directory, which has no revision {revision}.")
        return directory
    if directory.exists():
        raise CheckpointError(f"{name_or_path} is a file: name the directory of a model, or a GGUF file.")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{name_or_path} is not a directory here, and was not available from the Hub: {error}"
        ) from error
