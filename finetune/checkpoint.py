"""Loading and saving models: names, the Hub, configs, weights and tokenizers. Nothing here depends on norms.

Only safetensors and GGUF are read, and no remote code is run. `folding` checks the norms of checkpoints.
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
    """Write `model`, its tokenizer and its model card to a new directory, completely or not at all.

    Raises:
        CheckpointError: the directory exists or cannot be written; or as in `folding.check_can_be_saved`.
    """
    directory = names.expanded(directory)
    if directory.exists():
        raise CheckpointError(f"{directory} already exists and is not overwritten. Move it, or choose another name.")
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
        raise CheckpointError(
            f"{directory} cannot be written: {error}. Free some space, or choose another directory."
        ) from error


def load_config(name_or_path: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """Read the config of a model, given by a short name, a directory, a GGUF file or a Hub id. Downloads no weights.

    Raises:
        CheckpointError: the model does not exist or cannot be read, or neither `families` nor `blocks` supports its
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
    """Load a model of a supported family, LN-free or not, or of `finetune.blocks`, on the CPU in evaluation mode.

    It is given by a short name (`finetune.names`), a directory, a GGUF file or a Hub id.

    Only safetensors and GGUF are read, and no remote code is run. A local directory needs no network. The weights are
    in float32 unless `dtype` is given, whatever the dtype of the files.

    Raises:
        CheckpointError: the model does not exist, files are missing or corrupt, or the architecture is not supported;
            or as in `folding.norm_state`.
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
    folding.norm_state(model)  # raises if the norms are in no valid state
    return model


def load_tokenizer(name_or_path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a model's directory or GGUF file. For a published model without one, load its base's.

    Raises:
        NoTokenizerError: there is no tokenizer.
        CheckpointError: the model does not exist, or its tokenizer cannot be read.
    """
    if file := gguf_of(name_or_path, revision):
        return gguf_file.load_tokenizer(file)
    directory = _local(name_or_path, revision, _CONFIG_FILES + _TOKENIZER_FILES)
    if not (any(any(directory.glob(file)) for file in _VOCABULARIES) or _needs_no_vocabulary(directory)):
        if published := names.PUBLISHED.get(str(name_or_path)):
            return load_tokenizer(published.base)
        raise NoTokenizerError(f"{name_or_path} has no tokenizer. Load that of the model it was made from.")
    with model_files.reading(f"The tokenizer of {name_or_path}", "Copy its files again from the model's source."):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def tokenizer_of(tokenizer: str | Path | PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """Return a tokenizer that is given as an object or by name. None for None.

    Raises:
        NoTokenizerError, CheckpointError: as in `load_tokenizer`, or `tokenizer` is something else.
    """
    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if isinstance(tokenizer, str | Path):
        return load_tokenizer(tokenizer)
    remedy = "PreTrainedTokenizerFast(tokenizer_object=...) wraps a Tokenizer" if hasattr(tokenizer, "to_str") else ""
    raise CheckpointError(
        f"The tokenizer is a {type(tokenizer).__name__}. Pass a name, a directory, or a tokenizer of transformers"
        f"{remedy and f' ({remedy})'}."
    )


def _needs_no_vocabulary(directory: Path) -> bool:
    """Return whether a tokenizer's class needs no vocabulary file, like ByT5's, whose tokens are bytes."""
    try:
        name = json.loads((directory / "tokenizer_config.json").read_bytes())["tokenizer_class"]
        kind = getattr(transformers, name)
    except Exception:  # the file is missing or invalid, or the class or its requirements do not exist
        return False
    return isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase) and not kind.vocab_files_names


def gguf_of(name_or_path: str | Path, revision: str | None = None) -> Path | None:
    """Return the GGUF file that a name stands for, or None if it stands for something else.

    Raises:
        CheckpointError: a revision of a file is requested.
    """
    path = names.expanded(names.resolve(name_or_path)[0])
    if not gguf_file.is_gguf(path):
        return None
    if revision is not None:
        raise CheckpointError(f"{name_or_path} is a file, which has no revision {revision}.")
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' table of weights that do not match, which our error message summarises."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars for files that are read and written in a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _local(name_or_path: str | Path, revision: str | None, files: list[str]) -> Path:
    """Return the directory of a short name, a path, or a Hub id. Its `files` are downloaded if they are not cached."""
    name, revision = names.resolve(name_or_path, revision)
    if (directory := names.expanded(name)).is_dir():
        if revision is not None:
            raise CheckpointError(f"{name_or_path} is a directory, which has no revision {revision}.")
        return directory
    if directory.exists():
        raise CheckpointError(f"{name_or_path} is a file. Pass the directory of a model, or a GGUF file.")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{name_or_path} is not a local directory, and was not available from the Hub: {error}"
        ) from error
