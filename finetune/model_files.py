"""Checks of a model's files before they are loaded: their size, format and location, and whether they match."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from finetune.errors import CheckpointError

_LARGEST_JSON = 2**26
"""Bytes. The index of the largest models has about 200 thousand."""
_MOST_LAYERS = 1000
_WITHOUT_PLACE = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias|rotary_emb\.inv_freq))"  # buffers, not weights
)


@contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
    """Turn any exception of the libraries into a CheckpointError that says what could not be read, and what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        if len(message) > 300:
            message = f"{message[:300]}…"
        raise CheckpointError(f"{what} cannot be read: {type(error).__name__}: {message}. {remedy}") from error


def read_json(path: Path, name: str | Path) -> dict[str, Any]:
    """Return the fields of a JSON file of the model `name`.

    Raises:
        CheckpointError: the file is missing, too large, or not JSON.
    """
    with reading(f"The {path.name} of {name}", "Copy the file again from the model's source."):
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise CheckpointError(
                f"The {path.name} of {name} has {size:,} bytes, too many for the {path.name} of a model."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except RecursionError:
            content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"The {path.name} of {name} cannot be read: it is not an object with fields.")
    return content


def check_config(config: dict[str, Any], name: str | Path) -> None:
    """Check that the config of the model `name` has a valid number of layers, and no quantisation.

    Raises:
        CheckpointError: the number of layers is invalid, or the model is quantised.
    """
    for field in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(layers := config.get(field), int) and not 1 <= layers <= _MOST_LAYERS:
            raise CheckpointError(f"The config.json of {name} is invalid: {field} is {layers}. Correct that field.")
    if (quantised := config.get("quantization_config")) is not None:
        how = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise CheckpointError(
            f"{name} is quantised{f' ({how})' if how else ''}, according to quantization_config in its config.json. "
            "Quantised weights cannot be fine-tuned. Pass the model that it was made from, or its dequantised weights."
        )


def shapes_of(config: Any, kind: Any, name: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a model of class `kind` with this config, created on the meta device.

    Raises:
        CheckpointError: the config is invalid. The message says what is wrong with the config.json of the model `name`.
    """
    with reading(f"The config.json of {name}", "Correct that field."):
        for field in ("hidden_size", "num_attention_heads", "vocab_size"):
            if (size := getattr(config, field)) < 1:
                raise ValueError(f"{config.attribute_map.get(field, field)} is {size}")
        with torch.device("meta"):
            return {key: tuple(weight.shape) for key, weight in kind(config).state_dict().items()}


def check_weights(directory: Path, name: str | Path, kind: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check the weight files of the model `name`, whose class is `kind` and whose weights should have `shapes`.

    Raises:
        CheckpointError: there are no safetensors files; or a file is missing, unreadable, or in another directory
            according to the index; or a weight has another shape.
    """
    files = [directory / "model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if not files[0].exists() and index.exists():
        shards = read_json(index, name).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise CheckpointError(f"The {index.name} of {name} has no weight_map of file names. Copy it again.")
        for shard in sorted(set(shards.values())):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(f"The {index.name} of {name} names {shard!r}, which is not a file beside it.")
        files = [directory / shard for shard in sorted(set(shards.values()))]
    elif not files[0].exists():
        raise CheckpointError(f"{name} has no model.safetensors{_instead(directory, kind.__name__)}")
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{name} lacks {file.name}. Copy it from the model's source.")
        try:
            with safe_open(file, "pt") as weights:
                found = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"The weights of {name} cannot be read: {file.name} is damaged or truncated ({error}). Copy it again."
            ) from error
        for key, shape in found.items():
            expected = shapes.get(key) or shapes.get(f"{kind.base_model_prefix}.{key}")
            if expected not in (None, shape):
                raise CheckpointError(
                    f"The config and the weights of {name} do not match: {key} is {_by(expected)} according to "
                    f"config.json, but {_by(shape)} in {file.name}. Correct one of them."
                )


def _by(shape: Any) -> str:
    return " x ".join(map(str, shape))


def _instead(directory: Path, architecture: str) -> str:
    """Return the rest of a sentence that says that there are no safetensors: what there is instead, and what to do."""
    if any(directory.glob("pytorch_model*.bin")):
        return (
            ", only pytorch_model.bin, a pickle, which can run arbitrary code when it is loaded. If you trust it, "
            f'convert it with these two lines: model = transformers.{architecture}.from_pretrained("{directory}", '
            f'use_safetensors=False); model.save_pretrained("{directory}")'
        )
    if (directory / "adapter_config.json").exists():
        return ", only adapters. Merge them into their base model (merge_and_unload), and save the result."
    return ". Save the model with save_pretrained."


def check_loaded(info: dict[str, Any], name: str | Path, tied: bool) -> None:
    """Check what transformers reports about the weights that it loaded.

    Raises:
        CheckpointError: weights are missing, or do not belong to the model.
    """
    problems = []
    if missing := sorted(info["missing_keys"]):
        problems.append(f"it lacks {_some(missing)}")
    heads = {"lm_head.weight", "embed_out.weight"} if tied else set()
    surplus = [key for key in info["unexpected_keys"] if not _WITHOUT_PLACE.fullmatch(key) and key not in heads]
    if surplus:
        problems.append(f"it contains {_some(sorted(surplus))} that a model with its config.json does not have")
    if problems:
        raise CheckpointError(
            f"The config and the weights of {name} do not match: {'; '.join(problems)}. Correct one of them."
        )


def _some(names: list[str]) -> str:
    return f"{len(names)} weights ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
