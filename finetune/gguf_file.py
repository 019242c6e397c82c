"""A GGUF file, llama.cpp's format for a model -> the config, dequantised weights and tokenizer of transformers.

transformers reads the weights and the tokenizer. It ignores whatever it does not support, such as scaled rotary
positions, experts or biases, and would silently load a different model. Therefore this module builds the config itself,
from every key of the file's architecture, and refuses a key or tensor that is not used, by name.
"""

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import GgufConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune import families, model_files
from finetune.errors import CheckpointError, NoTokenizerError

_ROTARY = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
FIELDS: dict[str, dict[str, str]] = {
    "llama": _ROTARY,
    "qwen2": _ROTARY,
    "gemma2": _ROTARY
    | {
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "gpt2": {
        "block_count": "n_layer",
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.head_count_kv": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "vocab_size": "vocab_size",
    },
}
"""The config field of each key, by architecture. llama.cpp's name of an architecture is also its `model_type`."""

_OPTIONAL = {
    *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("rope.dimension_count", "rope.freq_base", "vocab_size"),
}
_WITHOUT_EFFECT: dict[str, set[Any]] = {
    "tensor_data_layout": {"Meta AI original pth"},
    "rope.scaling.type": {"none"},
    "attention.causal": {True},
    "expert_count": {0},
    "expert_used_count": {0},
}
_LAYERS_OF_GEMMA_27B = 46
_GPT2_SPLITS = {None, "default", "gpt-2", "gpt2"}
_DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""llama.cpp's names of the ways to split text before tokenising: GPT-2's, and GPT-2's with single digits."""


def is_gguf(path: Path) -> bool:
    """Return whether a path is a GGUF file, judging by its name or its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF"


def load_config(path: Path) -> PreTrainedConfig:
    """Return the config of the model in a GGUF file.

    Raises:
        CheckpointError: the package gguf is missing, the file is damaged, or its model is not supported.
    """
    metadata, shapes = _read(path)
    architecture = metadata.get("general.architecture")
    if architecture not in FIELDS:
        why = families.why_not(SimpleNamespace(model_type=architecture))
        raise CheckpointError(f"{path} is a model of type {architecture}{why.partition('. ')[0]}. {_supported()}")
    family = families.FAMILIES[architecture]
    if metadata.get("split.count", 1) != 1:
        raise CheckpointError(
            f"{path} is one of {metadata['split.count']} parts. Merge them with `gguf-split --merge`."
        )
    keys = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    keys = {key: value for key, value in keys.items() if f"{architecture}.{key}" in metadata}
    fields = FIELDS[architecture]
    refused = [key for key in keys if key not in fields and keys[key] not in _WITHOUT_EFFECT.get(key, ())]
    if refused:
        named = ", ".join(f"{key} {keys[key]}" for key in refused)
        raise CheckpointError(f"{path} has metadata that is not supported for a {family.architecture}: {named}.")
    if missing := sorted(fields.keys() - keys.keys() - _OPTIONAL):
        raise CheckpointError(f"{path} lacks {', '.join(f'{architecture}.{key}' for key in missing)}. {_ANEW}")
    config: dict[str, Any] = {}
    for key, field in fields.items():
        if key in keys and config.setdefault(field, keys[key]) != keys[key]:
            raise CheckpointError(f"{path} contradicts itself: {field} is {config[field]}, but {key} is {keys[key]}.")
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{path} lacks token_embd.weight. {_ANEW}")
    config["vocab_size"] = shapes["token_embd.weight"][0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    for kind in ("bos", "eos"):
        config[f"{kind}_token_id"] = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    config["pad_token_id"] = metadata.get("tokenizer.ggml.padding_token_id")
    if architecture == "gemma2":
        # Not in the file: llama.cpp, too, scales scores by the width of heads, but in the 27B model by d/heads.
        per_head = config["hidden_size"] // config["num_attention_heads"]
        is_27b = config["num_hidden_layers"] == _LAYERS_OF_GEMMA_27B
        config["query_pre_attn_scalar"] = per_head if is_27b else config["head_dim"]
    model_files.check_config(config, path)
    with model_files.reading(f"The metadata of {path}", _ANEW):
        config_class: Any = family.model_class.config_class
        made: PreTrainedConfig = config_class.from_dict(config)
    made.name_or_path = str(path)
    return made


def load(path: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the model in a GGUF file, dequantised, on the CPU.

    Raises:
        CheckpointError: as in `load_config`; or a tensor is missing, has another shape, or does not belong to the
            model.
    """
    config = load_config(path)
    kind: Any = families.family_of(config, str(path)).model_class
    expected = model_files.shapes_of(config, kind, path)
    _check_tensors(path, config, expected)
    with model_files.reading(f"The weights of {path}", _ANEW):
        packed: Any = kind.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
        )
        # Rebuild the model without any trace of quantisation, with which it could be neither trained nor saved.
        state = {name: weight.contiguous() for name, weight in packed.state_dict().items()}
        model: PreTrainedModel = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype or torch.float32
        )
    model.config.name_or_path = str(path)
    return model.eval()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a GGUF file.

    Raises:
        NoTokenizerError: the file has no tokenizer.
        CheckpointError: the tokenizer is damaged, or it splits text in a way that is not supported.
    """
    metadata, _ = _read(path)
    if not metadata.get("tokenizer.ggml.tokens"):
        raise NoTokenizerError(f"{path} has no tokenizer. Load that of the model it was made from.")
    with model_files.reading(f"The tokenizer of {path}", _ANEW):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        tokenizer.name_or_path = str(path)
        backend: Any = tokenizer.backend_tokenizer
        state = json.loads(backend.to_str())["pre_tokenizer"]
    split = metadata.get("tokenizer.ggml.pre")
    # transformers splits as GPT-2 does whenever it does not know the way.
    if state and state["type"] == "ByteLevel" and split not in _GPT2_SPLITS:
        if split not in _DIGIT_SPLITS:
            raise CheckpointError(
                f"The tokenizer of {path} splits text in a way that is not supported, {split}. Load the tokenizer of "
                "the model that the file was made from, and pass it together with the model."
            )
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


_ANEW = "Copy the file again from the model's source."


def _supported() -> str:
    return f"Types supported in GGUF files: {', '.join(FIELDS)}."


def _check_tensors(path: Path, config: PreTrainedConfig, expected: dict[str, tuple[int, ...]]) -> None:
    """Check that the file contains every weight of the model, and nothing else.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or does not belong to the model. The message names it.
    """
    import gguf

    (architecture,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    places = {
        names.get_name(name, try_suffixes=(".weight", ".bias")): shape
        for name, shape in expected.items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    found = _read(path)[1]
    problems = [f"it lacks {name}" for name in sorted(places.keys() - found.keys(), key=str)]
    problems += [f"{name} is not part of a {config.model_type} model" for name in sorted(found.keys() - places.keys())]
    problems += [
        f"{name} has the shape {found[name]} instead of {shape}"
        for name, shape in places.items()
        if name in found and found[name] not in (shape, shape[::-1])  # GPT-2's matrices are transposed in transformers
    ]
    if problems:
        more = f"; and {len(problems) - 3} more problems like these" if len(problems) > 3 else ""
        raise CheckpointError(f"The model in {path} is invalid: {'; '.join(problems[:3])}{more}.")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return the metadata of a GGUF file, with the length of each array in its place, and the shapes of its tensors."""
    status = path.stat()
    return _read_once(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1)  # reading a vocabulary takes seconds
def _read_once(path: Path, *_: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"{path} is a GGUF file, which requires the package gguf. Install it with `pip install 'noln[gguf]'`."
        ) from error
    with model_files.reading(f"The GGUF file {path}", _ANEW):
        reader = gguf.GGUFReader(path)
        metadata = {
            name: len(field.data) if field.types[0] == gguf.GGUFValueType.ARRAY else field.contents()
            for name, field in reader.fields.items()
        }
        shapes = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
    return metadata, shapes
