"""What a run was started with: recipe, model and text. Resuming it with anything else is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from finetune.checkpoints import to_disk
from finetune.errors import NolnError
from finetune.recipe import Text, Training
from finetune.run_directory import write
from finetune.text import Blocks, StreamedBlocks, TextSplits
from finetune.text.sources import path_of

_FREE = {
    *("name", "max_rise", "max_outlier", "log_every", "save_every", "report_to", "push_to_hub"),
    *("also", "control", "control_from"),
    *("export_format", "model", "revision", "tokenizer", "text.source", "text.held_out"),
}
"""Recipe fields that may change: they do not affect the weights, or they name something that is compared itself."""
_MOST_TOKENS = 2**26
"""If a text has more tokens than this, only evenly spaced blocks of it are compared."""


class ChangedError(NolnError):
    """The recipe, model or text differs from what the run was started with; the message says how."""


def check(directory: Path, recipe: Training, model: PreTrainedModel | None, text: TextSplits, anyway: bool) -> None:
    """Check that a run continues with what it was started with. Record it if the run is new, or if `anyway`.

    Raises:
        ChangedError: something differs, or the record is missing or unreadable, and `anyway` is False.
    """
    path = directory / "checkpoints/begun_with.json"
    now = {"recipe": _flat(recipe), "model": _model(model), "text": _text(text, recipe.text)}
    try:
        then = json.loads(path.read_text()) if path.exists() else None
        changes = _changes(then, now) if then is not None else []
    except (ValueError, LookupError, TypeError, AttributeError):
        changes = [f"{path} cannot be read"]
    if not path.exists() and any(directory.glob("checkpoints/*/checkpoint-*/files.json")):
        changes = [f"{path} is missing"]
    if changes and not anyway:
        raise ChangedError(
            f"{directory} no longer matches what it was started with: {'; '.join(changes)}. Restore that, start "
            "another run, or continue regardless with --anyway (in Python, anyway=True)."
        )
    PartialState().wait_for_everyone()  # all processes have read the record
    if PartialState().is_main_process and (changes or not path.exists()):
        if changes:
            tqdm.write(f"warning: continuing although the run has changed since it was started: {'; '.join(changes)}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(now, indent=1))
        to_disk(path)


def _changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe what differs. Fields that only one of the two versions has are ignored."""
    now = json.loads(json.dumps(now))
    fields = now["recipe"].keys() & then["recipe"].keys()
    changes = [
        f"{field} was {then['recipe'][field]} and is {now['recipe'][field]}"
        for field in sorted(fields)
        if then["recipe"][field] != now["recipe"][field]
    ]
    if now["model"] is not None and then["model"] is not None:
        before, config = then["model"]["config"], now["model"]["config"]
        changes += [
            f"the model's {field} was {before[field]} and is {config[field]}"
            for field in sorted(config.keys() & before.keys())
            if before[field] != config[field]
        ]
        if then["model"]["weights"] != now["model"]["weights"]:
            changes.append("the model's weights have changed")
    for part, what in {"train": "the training text", "held_out": "the held-out text"}.items():
        (size, digest), (new_size, new_digest) = then["text"][part], now["text"][part]
        if size != new_size:
            changes.append(f"{what} was {size} and is {new_size}")
        elif digest != new_digest:
            changes.append(f"{what} has changed")
    return changes


def _flat(recipe: Training) -> dict[str, Any]:
    """Return the fields that affect the weights, by dotted name."""

    def flatten(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        parts = (flatten(part, f"{name}.{key}".lstrip(".")) for key, part in value.items())
        return {key: value for part in parts for key, value in part.items()}

    fields = flatten(pydantic.TypeAdapter(type(recipe)).dump_python(recipe, mode="json"), "")
    return {name: value for name, value in fields.items() if name not in _FREE}


def _model(model: PreTrainedModel | None) -> dict[str, Any] | None:
    """Return a digest of a model's weights, and the fields of its config that affect what it computes."""
    if model is None:
        return None
    digest = hashlib.blake2b()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().float().contiguous().numpy().data)
    config = json.loads(json.dumps(model.config.to_dict(), default=str))
    others = ("dtype", "torch_dtype", "architectures", "transformers_version", "use_cache", "name_or_path")
    config = {name: value for name, value in config.items() if name not in others and not name.startswith("_")}
    return {"weights": digest.hexdigest(), "config": config}


def _text(text: TextSplits, source: Text) -> dict[str, tuple[str, str]]:
    """Return the size of each part of a text, in words, and a digest. For a stream, only the size of its files."""
    if isinstance(text.train, StreamedBlocks):
        path = path_of(source.source)
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        train = f"{sum(file.stat().st_size for file in files):,} bytes", ""
    else:
        train = _blocks(text.train)
    return {"train": train, "held_out": _blocks(text.held_out)}


def _blocks(blocks: Blocks) -> tuple[str, str]:
    digest = hashlib.blake2b()
    count = min(len(blocks), max(1, _MOST_TOKENS // blocks.context))
    rows = np.linspace(0, len(blocks) - 1, count).round().astype(int)
    for start in range(0, count, 4096):  # in chunks: the tokens may not fit into memory
        digest.update(np.ascontiguousarray(blocks.blocks[rows[start : start + 4096]], np.uint32).data)
    return f"{blocks.blocks.size:,} tokens", digest.hexdigest()
