import copy
import math

import pytest
import torch
from models import random_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from finetune.blocks import BLOCKS, BlockError, BlocksForCausalLM, block_config

SHAPE = {"vocab_size": 23, "n_positions": 11, "n_embd": 12, "n_layer": 2, "n_head": 3}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
SAS = [name for name in BLOCKS if "skipless" in name]
each_block = pytest.mark.parametrize("name", BLOCKS)


def make(name: str, seed: int = 0, **knobs) -> BlocksForCausalLM:
    torch.manual_seed(seed)
    return BlocksForCausalLM(block_config(name, **{**SHAPE, **knobs})).double().eval()


def shaken(name: str, **knobs) -> BlocksForCausalLM:
    """A model whose every parameter matters."""
    return random_model("blocks", block=name, dtype=torch.float64, **knobs)


# The papers' equations, in the words of the papers: Norm, MHA, A, C, W^V, W^P, α, β, γ.


def normalise(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1] if kind == "ln" else 0
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    x = (x - mean) / (variance + eps) ** 0.5 * weight
    return x + bias if kind == "ln" else x


def gelu_new(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def forward_by_hand(name: str, model: BlocksForCausalLM, tokens: Tensor) -> Tensor:
    """The logits of one sequence, written anew for the blocks' default knobs and some others."""
    w = {key: value.detach() for key, value in model.state_dict().items()}
    width, heads = SHAPE["n_embd"], SHAPE["n_head"]
    d = width // heads
    T = len(tokens)
    knobs = model.config
    eps, softcap = knobs.norm_epsilon, knobs.softcap
    norms = "none" if name.endswith("nonorm") or name == "op" else knobs.norm
    shaped = "skip" in name
    parallel = "parallel" in name

    def norm(x: Tensor, at: str) -> Tensor:
        first = knobs.first_norm or ("ln" if norms == "none" else norms)
        kind = {"blocks.0.ln1": first, "ln_final": knobs.final_norm}.get(at, norms)
        return x if kind == "none" else normalise(kind, x, w[f"{at}.weight"], w.get(f"{at}.bias"), eps)

    def linear(x: Tensor, at: str) -> Tensor:
        return x @ w[f"{at}.weight"].T + w.get(f"{at}.bias", torch.zeros(1))

    def attention(x: Tensor, i: int) -> Tensor:
        at = f"blocks.{i}.attn"
        qk = linear(x, f"{at}.qk")
        Q, K = qk[:, :width], qk[:, width:]
        if "skipless" not in name:
            V = linear(x, f"{at}.v")
        elif i == 0:  # α_V · X + β_V · X ΔW, the first layer's exception
            V = w[f"{at}.v.skip_gain.value"] * x + w[f"{at}.v.gain.value"] * (x @ w[f"{at}.v.weight"].T)
        else:
            V = x
        out = []
        for h in range(heads):
            q, k, v = (M[:, h * d : (h + 1) * d] for M in (Q, K, V))
            if (kind := "rmsnorm" if name == "op" else knobs.qk_norm) != "none":
                q = normalise(kind, q, w[f"{at}.q_norm.weight"], w.get(f"{at}.q_norm.bias"), eps)
                k = normalise(kind, k, w[f"{at}.k_norm.weight"], w.get(f"{at}.k_norm.bias"), eps)
            A = torch.zeros(T, T, dtype=x.dtype)
            for s in range(T):
                scores = [float(q[s] @ k[t]) / d**0.5 for t in range(s + 1)]
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                exponentials = [math.exp(score) for score in scores]
                for t in range(s + 1):
                    A[s, t] = exponentials[t] / sum(exponentials)
                    if shaped:
                        absent = torch.zeros(heads)
                        alpha, beta, gamma = (w.get(f"{at}.{g}.value", absent)[h] for g in ("alpha", "beta", "gamma"))
                        A[s, t] = alpha * (s == t) + beta * A[s, t] - gamma / (s + 1)
            out.append(A @ v)
        concatenated = torch.cat(out, dim=-1)
        return concatenated if "skipless" in name else linear(concatenated, f"{at}.o")

    def mlp(x: Tensor, i: int) -> Tensor:
        x = linear(x, f"blocks.{i}.mlp.fc")
        x = (
            torch.where(x > 0, x, knobs.negative_slope * x)
            if knobs.activation_function == "leaky_relu"
            else gelu_new(x)
        )
        return linear(x, f"blocks.{i}.mlp.proj")

    x = w["embed.weight"][tokens] + w["pos_embed.weight"][:T]
    if name == "post-ln":  # LN(x + f(x)): the norms behind, of which the first is that of the embedding
        x = norm(x, "blocks.0.ln1")
        for i in range(SHAPE["n_layer"]):
            after = "ln_final" if i == SHAPE["n_layer"] - 1 else f"blocks.{i + 1}.ln1"
            x = norm(x + attention(x, i), f"blocks.{i}.ln2")
            x = norm(x + mlp(x, i), after)
        return x @ w["embed.weight"].T
    for i in range(SHAPE["n_layer"]):
        gain = {g: w.get(f"blocks.{i}.{g}.value", torch.ones(1)) for g in ("attn_gain", "mlp_gain", "mlp_skip_gain")}
        read = norm(x, f"blocks.{i}.ln1")
        attended = gain["attn_gain"] * attention(read, i)
        if name == "parallel":
            x = (read if knobs.norm_position == "post" else x) + attended + mlp(read, i)
        elif parallel:
            x = attended + gain["mlp_gain"] * mlp(read, i)
        else:
            x = attended if shaped else x + attended
            x = gain["mlp_skip_gain"] * x + gain["mlp_gain"] * mlp(norm(x, f"blocks.{i}.ln2"), i)
    return norm(x, "ln_final") @ w["embed.weight"].T


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        *((name, {}) for name in BLOCKS),
        ("pre-ln", {"norm": "rmsnorm", "final_norm": "rmsnorm", "norm_epsilon": 0.1}),
        ("pre-ln", {"norm": "none"}),
        ("pre-ln", {"first_norm": "none", "final_norm": "none", "qk_norm": "ln", "softcap": 0.5}),
        ("pre-ln", {"activation_function": "leaky_relu", "n_inner": 20, "vp_bias": False, "mlp_bias": False}),
        ("pre-ln", {"activation_function": "leaky_relu", "negative_slope": 0.2}),
        ("op", {"norm_epsilon": 0.1}),
        ("parallel", {"norm_position": "post"}),
        ("skipless", {"attn_identity_gain": 0.0}),
        ("v-skipinit", {"attn_centre_gain": 0.0}),
        ("skipless", {"attn_softmax_gain": 0.3, "train_attn_matrix_gains": False}),
    ],
)
def test_logits_are_those_of_the_equations(name: str, knobs: dict, implementation: str):
    model = shaken(name, **knobs)
    model.set_attn_implementation(implementation)
    expected = torch.stack([forward_by_hand(name, model, tokens) for tokens in TOKENS])
    torch.testing.assert_close(model(TOKENS).logits, expected)


