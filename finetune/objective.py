"""What fine-tuning minimises: cross-entropy or KL to the original, distance to its residual stream, auxiliary loss.

Cross-entropy and KL are both cross-entropies with a target distribution, the next token's or the teacher's prediction,
so their mixture has one gradient in closed form, softmax(logits) − target. It is taken together with the loss, a few
tokens at a time: the logits of a whole batch are never held.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from finetune.fake_norm import CLASSES

_LOGITS_AT_ONCE = {"cpu": 2**21, "cuda": 2**28}
"""Numbers in the logits of one piece, by device: few enough for a CPU's cache, enough to keep a GPU busy."""
_FEWEST_TOKENS = 256
"""In one piece: of fewer, reading the unembedding and adding to its gradient takes longer than the logits do."""

_ALIGNED = 64
"""Products of narrow numbers are fast where sizes are multiples of it."""
_NEVER = -1e30
"""The logit of a token that the vocabulary is padded with: not −∞, because −∞ − (−∞) is NaN."""


class Head(NamedTuple):
    """The end of a model: what it unembeds, and with what."""

    residual: Float[Tensor, "batch pos d"]
    """The last site's output."""
    unembedding: Float[Tensor, "vocab d"]


class DeferredUnembedding(nn.Module):
    """Stands in for a model's unembedding: owns its weight, and does nothing."""

    def __init__(self, unembedding: nn.Module, softcap: float | None) -> None:
        super().__init__()
        self.weight = unembedding.weight
        self.__dict__["unembedding"], self.softcap = unembedding, softcap  # the weight is there once

    def forward(self, residual: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """Return the residual, for a `Head`."""
        return residual


def defer_unembedding(model: PreTrainedModel) -> None:
    """Have `model` return what it unembeds in place of logits, for a loss that takes these in pieces."""
    softcap = softcap_of(model)
    model.set_output_embeddings(DeferredUnembedding(model.get_output_embeddings(), softcap))
    if softcap is not None:
        model.config.final_logit_softcapping = None


def restore_unembedding(model: PreTrainedModel) -> None:
    """Have `model` return logits again."""
    deferred: Any = model.get_output_embeddings()
    model.set_output_embeddings(deferred.unembedding)
    if deferred.softcap is not None:
        model.config.final_logit_softcapping = deferred.softcap


def head_of(model: PreTrainedModel, residual: Float[Tensor, "batch pos d"]) -> Head:
    """Return how `model`, its unembedding deferred or not, goes on from what it unembeds."""
    return Head(residual, unembedding(model))


def softcap_of(model: PreTrainedModel) -> float | None:
    """Return the soft-cap of a model's logits, whether its unembedding is deferred or not."""
    deferred: Any = model.get_output_embeddings()
    return getattr(deferred, "softcap", getattr(model.config, "final_logit_softcapping", None))


def unembedding(model: PreTrainedModel) -> Float[Tensor, "vocab d"]:
    """Return the weight of a model's unembedding, deferred or not."""
    return model.get_output_embeddings().weight


class NextTokenLoss(NamedTuple):
    """Sums over the text or the cover, divided by the number of all positions but each sequence's last, nats/token.

    Where all is text they are means. Where some is cover, a mean over micro-batches is right however it is spread.
    """

    total: Float[Tensor, ""]
    """(1 − kl_weight) · cross-entropy of the text + kl_weight · KL on all; the only one with a gradient."""
    cross_entropy: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    """KL(teacher ‖ model) on the text; 0 without a teacher."""
    teacher_cross_entropy: Float[Tensor, ""]
    """0 without a teacher."""
    cover_kl: Float[Tensor, ""]
    """KL(teacher ‖ model) on the cover."""


def loss_of_logits(
    products: Sequence[Float[Tensor, "token padded"]],
    target: Int[Tensor, "token 1"],
    text: Float[Tensor, " token"] | None,
    kl_weight: float,
    vocabulary: int,
    softcap: float | None,
    shifts: Sequence[Float[Tensor, "token 1"]] | None,
) -> tuple[Float[Tensor, "token padded"], Float[Tensor, "4"], Float[Tensor, "token 1"]]:
    """Return the gradient of logits, of the sum of their losses; four sums; and the gradients' sums with a soft-cap.

    The part of the loss that is no product: compiled, it reads and writes each logit a few times, and not 20. The sums
    are those of `NextTokenLoss` without the total. Logits are `products`, the model's and, if there is one, the
    teacher's; `shifts` are added before a soft-cap, which those beyond the `vocabulary` do not have.
    """
    wide = torch.promote_types(products[0].dtype, torch.float32)
    log_probs, tanhs = [], []
    for i, logits in enumerate(products):
        if softcap is not None and shifts is not None:
            tanhs.append(((logits + shifts[i]) / softcap).tanh())
            logits = softcap * tanhs[i]
            logits[:, vocabulary:] = _NEVER
        log_probs.append(F.log_softmax(logits, -1, dtype=wide))
    own, *expected = log_probs
    of_targets = [one.gather(-1, target) for one in log_probs]
    sums = [-_sum(of_targets[0].squeeze(-1), text), *own.new_zeros(3)]
    # The target's gradient is taken by itself: if it were added to the others' in float32, a compiler would not write
    # these in the products' type alone.
    gradient, at_target = own.exp(), of_targets[0].exp()
    if text is not None and kl_weight < 1:
        weight = (kl_weight + (1 - kl_weight) * text).unsqueeze(-1)
        gradient, at_target = gradient.mul_(weight), at_target * weight
    at_target = at_target - (1 - kl_weight) * (1 if text is None else text.unsqueeze(-1))
    if expected:
        probs = expected[0].exp()
        divergence = torch.linalg.vecdot(probs, expected[0] - own)
        cover_kl = sums[3] if text is None else divergence @ (1 - text)
        sums[1:] = _sum(divergence, text), -_sum(of_targets[1].squeeze(-1), text), cover_kl
        gradient.sub_(probs, alpha=kl_weight)
        at_target = at_target - kl_weight * of_targets[1].exp()
    common = at_target
    if tanhs:
        slope = 1 - tanhs[0].square()
        at_target = at_target * slope.gather(-1, target)
        gradient = gradient.mul_(slope).scatter_(-1, target, at_target)
        common = gradient.sum(-1, keepdim=True)
    gradient = gradient.to(products[0].dtype)
    return gradient.scatter_(-1, target, at_target.to(gradient)), torch.stack(sums), common


def next_token_loss(
    model: Head,
    input_ids: Int[Tensor, "batch pos"],
    teacher: Head | None = None,
    kl_weight: float = 0.0,
    dtype: torch.dtype | None = None,
    is_cover: Bool[Tensor, " batch"] | None = None,
    softcap: float | None = None,
    at_once: int | None = None,
    of_logits: Callable[..., tuple[Tensor, Tensor, Tensor]] = loss_of_logits,
) -> NextTokenLoss:
    """Return the loss of the next token, and of `teacher`'s prediction of it (Hinton et al. 2015, arXiv 1503.02531).

    Sequences that `is_cover` (None: none) are not text: their next tokens say nothing, only `teacher` does. Products
    are taken in `dtype` (None: the residual's), softmax and sums in float32 at least. A `softcap` c makes c · tanh(x/c)
    of each logit x, as Gemma 2 does. `at_once` is how many numbers are in the logits of one piece (None: by device).
    `of_logits` may be that function compiled.

    In a `dtype` narrower than float32 the unembedding has its mean over the vocabulary taken out before it is cast. It
    adds the same to all logits of a token, which softmax does not see, but rounding does: GPT-2's logits lie near −65,
    where bfloat16's steps are 0.5. Where there is a soft-cap, which sees it, it is added back in float32. It is also
    padded to a multiple of 64 tokens, which products of narrow numbers are fast for: those added have a logit of −1e30.
    """
    ends = [
        end for head in (model, teacher) if head is not None for end in (head.residual[:, :-1].flatten(0, 1), head[1])
    ]
    targets = input_ids[:, 1:]
    is_text = None if is_cover is None else (~is_cover).unsqueeze(-1).expand_as(targets).flatten()
    given = targets.flatten(), is_text, kl_weight, dtype, softcap, at_once, of_logits
    return NextTokenLoss(*_NextTokenLoss.apply(*given, *ends))


_UNEMBEDDING = 8
"""The place of the model's unembedding among what `_NextTokenLoss` takes."""


class _NextTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        targets: Tensor,
        is_text: Tensor | None,
        kl_weight: float,
        dtype: torch.dtype | None,
        softcap: float | None,
        at_once: int | None,
        of_logits: Callable[..., tuple[Tensor, Tensor, Tensor]],
        *ends: Tensor,
    ) -> tuple[Tensor, ...]:
        dtype = dtype or ends[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        residuals = [end.to(dtype) for end in ends[::2]]
        unembeddings, offsets = zip(*(_centred(end, dtype, wide) for end in ends[1::2]), strict=True)
        (residual, *_), (unembedding, *_), (offset, *_) = residuals, unembeddings, offsets
        sums = torch.zeros(4, dtype=wide, device=residual.device)
        of_residual = torch.empty_like(residual)
        of_unembedding = torch.zeros_like(unembedding, dtype=wide) if ctx.needs_input_grad[_UNEMBEDDING] else None
        at_once = at_once or logits_at_once(residual.device.type, len(unembedding))
        size = _piece(len(targets), len(unembedding), at_once)
        for start in range(0, len(targets), size):
            piece = slice(start, start + size)
            given = [of[piece] for of in residuals]
            products = [one @ other.T for one, other in zip(given, unembeddings, strict=True)]
            for product in products:
                product[:, len(ends[1]) :] = _NEVER
            shifts = None
            if softcap is not None:
                shifts = [(one.to(wide) @ shift).unsqueeze(-1) for one, shift in zip(given, offsets, strict=True)]
            text = None if is_text is None else is_text[piece].to(wide)
            gradient, parts, common = of_logits(
                products, targets[piece].unsqueeze(-1), text, kl_weight, len(ends[1]), softcap, shifts
            )
            sums += parts
            of_residual[piece] = gradient @ unembedding
            if softcap is not None:  # without a soft-cap each token's gradients add up to 0
                of_residual[piece] += common * offset
            if of_unembedding is not None:
                of_unembedding += gradient.T @ given[0]
        if of_unembedding is not None:  # without what it was padded with
            of_unembedding = of_unembedding[: len(ends[1])]
        ctx.gradients = [
            None if gradient is None else (gradient / len(targets)).to(end)
            for gradient, end in zip((of_residual, of_unembedding), ends, strict=False)
        ]
        means = (sums / len(targets)).unbind()
        ctx.mark_non_differentiable(*means)
        cross_entropy, kl, _, cover_kl = means
        return (1 - kl_weight) * cross_entropy + kl_weight * (kl + cover_kl), *means

    @staticmethod
    def backward(ctx: Any, of_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        of_residual, of_unembedding = (None if gradient is None else gradient * of_total for gradient in ctx.gradients)
        return *[None] * 7, of_residual, of_unembedding, None, None


def logits_at_once(device: str, vocabulary: int) -> int:
    """Return how many numbers are in the logits of one piece on a kind of device."""
    return max(_LOGITS_AT_ONCE.get(device, 2**24), _FEWEST_TOKENS * vocabulary)


def _piece(tokens: int, vocabulary: int, at_once: int) -> int:
    """Return how many tokens are in one piece: all pieces are equally long, if that takes at most twice as many."""
    size = math.ceil(tokens / math.ceil(tokens * vocabulary / at_once))
    return next((n for n in range(size, size // 2, -1) if tokens % n == 0), size)


def _centred(
    unembedding: Float[Tensor, "vocab d"], dtype: torch.dtype, wide: torch.dtype
) -> tuple[Float[Tensor, "padded d"], Float[Tensor, " d"]]:
    """Return an unembedding in `dtype` and, where that is narrow, without its mean over the vocabulary, and the mean.

    Where it is narrow it is padded with zeros, too.
    """
    if dtype == wide:
        return unembedding.to(dtype), unembedding.new_zeros(unembedding.shape[1], dtype=wide)
    mean = unembedding.to(wide).mean(0)
    return F.pad((unembedding - mean).to(dtype), (0, 0, 0, -len(unembedding) % _ALIGNED)), mean


def _sum(values: Float[Tensor, " token"], weights: Float[Tensor, " token"] | None) -> Float[Tensor, ""]:
    return values.sum() if weights is None else values @ weights


def residual_distance(
    own: Sequence[Float[Tensor, "batch pos d"]],
    teachers: Sequence[Float[Tensor, "batch pos d"]],
    centred: bool = True,
) -> Float[Tensor, ""]:
    """Return the mean squared difference of the residual stream and the teacher's, both at mean 0 and std 1.

    Where not `centred`, both at an RMS of 1. That is how a LayerNorm or an RMSNorm reads them: their lengths, which a
    model of constants needs to be other than the teacher's, do not count. The mean is over layers, tokens and the width
    (hints: Romero et al. 2015, arXiv 1412.6550).
    """
    distances = []
    for residual, target in zip(own, teachers, strict=True):
        width = residual.shape[-1:]
        normalise = F.layer_norm if centred else F.rms_norm
        distances.append(F.mse_loss(normalise(residual, width), normalise(target, width)))
    return torch.stack(distances).mean()


def auxiliary_loss(
    std: Float[Tensor, "batch pos"], classes: Int[Tensor, "batch pos"], is_cover: Bool[Tensor, " batch"] | None = None
) -> Float[Tensor, ""]:
    """Return the mean of (σ_token − σ̂)² over all positions, with σ̂ the mean of σ over ordinary tokens.

    It keeps the stds at the final norm uniform, so that dividing by a constant changes little. No gradient flows
    through σ̂ (Baroni et al. 2025, arXiv 2507.02559, section 3). `classes` are indices into `fake_norm.CLASSES`.
    Sequences that `is_cover` (None: none) count as 0.
    """
    ordinary = classes == CLASSES.index("ordinary")
    if is_cover is None:
        target = (std.detach() * ordinary).sum() / ordinary.sum()
        return (std - target).square().mean()
    is_text = ~is_cover.unsqueeze(-1)
    ordinary = ordinary & is_text
    target = (std.detach() * ordinary).sum() / ordinary.sum().clamp_min(1)
    return ((std - target).square() * is_text).mean()


def spread_loss(
    stds: Float[Tensor, "site batch pos"],
    constants: Float[Tensor, "site _ _"],
    weights: Float[Tensor, "site _ _"],
    power: float = 2.0,
) -> Float[Tensor, ""]:
    """Return the mean of |log std − log constant|^power over sites and tokens, each weighed.

    No gradient flows through the constants. The higher the `power`, the more it is the outliers that count.
    """
    return ((stds.log() - constants.detach().log()).abs().pow(power) * weights).mean()
