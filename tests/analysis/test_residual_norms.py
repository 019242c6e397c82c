import numpy as np
import pytest
import torch
from contract import EOT, TOKENS, assert_keeps_contract, assert_plots_by_model, trio

from analysis import load_bridge, residual_norms


def test_contract(make_gpt2):
    def measure(*args, **options):
        return residual_norms.measure(*args, eot_token_id=EOT, **options)

    assert_keeps_contract(measure, make_gpt2)


@torch.no_grad()
def plain_residuals(model, tokens: torch.Tensor) -> list[np.ndarray]:
    """The residual stream of plain transformers in float64, [block, pos, d_model] at each point."""
    model, found = model.double(), []
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].numpy()))
        block.ln_2.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].numpy()))
    model.transformer.ln_f.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].numpy()))
    model(tokens)
    return found


def test_against_plain_transformers(make_gpt2):
    frame = residual_norms.measure({"m": load_bridge(make_gpt2())}, TOKENS, eot_token_id=EOT, batch_size=2)
    residuals = plain_residuals(make_gpt2(), TOKENS)
    assert len(frame) == 3 * len(residuals)
    first = np.arange(11) == 0
    ended = (TOKENS.numpy() == EOT) & ~first
    members = {"position 0": first | np.zeros_like(ended), "end-of-text": ended, "ordinary": ~first & ~ended}
    assert ended.any()
    assert (TOKENS[:, 0] == EOT).any()  # and yet at position 0
    points = residual_norms.residual_points(load_bridge(make_gpt2()))
    for row in frame.itertuples():
        i = points.index(row.point)
        x = residuals[i][members[row.token_class]]
        norms, stds = [np.linalg.norm(token) for token in x], [np.std(token) for token in x]
        assert row.tokens == len(x)
        for name, values in (("norm", norms), ("std", stds)):
            assert getattr(row, name) == pytest.approx(np.mean(values), rel=1e-5)
            assert getattr(row, f"{name}_spread") == pytest.approx(np.std(values), rel=1e-4)
            assert getattr(row, f"{name}_median") == pytest.approx(sorted(values)[(len(values) - 1) // 2], rel=3e-3)
            assert getattr(row, f"{name}_max") == pytest.approx(max(values), rel=1e-5)
        if i == 0:
            assert np.isnan([row.growth, row.cosine]).all()
            continue
        before = residuals[i - 1][members[row.token_class]]
        growths = [norm / np.linalg.norm(token) for norm, token in zip(norms, before, strict=True)]
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, before, strict=True)]
        assert row.growth == pytest.approx(np.mean(growths), rel=1e-5)
        assert row.cosine == pytest.approx(np.mean(cosines), abs=1e-5)


def test_a_class_without_tokens_has_no_rows(make_gpt2):
    frame = residual_norms.measure({"m": load_bridge(make_gpt2())}, TOKENS)  # and without a tokenizer
    assert set(frame["token_class"]) == {"ordinary", "position 0"}


def test_mean_of_what_load_trio_loads_is_zero(make_gpt2):
    frame = residual_norms.measure(trio(make_gpt2), TOKENS)
    np.testing.assert_allclose(frame["norm"], frame["std"] * 12**0.5, rtol=1e-5)


def test_plots(make_gpt2):
    models = trio(make_gpt2)
    frame = residual_norms.measure(models, TOKENS, eot_token_id=EOT)
    figure = residual_norms.plot(frame)
    assert_plots_by_model(figure, list(models))
    shown = {tuple(trace.y) for trace in figure.data}
    steps = residual_norms.plot_steps(frame)
    assert_plots_by_model(steps, list(models))
    for (model, _), group in frame.groupby(["model", "token_class"]):
        for column in ("norm", "std", "norm_max", "std_max"):
            assert tuple(group[column]) in shown
        for column in ("growth", "cosine"):
            assert (model, *group[column][1:]) in {(trace.name, *trace.y) for trace in steps.data}
