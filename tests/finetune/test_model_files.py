"""Files of models that cannot be read, contradict each other, or are not what they should be."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from models import random_model
from safetensors.torch import load_file, save_file

from finetune import checkpoint
from finetune.errors import CheckpointError, NolnError


def saved(directory: Path, family: str = "gpt2", **changes) -> Path:
    random_model(family).save_pretrained(directory / "model")
    config = directory / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return directory / "model"


def with_weights(directory: Path, **weights: torch.Tensor) -> None:
    held = load_file(directory / "model.safetensors") | weights
    save_file(held, directory / "model.safetensors", metadata={"format": "pt"})


def refuse(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"eos_token_id": "<|endoftext|>"}, "eos_token_id"),
        ("llama", {"hidden_act": "SiLU"}, "SiLU"),
        ("gpt2", {"n_head": 5}, "divisible by num_heads"),
        ("gpt2", {"n_head": 0}, "n_head is 0"),
        ("gpt2", {"n_inner": 128.0}, "n_inner"),
        ("gpt2", {"n_layer": 10**9}, "n_layer is 1000000000"),
        ("llama", {"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ("llama", {"rope_scaling": 3}, r"config\.json of .* cannot be read"),
        ("llama", {"dtype": "floaty"}, "floaty"),
        ("gpt_neox", {"id2label": [1]}, r"config\.json of .* cannot be read"),
        ("gpt2", {"model_type": ["gpt2"]}, "Supported architectures"),
        ("gpt2", {"architectures": 3}, "Supported architectures"),
        ("gpt2", {"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantised \(bitsandbytes\)"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
        (
            "gpt2",
            {"vocab_size": 7},
            r"wte\.weight is 7 x 12 according to config\.json, but 23 x 12 in model\.safetensors",
        ),
        (
            "llama",
            {"intermediate_size": 21},
            r"is 16 x 21 according to config\.json, but 16 x 20 in model\.safetensors",
        ),
        ("gpt2", {"n_layer": 1}, r"contains 11 weights \(transformer\.h\.1\.attn\.c_attn\.weight, .* does not have"),
        ("llama", {"num_hidden_layers": 1}, r"contains \d+ weights \(model\.layers\.1\..* does not have"),
        ("gpt2", {"n_layer": 3}, r"lacks 12 weights \(transformer\.h\.2\."),
    ],
)
def test_configs_that_do_not_do(family: str, changes: dict, message: str, tmp_path: Path):
    refuse(saved(tmp_path, family, **changes), message)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000, '"gpt2"', "\ufeff{"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none(file: str, content: str, tmp_path: Path):
    directory = saved(tmp_path)
    if file != "config.json":
        (directory / "model.safetensors").unlink()
    (directory / file).write_text(content)
    refuse(directory, file.replace(".", r"\."))


def test_a_huge_config_is_not_read(tmp_path: Path):
    directory = saved(tmp_path)
    with (directory / "config.json").open("r+b") as file:
        file.truncate(2**32)  # a hole, which takes no room
    refuse(directory, r"config\.json of .* has 4,294,967,296 bytes")


def test_weights_without_a_place(tmp_path: Path):
    directory = saved(tmp_path)
    with_weights(directory, **{"v_head.summary.weight": torch.ones(1, 12)})
    refuse(
        directory, r"contains 1 weights \(v_head\.summary\.weight\) that a model with its config\.json does not have"
    )
    other = saved(tmp_path / "renamed", "llama")
    held = load_file(other / "model.safetensors")
    held = {name.replace("up_proj", "w3"): weight for name, weight in held.items()}
    save_file(held, other / "model.safetensors", metadata={"format": "pt"})
    refuse(other, r"lacks 2 weights \(.*up_proj.*contains 2 weights \(.*w3")


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias", "lm_head.weight"]),
        ("gpt_neo", ["transformer.h.0.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias"]),
        ("gpt_neox", ["gpt_neox.layers.1.attention.rotary_emb.inv_freq", "gpt_neox.layers.0.attention.bias"]),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]),
    ],
)
def test_buffers_of_earlier_versions_are_harmless(family: str, buffers: list[str], tmp_path: Path):
    directory = saved(tmp_path, family)
    model = random_model(family)
    own = {name: model.state_dict()[name].clone() for name in buffers if name in model.state_dict()}
    with_weights(directory, **{name: torch.ones(3) for name in buffers} | own)
    tokens = torch.tensor([[3, 1, 4]])
    assert torch.equal(checkpoint.load(directory)(tokens).logits, model(tokens).logits)


def test_pickles_are_refused_with_the_lines_that_convert_them(tmp_path: Path):
    directory = saved(tmp_path)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin, a pickle.*these two lines") as error:
        checkpoint.load(directory)
    exec("import transformers; " + str(error.value).partition("these two lines: ")[2])
    assert torch.equal(checkpoint.load(directory).lm_head.weight, random_model().lm_head.weight)


def test_other_files_in_place_of_weights(tmp_path: Path):
    directory = saved(tmp_path)
    (directory / "model.safetensors").unlink()
    refuse(directory, r"has no model\.safetensors\. Save the model")
    (directory / "adapter_config.json").write_text("{}")
    refuse(directory, r"only adapters\. Merge .*merge_and_unload")
    (directory / "model.safetensors").write_bytes(b"\xff" * 64)
    refuse(directory, r"model\.safetensors is damaged")
    refuse(directory / "config.json", "is a file. Pass the directory")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/hostname", "sub/../../x.safetensors", "..", "x.bin"])
def test_shards_lie_in_the_directory(shard: str, tmp_path: Path):
    directory = saved(tmp_path)
    (directory / "model.safetensors").rename(tmp_path / "secret.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "secret.safetensors"), shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    refuse(directory, "which is not a file beside it")


@pytest.mark.parametrize("entry", ["evil.Model", "../../evil.Model", "someone/elsewhere--evil.Model"])
def test_code_beside_a_model_is_never_run(entry: str, tmp_path: Path, tokenizer):
    directory = saved(tmp_path, auto_map={"AutoConfig": entry, "AutoModelForCausalLM": entry})
    for place in (directory, tmp_path):
        (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    auto_map = {"auto_map": {"AutoTokenizer": [entry, entry]}, "tokenizer_class": "Evil"}
    file.write_text(json.dumps(json.loads(file.read_text()) | auto_map))
    checkpoint.load(directory)
    with contextlib.suppress(CheckpointError):
        checkpoint.load_tokenizer(directory)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["cut", "no-merges", "list"])
def test_tokenizers_that_cannot_be_read(damage: str, tmp_path: Path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    if damage == "cut":
        file.write_text(file.read_text()[:999])
    elif damage == "list":
        file.write_text("[]")
    else:
        (tmp_path / "vocab.json").write_text(json.dumps(json.loads(file.read_text())["model"]["vocab"]))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=r"The tokenizer of .* cannot be read") as error:
        checkpoint.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tilde_is_the_home_directory(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = random_model()
    checkpoint.save(model, "~/deep/model", tokenizer)
    assert (tmp_path / "deep/model/config.json").exists()
    assert torch.equal(checkpoint.load("~/deep/model").lm_head.weight, model.lm_head.weight)
    assert len(checkpoint.load_tokenizer("~/deep/model")) == len(tokenizer)
    with pytest.raises(NolnError, match="~nobody-of-this-name/model: the home directory"):
        checkpoint.load("~nobody-of-this-name/model")
