import pytest
import torch
from models import random_model
from transformers import GPT2LMHeadModel

from finetune.blocks import BLOCKS, BlockError, BlocksForCausalLM, block_config, to_gpt2

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def shaken(name: str, **knobs) -> BlocksForCausalLM:
    return random_model("blocks", block=name, dtype=torch.float64, **knobs)


@pytest.mark.parametrize("knobs", [{}, {"qk_bias": False, "vp_bias": False, "mlp_bias": False, "n_inner": 20}])
@pytest.mark.parametrize("tied", [True, False])
def test_pre_ln_becomes_gpt2(knobs: dict, tied: bool, tmp_path):
    model = shaken("pre-ln", tie_word_embeddings=tied, **knobs)
    gpt2 = to_gpt2(model)
    torch.testing.assert_close(gpt2(TOKENS).logits, model(TOKENS).logits)
    gpt2.float().save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path).double()
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        *((name, {}) for name in BLOCKS if name != "pre-ln"),
        *(
            ("pre-ln", knobs)
            for knobs in (
                {"norm": "rmsnorm"},
                {"norm": "none"},
                {"first_norm": "none"},
                {"final_norm": "rmsnorm"},
                {"qk_norm": "ln"},
                {"softcap": 30.0},
                {"attn_skip_gain": 0.5},
                {"attn_gain": 0.5},
                {"mlp_skip_gain": 0.5},
                {"mlp_gain": 0.5},
                {"train_attn_gains": True},
                {"train_mlp_gains": True},
                {"attn_identity_gain": 1.0},
                {"attn_softmax_gain": 0.5},
                {"attn_centre_gain": 1.0},
                {"train_attn_matrix_gains": True},
                {"value_skip_gain": 1.0},
                {"proj_skip_gain": 1.0},
                {"activation_function": "leaky_relu", "negative_slope": 0.1},
            )
        ),
    ],
)
def test_no_other_block_becomes_gpt2(name: str, knobs: dict):
    with pytest.raises(BlockError, match="differs from GPT-2"):
        to_gpt2(shaken(name, **knobs))


def test_pre_ln_starts_as_gpt2_does():
    config = {"n_embd": 192, "vocab_size": 512, "n_layer": 2, "n_head": 3}
    made = to_gpt2(BlocksForCausalLM(block_config("pre-ln", **config)))
    gpt2 = GPT2LMHeadModel(made.config)
    for (name, ours), theirs in zip(made.named_parameters(), gpt2.parameters(), strict=True):
        assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=1e-3), name
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05, abs=1e-6), name


def test_hidden_states_are_where_gpt2s_are():
    model = shaken("pre-ln").eval()
    ours, theirs = (m(TOKENS, output_hidden_states=True).hidden_states for m in (model, to_gpt2(model)))
    for own, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, its)
    assert model(TOKENS).hidden_states is None
    positions = torch.arange(3, 11)[None]
    torch.testing.assert_close(
        model(TOKENS, position_ids=positions).logits, to_gpt2(model)(TOKENS, position_ids=positions).logits
    )
