import pytest
import torch
from models import random_model

from finetune.blocks import signals

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def test_signals_are_those_of_the_definitions():
    model = random_model("blocks", block="skipless", dtype=torch.float64)
    resid, patterns = [], []
    model.blocks[1].hook_resid_pre.register_forward_hook(lambda _, __, output: resid.append(output))
    model.blocks[1].attn.hook_pattern.register_forward_hook(lambda _, __, output: patterns.append(output))
    with signals(model) as found, torch.no_grad():
        model(TOKENS)
    assert model.config._attn_implementation == "sdpa"
    x = resid[0].flatten(0, 1)
    n, d = x.shape
    s = (x**2).mean(0)
    y = x - x.mean(-1, keepdim=True)
    y = y / (y**2).mean().sqrt()
    features = (y.T @ y / n)[~torch.eye(d, dtype=torch.bool)]
    inputs = (y @ y.T / d)[~torch.eye(n, dtype=torch.bool)]
    expected = {
        "rms": (x**2).mean() ** 0.5,
        "kurtosis": (s**2).mean() / s.mean() ** 2,
        "max_median_ratio": torch.stack([row.max() / row.median() for row in x.abs()]).mean(),
        "feature_correlation_rms": (features**2).mean() ** 0.5,
        "input_correlation": inputs.mean(),
        "input_correlation_rms": (inputs**2).mean() ** 0.5,
    }
    for key, value in expected.items():
        assert found[f"blocks.1.hook_resid_pre.{key}"] == pytest.approx(value.item(), rel=1e-4), key
    entropies = [-(p[p > 0] * p[p > 0].log()).sum() for p in patterns[0].flatten(0, 2)]
    assert found["blocks.1.attn.entropy"] == pytest.approx(torch.stack(entropies).mean().item())
    alpha = model.blocks[1].attn.alpha.value
    assert found["blocks.1.attn.alpha"] == pytest.approx(alpha.mean().item())
    assert found["blocks.1.attn.alpha.std"] == pytest.approx(alpha.std().item())
    assert found["blocks.1.mlp_skip_gain"] == pytest.approx(model.blocks[1].mlp_skip_gain.value.item())
    assert not model.blocks[0].hook_resid_pre._forward_hooks
