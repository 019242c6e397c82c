"""Anything in the files of a text or in a model's config: a result or one of our errors, and nothing half written."""

import gzip
import io
import json
import warnings
from itertools import islice

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from fuzzing import FUZZ, anything
from hypothesis import given
from hypothesis import strategies as st
from models import random_model

from finetune import checkpoint
from finetune.errors import NolnError
from finetune.recipe import Text
from finetune.text import load_text

LINES = [f"Chapter {i}. It was the best of times, it was “the worst” of times.\n" for i in range(20)]
ROWS = [{"text": line, "id": i, "meta": {"tags": [line]}} for i, line in enumerate(LINES)]


def _parquet() -> bytes:
    file = io.BytesIO()
    pd.DataFrame(ROWS).to_parquet(file)
    return file.getvalue()


CONTENTS = {
    ".txt": "".join(LINES).encode(),
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".parquet": _parquet(),
    ".bin": (np.arange(2000) % 290).astype(np.uint16).tobytes(),
}
TELLING = [
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\0",
    b"\xff",
    b"\n",
    b"[",
    b"{",
    b'"',
    b"\\ud800",
    b"PAR1",
    b"null",
    b"\x1f\x8b",
]


@st.composite
def files(draw) -> tuple[str, bytes]:
    """A file's ending and its bytes: any at all, or a good file's with a few changes."""
    ending = draw(st.sampled_from(sorted(CONTENTS)))
    content = bytearray(draw(st.binary(max_size=60)) if draw(st.integers(0, 4)) == 0 else CONTENTS[ending])
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        stop = start + draw(st.sampled_from([0, 1, 7, 100, len(content)]))
        content[start:stop] = draw(st.sampled_from(TELLING) | st.binary(max_size=9))
    if draw(st.booleans()) and ending != ".bin":
        content = bytearray(gzip.compress(content, mtime=0))
        ending += ".gz"
        if draw(st.booleans()):
            del content[draw(st.integers(0, len(content))) :]
    return ending, bytes(content)


@FUZZ
@given(files(), st.booleans())
def test_a_file_is_a_text_or_an_error(tmp_path_factory, tokenizer, file, streaming):
    ending, content = file
    cache = tmp_path_factory.getbasetemp() / "fuzzed-cache"
    path = tmp_path_factory.getbasetemp() / f"fuzzed{ending}"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unknown tokens
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        try:
            splits = load_text(Text(str(path), streaming=streaming, held_out_blocks=2), tokenizer, 8, 4096)
            for block in islice(splits.train, 20):
                assert block["input_ids"].shape == (8,)
            assert len(splits.held_out)
        except NolnError:
            pass
    for made in (cache / "noln").glob("*"):
        names = {"train.bin", "held_out.bin", "train-ends.bin", "held_out-ends.bin", "unknown.json"}
        assert made.suffix == ".lock" or {inner.name for inner in made.iterdir()} == names


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Models of some families, with what their config.json holds."""
    made = {}
    for family in ("gpt2", "gpt_neox", "llama", "gemma2"):
        directory = tmp_path_factory.mktemp(family) / "model"
        random_model(family).save_pretrained(directory)
        made[directory] = json.loads((directory / "config.json").read_text())
    return made


@FUZZ
@given(st.data())
def test_a_config_is_a_model_or_an_error(directories, tmp_path_factory, data):
    directory = data.draw(st.sampled_from(sorted(directories)))
    config = dict(directories[directory])
    for _ in range(data.draw(st.integers(1, 3))):
        field = data.draw(
            st.sampled_from([*sorted(config), "quantization_config", "auto_map", "n_inner", "rope_scaling"])
        )
        if data.draw(st.integers(0, 4)):
            config[field] = data.draw(anything)
        else:
            config.pop(field, None)
    content = json.dumps(config)
    (directory / "config.json").write_text(content)
    out = tmp_path_factory.getbasetemp() / "fuzzed-model"
    try:
        model = checkpoint.load(directory)
        logits = model(torch.tensor([[1, 2, 3]])).logits
        assert logits.shape == (1, 3, model.config.vocab_size)
        checkpoint.save(model, out)
    except NolnError:
        assert not out.exists()
    else:
        assert checkpoint.load(out).state_dict().keys() == model.state_dict().keys()
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
    assert not list(out.parent.glob(f".{out.name}-*"))
    assert (directory / "config.json").read_text() == content
