"""The losses of fine-tuning: cross-entropy, KL to the original, distance to its residual stream, and penalties.

Cross-entropy and KL are both cross-entropies with a target distribution: the next token, or the teacher's prediction.
The gradient of their mixture therefore has the closed form softmax(logits) − target. It is computed together with the
loss, a few tokens at a time, so that the logits of a whole batch are never in memory.
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
"""The number of logits in one piece, by device: small enough for a CPU's cache, large enough to keep a GPU busy."""
_FEWEST_TOKENS = 256
"""The minimum number of tokens in one piece. With fewer, accessing the unembedding and its gradient takes longer than
the logits."""

_ALIGNED = 64
"""Products in bfloat16 or float16 are fast if sizes are multiples of this."""
_NEVER = -1e30
"""The logit of padding tokens of the vocabulary. It is not −∞ because −∞ − (−∞) is NaN."""


class Head(NamedTuple):
    """The end of a model: the vectors that it unembeds, and its unembedding."""

    residual: Float[Tensor, "batch pos d"]
    """The output of the final norm."""
    unembedding: Float[Tensor, "vocab d"]


class DeferredUnembedding(nn.Module):
    """Takes the place of a model's unembedding: it has its weight, but returns its input."""

    def __init__(self, unembedding: nn.Module, softcap: float | None) -> None:
        super().__init__()
        self.weight = unembedding.weight
        self.__dict__["unembedding"], self.softcap = unembedding, softcap  # not a submodule: the weight counts once

    def forward(self, residual: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """Return the residual, for a `Head`."""
        return residual


def defer_unembedding(model: PreTrainedModel) -> None:
    """Make `model` return the vectors that it would unembed instead of logits, for a loss computed in pieces."""
    softcap = softcap_of(model)
    model.set_output_embeddings(DeferredUnembedding(model.get_output_embeddings(), softcap))
    if softcap is not None:
        model.config.final_logit_softcapping = None


def restore_unembedding(model: PreTrainedModel) -> None:
    """Make `model` return logits again."""
    deferred: Any = model.get_output_embeddings()
    model.set_output_embeddings(deferred.unembedding)
    if deferred.softcap is not None:
        model.config.final_logit_softcapping = deferred.softcap


def head_of(model: PreTrainedModel, residual: Float[Tensor, "batch pos d"]) -> Head:
    """Return the `Head` of `model` for the vectors that it unembeds. Its unembedding may be deferred."""
    return Head(residual, unembedding(model))


def softcap_of(model: PreTrainedModel) -> float | None:
    """Return the soft-cap of a model's logits, or None. Its unembedding may be deferred."""
    deferred: Any = model.get_output_embeddings()
    return getattr(deferred, "softcap", getattr(model.config, "final_logit_softcapping", None))


def unembedding(model: PreTrainedModel) -> Float[Tensor, "vocab d"]:
    """Return the weight of a model's unembedding, which may be deferred."""
    return model.get_output_embeddings().weight


class NextTokenLoss(NamedTuple):
    """Sums over text or cover, divided by the number of all positions except each sequence's last, in nats/token.

    If all sequences are text, these are means. If some are cover, the mean over micro-batches is correct even if the
    cover is unevenly distributed over them.
    """

    total: Float[Tensor, ""]
    """(1 − kl_weight) · cross-entropy on text + kl_weight · KL on text and cover. Only this part has a gradient."""
    cross_entropy: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    """KL(teacher ‖ model) on text; 0 without a teacher."""
    teacher_cross_entropy: Float[Tensor, ""]
    """The teacher's cross-entropy on text; 0 without a teacher."""
    cover_kl: Float[Tensor, ""]
    """KL(teacher ‖ model) on cover."""


def loss_of_logits(
    products: Sequence[Float[Tensor, "token padded"]],
    target: Int[Tensor, "token 1"],
    text: Float[Tensor, " token"] | None,
    kl_weight: float,
    vocabulary: int,
    softcap: float | None,
    shifts: Sequence[Float[Tensor, "token 1"]] | None,
) -> tuple[Float[Tensor, "token padded"], Float[Tensor, "4"], Float[Tensor, "token 1"]]:
    """Return the gradient of the summed loss w.r.t. logits, the parts of that loss, and each token's sum of gradients.

    This is the part of the loss without matrix products. Compiled, it reads and writes each logit a few times rather
    than 20 times. The parts are those of `NextTokenLoss` without the total. `products` are the logits of the model and,
    if there is one, of the teacher. With a soft-cap, `shifts` are added to them first; logits beyond the `vocabulary`,
    which are padding, are not capped. The sums of gradients are those that `shifts` need.
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
    # The gradient at the target is computed separately: otherwise a compiler would also write all gradients in float32,
    # rather than only in the dtype of the products.
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
    """Return the next-token cross-entropy and the KL to `teacher`'s prediction (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        model: the end of the model that is trained.
        input_ids: the tokens.
        teacher: the end of the original, if there is one.
        kl_weight: the weight of KL; that of cross-entropy is 1 − kl_weight.
        dtype: the dtype of matrix products (None: that of the residual). Softmax and sums are in at least float32.
        is_cover: the sequences that are cover (None: none). Their next tokens are not targets, only `teacher` is.
        softcap: c, which replaces each logit x by c · tanh(x/c), as in Gemma 2.
        at_once: the number of logits in one piece (None: depends on the device).
        of_logits: `loss_of_logits`, or the same function compiled.

    In a `dtype` narrower than float32, the unembedding's mean over the vocabulary is subtracted before it is cast. The
    mean adds the same number to all logits of a token. This does not affect softmax, but it affects rounding: GPT-2's
    logits are near −65, where bfloat16 has steps of 0.5. With a soft-cap, which it does affect, it is added back in
    float32. The vocabulary is also padded to a multiple of 64 tokens, for which narrow products are fast. The padding
    has a logit of −1e30.
    """
    ends = [
        end for head in (model, teacher) if head is not None for end in (head.residual[:, :-1].flatten(0, 1), head[1])
    ]
    targets = input_ids[:, 1:]
    is_text = None if is_cover is None else (~is_cover).unsqueeze(-1).expand_as(targets).flatten()
    given = targets.flatten(), is_text, kl_weight, dtype, softcap, at_once, of_logits
    return NextTokenLoss(*_NextTokenLoss.apply(*given, *ends))


_UNEMBEDDING = 8
"""The index of the model's unembedding among the arguments of `_NextTokenLoss`."""


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
            if softcap is not None:  # without a soft-cap the gradients of each token sum to 0
                of_residual[piece] += common * offset
            if of_unembedding is not None:
                of_unembedding += gradient.T @ given[0]
        if of_unembedding is not None:  # without the padding
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
    """Return the number of logits in one piece, for a type of device."""
    return max(_LOGITS_AT_ONCE.get(device, 2**24), _FEWEST_TOKENS * vocabulary)


def _piece(tokens: int, vocabulary: int, at_once: int) -> int:
    """Return the number of tokens in one piece. All pieces have equal length, if at most twice as many then suffice."""
    size = math.ceil(tokens / math.ceil(tokens * vocabulary / at_once))
    return next((n for n in range(size, size // 2, -1) if tokens % n == 0), size)


def _centred(
    unembedding: Float[Tensor, "vocab d"], dtype: torch.dtype, wide: torch.dtype
) -> tuple[Float[Tensor, "padded d"], Float[Tensor, " d"]]:
    """Return an unembedding in `dtype` minus its mean over the vocabulary, and that mean.

    If `dtype` is `wide`, nothing is subtracted, and the mean is returned as 0. Otherwise the vocabulary is also padded
    with zeros.
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
    """Return the mean squared difference of the residual stream and the teacher's, both normalised.

    They are normalised to mean 0 and std 1 or, if not `centred`, to an RMS of 1, as a LayerNorm or an RMSNorm reads
    them. Their lengths do not count, because a model with constants needs other lengths than the teacher. The mean is
    over layers, tokens and the width (hints: Romero et al. 2015, arXiv 1412.6550).
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

    The loss keeps the stds at the final norm uniform, so that dividing by a constant changes little. No gradient flows
    through σ̂ (Baroni et al. 2025, arXiv 2507.02559, section 3). `classes` are indices into `fake_norm.CLASSES`.
    Sequences that are cover (`is_cover`; None: none) contribute 0.
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
    """Return the mean over sites and tokens of weight · |log std − log constant|^power.

    No gradient flows through the constants. The higher the `power`, the more outliers count.
    """
    return ((stds.log() - constants.detach().log()).abs().pow(power) * weights).mean()
