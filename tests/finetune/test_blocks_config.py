import math

import pytest

from finetune.blocks import BlockError, block_config


def test_knobs_that_cannot_be_are_refused():
    with pytest.raises(BlockError, match=r"no block pre-norm\. The blocks are pre-ln"):
        block_config("pre-norm")
    with pytest.raises(BlockError, match="do not have the knobs n_layers"):
        block_config("pre-ln", n_layers=2)
    with pytest.raises(BlockError, match=r"one of .*, got batchnorm"):
        block_config("pre-ln", norm="batchnorm")
    with pytest.raises(BlockError, match="activation_function is gelu_old"):
        block_config("pre-ln", activation_function="gelu_old")
    with pytest.raises(BlockError, match="multiple of n_head"):
        block_config("pre-ln", n_head=7)
    with pytest.raises(BlockError, match="Set attn_skip_gain to 0"):
        block_config("pre-ln", parallel=True)
    for knob, value, said in [
        ("n_layer", 0, "n_layer is 0; it must be at least 1"),
        ("n_layer", "3", "n_layer"),
        ("n_head", 0, "n_head is 0"),
        ("n_inner", 0, "n_inner is 0"),
        ("initializer_range", -1.0, "initializer_range is -1.0; it must be at least 0"),
        ("softcap", 0, "softcap is 0; it must be above 0"),
        ("norm_epsilon", 0.0, "norm_epsilon is 0.0; it must be above 0"),
        ("softcap", math.nan, "softcap is nan; it must be finite"),
        ("attn_gain", math.inf, "attn_gain is inf; it must be finite"),
        ("value_gain", 0.2, "value_gain is 0.2, but value_skip_gain is None"),
        ("train_proj_gains", True, "train_proj_gains is True, but proj_skip_gain is None"),
        ("negative_slope", 0.3, "negative_slope is 0.3, but activation_function is gelu_new"),
        ("architectures", ["x"], "do not have the knobs architectures"),
    ]:
        with pytest.raises(BlockError, match=said):
            block_config("op", **{knob: value})
    for name in ("v-skipinit", "skipless"):
        with pytest.raises(BlockError, match=r"vp_init_std is 3\.0, but no value"):
            block_config(name, vp_init_std=3.0)
    with pytest.raises(BlockError, match="identity"):
        block_config("skipless", tie_value_proj_init="all_blocks")
