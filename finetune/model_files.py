"""What is looked at in the files of a model before they are read: size, kind, and that they lie in its directory."""

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
"""Bytes; the index of the largest models takes some 200 thousand."""
_MOST_LAYERS = 1000
_WITHOUT_PLACE = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias|rotary_emb\.inv_freq))"  # no weights: buffers
)


@contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever the libraries raise into a CheckpointError that says what could not be read, and what to do."""
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
    """Return the fields in a file of the model called `name`.

    Raises:
        CheckpointError: it is missing, too large to be what it is called, or no JSON.
    """
    with reading(f"The {path.name} of {name}", "Copy the file again from the model's source."):
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise CheckpointError(
                f"The {path.name} of {name} has {size:,} bytes: it is not the {path.name} of a model."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except RecursionError:
            content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"The {path.name} of {name} cannot be read: it is not an object with fields.")
    return content


def check_config(config: dict[str, Any], name: str | Path) -> None:
    """Check that the config of the model called `name` is of weights that can be trained, and of a depth that there is.

    Raises:
        CheckpointError: it is not.
    """
    for field in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(layers := config.get(field), int) and not 1 <= layers <= _MOST_LAYERS:
            raise CheckpointError(f"The config.json of {name} is invalid: {field} is {layers}. Correct that field.")
    if (quantised := config.get("quantization_config")) is not None:
        how = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise CheckpointError(
            f"{name} is quantised{f' ({how})' if how else ''}, says quantization_config in its config.json, and such "
            "weights cannot be fine-tuned: pass the model that it was made from, or its dequantised weights."
        )


def shapes_of(config: Any, kind: Any, name: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a model with a config, which is made on no device.

    Raises:
        CheckpointError: it cannot be made; the message says what is wrong with the config.json of the model `name`.
    """
    with reading(f"The config.json of {name}", "Correct that field."):
        for field in ("hidden_size", "num_attention_heads", "vocab_size"):
            if (size := getattr(config, field)) < 1:
                raise ValueError(f"{config.attribute_map.get(field, field)} is {size}")
        with torch.device("meta"):
            return {key: tuple(weight.shape) for key, weight in kind(config).state_dict().items()}


def check_weights(directory: Path, name: str | Path, kind: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check the files of weights of the model called `name`, a `kind` whose weights have `shapes`.

    Raises:
        CheckpointError: there are no safetensors, or one is missing, unreadable, or said to be in another directory, or
            a weight is of another shape.
    """
    files = [directory / "model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if not files[0].exists() and index.exists():
        shards = read_json(index, name).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise CheckpointError(f"The {index.name} of {name} has no weight_map of names: copy it anew.")
        for shard in sorted(set(shards.values())):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(f"The {index.name} of {name} names {shard!r}, which is not a file beside it.")
        files = [directory / shard for shard in sorted(set(shards.values()))]
    elif not files[0].exists():
        raise CheckpointError(f"{name} holds no model.safetensors{_instead(directory, kind.__name__)}")
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{name} lacks {file.name}: copy it from the model's source.")
        try:
            with safe_open(file, "pt") as weights:
                found = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"The weights of {name} cannot be read: {file.name} is damaged or cut off ({error}). Copy it anew."
            ) from error
        for key, shape in found.items():
            expected = shapes.get(key) or shapes.get(f"{kind.base_model_prefix}.{key}")
            if expected not in (None, shape):
                raise CheckpointError(
                    f"The config and the weights of {name} do not match: by its config.json {key} is {_by(expected)}, "
                    f"but in {file.name} it is {_by(shape)}. Correct one of them."
                )


def _by(shape: Any) -> str:
    return " x ".join(map(str, shape))


def _instead(directory: Path, architecture: str) -> str:
    """Return how a sentence goes on that says that there are no safetensors, by what there is."""
    if any(directory.glob("pytorch_model*.bin")):
        return (
            ", only pytorch_model.bin, a pickle, which may run any code when it is read. Where you trust it, these "
            f'two lines convert it: model = transformers.{architecture}.from_pretrained("{directory}", '
            f'use_safetensors=False); model.save_pretrained("{directory}")'
        )
    if (directory / "adapter_config.json").exists():
        return ", only adapters: merge them with the model that they are of (merge_and_unload), and save the result."
    return ": save the model with save_pretrained."


def check_loaded(info: dict[str, Any], name: str | Path, tied: bool) -> None:
    """Check what transformers says of the weights that it has read.

    Raises:
        CheckpointError: some are missing, or have no place in the model.
    """
    problems = []
    if missing := sorted(info["missing_keys"]):
        problems.append(f"it lacks {_some(missing)}")
    heads = {"lm_head.weight", "embed_out.weight"} if tied else set()
    surplus = [key for key in info["unexpected_keys"] if not _WITHOUT_PLACE.fullmatch(key) and key not in heads]
    if surplus:
        problems.append(f"it holds {_some(sorted(surplus))} that the model of its config.json has no place for")
    if problems:
        raise CheckpointError(
            f"The config and the weights of {name} do not match: {'; '.join(problems)}. Correct one of them."
        )


def _some(names: list[str]) -> str:
    return f"{len(names)} weights ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
