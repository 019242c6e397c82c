import copy
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from contract import TL4, TOOLS, only_tl3
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model
from torch import nn
from transformers import GPT2LMHeadModel

import analysis
from analysis import conversion, loading
from finetune.checkpoint import CheckpointError, convert, load, load_tokenizer, save, to_identity

TEXT = "It is a truth universally acknowledged"


def gpt2(kind: str = "b25", **config) -> GPT2LMHeadModel:
    """A random GPT-2: "ordinary", or LN-free in the format b25 or h24."""
    shape = {"vocab_size": 29, "n_positions": 12, "n_embd": 24, "n_head": 4, "n_layer": 3}
    model = random_model(std=0.15, frozen=kind != "ordinary", **shape | config)
    return convert(model, "h24") if kind == "h24" else model


@torch.no_grad()
def plain_activations(model: GPT2LMHeadModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The activations of plain transformers under TransformerLens's names."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    heads, found, handles = model.config.n_head, {}, []

    def keep(name, module, which):
        def hook(_, inputs, output):
            found[name] = inputs[0] if which == "in" else output[which] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(hook))

    for i, block in enumerate(model.transformer.h):
        keep(f"blocks.{i}.hook_resid_pre", block, "in")
        keep(f"blocks.{i}.hook_resid_mid", block.ln_2, "in")
        keep(f"blocks.{i}.hook_resid_post", block, 0)
        keep(f"blocks.{i}.qkv", block.attn.c_attn, 0)
        keep(f"blocks.{i}.attn.hook_pattern", block.attn, 1)
        keep(f"blocks.{i}.attn.hook_z", block.attn.c_proj, "in")
        keep(f"blocks.{i}.hook_attn_out", block.attn, 0)
        keep(f"blocks.{i}.mlp.hook_post", block.mlp.c_proj, "in")
        keep(f"blocks.{i}.hook_mlp_out", block.mlp, 0)
    found["logits"] = model(tokens).logits
    for i, block in enumerate(model.transformer.h):
        parts = found.pop(f"blocks.{i}.qkv").unflatten(-1, (3, heads, -1)).unbind(-3)
        found |= {f"blocks.{i}.attn.hook_{name}": part for name, part in zip("qkv", parts, strict=True)}
        z = found[f"blocks.{i}.attn.hook_z"].unflatten(-1, (heads, -1))
        found[f"blocks.{i}.attn.hook_z"] = z
        W_O = block.attn.c_proj.weight.unflatten(0, (heads, -1))
        found[f"blocks.{i}.attn.results"] = torch.einsum("bphd,hdm->bphm", z, W_O)
    return found


@torch.no_grad()
def tool_activations(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    logits, cache = model.run_with_cache(tokens)
    found = dict(cache.items()) | {"logits": logits}
    for i in range(model.cfg.n_layers):
        results = torch.einsum("bphd,hdm->bphm", cache[f"blocks.{i}.attn.hook_z"], model.W_O[i])
        found[f"blocks.{i}.attn.results"] = results
    return found


@torch.no_grad()
def nnsight_activations(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    with model.trace(tokens):
        for i in range(len(model._module.transformer.h)):
            block = model.transformer.h[i]
            found[f"blocks.{i}.hook_resid_pre"] = block.input.save()
            found[f"blocks.{i}.qkv"] = block.attn.c_attn.output.save()
            found[f"blocks.{i}.attn.hook_z"] = block.attn.c_proj.input.save()
            found[f"blocks.{i}.hook_resid_mid"] = block.ln_2.input.save()
            found[f"blocks.{i}.mlp.hook_post"] = block.mlp.c_proj.input.save()
            found[f"blocks.{i}.hook_resid_post"] = block.output.save()
        found["logits"] = model.output.logits.save()
    return found


def random_tokens(vocabulary: int = 29, length: int = 12) -> torch.Tensor:
    return torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def assert_agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, activation in expected.items():
        difference = error(found[name].reshape(activation.shape), activation)
        assert difference < 1e-4, f"{name} differs by {difference:.1e} of its scale"


@st.composite
def shapes(draw):
    heads, layers = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return {
        "n_head": heads,
        "n_embd": heads * draw(st.integers(2, 9)),
        "n_layer": layers,
        "n_positions": draw(st.integers(4, 12)),
        "vocab_size": draw(st.integers(5, 60)),
        "n_inner": draw(st.none() | st.integers(3, 50)),
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "relu"])),
        "tie_word_embeddings": draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
        "scale_attn_weights": draw(st.booleans()),
    }


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=shapes(),
    kind=st.sampled_from(["b25", "h24", "ordinary"]),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_every_tool_agrees_with_plain_transformers(shape, kind, stored, seed):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        save(gpt2(kind, seed=seed, **shape).to(stored), path)
        plain = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32)
        tokens = random_tokens(shape["vocab_size"], shape["n_positions"])
        expected = plain_activations(plain, tokens)
        for tool in TOOLS:
            model = TOOLS[tool](path)
            assert model.cfg.normalization_type == ("LNPre" if kind == "ordinary" else None)
            assert_agree(tool_activations(model, tokens), expected)
        identity = analysis.load_transformers(path)
        assert isinstance(identity.transformer.ln_f, nn.LayerNorm if kind == "ordinary" else nn.Identity)
        assert_agree(plain_activations(identity, tokens), expected)