ATTENTION = {"attn.alpha", "attn.beta", "attn.gamma"}
GAINS_IN_BLOCK_1 = {
    "op": {"attn_gain", "mlp_gain"},
    **dict.fromkeys(["v-skipinit", *SAS], ATTENTION | {"attn_gain", "mlp_gain", "mlp_skip_gain"}),
    **dict.fromkeys([name for name in SAS if "parallel" in name], ATTENTION | {"attn_gain", "mlp_gain"}),
}


@each_block
def test_at_initialisation_the_gains_are_the_published_ones(name: str):
    at_depth = {"op": 12}.get(name, 18)
    model = BlocksForCausalLM(block_config(name, **{**SHAPE, "n_layer": at_depth}))
    gains = {key: value.unique().tolist() for key, value in model.state_dict().items() if key.endswith("value")}
    own = GAINS_IN_BLOCK_1.get(name, set())
    assert {key for key in gains if "blocks.1." in key} == {f"blocks.1.{gain}.value" for gain in own}
    in_first = {"attn.v.gain", "attn.v.skip_gain"} if name in SAS else set()
    assert {key for key in gains if "blocks.0." in key} == {f"blocks.0.{gain}.value" for gain in own | in_first}
    small = {"op": 0.2}.get(name, 0.1)
    for key, value in gains.items():
        is_small = "mlp_gain" in key or (name == "op" and "attn_gain" in key)
        assert value == pytest.approx([small if is_small else 1]), key
    deeper = block_config(name, n_layer=4 * at_depth)
    assert deeper.mlp_gain == pytest.approx(small / 2 if gains else 1)
    assert block_config(name, mlp_gain=0.7).mlp_gain == 0.7


