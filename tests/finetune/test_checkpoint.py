import copy
import json
from pathlib import Path

import pytest
import torch
from models import random_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2LMHeadModel, OPTConfig, OPTForCausalLM
from transformers.utils import logging

from finetune import checkpoint
from finetune.bundled import MODELS
from finetune.checkpoint import load, save
from finetune.errors import CheckpointError, NoTokenizerError
from finetune.folding import convert, linear_maps, norm_state, to_identity

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def gpt2(*, frozen: bool, tied: bool = True, seed: int = 0) -> GPT2LMHeadModel:
    return random_model(frozen=frozen, seed=seed, tie_word_embeddings=tied)


def forward64(model: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    """The logits, from the definitions, in float64."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        eps = model.config.layer_norm_epsilon
        scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt() if eps < 1 else 1e6
        return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    length = tokens.shape[1]
    x = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][:length]
    for i in range(model.config.n_layer):
        at = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn")
        q, k, v = (part.unflatten(-1, (model.config.n_head, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        z = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + linear(z.transpose(1, 2).flatten(2), f"{at}.attn.c_proj")
        pre = linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        x = x + linear(nn.functional.gelu(pre, approximate="tanh"), f"{at}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["lm_head.weight"].T


def error(model: GPT2LMHeadModel, expected: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(TOKENS).logits - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("tied", [True, False])
def test_every_form_has_the_logits_of_the_definition(tied):
    b25 = gpt2(frozen=True, tied=tied)
    expected = forward64(b25, TOKENS)
    h24 = convert(b25, "h24")
    for model in (b25, h24, convert(h24, "b25"), to_identity(b25), to_identity(h24), to_identity(to_identity(b25))):
        assert error(model, expected) < 1e-5
    for model in (convert(b25.double(), "h24"), to_identity(h24.double()), to_identity(b25)):
        assert model.dtype == torch.float64
    assert error(to_identity(b25), forward64(b25, TOKENS)) < 1e-12


def test_forms_are_what_they_are_called():
    b25 = gpt2(frozen=True)
    before = copy.deepcopy(b25.state_dict())
    h24, identity = convert(b25, "h24"), to_identity(b25)

    for name, tensor in b25.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the input was changed"
    assert b25.config.tie_word_embeddings
    assert not isinstance(b25.transformer.ln_f, nn.Identity)

    for block in h24.transformer.h:
        for norm in (block.ln_1, block.ln_2):
            assert (norm.weight == 1e6).all()
            assert (norm.bias == 0).all()
    assert torch.equal(h24.transformer.ln_f.weight, b25.transformer.ln_f.weight)
    assert h24.lm_head.weight is h24.transformer.wte.weight

    assert [type(norm) for norm in (identity.transformer.h[1].ln_2, identity.transformer.ln_f)] == [nn.Identity] * 2
    assert identity.lm_head.weight is not identity.transformer.wte.weight
    assert torch.equal(identity.transformer.wte.weight, b25.transformer.wte.weight)
    assert identity.lm_head.bias.abs().max() > 0
    assert not any("ln_" in name for name in identity.state_dict())


def test_identity_form_generates_with_a_cache():
    model = gpt2(frozen=True)
    identity = to_identity(model)
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = identity.generate(TOKENS[:1, :4], use_cache=True, **greedy)
    assert torch.equal(found, model.generate(TOKENS[:1, :4], use_cache=False, **greedy))
    assert found.shape == (1, 9)


def test_linear_maps_of_live_norms_read_the_normalised_stream():
    model = gpt2(frozen=False)
    maps = {name: (weight, bias) for name, weight, bias in linear_maps(model)}
    assert len(maps) == 5
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1)) * 3
    normalised = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    for name, norm, reader in (
        ("transformer.h.1.attn.c_attn", model.transformer.h[1].ln_1, model.transformer.h[1].attn.c_attn),
        ("transformer.h.0.mlp.c_fc", model.transformer.h[0].ln_2, model.transformer.h[0].mlp.c_fc),
        ("lm_head", model.transformer.ln_f, model.lm_head),
    ):
        weight, bias = maps[name]
        torch.testing.assert_close(normalised @ weight + bias, reader(norm(x)), rtol=1e-4, atol=1e-4)
        assert weight.mean(0).abs().max() < 1e-6, "the centring is not folded in"


def test_norm_state():
    model = gpt2(frozen=True)
    assert norm_state(model) == "frozen"
    assert norm_state(to_identity(model)) == "identity"
    assert norm_state(gpt2(frozen=False)) == "live"
    model.config.layer_norm_epsilon = 1e-5
    assert norm_state(model) == "frozen", "the modules decide"


def test_what_is_not_recognised_is_refused():
    opt = OPTForCausalLM(OPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8, vocab_size=9))
    with pytest.raises(CheckpointError, match=r"OPTForCausalLM.*no eps in its config"):
        norm_state(opt)

    mixture = gpt2(frozen=True)
    mixture.transformer.h[1].ln_2 = nn.LayerNorm(12)
    with pytest.raises(CheckpointError, match=r"different states.*h\.1\.ln_2"):
        norm_state(mixture)

    lost = gpt2(frozen=True)
    for module in lost.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    with pytest.raises(CheckpointError, match=r"like an LN-free model's.* 1e\+12"):
        norm_state(lost)

    ordinary = gpt2(frozen=False)
    for module in ordinary.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e12
    with pytest.raises(CheckpointError, match=r"like an ordinary model's.* 1e-05"):
        norm_state(ordinary)

    with pytest.raises(CheckpointError, match=r"ln_1\.weight.*float16"):
        norm_state(gpt2(frozen=True).half())

    for dtype in (torch.float32, torch.bfloat16):
        corrupt = gpt2(frozen=False).to(dtype)
        corrupt.transformer.wte.weight.data[3, 2] = torch.nan
        with pytest.raises(CheckpointError, match=r"wte\.weight contains"):
            norm_state(corrupt)

    other = gpt2(frozen=False)
    other.transformer.h[0].ln_1 = nn.RMSNorm(12)
    with pytest.raises(CheckpointError, match="RMSNorm"):
        norm_state(other)

    with pytest.raises(CheckpointError, match="live"):
        to_identity(gpt2(frozen=False))
    with pytest.raises(CheckpointError, match="live"):
        convert(gpt2(frozen=False), "h24")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("stored", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-2)])
def test_save_and_load(tmp_path, frozen, stored, tolerance):
    model = gpt2(frozen=frozen)
    save(copy.deepcopy(model).to(stored), tmp_path / "deep" / "saved", card="# A card")
    assert {file.name for file in (tmp_path / "deep").iterdir()} == {"saved"}
    assert (tmp_path / "deep" / "saved" / "README.md").read_text() == "# A card"

    loaded = load(tmp_path / "deep" / "saved")
    assert loaded.dtype == torch.float32
    assert error(loaded, forward64(model, TOKENS)) < tolerance
    assert load(tmp_path / "deep" / "saved", dtype=torch.bfloat16).dtype == torch.bfloat16
    plain = GPT2LMHeadModel.from_pretrained(tmp_path / "deep" / "saved", dtype=torch.float32)
    assert error(plain, loaded(TOKENS).logits) == 0


def test_half_precision_on_disk_is_float32_in_memory():
    assert json.loads((Path(MODELS["micro"]) / "config.json").read_text())["dtype"] == "float16"
    assert load("micro").dtype == torch.float32


def test_save_refuses_and_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="exists"):
        save(gpt2(frozen=True), tmp_path / "taken")
    with pytest.raises(CheckpointError, match="Identity"):
        save(to_identity(gpt2(frozen=True)), tmp_path / "new")
    disagreeing = gpt2(frozen=True)
    disagreeing.config.layer_norm_epsilon = 1e-5
    with pytest.raises(CheckpointError, match=r"1e\+12.*1e-05"):
        save(disagreeing, tmp_path / "new")

    class FullDisk:
        def save_pretrained(self, directory):
            raise OSError("No space left on device")

    with pytest.raises(CheckpointError, match="No space"):
        save(gpt2(frozen=True), tmp_path / "new", tokenizer=FullDisk())
    assert [file.name for file in tmp_path.rglob("*")] == ["taken", "file"]
    assert (tmp_path / "taken" / "file").read_text() == "precious"


@pytest.fixture
def saved(tmp_path):
    gpt2(frozen=True).save_pretrained(tmp_path / "saved", max_shard_size="3KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    return tmp_path / "saved"


def test_shards_are_put_together(saved):
    assert error(load(saved), forward64(gpt2(frozen=True), TOKENS)) < 1e-5


def drop_shard(saved):
    next(saved.glob("model-00002-*")).unlink()


def truncate_shard(saved):
    shard = next(saved.glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-100])


def drop_weight(saved):
    shard = next(file for file in saved.glob("model-*") if any("c_fc.bias" in key for key in load_file(file)))
    kept = {key: tensor for key, tensor in load_file(shard).items() if "c_fc.bias" not in key}
    save_file(kept, shard, metadata={"format": "pt"})


def only_pickles(saved):
    for file in saved.glob("model*"):
        file.unlink()
    torch.save(gpt2(frozen=True).state_dict(), saved / "pytorch_model.bin")


def other_architecture(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"architectures": ["GPTNeoForCausalLM"], "model_type": "x"}))


def other_width(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"n_embd": 24}))


def no_eps(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-5}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_shard, "model-00002"),
        (truncate_shard, "cannot be read"),
        (drop_weight, r"lacks 1 weights.*c_fc\.bias"),
        (only_pickles, "safetensors"),
        (other_architecture, "GPTNeoForCausalLM"),
        (other_width, "do not match"),
        (no_eps, "layer_norm_epsilon to 1e\\+12"),
        (lambda saved: (saved / "config.json").unlink(), r"config\.json"),
        (lambda saved: (saved / "config.json").write_text("{"), r"config\.json"),
    ],
)
def test_spoilt_files_are_refused(saved, spoil, message):
    spoil(saved)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_what_is_not_there_is_refused(saved):
    with pytest.raises(CheckpointError, match="no/such/directory is not a local directory"):
        load("no/such/directory")
    with pytest.raises(CheckpointError, match="revision v1"):
        load(saved, revision="v1")
    with pytest.raises(NoTokenizerError, match="tokenizer"):
        checkpoint.load_tokenizer(saved)


def test_saves_and_loads_no_progress_bars(tmp_path, capsys):
    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        save(gpt2(frozen=True), tmp_path / "model")
        load(tmp_path / "model")
        assert logging.is_progress_bar_enabled()
    finally:
        if not shown:
            logging.disable_progress_bar()
    assert capsys.readouterr().err == ""