@pytest.mark.parametrize("kind", ["b25", "h24", "ordinary"])
def test_nnsight_agrees_with_plain_transformers(kind):
    model, tokens = gpt2(kind, vocab_size=4096), random_tokens(4096, 7)
    expected = plain_activations(model, tokens)
    found = nnsight_activations(analysis.load_nnsight(model, load_tokenizer("micro")), tokens)
    for i in range(3):
        qkv = found.pop(f"blocks.{i}.qkv").unflatten(-1, (3, 4, -1)).unbind(-3)
        found |= {f"blocks.{i}.attn.hook_{name}": part for name, part in zip("qkv", qkv, strict=True)}
    assert len(found) == 3 * 8 + 1
    assert_agree(found, {name: expected[name] for name in found})


def test_nnsight_traces_text_and_generates():
    plain, tokenizer = load("micro-ln-free"), load_tokenizer("micro")
    model = analysis.load_nnsight(plain, tokenizer)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad(), model.trace(TEXT):
        logits = model.output.logits.save()
    with torch.no_grad():
        assert error(logits, plain(ids).logits) < 1e-4
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with model.generate(TEXT, **options) as tracer:
        generated = tracer.result.save()
    assert torch.equal(generated, plain.generate(ids, **options))
    with pytest.raises(CheckpointError, match="tokenizer"):
        analysis.load_nnsight(plain)


@only_tl3
def test_nnsight_over_the_hooked_model():
    plain, tokens = gpt2("b25"), torch.arange(8)[None]
    model = analysis.load_nnsight(plain, hooked=True)
    with torch.no_grad(), model.trace(tokens):
        residual = model.blocks[1].hook_resid_post.output.save()
        logits = model.output.save()
    expected = plain_activations(plain, tokens)
    assert error(residual, expected["blocks.1.hook_resid_post"]) < 1e-4
    assert error(logits, expected["logits"]) < 1e-4


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("kind", ["b25", "h24", "micro"])
def test_the_residual_stream_adds_up_to_the_logits(tool, kind):
    plain = load("micro-ln-free") if kind == "micro" else gpt2(kind)
    tokens = random_tokens()
    model = TOOLS[tool](plain)
    found = tool_activations(model, tokens)
    parts = [found["hook_embed"], found["hook_pos_embed"].expand_as(found["hook_embed"])]
    for i in range(model.cfg.n_layers):
        parts += [*found[f"blocks.{i}.attn.results"].unbind(2), model.b_O[i], found[f"blocks.{i}.hook_mlp_out"]]
    logits = sum(part @ model.W_U for part in parts) + model.b_U
    with torch.no_grad():
        expected = plain(tokens).logits
    for position in range(tokens.shape[1]):
        assert error(logits[:, position], expected[:, position]) < 1e-4