@each_block
def test_mlps_start_where_the_published_ones_do(name: str):
    model = make(name, n_embd=96)
    std = 0.02 if name in GAINS_IN_BLOCK_1 else 0.02 / math.sqrt(2 * SHAPE["n_layer"])
    assert model.blocks[1].mlp.proj.weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
    ("flag", "gains"),
    {
        "train_attn_gains": {"attn_gain", "attn_skip_gain"},
        "train_mlp_gains": {"mlp_gain", "mlp_skip_gain"},
        "train_attn_matrix_gains": ATTENTION,
        "train_value_gains": {"attn.v.gain", "attn.v.skip_gain"},
        "train_proj_gains": {"attn.o.gain", "attn.o.skip_gain"},
    }.items(),
)
def test_flag_trains_its_gains_and_no_others(flag: str, gains: set[str]):
    names = ["attn_gain", "attn_skip_gain", "mlp_gain", "mlp_skip_gain", "attn_identity_gain", "attn_softmax_gain"]
    names += ["attn_centre_gain", "value_gain", "value_skip_gain", "proj_gain", "proj_skip_gain"]
    block = make("pre-ln", **dict.fromkeys(names, 0.9), **{flag: True}).blocks[1]
    assert {f"{gain}.value" for gain in gains} == {key for key, _ in block.named_parameters() if key.endswith("value")}
    assert len({key for key in block.state_dict() if key.endswith("value")}) == len(names)


def test_gains_and_stds_start_where_the_knobs_say():
    knobs = {"proj_skip_gain": 0.7, "proj_gain": 0.2, "last_proj_gain": 0.4, "attn_softmax_gain": 0.3}
    stds = {"initializer_range": 0.01, "residual_init_std": 0.02, "query_init_std": 0.03, "key_init_std": 0.04}
    knobs |= {"n_embd": 96, "n_layer": 3, "value_skip_gain": None, "value_init": "normal", "vp_init_std": 0.05}
    blocks = make("skipless", **knobs, **stds).blocks
    assert [block.attn.o.gain.value.item() for block in blocks] == pytest.approx([0.2, 0.2, 0.4])
    assert blocks[0].attn.o.skip_gain.value.item() == pytest.approx(0.7)
    assert blocks[0].attn.beta.value.tolist() == pytest.approx(3 * [0.3])
    block = blocks[0]
    query, key = block.attn.qk.weight.chunk(2)
    found = {"fc": block.mlp.fc, "proj": block.mlp.proj, "v": block.attn.v}
    found = {name: linear.weight.std().item() for name, linear in found.items()}
    found |= {"query": query.std().item(), "key": key.std().item()}
    assert found == pytest.approx({"fc": 0.01, "proj": 0.02, "v": 0.05, "query": 0.03, "key": 0.04}, rel=0.05)
    plain = make("pre-ln", n_embd=96, **stds).blocks[0]
    assert plain.attn.v.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert plain.attn.o.weight.std().item() == pytest.approx(0.02, rel=0.05)
    plain = make("pre-ln", n_embd=96, vp_init_std=0.05, **stds).blocks[0]
    assert plain.attn.o.weight.std().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("name", [*SAS, "v-skipinit"])
def test_shaped_attention_starts_as_the_identity(name: str):
    model = make(name)
    model.set_attn_implementation("eager")
    seen = {}
    for i, block in enumerate(model.blocks):
        for hook in ("hook_mixing", "hook_v", "hook_z"):
            keep = lambda _, inputs, output, key=(i, hook): seen.update({key: output})  # noqa: E731
            getattr(block.attn, hook).register_forward_hook(keep)
        block.ln1.register_forward_hook(lambda _, inputs, output, i=i: seen.update({(i, "read"): output}))
    model(TOKENS)
    for i in range(SHAPE["n_layer"]):
        assert torch.equal(seen[i, "hook_mixing"], torch.eye(8).expand(2, 3, 8, 8).double())
        assert torch.equal(seen[i, "hook_z"], seen[i, "hook_v"])
        if name != "v-skipinit":
            assert torch.equal(seen[i, "hook_v"].flatten(2), seen[i, "read"])


def test_identity_without_gains_is_no_matrix():
    model = make("skipless")
    matrices = {key for key in model.state_dict() if ".attn.v." in key or ".attn.o." in key}
    assert matrices == {f"blocks.0.attn.v.{part}" for part in ("weight", "gain.value", "skip_gain.value")}


@each_block
def test_gradients_are_finite_and_reach_every_parameter(name: str):
    model = shaken(name).train()
    loss = model(TOKENS, labels=TOKENS).loss
    log_probs = model(TOKENS).logits.log_softmax(-1)
    expected = -log_probs[:, :-1].gather(-1, TOKENS[:, 1:, None]).mean()
    torch.testing.assert_close(loss, expected, check_dtype=False, rtol=1e-6, atol=1e-6)
    of_more = model(TOKENS, labels=TOKENS, num_items_in_batch=28).loss  # of 14 here: a Trainer that accumulates
    torch.testing.assert_close(of_more, expected / 2, check_dtype=False, rtol=1e-6, atol=1e-6)
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name
        # A bias of all keys moves no probability.
        assert parameter.grad.abs().max() > 0, parameter_name


