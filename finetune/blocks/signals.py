"""The signals that the papers' released code logs during training: gains, attention entropy and outlier features."""

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
    """Measure the signals that the released code of [S24] and [O24] logs, in the one forward of the `with` statement.

    Yields a dict that is filled on exit:

    - for every gain, by its module's name: its mean (over heads), and `.std` if there are several heads;
    - `blocks.3.attn.entropy`: the entropy of A(x) in nats, the mean over heads and queries;
    - for the input x of every block and the output x of the last one, such as `blocks.3.hook_resid_pre.kurtosis`, over
      all tokens: `rms`, √mean x², in units of x; and, without units and as defined in `analysis.outlier_features`,
      `kurtosis` (from 1 to the width), `max_median_ratio`, `feature_correlation_rms`, `input_correlation` and
      `input_correlation_rms`. RMS, kurtosis and ratio are those of x itself, as in the paper; the released code first
      subtracts the mean over the width.

    The entropy needs attention probabilities, so attention is "eager" inside the `with` statement.
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
    # Wait for the device once, not once per value.
    values.update(zip(measured, torch.stack([value.float() for value in measured.values()]).tolist(), strict=True))


def _statistics(x: Float[Tensor, "batch pos d_model"]) -> dict[str, Tensor]:
    sums = FeatureSums.of(x, torch.float32)
    measured = sums.measured()
    del measured["kurtosis_code"]  # the paper's kurtosis is enough
    return {"rms": (sums.x_square.mean() / sums.tokens).sqrt(), **measured}
