"""What fine-tuning minimises: cross-entropy of the next token, and the auxiliary loss on the last site's std."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from finetune.fake_layernorm import CLASSES


def cross_entropy(logits: Float[Tensor, "batch pos vocab"], input_ids: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Return the mean loss of the next token in nats/token, over all positions but each sequence's last."""
    # Marking the last position costs nothing; slicing it off the logits would copy them.
    targets = F.pad(input_ids[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)


def auxiliary_loss(std: Float[Tensor, "batch pos"], classes: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Return the mean of (σ_token − σ̂)² over all positions, with σ̂ the mean of σ over ordinary tokens.

    It keeps the stds at `ln_f` uniform, so that dividing by a constant changes little. No gradient flows through σ̂
    (Baroni et al. 2025, arXiv 2507.02559, section 3). `classes` are indices into `fake_layernorm.CLASSES`.
    """
    ordinary = classes == CLASSES.index("ordinary")
    target = (std.detach() * ordinary).sum() / ordinary.sum()
    return (std - target).square().mean()