@pytest.mark.parametrize("tool", TOOLS)
def test_what_asks_the_config_about_ln_is_told_right(tool):
    plain, tokens = gpt2("b25"), random_tokens()
    model = TOOLS[tool](plain)
    assert not [module for module in model.modules() if "Norm" in type(module).__name__]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    expected = plain_activations(plain, tokens)
    streams = [expected[f"blocks.{i}.hook_resid_pre"] for i in range(3)] + [expected["blocks.2.hook_resid_post"]]
    assert error(cache.accumulated_resid(apply_ln=True), torch.stack(streams)) < 1e-4

    parts = cache.decompose_resid(mode="all")
    assert error(parts.sum(0), streams[-1]) < 1e-4
    assert torch.equal(cache.apply_ln_to_stack(parts), parts)

    # Δlogit = (c − mean c) ⊙ γ/σ̄ · w_token, from the weights as they were saved
    ln_f, targets = plain.transformer.ln_f, tokens.roll(-1, dims=1)
    centred = (parts - parts.mean(-1, keepdim=True)) * ln_f.weight / 1e6
    attributions = torch.einsum("cbpm,bpm->cbp", centred, plain.lm_head.weight[targets])
    assert error(cache.logit_attrs(parts, tokens=targets), attributions) < 1e-4

    results = torch.stack([expected[f"blocks.{i}.attn.results"] for i in range(3)])
    heads = results.permute(0, 3, 1, 2, 4).flatten(0, 1)
    assert error(cache.stack_head_results(apply_ln=True), heads) < 1e-4


@pytest.mark.parametrize("tool", TOOLS)
def test_an_ordinary_model_keeps_its_ln(tool):
    plain, tokens = gpt2("ordinary"), random_tokens()
    model = TOOLS[tool](plain)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    final = plain_activations(plain, tokens)["blocks.2.hook_resid_post"]
    normalised = (final - final.mean(-1, keepdim=True)) / (final.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert error(cache.accumulated_resid(apply_ln=True)[-1], normalised) < 1e-4


@pytest.mark.parametrize("tool", TOOLS)
def test_tokens_and_generation(tool):
    plain, tokenizer = load("micro-ln-free"), load_tokenizer("micro")
    model = TOOLS[tool](plain, tokenizer)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert torch.equal(model.to_tokens(TEXT, prepend_bos=False), ids)
    with_bos = model.to_tokens(TEXT)
    assert torch.equal(with_bos, torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1))
    everything = torch.ones_like(with_bos)  # or else the token 0, which leads, would be taken for padding
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    greedy = plain.generate(with_bos, attention_mask=everything, **options)
    found = model.generate(with_bos, max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False)
    assert torch.equal(found, greedy)
    assert tokenizer.pad_token is None, "the caller's tokenizer was changed"


def test_a_patch_has_the_same_effect_in_every_tool():
    plain, tokens = gpt2("h24", vocab_size=4096), random_tokens(4096, 9)
    push = torch.randn(24, generator=torch.Generator().manual_seed(0))
    position, block = 4, 1

    def add(activation, hook=None):
        activation = activation.clone()
        activation[:, position] += push
        return activation

    before = plain_activations(plain, tokens)
    handle = plain.transformer.h[block].register_forward_hook(lambda _, __, output: add(output))
    after = plain_activations(plain, tokens)
    handle.remove()
    effects = {"plain": after["logits"] - before["logits"]}

    for tool in TOOLS:
        model = TOOLS[tool](plain)
        name = f"blocks.{block}.hook_resid_post"
        with torch.no_grad(), model.hooks(fwd_hooks=[(name, add)]):
            logits, cache = model.run_with_cache(tokens)
        effects[tool] = logits - before["logits"]
        for site in ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"):
            assert error(cache[site], before[site]) < 1e-4, f"{site} comes before the patch"
        assert error(cache["blocks.2.hook_resid_pre"], after["blocks.2.hook_resid_pre"]) < 1e-4

    model = analysis.load_nnsight(plain, load_tokenizer("micro"))
    with torch.no_grad(), model.trace(tokens):
        earlier = model.transformer.h[0].output.save()
        model.transformer.h[block].output[:, position] += push
        logits = model.output.logits.save()
    effects["nnsight"] = logits - before["logits"]
    assert error(earlier, before["blocks.0.hook_resid_post"]) < 1e-4

    assert effects["plain"][:, position:].abs().max() > 1e-2
    for tool, effect in effects.items():
        assert error(effect[:, position:], effects["plain"][:, position:]) < 1e-4, tool
        assert effect[:, :position].abs().max() < 1e-4, f"{tool}: positions before the patch changed"