@each_block
def test_gradients_at_initialisation_are_finite(name: str):
    model = make(name).train()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    plain = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(TOKENS, labels=TOKENS, use_cache=True).loss.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[key])


@each_block
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_later_tokens_change_nothing_before(name: str, implementation: str):
    model = shaken(name)
    model.set_attn_implementation(implementation)
    changed = TOKENS.clone()
    changed[:, 5:] = (changed[:, 5:] + 7) % SHAPE["vocab_size"]
    before, after = model(TOKENS).logits, model(changed).logits
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all()


@each_block
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generation_with_a_cache_is_that_without(name: str, implementation: str):
    model = shaken(name, eos_token_id=None)
    model.set_attn_implementation(implementation)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(TOKENS, **options)
    assert cached.shape == (2, 11)
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **options))
    start = model(TOKENS[:, :3], use_cache=True)
    rest = model(TOKENS[:, 3:], past_key_values=start.past_key_values, use_cache=True)  # several tokens at once
    torch.testing.assert_close(torch.cat([start.logits, rest.logits], dim=1), model(TOKENS).logits)


@each_block
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path):
    model = shaken(name).float()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*") if path.suffix != ".json"} == {"model.safetensors"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is BlocksForCausalLM
    config = AutoConfig.from_pretrained(tmp_path)
    assert {knob: getattr(config, knob) for knob in BLOCKS[name] | SHAPE} == BLOCKS[name] | SHAPE
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert loaded.unembed.weight is loaded.embed.weight
    trained = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    assert trained == {key: parameter.requires_grad for key, parameter in loaded.named_parameters()}


def published(name: str, **knobs) -> int:
    """Millions of parameters in the setting of the published code, whose tokenizer has 50,000 tokens."""
    shape = {"vocab_size": 50_000, "n_positions": 1024, "n_embd": 768, "n_layer": 18, "n_head": 12}
    with torch.device("meta"):
        model = BlocksForCausalLM(block_config(name, **shape, vp_bias=False, mlp_bias=False, **knobs))
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6)


def test_parameters_are_as_many_as_published():
    assert published("pre-ln", norm="rmsnorm") == 167
    assert published("skipless-parallel", norm="rmsnorm") == 146


def test_softcap_bounds_the_logits():
    assert block_config("op", softcap=30).softcap == 30
    model = shaken("op", softcap=0.5)
    scores = []
    model.blocks[0].attn.hook_attn_scores.register_forward_hook(lambda _, __, output: scores.append(output))
    capped = model(TOKENS).logits
    assert scores[0][scores[0].isfinite()].abs().max() < 0.5
    model.config.softcap = None
    model.set_attn_implementation("eager")
    model(TOKENS)
    seen = scores[0].isfinite()
    torch.testing.assert_close(scores[0][seen], 0.5 * (scores[1][seen] / 0.5).tanh())
    assert not torch.isclose(capped, model(TOKENS).logits).all()


@pytest.mark.parametrize("skip_gain", [None, 1.0])
@pytest.mark.parametrize("tie", ["all_blocks", "last_block"])
def test_tied_values_and_projections_cancel(skip_gain: float | None, tie: str):
    knobs = {"value_skip_gain": skip_gain, "proj_skip_gain": skip_gain, "vp_bias": False}
    if skip_gain is not None:
        knobs |= {"value_gain": 0.5, "proj_gain": 0.5}
    model = make("v-skipinit", tie_value_proj_init=tie, **knobs)
    x = torch.randn(1, 1, 12).double()
    y = x
    for block in model.blocks:
        y = block.attn.o(block.attn.v(y))
        assert torch.allclose(x, y, atol=1e-5) == (tie == "all_blocks" or block is model.blocks[-1])


def test_gained_matrix_is_what_eq_6_says():
    knobs = {"value_init": "normal", "value_skip_gain": 0.7, "value_gain": 0.2, "first_value_gain": 0.4}
    model = shaken("skipless", **knobs)
    v = model.blocks[1].attn.v
    x = torch.randn(1, 4, 12).double()
    W = v.skip_gain.value * v.initial + v.gain.value * v.weight
    torch.testing.assert_close(v(x), x @ W.T)
    fresh = make("skipless", **knobs)
    assert [fresh.blocks[i].attn.v.gain.value.item() for i in (0, 1)] == pytest.approx([0.4, 0.2])
    assert fresh.blocks[1].attn.v.weight.abs().max() == 0
    assert make("skipless", n_embd=96, **knobs).blocks[1].attn.v.initial.std().item() == pytest.approx(
        96**-0.5, rel=0.05
    )
    assert "blocks.1.attn.v.initial" in fresh.state_dict()


