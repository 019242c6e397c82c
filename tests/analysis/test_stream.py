import pytest
import torch
from contract import TOKENS, TOOLS, only_tl3, trio

from analysis import load_bridge, load_hooked_blocks, logit_attribution, outlier_features, residual_norms
from analysis.stream import Stream, label, place
from finetune.blocks import BlocksForCausalLM, block_config

each_tool = pytest.mark.parametrize("load", TOOLS.values())


@each_tool
def test_a_gpt2_in_order(load, make_gpt2):
    model = load(make_gpt2())
    stream = Stream(model)
    in_a_block = ["head", "b_O", "mlp"]
    assert [component.kind for component in stream.components] == ["embed", "pos_embed", *in_a_block, *in_a_block]
    assert [component.layer for component in stream.components] == [None, None, 0, 0, 0, 1, 1, 1]
    assert [label(point) for point in stream.points] == ["0 pre", "0 mid", "1 pre", "1 mid", "1 post"]
    assert [label(point) for point in stream.before_blocks] == ["0 pre", "1 pre"]
    assert [label(point) for point in stream.between_blocks] == ["0 pre", "0 post", "1 post"]
    assert place(stream.final) == "after block 1"
    assert place(stream.points[1]) == "after the attention of block 0"
    assert all(stream.skip_gain(component) == 1 for component in stream.components)


@torch.no_grad()
@each_tool
def test_components_add_up_to_the_final_stream(load, make_gpt2):
    model = load(make_gpt2())
    stream = Stream(model)
    _, cache = model.run_with_cache(TOKENS)
    total = torch.zeros(())
    for component in stream.components:
        if component.kind == "head":
            total = total + torch.einsum("bphd,hdm->bpm", cache[component.hook], stream.weight(component))
        else:
            total = total + (cache[component.hook] if component.hook else stream.weight(component))
    torch.testing.assert_close(total, cache[stream.final], rtol=1e-4, atol=1e-4)
    for neurons in stream.neurons:
        out = cache[neurons.hook] @ stream.weight(neurons) + model.blocks[neurons.layer].mlp.b_out
        torch.testing.assert_close(out, cache[f"blocks.{neurons.layer}.hook_mlp_out"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tool", TOOLS)
def test_the_final_norm(tool, make_gpt2):
    for name, model in trio(make_gpt2, tool).items():
        stream = Stream(model)
        logits, cache = model.run_with_cache(TOKENS)
        final = cache[stream.final] + 0.3  # a mean, which only LayerNorm takes out
        scale = stream.scale(stream.centre(final).square().sum(-1, keepdim=True))
        assert stream.norm == (None if name == "ln_free" else "LN")
        torch.testing.assert_close(stream.measured_scale(final), scale)
        torch.testing.assert_close(stream.unembed(cache[stream.final]), logits)
        torch.testing.assert_close(stream.centre(final) / scale @ model.W_U + model.b_U, stream.unembed(final))


@torch.no_grad()
@only_tl3
@pytest.mark.parametrize("is_parallel", [True, False])
@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
def test_another_family(is_parallel):
    """Rotary positions, parallel blocks, RMSNorm and gated MLPs: no position embedding, and no point in between."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    shape = {"n_layers": 2, "d_model": 12, "n_heads": 3, "d_head": 4, "d_mlp": 20, "d_vocab": 23, "n_ctx": 11}
    family = {"positional_embedding_type": "rotary", "rotary_dim": 4, "gated_mlp": True, "normalization_type": "RMSPre"}
    options = {"parallel_attn_mlp": is_parallel, "act_fn": "silu", "dtype": torch.float64}
    model = HookedTransformer(HookedTransformerConfig(**shape, **family, **options))
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    stream = Stream(model)
    assert [component.kind for component in stream.components] == ["embed", *["head", "b_O", "mlp"] * 2]
    mid = [] if is_parallel else ["mid"]
    assert [label(point).split()[1] for point in stream.points] == [*["pre", *mid] * 2, "post"]
    assert stream.norm == "RMS"
    frame = logit_attribution.measure_components({"m": model}, TOKENS, neurons=True).set_index("label")
    assert frame.loc["logit", "dla_max"] > 0.5
    assert frame.loc["residue", "dla_max"] < 1e-9
    for measure in (residual_norms.measure, outlier_features.measure):
        assert list(measure({"m": model}, TOKENS)["point"].unique()) == list(stream.points)


def test_a_model_without_attention_biases(make_gpt2):
    model = load_bridge(make_gpt2())
    for block in model.blocks:
        block.attn.o.original_component.bias = None
    assert [component.kind for component in Stream(model).components] == ["embed", "pos_embed", *["head", "mlp"] * 2]


def test_gains_of_skips():
    gains = {"attn_skip_gain": 0.5, "mlp_skip_gain": 0.25}
    shape = {"vocab_size": 23, "n_positions": 11, "n_embd": 12, "n_layer": 2, "n_head": 3}
    stream = Stream(load_hooked_blocks(BlocksForCausalLM(block_config("pre-ln", **shape, **gains))))
    found = {(component.kind, component.layer): float(stream.skip_gain(component)) for component in stream.components}
    assert found["embed", None] == found["pos_embed", None] == 0.125**2
    assert found["head", 0] == found["b_O", 0] == 0.25 * 0.125
    assert found["mlp", 0] == 0.125
    assert (found["head", 1], found["mlp", 1]) == (0.25, 1)