@pytest.mark.parametrize("tool", TOOLS)
def test_the_trio_is_centred_and_computes_the_same(tool):
    plain = {"original": gpt2("ordinary"), "control": gpt2("ordinary", seed=1), "ln_free": gpt2("b25", seed=2)}
    trio, tokens = analysis.load_trio(**plain, tool=tool), random_tokens()
    assert list(trio) == ["original", "control", "ln_free"]
    for name, model in trio.items():
        found, expected = tool_activations(model, tokens), plain_activations(plain[name], tokens)
        assert error(found["logits"], expected["logits"]) < 1e-4
        for i in range(3):
            stream = expected[f"blocks.{i}.hook_resid_post"]
            centred = stream - stream.mean(-1, keepdim=True)
            assert error(found[f"blocks.{i}.hook_resid_post"], centred) < 1e-4
            v = expected[f"blocks.{i}.attn.hook_v"]
            assert error(found[f"blocks.{i}.attn.hook_v"], v) < 1e-4, "value biases were folded"
        assert model.cfg.normalization_type == (None if name == "ln_free" else "LNPre")
    assert list(analysis.load_trio(plain["original"], None, plain["ln_free"])) == ["original", "ln_free"]
    with pytest.raises(CheckpointError, match="ln_free must be a model without live norms"):
        analysis.load_trio(plain["original"], None, plain["control"])
    with pytest.raises(CheckpointError, match="original must be a model with live norms"):
        analysis.load_trio(plain["ln_free"], None, plain["ln_free"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    plain, tokens = gpt2("b25"), torch.arange(8)[None]
    expected = plain_activations(plain, tokens)["logits"]
    tolerance = {torch.float64: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    for tool in TOOLS:
        model = TOOLS[tool](plain, dtype=dtype)
        assert (model.W_U.dtype, model.cfg.dtype) == (dtype, dtype)
        with torch.no_grad():
            assert error(model(tokens).float(), expected) < tolerance
    identity = analysis.load_transformers(plain, dtype=dtype)
    assert identity.dtype == dtype
    with torch.no_grad():
        assert error(identity(tokens).logits.float(), expected) < tolerance
    assert plain.dtype == torch.float32, "the caller's model was changed"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_device():
    plain, tokens = gpt2("b25"), torch.arange(8, device="cuda")[None]
    for tool in TOOLS:
        model = TOOLS[tool](plain, device="cuda")
        assert model.W_E.is_cuda
        with torch.no_grad():
            assert error(model(tokens).cpu(), plain(tokens.cpu()).logits) < 1e-4
    assert analysis.load_transformers(plain, device="cuda").device.type == "cuda"
    assert plain.device.type == "cpu", "the caller's model was moved"


@pytest.mark.parametrize("in_training", [True, False])
def test_a_model_in_memory_stays_as_it_is(in_training):
    plain = gpt2("ordinary").train(in_training)
    before = copy.deepcopy(plain.state_dict())
    for tool in TOOLS:
        TOOLS[tool](plain)
    assert analysis.load_transformers(plain) is not plain
    assert plain.training == in_training
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def test_the_self_check_raises(monkeypatch):
    def wrong(model):
        for name, weight, bias in original(model):
            yield name, weight, bias + (0.01 if name == "lm_head" else 0)

    original = conversion.linear_maps
    monkeypatch.setattr(conversion, "linear_maps", wrong)
    for tool in TOOLS:
        with pytest.raises(CheckpointError, match="differ from those of plain transformers"):
            TOOLS[tool](gpt2("b25"))
    monkeypatch.setattr(loading, "to_identity", lambda model: to_identity(gpt2("b25", seed=1)))
    with pytest.raises(CheckpointError, match="differ from those of plain transformers"):
        analysis.load_transformers(gpt2("b25"))


def test_what_a_tool_does_not_have_is_refused():
    with pytest.raises(CheckpointError, match="relu2"):
        analysis.load_bridge(gpt2("b25", activation_function="relu2"))
    if TL4:
        for refused in (analysis.load_hooked, lambda model: analysis.load_nnsight(model, hooked=True)):
            with pytest.raises(ImportError, match=r"use load_bridge, .*pip install 'transformer-lens<4'"):
                refused(gpt2("b25"))


@pytest.mark.parametrize("name", ["load_bridge", "load_transformers", "load_nnsight"])
def test_every_loader_refuses_what_is_not_recognised(name, tmp_path):
    loader = getattr(analysis, name)
    mixture = gpt2("b25")
    mixture.transformer.h[0].ln_1 = nn.LayerNorm(24)
    with pytest.raises(CheckpointError, match="different states"):
        loader(mixture)
    with pytest.raises(CheckpointError, match="float16"):
        loader(gpt2("b25").half())
    with pytest.raises(CheckpointError, match="Linear"):
        loader(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="not a local directory"):
        loader(tmp_path / "missing")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline cache of the Hub, and a way to put a model into it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(repository: str, revision: str, model=None, tokenizer=None) -> None:
        root, commit = tmp_path / f"models--{repository.replace('/', '--')}", f"{len(revision):040x}"
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        for part in (model, tokenizer):
            if part is not None:
                part.save_pretrained(root / "snapshots" / commit)

    return put


def test_published_models_load_by_name_from_the_cache(hub):
    small = {"vocab_size": 4096}
    models = {
        "gpt2_noLN": gpt2("h24", seed=1, **small),
        "gpt2_noLN-v3": gpt2("h24", seed=2, **small),
        "gpt2_noLN-vanilla": gpt2("ordinary", seed=3, **small),
        "gpt2-medium_LNFree500": gpt2("b25", seed=4, **small),
    }
    for name, model in models.items():
        hub(analysis.PUBLISHED[name].id, analysis.PUBLISHED[name].revision, model)
    hub("openai-community/gpt2", "main", tokenizer=load_tokenizer("micro"))
    hub("openai-community/gpt2-medium", "main", tokenizer=load_tokenizer("micro"))
    tokens = torch.arange(8)[None]
    for name, model in models.items():
        bridge = analysis.load_bridge(name)
        with torch.no_grad():
            assert error(bridge(tokens), model(tokens).logits) < 1e-4, name
        assert torch.equal(bridge.to_tokens(TEXT), analysis.load_bridge("micro").to_tokens(TEXT))
        assert load_tokenizer(name).get_vocab() == load_tokenizer("micro").get_vocab()  # its base's
        assert (
            load(name).name_or_path == load(analysis.PUBLISHED[name].id, analysis.PUBLISHED[name].revision).name_or_path
        )
    assert error(load("apollo-research/gpt2_noLN", "v3").lm_head.weight, models["gpt2_noLN-v3"].lm_head.weight) == 0
    with pytest.raises(CheckpointError, match=r"gpt2-xl_LNFree800 is not a local directory, and was not available"):
        analysis.load_transformers("gpt2-xl_LNFree800")


def test_live_ln_where_ln_free_was_asked_for_is_refused(hub):
    hub("schaeff/gpt2-small_LNFree300", "main", gpt2("ordinary"))
    with pytest.raises(CheckpointError, match=r"gpt2-small_LNFree300 has live norms"):
        analysis.load_transformers("gpt2-small_LNFree300")


def test_a_directory_is_loaded_without_a_look_up(tmp_path):
    """As `_no_network` of tests/conftest.py sees to."""
    tokenizer = load_tokenizer("micro")
    save(load("micro-ln-free"), tmp_path / "model", tokenizer)
    for tool in TOOLS:
        TOOLS[tool](tmp_path / "model")
    analysis.load_nnsight(tmp_path / "model")
    analysis.load_transformers(tmp_path / "model")


def test_importing_the_package_is_cheap():
    code = "import sys, analysis; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="load_everything"):
        analysis.load_everything  # noqa: B018


def snippets_of_the_docs() -> list[str]:
    text = (Path(__file__).parents[2] / "docs/analyse.md").read_text()
    section = re.search(r"^# Load and analyse LN-free models\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    snippets = re.findall(r"^```python\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    return [snippet for snippet in snippets if "from analysis" in snippet]


@pytest.mark.parametrize("snippet", snippets_of_the_docs(), ids=lambda snippet: re.search(r"load_\w+", snippet)[0])
def test_the_snippets_of_the_docs_run(snippet, tmp_path, monkeypatch):
    if TL4 and "load_hooked" in snippet:
        pytest.skip(only_tl3.kwargs["reason"])
    monkeypatch.chdir(tmp_path)
    Path("snippet.py").write_text(snippet)  # nnsight reads its source back
    runpy.run_path("snippet.py")


@pytest.mark.parametrize("tool", TOOLS)
def test_a_device_keeps_its_number(tool, make_gpt2):
    """Of a torch.device TransformerLens takes "cuda" alone."""
    load = getattr(analysis, f"load_{tool}")
    assert load(make_gpt2(), device=torch.device("cpu:0")).cfg.device == "cpu:0"