@pytest.mark.parametrize("name", [*(name for name in SAS if "nonorm" in name), "op"])
def test_without_norms_the_first_and_the_last_may_go_too(name: str):
    def norms(model: BlocksForCausalLM) -> list[str]:
        return [key for key in model.state_dict() if key.endswith("weight") and ("ln" in key)]

    assert norms(make(name)) == ["blocks.0.ln1.weight", "ln_final.weight"]
    bare = make(name, first_norm="none", final_norm="none")
    assert norms(bare) == []
    assert bare(TOKENS).logits.isfinite().all()


def test_hooks_replace_activations():
    model = shaken("skipless")
    hook = model.blocks[1].hook_resid_mid.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    first = model(TOKENS).logits
    hook.remove()
    assert not torch.isclose(first, model(TOKENS).logits).all()


@each_block
def test_residual_stream_is_the_sum_of_what_is_added(name: str):
    model = shaken(name)
    seen = {}
    for key, module in model.blocks[1].named_children():
        if key.startswith("hook_"):
            module.register_forward_hook(lambda _, __, output, key=key: seen.update({key: output}))
    model(TOKENS)
    block = model.blocks[1]
    before, between = seen["hook_resid_pre"], seen["hook_resid_mid"]
    if name == "post-ln":
        skipped, carried = block.ln1(before), block.ln2(between)
    elif name in ("pre-ln", "op", "parallel"):
        skipped, carried = before, between
    else:
        skipped = 0
        carried = between if name.startswith("skipless-parallel") else block.mlp_skip_gain.value * between
    torch.testing.assert_close(skipped + seen["hook_attn_out"], between)
    torch.testing.assert_close(carried + seen["hook_mlp_out"], seen["hook_resid_post"])


@each_block
def test_training_lowers_the_loss(name: str):
    model = make(name).float().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_what_the_model_does_not_take_is_refused():
    model = make("pre-ln")
    with pytest.raises(BlockError, match="only 11 positions, but there are 12"):
        model(torch.zeros(1, 12, dtype=torch.long))
    with pytest.raises(BlockError, match=r"attention_mask has the shape \[2, 1, 8, 8\] instead of \[2, 8\]"):
        model(TOKENS, attention_mask=torch.ones(2, 1, 8, 8))
    with pytest.raises(BlockError, match="is a StaticCache"):
        model(TOKENS, past_key_values=StaticCache(config=model.config, max_cache_len=11))


@each_block
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("side", "dtype"), [("left", torch.long), ("left", torch.float32), ("right", torch.bool)])
def test_padding_changes_nothing(name: str, implementation: str, side: str, dtype: torch.dtype):
    model = shaken(name, eos_token_id=None)
    model.set_attn_implementation(implementation)
    short, pad = TOKENS[1:, :6], torch.zeros(1, 2, dtype=torch.long)
    parts = (pad, short) if side == "left" else (short, pad)
    tokens = torch.cat([TOKENS[:1], torch.cat(parts, dim=1)])
    mask = torch.ones_like(tokens, dtype=dtype)
    mask[1, slice(0, 2) if side == "left" else slice(6, 8)] = 0
    alone = model(short).logits
    logits = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], torch.cat([model(TOKENS[:1]).logits[0], alone[0]]))
    assert logits.isfinite().all()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    if side == "left":
        for beams in (1, 2):
            generated = model.generate(tokens, attention_mask=mask, num_beams=beams, **options)[1, 8:]
            assert torch.equal(generated, model.generate(short, num_beams=beams, **options)[0, 6:])


@pytest.mark.parametrize("kind", ["ln", "rmsnorm"])
def test_half_precision_takes_large_activations(kind: str):
    """Whose squares are beyond float16."""
    model = make("pre-ln", norm=kind, qk_norm=kind, final_norm=kind).float()
    with torch.no_grad():
        model.embed.weight.mul_(4e4)
    expected = model(TOKENS).logits
    for implementation in ("sdpa", "eager"):
        half = copy.deepcopy(model).half()
        half.set_attn_implementation(implementation)
        error = (half(TOKENS).logits - expected).abs().max() / expected.abs().max()
        assert error < 0.01, implementation


def test_vocabulary_can_be_resized():
    model = make("skipless")
    model.resize_token_embeddings(30)
    assert model(TOKENS).logits.shape == (2, 8, 30)
    assert model.unembed.weight is model.embed.weight
