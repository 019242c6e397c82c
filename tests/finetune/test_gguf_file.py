"""Models in GGUF files, which `gguf_files.write_gguf` lays out by itself."""

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from models import random_model

from analysis import load_trio
from finetune import checkpoint, gguf_file
from finetune.errors import CheckpointError, NoTokenizerError
from finetune.recipe import Gaps, Recipe, Schedule, Text
from finetune.removal import remove_norms
from finetune.resuming import resume

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A tiny Llama with the tokenizer of micro."""
    shape = {"vocab_size": 4096, "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    return write_gguf(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf", random_model("llama", std=0.02, **shape), tokenizer
    )


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}, "rms_norm_eps": 0.25}),
        ("llama", {"head_dim": 6, "num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "tie_word_embeddings": True}),
        ("gpt2", {"n_inner": 5, "layer_norm_epsilon": 0.25}),
        ("gpt2", {"tie_word_embeddings": False}),
    ],
)
def test_the_model_that_was_written_is_read(family: str, config: dict, tmp_path: Path):
    model = random_model(family, **config)
    file = write_gguf(tmp_path / "model.gguf", model)
    read = checkpoint.load(file)
    assert type(read) is type(model)
    assert read.dtype == torch.float32
    assert not hasattr(read.config, "quantization_config")
    assert checkpoint.load_config(file).to_dict() == read.config.to_dict() | {"dtype": None}
    with torch.no_grad():
        torch.testing.assert_close(read(TOKENS).logits, model(TOKENS).logits, rtol=1e-6, atol=1e-6)
    checkpoint.save(read, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "saved")(TOKENS).logits, read(TOKENS).logits)
    assert checkpoint.load(file, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("quantise", ["Q4_1", "Q8_0", "F16"])
def test_quantised_weights_are_dequantised(quantise: str, tmp_path: Path):
    model = random_model("llama", hidden_size=32, intermediate_size=64)
    read = checkpoint.load(write_gguf(tmp_path / "model.gguf", model, quantise=quantise))
    kind = gguf.GGMLQuantizationType[quantise]
    for part in ("embed_tokens", "layers.1.mlp.down_proj"):
        weight = model.get_submodule(f"model.{part}").weight.detach().numpy()
        expected = gguf.dequantize(gguf.quantize(weight, kind), kind)
        assert np.array_equal(read.get_submodule(f"model.{part}").weight.detach().numpy(), expected)
        assert not np.array_equal(weight, expected)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_the_tokenizer(pre: str, tmp_path: Path, tokenizer):
    file = write_gguf(tmp_path / "model.gguf", random_model("llama", vocab_size=4096), tokenizer, pre=pre)
    read = checkpoint.load_tokenizer(file)
    assert read.eos_token_id == tokenizer.eos_token_id
    assert read.apply_chat_template([{"role": "user", "content": "Hail"}], tokenize=False) == "Hail"
    texts = ["It is a truth, I'm told:\n\n  that   all", tokenizer.eos_token + "été — x"]
    numbers = "in  1813  £4"
    assert [read(text).input_ids for text in texts] == [tokenizer(text).input_ids for text in texts]
    assert read.decode(read(numbers).input_ids) == numbers
    if pre == "smollm":  # spaces before a digit stay together, and no two digits do
        apart = [tokenizer(part).input_ids for part in ("in", "  ", *"1813", "  £", "4")]
        assert read(numbers).input_ids == [token for part in apart for token in part]
    else:
        assert read(numbers).input_ids == tokenizer(numbers).input_ids
    read.save_pretrained(tmp_path / "saved")
    assert checkpoint.load_tokenizer(tmp_path / "saved")(numbers).input_ids == read(numbers).input_ids


def refuse(file: Path, message: str, load: Any = checkpoint.load) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general_architecture": "qwen3"}, "is a model of type qwen3, which has norms of queries and keys.*llama"),
        ({"general_architecture": "gemma"}, r"is a model of type gemma\. Types supported in GGUF files: llama"),
        ({"general_architecture": "falcon-h1"}, r"type falcon-h1\. Types supported in GGUF files"),
        ({"rope_scaling.factor": 8.0, "rope_scaling.type": "linear"}, r"rope\.scaling\.factor 8\.0, rope\.scaling"),
        ({"expert_count": 8}, "not supported for a LlamaForCausalLM: expert_count 8"),
        ({"block_count": None}, r"lacks llama\.block_count\. Copy"),
        ({"block_count": 3}, r"it lacks blk\.2\.attn_k\.weight;.* 6 more problems like these"),
        ({"block_count": 1}, r"blk\.1\.attn_k\.weight is not part of a llama model"),
        ({"block_count": 10**6}, "num_hidden_layers is 1000000"),
        ({"embedding_length": 12}, "token_embd.weight has the shape .23, 16. instead of .23, 12."),
        ({"attention.head_count": 0}, "The metadata of .* cannot be read: ZeroDivisionError"),
        ({"rope_dimension_count": 2, "attention.key_length": 4}, "contradicts itself: head_dim is"),
        ({"tensors": {"rope_freqs.weight": np.ones(2, np.float32)}}, "rope_freqs.weight is not part of a llama model"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(16, np.float32)}}, "blk.0.attn_q.bias is not part of"),
        ({"tensors": {"token_embd.weight": None}}, "lacks token_embd"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "it lacks blk.1.ffn_up.weight"),
    ],
)
def test_what_would_be_another_model_is_refused_by_name(changes: dict, message: str, tmp_path: Path):
    refuse(write_gguf(tmp_path / "model.gguf", random_model("llama"), **changes), message)


def test_keys_without_effect_are_passed_over(tmp_path: Path):
    changes = {"expert_count": 0, "rope_scaling.type": "none", "tensor_data_layout": "Meta AI original pth"}
    checkpoint.load(write_gguf(tmp_path / "model.gguf", random_model("llama"), **changes))


def test_damaged_files(tmp_path: Path, tiny_gguf: Path):
    content = tiny_gguf.read_bytes()
    for name, damaged in {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "cut-in-the-header": content[:999],
        "zeros": bytes(4096),
        "huge": content[:8] + b"\xff" * 16 + content[24:],
    }.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(damaged)
        refuse(file, rf"The GGUF file .*{name}\.gguf cannot be read: .* Copy the file again")
    renamed = tmp_path / "model.bin"
    renamed.write_bytes(content)
    assert checkpoint.load_config(renamed).model_type == "llama"
    renamed.write_bytes(b"PK" + content[2:])
    refuse(renamed, "is a file. Pass the directory of a model, or a GGUF file")


def test_tokenizers_that_cannot_be_read(tmp_path: Path, tokenizer):
    model = random_model("llama", vocab_size=4096)
    with pytest.raises(NoTokenizerError, match="has no tokenizer"):
        checkpoint.load_tokenizer(write_gguf(tmp_path / "without.gguf", model))
    odd = write_gguf(tmp_path / "odd.gguf", model, tokenizer, pre="bailingmoe")
    refuse(odd, "splits text in a way that is not supported, bailingmoe", checkpoint.load_tokenizer)


def test_the_package_may_be_missing(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch):
    gguf_file._read_once.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    refuse(tiny_gguf, r"which requires the package gguf. Install it with `pip install 'noln\[gguf\]'`")


def test_a_revision_of_a_file(tiny_gguf: Path):
    with pytest.raises(CheckpointError, match="is a file, which has no revision main"):
        checkpoint.load(tiny_gguf, "main")


def test_a_run_keeps_the_dequantised_original(tiny_gguf: Path, text: Path, tmp_path: Path):
    recipe = Recipe(
        name="tiny",
        model=str(tiny_gguf),
        text=Text(source=str(text), held_out_fraction=0.1),
        steps=8,
        batch=2,
        micro_batch=2,
        lr=1e-3,
        min_lr=1e-4,
        warmup=2,
        kl_weight=1.0,
        control=False,
        schedule=Schedule(start=2, gap=Gaps()),
        save_every=4,
        log_every=4,
        device="cpu",
        bf16=False,
    )
    run = remove_norms(recipe=recipe, out=tmp_path / "run")
    original = run.load("original")
    assert not (tmp_path / "run/original").is_symlink()
    with torch.no_grad():
        assert torch.equal(original(TOKENS).logits, checkpoint.load(tiny_gguf)(TOKENS).logits)
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    (moved / "results.csv").unlink()
    again = resume(moved)
    assert again.results["loss"].tolist() == run.results["loss"].tolist()
    trio = load_trio(tiny_gguf, None, moved / "ln_free")
    assert trio["ln_free"].cfg.normalization_type is None
