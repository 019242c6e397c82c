"""What the released code of the papers logs of a model while it trains: gains, attention entropy, outlier features."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from finetune.blocks.model import BlocksForCausalLM, Gain
from finetune.features import FeatureSums


@contextmanager
def signals(model: BlocksForCausalLM) -> Iterator[dict[str, float]]:
    """Measure what the released code of [S24] and [O24] logs, of the one forward made in the `with` statement.

    The dict that it yields is filled at the end. Of every gain, by its module's name, its mean (over heads), and `.std`
    where there are heads. `blocks.3.attn.entropy`: of A(x), nats, the mean over heads and queries. Of every block's
    input and the last one's output x, such as `blocks.3.hook_resid_pre.kurtosis`, over all tokens: `rms`, √mean x², in
    x's unit; and, without unit and as `analysis.outlier_features` defines them, `kurtosis`, from 1 to the width,
    `max_median_ratio`, `feature_correlation_rms`, `input_correlation` and `input_correlation_rms`. RMS, kurtosis and
    ratio are of x as it is, as in the paper; the released code takes its mean over the width out first. They need
    probabilities: attention is "eager" meanwhile.
    """
    measured: dict[str, Tensor] = {}
    values: dict[str, float] = {}
    hooks = []

    def entropy(name: str) -> Any:
        return lambda module, _, pattern: measured.update({name: torch.special.entr(pattern.detach()).sum(-1).mean()})

    def statistics(name: str) -> Any:
        return lambda module, _, x: measured.update({f"{name}.{k}": v for k, v in _statistics(x.detach()).items()})

    block: Any
    for i, block in enumerate(model.blocks):
        hooks.append(block.attn.hook_pattern.register_forward_hook(entropy(f"blocks.{i}.attn.entropy")))
        hooks.append(block.hook_resid_pre.register_forward_hook(statistics(f"blocks.{i}.hook_resid_pre")))
    hooks.append(block.hook_resid_post.register_forward_hook(statistics(f"blocks.{i}.hook_resid_post")))
    implementation, model.config._attn_implementation = model.config._attn_implementation, "eager"
    try:
        yield values
    finally:
        model.config._attn_implementation = implementation
        for hook in hooks:
            hook.remove()
    for name, module in model.named_modules():
        if isinstance(module, Gain):
            gain = module.value.detach()
            measured[name] = gain.mean()
            if len(gain) > 1:
                measured[f"{name}.std"] = gain.std()
    # One wait for the device, not one a value.
    values.update(zip(measured, torch.stack([value.float() for value in measured.values()]).tolist(), strict=True))


def _statistics(x: Float[Tensor, "batch pos d_model"]) -> dict[str, Tensor]:
    sums = FeatureSums.of(x, torch.float32)
    measured = sums.measured()
    del measured["kurtosis_code"]  # the paper's kurtosis is enough
    return {"rms": (sums.x_square.mean() / sums.tokens).sqrt(), **measured}
