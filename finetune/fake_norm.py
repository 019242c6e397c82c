"""The LayerNorm whose standard deviation can be frozen, and the only place with its arithmetic.

LayerNorm divides a token's centred residual vector by its live standard deviation σ = √(var + eps). Here the scale is

    s = σ^(1−α) · σ̄^α

with σ̄ a constant: α = 0 is LayerNorm, α = 1 is a constant and linear in the residual vector (FakeLN of Heimersheim
2024, arXiv 2409.13710, section 2). α and σ̄ are buffers, so that freezing neither recompiles a compiled model nor waits
for the device. Tokens at position 0 and end-of-text tokens have constants of their own until these are merged into
the ordinary one.

The norm in front of attention is read on two paths, QK and V, that freeze at different times. The scale is one number
a token, so it commutes with the weights: the QKV product is taken once, of the vector scaled for QK, and its V columns
are rescaled.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from finetune.recipe import StdMean, TokenClass

CLASSES = ("ordinary", "position_0", "eot")
"""The classes of token, in the order of every buffer of length 3. Position 0 wins over end-of-text."""


STD_MEANS: dict[StdMean, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "arithmetic": (torch.clone, torch.clone),
    "geometric": (torch.log, torch.exp),
    "harmonic": (torch.reciprocal, torch.reciprocal),
}
"""What is averaged of a std, and the way back, by the kind of mean."""


class TokenClasses:
    """The class of every token of the batch that is in the model: written before a forward, read by every norm."""

    def __init__(self, eot_token_id: int | None, own: Collection[TokenClass] = get_args(TokenClass)) -> None:
        """Tell the classes `own` from ordinary tokens."""
        self.eot_token_id, self.own = eot_token_id, own
        self.index: Int[Tensor, "batch pos"]

    def set(self, input_ids: Int[Tensor, "batch pos"], past_length: int = 0) -> None:
        """Classify tokens that come after `past_length` cached ones."""
        index = torch.zeros_like(input_ids)
        if "eot" in self.own and self.eot_token_id is not None:
            index = torch.where(input_ids == self.eot_token_id, CLASSES.index("eot"), index)
        if "position_0" in self.own and past_length == 0:
            first = torch.arange(input_ids.shape[1], device=input_ids.device) == 0
            index = torch.where(first, CLASSES.index("position_0"), index)
        self.index = index


class Divisor(nn.Module):
    """What divides at one site: the std that was measured there, its constants, and how far it is frozen."""

    std_sum: Float[Tensor, "3"]
    std_count: Float[Tensor, "3"]
    frozen: Float[Tensor, "3"]
    alpha: Float[Tensor, ""]
    merged: Float[Tensor, "3"]

    def __init__(self, dtype: torch.dtype, device: torch.device, std_mean: StdMean = "arithmetic") -> None:
        super().__init__()
        self._from_mean = STD_MEANS[std_mean][1]
        for name, value in (("std_sum", 0), ("std_count", 0), ("frozen", 1), ("merged", 0)):
            self.register_buffer(name, torch.full((len(CLASSES),), float(value), dtype=dtype, device=device))
        self.register_buffer("alpha", torch.zeros((), dtype=dtype, device=device))

    def update(self, std_sum: Float[Tensor, "3"], count: Float[Tensor, "3"], decay: float) -> None:
        """Take one optimizer step into the running mean: the sum of its (transformed) stds and their number, by class.

        The mean is over tokens, a step's weight falling by `decay` with each later step that had tokens of the class.
        """
        kept = torch.where(count > 0, decay, 1.0)
        self.std_sum.mul_(kept).add_(std_sum)
        self.std_count.mul_(kept).add_(count)

    def running_std(self) -> Float[Tensor, "3"]:
        """Return the running mean of the std by class. A class that no token was in has the ordinary one's."""
        mean = self._from_mean(self.std_sum / self.std_count)
        return torch.where(self.std_count > 0, mean, mean[0])

    def freeze(self) -> None:
        """Take the running means as the constants. `alpha` says how much they count."""
        self.frozen.copy_(self.running_std())

    def constants(self) -> Float[Tensor, "3"]:
        """Return the constant of each class, moved towards the ordinary one as far as the class is merged."""
        return self.frozen.pow(1 - self.merged) * self.frozen[0].pow(self.merged)

    def frozen_part(self, classes: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos 1"]:
        """Return σ̄^α of each token: what the live part σ^(1−α) is to be multiplied by."""
        return self.constants().pow(self.alpha)[classes].unsqueeze(-1)


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def _std(centred: Float[Tensor, "batch pos d"], eps: float) -> Float[Tensor, "batch pos 1"]:
    """Return σ = √(var + eps) of centred vectors. A vector norm is an order faster than torch.var on the CPU."""
    norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    return (norm.square() / centred.shape[-1] + eps).sqrt()


class _Normalise(torch.autograd.Function):
    """Centre x and divide by s = σ^(1−α)·c; also return σ. Gradients in closed form, without the graph's temporaries.

    With y = (x − μ)/s, gradients g of y and h of σ, width d and C the centring:
    dx = C(g/s) + y · [h·s/(d·σ) − (1−α)·s/σ² · mean(g·y)]. At α = 1 no live term is left.
    """

    @staticmethod
    def forward(x: Tensor, c: Tensor, alpha: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        centred = x - x.mean(-1, keepdim=True)
        std = _std(centred, eps)
        return centred / (std.pow(1 - alpha) * c), std

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, c, alpha, _ = inputs
        ctx.save_for_backward(*output, c, alpha)

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, None, None, None]:
        y, std, c, alpha = ctx.saved_tensors
        scale = std.pow(1 - alpha) * c
        width = y.shape[-1]
        along = torch.linalg.vecdot(g, y).unsqueeze(-1) / width
        slope = h * scale / (width * std) - (1 - alpha) * scale / std.square() * along
        return torch.addcmul((g - g.mean(-1, keepdim=True)) / scale, y, slope), None, None, None


class FakeLayerNorm(nn.Module):
    """A LayerNorm whose std can be frozen, read on one path or, as that in front of attention, on several (QK and V).

    It has a `Divisor` for each path. It takes over the parameters of `norm` and starts as LayerNorm exactly. `live_std`
    holds the σ of the last forward, [batch pos], with its graph: the auxiliary loss trains through it.
    """

    divisors: Sequence[Divisor]

    def __init__(
        self, norm: nn.LayerNorm, n_paths: int, classes: TokenClasses, std_mean: StdMean = "arithmetic"
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        dtype = _statistics_dtype(norm.weight.dtype)
        divisors = (Divisor(dtype, norm.weight.device, std_mean) for _ in range(n_paths))
        self.divisors = nn.ModuleList(divisors)  # type: ignore[assignment]
        self.classes = classes
        self.live_std: Float[Tensor, "batch pos"]

    def normalise(
        self, x: Float[Tensor, "batch pos d"]
    ) -> tuple[Float[Tensor, "batch pos d"], list[Float[Tensor, "batch pos 1"]]]:
        """Return x centred and divided by the first path's scale, and that scale over each other path's."""
        first, *others = self.divisors
        classes = self.classes.index
        frozen_part = first.frozen_part(classes)
        y, std = _Normalise.apply(x.to(_statistics_dtype(x.dtype)), frozen_part, first.alpha, self.eps)
        self.live_std = std.squeeze(-1)
        return y, [std.pow(other.alpha - first.alpha) * frozen_part / other.frozen_part(classes) for other in others]

    def layer_norm(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """Return what `forward` does while no path is frozen, by one kernel; `live_std` has no graph."""
        dtype = _statistics_dtype(x.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        y, _, reciprocal = torch.native_layer_norm(x.to(dtype), x.shape[-1:], self.weight.to(dtype), bias, self.eps)
        self.live_std = reciprocal.detach().reciprocal().squeeze(-1)
        return y.to(x.dtype)

    def forward(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """Normalise x for the first path, with gain and bias."""
        y = self.normalise(x)[0] * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class NormedConv1D(nn.Module):
    """A FakeLayerNorm and the Conv1D that reads it, as one map: γ and β go into the weights, not the activations.

    `widths` says how many output columns belong to each path of the norm. While no path has begun to freeze, `live` may
    be set: then the norm is an ordinary one. When every path is frozen and every class merged, `constant` may be set:
    then it is nothing but a linear map and disappears into the weights too. Both only save time.
    """

    def __init__(self, norm: FakeLayerNorm, conv: Conv1D, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.norm, self.conv, self.widths = norm, conv, widths
        self.live = self.constant = False

    def forward(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos out"]:
        """Return LN(x)·W + b, each path's columns with that path's scale."""
        if not torch.compiler.is_compiling() and self.live:  # else each site that freezes would compile it again
            return self.conv(self.norm.layer_norm(x))
        weight: Tensor = self.conv.weight
        bias: Tensor = self.conv.bias
        if self.norm.bias is not None:
            # Not a matrix product, which autocast would round.
            bias = bias + (self.norm.bias.unsqueeze(-1) * weight).sum(0)
        weight = self.norm.weight.unsqueeze(-1) * weight
        if self.constant:
            self._measure(x)
            weight = (weight - weight.mean(0)) / self._column_stds()
            return F.linear(x, weight.T.to(x.dtype), bias)
        y, ratios = self.norm.normalise(x)
        y = y.to(x.dtype)
        if not ratios:
            return F.linear(y, weight.T, bias)
        # The ratios scale (x − μ)γW, never the bias: the first path's bias is added by the product, the others' after.
        first, *others = F.linear(y, weight.T, F.pad(bias[: self.widths[0]], (0, sum(self.widths[1:])))).split(
            self.widths, dim=-1
        )
        biases = bias.split(self.widths)[1:]
        rescaled = (
            torch.addcmul(b, z, ratio).to(first.dtype) for z, ratio, b in zip(others, ratios, biases, strict=True)
        )
        return torch.cat([first, *rescaled], dim=-1)

    def _column_stds(self) -> Float[Tensor, " out"]:
        """Return the constant that divides each output column."""
        divisors = zip(self.norm.divisors, self.widths, strict=True)
        return torch.cat([divisor.frozen[0].expand(width) for divisor, width in divisors])

    @torch.no_grad()
    def _measure(self, x: Float[Tensor, "batch pos d"]) -> None:
        """Keep the live std for the log, although nothing depends on it."""
        x = x.to(_statistics_dtype(x.dtype))
        self.norm.live_std = _std(x - x.mean(-1, keepdim=True), self.norm.eps).squeeze(-1)
