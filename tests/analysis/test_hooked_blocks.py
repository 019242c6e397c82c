import copy

import numpy as np
import pytest
import torch
from models import random_model
from test_patching import PAIRS, word_level
from torch import nn

from analysis import (
    attention,
    confidence_neurons,
    faithfulness,
    load_bridge,
    load_hooked,
    load_hooked_blocks,
    logit_attribution,
    loss,
    outlier_features,
    patching,
    residual_norms,
)
from analysis.readout import Readout
from analysis.stream import Stream
from finetune.blocks import BLOCKS, BlocksForCausalLM, signals, to_gpt2
from finetune.checkpoint import CheckpointError, load_tokenizer
from finetune.errors import NolnError

TOKENS = torch.randint(23, (5, 11), generator=torch.Generator().manual_seed(0))
each_block = pytest.mark.parametrize("name", BLOCKS)


def make(name: str, **knobs) -> BlocksForCausalLM:
    return random_model("blocks", block=name, dtype=torch.float64, **{"n_layer": 3, **knobs})


@torch.no_grad()
def plain(model: BlocksForCausalLM, patches: dict[str, torch.Tensor] | None = None):
    """The logits and every activation of the source, from hooks of torch; `patches` replace activations."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    found = {}

    def keep(name, output):
        found[name] = (patches or {}).get(name, output)
        return found[name]

    for name, module in model.named_modules():
        if name.split(".")[-1].startswith("hook_"):
            module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
    return model(TOKENS).logits, found


@torch.no_grad()
@each_block
def test_logits_and_activations_are_the_sources(name):
    source = make(name)
    hooked = load_hooked_blocks(source)
    expected, activations = plain(source)
    torch.testing.assert_close(expected, source(TOKENS).logits)
    logits, cache = hooked.run_with_cache(TOKENS, return_cache_object=False)
    torch.testing.assert_close(logits, expected)
    assert set(cache) == set(activations) == set(hooked.hook_dict)
    for hook, activation in activations.items():
        torch.testing.assert_close(cache[hook], activation)
    for point in Stream(hooked).points:
        assert cache[point].shape == (5, 11, 12)
    pattern = cache["blocks.1.attn.hook_pattern"]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(5, 3, 11).double())


@torch.no_grad()
@each_block
def test_a_patch_does_what_it_does_in_the_source(name):
    source = make(name)
    hooked = load_hooked_blocks(source)
    clean, activations = plain(source)
    for hook in ("hook_resid_pre", "hook_resid_mid", "attn.hook_pattern", "attn.hook_z", "hook_mlp_out"):
        at = f"blocks.1.{hook}"
        patch = activations[at].flip(0)
        expected, _ = plain(source, {at: patch})
        found = hooked.run_with_hooks(TOKENS, fwd_hooks=[(at, lambda activation, hook, patch=patch: patch)])
        torch.testing.assert_close(found, expected)
        assert not torch.isclose(found, clean).all(), hook
    torch.testing.assert_close(hooked(TOKENS), clean)  # no hook stayed


@torch.no_grad()
@pytest.mark.parametrize(
    "knobs", [{}, {"proj_skip_gain": 0.7, "proj_gain": 0.5, "proj_init": "orthogonal", "final_norm": "rmsnorm"}]
)
@each_block
def test_weights_have_the_gains_in_them(name, knobs):
    hooked = load_hooked_blocks(make(name, **knobs))
    logits, cache = hooked.run_with_cache(TOKENS)
    for layer, block in enumerate(hooked.blocks):
        read = cache.get(f"blocks.{layer}.ln1.hook_normalized", cache[f"blocks.{layer}.hook_resid_pre"])
        for part in "v" if name == "op" else "qkv":  # of op's queries and keys a norm makes something else
            W, b = (getattr(block.attn, f"{kind}_{part.upper()}") for kind in "Wb")
            found = torch.einsum("bpm,hmd->bphd", read, W) + b
            torch.testing.assert_close(found, cache[f"blocks.{layer}.attn.hook_{part}"])
        if "parallel" not in name:
            read = cache.get(f"blocks.{layer}.ln2.hook_normalized", cache[f"blocks.{layer}.hook_resid_mid"])
        torch.testing.assert_close(read @ block.mlp.W_in + block.mlp.b_in, cache[f"blocks.{layer}.mlp.hook_pre"])
        z = cache[f"blocks.{layer}.attn.hook_z"]
        assert block.attn.W_O.shape == (3, 4, 12)
        heads = torch.einsum("bphd,hdm->bphm", z, block.attn.W_O)
        torch.testing.assert_close(heads.sum(2) + block.attn.b_O, cache[f"blocks.{layer}.hook_attn_out"])
        alone = torch.zeros_like(z)
        alone[:, :, 1] = z[:, :, 1]
        written = block.attn_gain(block.attn.o(alone.flatten(2)))
        torch.testing.assert_close(heads[:, :, 1] + block.attn.b_O, written)
        mlp = cache[f"blocks.{layer}.mlp.hook_post"] @ block.mlp.W_out + block.mlp.b_out
        torch.testing.assert_close(mlp, cache[f"blocks.{layer}.hook_mlp_out"])
    torch.testing.assert_close(hooked.W_E[TOKENS] + hooked.W_pos, cache["blocks.0.hook_resid_pre"])
    assert cache["hook_pos_embed"].shape == cache["hook_embed"].shape
    final = cache["blocks.2.hook_resid_post"]
    scale = cache.get("ln_final.hook_scale", 1)
    torch.testing.assert_close(final / scale @ hooked.W_U + hooked.b_U, logits)


GAINED = {"attn_skip_gain": 0.7, "mlp_skip_gain": 0.6, "attn_gain": 0.8, "train_attn_gains": True}
CASES = [
    *[(name, {}) for name in BLOCKS if name != "post-ln"],
    ("pre-ln", {"final_norm": "rmsnorm", "norm": "rmsnorm"}),
    ("op", {"final_norm": "none"}),
    ("pre-ln", GAINED),
    ("op", {**GAINED, "final_norm": "none"}),
    ("parallel", {"mlp_skip_gain": 0.6, "train_mlp_gains": True}),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_attributions_add_up_to_the_logits(name, knobs):
    hooked = load_hooked_blocks(make(name, **knobs))
    frame = logit_attribution.measure_components({"m": hooked}, TOKENS, neurons=True).set_index("label")
    assert frame.loc["logit", "dla_max"] > 0.5
    assert frame.loc["residue", "dla_max"] < 1e-9
    parts = frame[frame["component"].isin(["embed", "pos_embed", "head", "mlp"])]
    assert (parts.loc[parts["layer"] == 2, "dla_abs"] > 0).all()
    assert ((parts.loc[parts["layer"] != 2, "dla_abs"] > 0) != ("skip" in name)).all(), "all earlier, or none"
    neurons = frame[(frame["component"] == "neuron") & (frame["layer"] == 2)]
    bias = hooked.blocks[2].mlp_gain(hooked.blocks[2].mlp.proj(torch.zeros(1, 1, 48).double()))
    _, cache = hooked.run_with_cache(TOKENS)
    readout = Readout(hooked, TOKENS, cache)
    scale = readout.normalise(cache["blocks.2.hook_resid_post"])[1][:, :-1, 0]
    mlp = neurons["dla"].sum() + ((readout.w * bias).sum(-1) / scale).mean().item()
    assert mlp == pytest.approx(frame.loc["L2 MLP", "dla"])
    if knobs.get("final_norm") == "none":
        np.testing.assert_allclose(parts["dla_abs"], parts["direct_effect_abs"])


@torch.no_grad()
@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_direct_effects_are_those_of_taking_out(name, knobs):
    """A component is taken out where it is written, and all that other layers write is held as it was."""
    hooked = load_hooked_blocks(make(name, **knobs))
    clean, cache = hooked.run_with_cache(TOKENS)
    frozen = {f"blocks.{layer}.hook_{part}_out" for layer in range(3) for part in ("attn", "mlp")}
    effects = {
        (kind, layer): effect.direct_effect
        for kind, layer, effect in Readout(hooked, TOKENS, cache, centre_unembedding=False).components(clean)
    }

    def effect_of(hook: str, written: torch.Tensor) -> torch.Tensor:
        held = {other: cache[other] for other in frozen} | {hook: cache[hook] - written}
        hooks = [(other, lambda _, hook, value=value: value) for other, value in held.items()]
        change = clean - hooked.run_with_hooks(TOKENS, fwd_hooks=hooks)
        return change[:, :-1].gather(-1, TOKENS[:, 1:, None]).squeeze(-1)

    for layer, block in enumerate(hooked.blocks):
        z, at = cache[f"blocks.{layer}.attn.hook_z"], f"blocks.{layer}.hook_attn_out"
        for head in range(3):
            expected = effect_of(at, z[:, :, head] @ block.attn.W_O[head])
            torch.testing.assert_close(effects["head", layer][..., head], expected)
        expected = effect_of(at, block.attn.b_O.expand(5, 11, 12))
        torch.testing.assert_close(effects["b_O", layer][..., 0], expected)
        at = f"blocks.{layer}.hook_mlp_out"
        torch.testing.assert_close(effects["mlp", layer][..., 0], effect_of(at, cache[at]))
    torch.testing.assert_close(effects["embed", None][..., 0], effect_of("hook_embed", cache["hook_embed"]))


def test_under_post_norm_nothing_is_attributed():
    hooked = load_hooked_blocks(make("post-ln"))
    for measure in (logit_attribution.measure, logit_attribution.measure_components):
        with pytest.raises(NolnError, match="not a sum of components"):
            measure({"m": hooked}, TOKENS)
    with pytest.raises(NolnError, match="not a sum of components"):
        logit_attribution.measure_prompt({"m": hooked}, TOKENS[0])


@each_block
def test_outlier_features_are_the_signals_of_training(name):
    source = make(name)
    with signals(source) as expected, torch.no_grad():
        source(TOKENS)
    frame = outlier_features.measure({"m": load_hooked_blocks(source)}, TOKENS, batch_size=2)
    frame = frame[frame["token_class"] == "all"].set_index("point")
    columns = ["kurtosis", "max_median_ratio", *(f"{x}_correlation_rms" for x in ("feature", "input"))]
    for point in ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"]:
        for column in [*columns, "input_correlation"]:
            assert frame.loc[point, column] == pytest.approx(expected[f"{point}.{column}"], rel=1e-4, abs=1e-6), column
    heads = attention.measure_heads({"m": load_hooked_blocks(source)}, TOKENS).groupby("layer")["entropy"].mean()
    for layer in range(3):  # of the queries after the first, whose entropy is 0
        assert heads[layer] * 10 / 11 == pytest.approx(expected[f"blocks.{layer}.attn.entropy"])


@each_block
def test_analyses_that_read_activations_take_every_block(name):
    source = make(name)
    models = {"original": load_hooked_blocks(source), "other": load_hooked_blocks(make(name, seed=1))}
    with torch.no_grad():
        log_probs, activations = plain(source)
    expected = -log_probs.log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None]).mean().item()
    assert loss.measure(models, TOKENS).loc[0, "loss"] == pytest.approx(expected)
    norms = residual_norms.measure(models, TOKENS).set_index(["model", "point", "token_class"])
    for point in Stream(models["original"]).points:
        norm = activations[point][:, 0].norm(dim=-1).mean().item()
        assert norms.loc[("original", point, "position 0"), "norm"] == pytest.approx(norm)
    pattern = activations["blocks.2.attn.hook_pattern"][:, :, 1:, 0]
    heads = attention.measure_heads({"m": models["original"]}, TOKENS)
    np.testing.assert_allclose(heads["attention_to_0"].tail(3), pattern.mean((0, 2)))
    assert (faithfulness.measure(models, TOKENS)["jsd"].tolist()[0]) == 0
    assert faithfulness.measure_layers(models, TOKENS)["cka"].notna().all()
    lens = logit_attribution.measure_lens({"m": models["original"]}, TOKENS)
    assert lens["loss"].iloc[-1] == pytest.approx(expected)
    assert lens["agreement"].iloc[-1] == 1
    confidence = confidence_neurons.measure({"m": models["original"]}, TOKENS, [3]).set_index(["ablation", "measure"])
    change = ablated(models["original"]) - expected
    np.testing.assert_allclose(confidence.loc[("alone", "loss"), "total"], change, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def ablated(model) -> float:
    """The loss where a neuron of the last MLP is at its mean."""

    def at_mean(activation, hook):
        activation = activation.clone()
        activation[..., 3] = activation[..., 3].mean()
        return activation

    logits = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.2.mlp.hook_post", at_mean)])
    return -logits.log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None]).mean().item()


@torch.no_grad()
@each_block
def test_patching(name):
    hooked, tokenizer = load_hooked_blocks(make(name)), word_level("a b c d e f g h i j k l m n o p q r s t u v")
    frame = patching.measure({"m": hooked}, [PAIRS[0]], tokenizer, hook_points=["attn.hook_z"])
    row = frame[(frame["layer"] == 1) & (frame["position"] == 4) & (frame["head"] == 2)].iloc[0]
    clean, corrupt = (torch.tensor([tokenizer.encode(text)]) for text in (PAIRS[0].clean, PAIRS[0].corrupt))
    correct, wrong = (tokenizer.encode(text)[0] for text in (PAIRS[0].correct, PAIRS[0].wrong))
    clean_logits, cache = hooked.run_with_cache(clean)

    def patch(activation, hook):
        activation = activation.clone()
        activation[:, 4, 2] = cache["blocks.1.attn.hook_z"][:, 4, 2]
        return activation

    patched = hooked.run_with_hooks(corrupt, fwd_hooks=[("blocks.1.attn.hook_z", patch)])
    low, found, high = ((x[0, -1, correct] - x[0, -1, wrong]).item() for x in (hooked(corrupt), patched, clean_logits))
    assert row["activation"] == pytest.approx((found - low) / (high - low))
    assert frame["attribution"].notna().all()


@pytest.mark.parametrize("name", ["pre-ln", "skipless-parallel-nonorm"])
def test_a_directory_is_loaded_with_its_tokenizer(name, tmp_path, monkeypatch):
    source, tokenizer = make(name, vocab_size=4096).float(), load_tokenizer("micro")
    source.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    hooked = load_hooked_blocks(tmp_path / "model")
    assert hooked.tokenizer("A").input_ids == tokenizer("A").input_ids
    with torch.no_grad():
        torch.testing.assert_close(hooked(TOKENS), source(TOKENS).logits, rtol=1e-4, atol=1e-4)
    half = load_hooked_blocks(str(tmp_path / "model"), dtype=torch.bfloat16)
    assert (half.cfg.dtype, half.W_U.dtype, half(TOKENS).dtype) == (torch.bfloat16,) * 3
    for loader in (load_hooked, load_bridge):
        for model in (source, tmp_path / "model"):
            with pytest.raises(CheckpointError, match=r"Use analysis\.load_hooked_blocks"):
                loader(model)


def test_what_is_no_model_of_blocks_is_refused(tmp_path):
    to_gpt2(make("pre-ln").float()).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match=r"is a GPT2LMHeadModel, .* use load_bridge"):
        load_hooked_blocks(tmp_path / "gpt2")
    assert load_bridge(tmp_path / "gpt2").cfg.n_layers == 3
    with pytest.raises(CheckpointError, match="not a local directory"):
        load_hooked_blocks(tmp_path / "missing")
    make("op").save_pretrained(tmp_path / "op")
    (tmp_path / "op" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_hooked_blocks(tmp_path / "op")


def test_a_model_in_memory_stays_as_it_is():
    source = make("skipless").train()
    before = copy.deepcopy(source.state_dict())
    hooked = load_hooked_blocks(source, dtype=torch.float32)
    assert (source.training, source.dtype, source.config._attn_implementation) == (True, torch.float64, "sdpa")
    assert isinstance(source.blocks[0].hook_resid_pre, nn.Identity)
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert not hooked.training
    with pytest.raises(NotImplementedError, match="ActivationCache"):
        hooked.run_with_cache(TOKENS, return_cache_object=True)


def test_config_follows_the_weights():
    hooked = load_hooked_blocks(make("op")).to(torch.float32).to("meta")
    assert (hooked.cfg.device, hooked.cfg.dtype) == ("meta", torch.float32)
    assert hooked.skip_gain(-1).device.type == "meta"


def test_half_precision():
    """Weights are those of the model, and what divides by a scale, which is float32, takes logits that are not."""
    source = make("pre-ln").bfloat16()
    hooked = load_hooked_blocks(source)
    for ours, theirs in zip(hooked.blocks, source.blocks, strict=True):
        assert torch.equal(ours.mlp.W_in, theirs.mlp.fc.weight.T)
        assert torch.equal(ours.mlp.b_in, theirs.mlp.fc.bias)
    frame = confidence_neurons.measure({"m": hooked, "bridge": load_bridge(to_gpt2(source))}, TOKENS, [0, 1])
    assert frame.notna().all(axis=None)


@torch.no_grad()
def test_a_text_is_read_behind_the_begin_of_sequence_token():
    source = make("op", vocab_size=4096)
    tokenizer = load_tokenizer("micro")
    hooked = load_hooked_blocks(source, tokenizer)
    ids = tokenizer.encode("It is a truth")
    assert hooked.to_tokens("It is a truth").tolist() == [[0, *ids]]
    assert hooked.to_tokens("It is a truth", prepend_bos=False).tolist() == [ids]
    logits, _ = hooked.run_with_cache("It is a truth")
    torch.testing.assert_close(logits, source.eval()(torch.tensor([[0, *ids]])).logits)
    with pytest.raises(NolnError, match="no tokenizer"):
        load_hooked_blocks(source)("It is a truth")
