"""The norm whose divisor can be frozen. All of its arithmetic is here.

LayerNorm divides a token's centred residual vector by its live standard deviation σ = √(var + eps). RMSNorm does not
centre; for RMSNorm, σ below is the root mean square, √(mean x² + eps). A norm of this module divides by the scale

    s = σ^(1−α) · σ̄^α

where σ̄ is a constant. At α = 0 it is the live norm. At α = 1 the scale is constant and the norm is linear in the
residual vector (FakeLN of Heimersheim 2024, arXiv 2409.13710, section 2). α and σ̄ are buffers, so freezing neither
recompiles a compiled model nor waits for the device. Tokens at position 0 and end-of-text tokens have their own
constants until these are merged into the constant of ordinary tokens.

During training the scale can be guarded: it is then at least σ/κ, with κ > 1. A token with an unusually large σ
therefore leaves the norm at most κ times as long as it would leave a live norm. A gated MLP is quadratic in its input,
so without the guard such excesses multiply from block to block. The guard is lifted (κ = ∞) before the norms are folded
into weights.

Gradients multiply in the same way. A live norm removes from a gradient the part along the vector that it divides. A
constant lets that part through, and in a deep gated model it grows a thousandfold on its way down. While the guard is
on, that part can be held back: the forward divides by a constant, the backward is that of a live norm, and only a
penalty on the std trains the lengths of vectors.

The norm in front of attention is read on two paths, QK and V, which freeze at different times. The scale is one number
per token, so it commutes with the weights: all products use the vector scaled for QK, and the outputs that belong to V
are rescaled afterwards. They are columns of a packed QKV or the output of a separate Linear.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.recipe import StdMean, TokenClass

CLASSES = ("ordinary", "position_0", "eot")
"""The token classes, in the order of every buffer of length 3. Position 0 takes precedence over end-of-text."""


STD_MEANS: dict[StdMean, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "arithmetic": (torch.clone, torch.clone),
    "geometric": (torch.log, torch.exp),
    "harmonic": (torch.reciprocal, torch.reciprocal),
}
"""For each kind of mean: the transform applied to stds before averaging, and its inverse."""


_NOISY = 1 / 16
"""The share of tokens with noise at a norm."""


class TokenClasses:
    """The class of every token in the current batch. It is set before each forward, and every norm reads it."""

    def __init__(self, eot_token_id: int | None, own: Collection[TokenClass] = get_args(TokenClass)) -> None:
        """Distinguish the classes `own` from ordinary tokens."""
        self.eot_token_id, self.own = eot_token_id, own
        self.index: Int[Tensor, "batch pos"]

    def set(self, input_ids: Int[Tensor, "batch pos"], past_length: int = 0) -> None:
        """Classify tokens that follow `past_length` cached ones."""
        index = torch.zeros_like(input_ids)
        if "eot" in self.own and self.eot_token_id is not None:
            index = torch.where(input_ids == self.eot_token_id, CLASSES.index("eot"), index)
        if "position_0" in self.own and past_length == 0:
            first = torch.arange(input_ids.shape[1], device=input_ids.device) == 0
            index = torch.where(first, CLASSES.index("position_0"), index)
        self.index = index


class Divisor(nn.Module):
    """The divisor of one site: the stds measured there, its constants, and how far it is frozen."""

    std_sum: Float[Tensor, "3"]
    std_count: Float[Tensor, "3"]
    frozen: Float[Tensor, "3"]
    alpha: Float[Tensor, ""]
    merged: Float[Tensor, "3"]
    least: Float[Tensor, ""]
    """1/κ: the scale is at least this fraction of the live std. 0: no guard. Not saved: the step determines it."""
    held: Float[Tensor, ""]
    """The fraction of the gradient along a vector to hold back. A live norm holds all of it back. Not saved either."""

    def __init__(self, dtype: torch.dtype, device: torch.device, std_mean: StdMean = "arithmetic") -> None:
        super().__init__()
        self._from_mean = STD_MEANS[std_mean][1]
        for name, value in (("std_sum", 0), ("std_count", 0), ("frozen", 1), ("merged", 0)):
            self.register_buffer(name, torch.full((len(CLASSES),), float(value), dtype=dtype, device=device))
        self.register_buffer("alpha", torch.zeros((), dtype=dtype, device=device))
        for name in ("least", "held"):
            self.register_buffer(name, torch.zeros((), dtype=dtype, device=device), persistent=False)

    def update(self, std_sum: Float[Tensor, "3"], count: Float[Tensor, "3"], decay: float) -> None:
        """Update the running mean with one optimizer step: the sum and the number of its transformed stds, by class.

        The mean is over tokens. A step's weight is multiplied by `decay` at each later step with tokens of the class.
        """
        kept = torch.where(count > 0, decay, 1.0)
        self.std_sum.mul_(kept).add_(std_sum)
        self.std_count.mul_(kept).add_(count)

    def running_std(self) -> Float[Tensor, "3"]:
        """Return the running mean of the std by class. A class without any tokens so far gets the ordinary mean."""
        mean = self._from_mean(self.std_sum / self.std_count)
        return torch.where(self.std_count > 0, mean, mean[0])

    def freeze(self) -> None:
        """Set the constants to the running means. `alpha` determines how much they count."""
        self.frozen.copy_(self.running_std())

    def constants(self) -> Float[Tensor, "3"]:
        """Return the constant of each class, moved towards the ordinary constant as far as the class is merged."""
        return self.frozen.pow(1 - self.merged) * self.frozen[0].pow(self.merged)

    def typical(self) -> Float[Tensor, "3"]:
        """Return the std that live stds are compared with, by class: running mean^(1−α) · constant^α.

        NaN until the first step has been measured, unless the site is frozen.
        """
        return self.running_std().pow(1 - self.alpha) * self.constants().pow(self.alpha)

    def scale(
        self, std: Float[Tensor, "batch pos 1"], classes: Int[Tensor, "batch pos"], guarded: bool = True
    ) -> Float[Tensor, "batch pos 1"]:
        """Return the scales of tokens with these live stds. The guard applies if `guarded`."""
        scale = std.pow(1 - self.alpha) * self.frozen_part(classes)
        return torch.maximum(scale, std * self.least) if guarded else scale

    def frozen_part(self, classes: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos 1"]:
        """Return σ̄^α of each token, the factor by which the live part σ^(1−α) is multiplied."""
        return self.constants().pow(self.alpha)[classes].unsqueeze(-1)


class NormStyle(NamedTuple):
    """How the norms of one family differ from those of others."""

    centred: bool = True
    """True for LayerNorm, False for RMSNorm."""
    gain_offset: float = 0.0
    """A constant added to the weight: 1 in Gemma, whose norms multiply by 1 + weight."""
    eps: str = "eps"
    """The name of the module's eps attribute."""


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of the statistics: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def _std(centred: Float[Tensor, "batch pos d"], eps: float) -> Float[Tensor, "batch pos 1"]:
    """Return σ = √(mean square + eps) of vectors. On a CPU, vector_norm is ten times as fast as torch.var."""
    norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    return (norm.square() / centred.shape[-1] + eps).sqrt()


def _centre(x: Float[Tensor, "*shape d"], centred: bool) -> Float[Tensor, "*shape d"]:
    return x - x.mean(-1, keepdim=True) if centred else x


def _guard(std: Tensor, c: Tensor, alpha: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Return c and α of the guarded scale σ^(1−α)·c. Where the guard acts, they are 1/κ and 0: the scale is σ/κ."""
    acts = std * least > std.pow(1 - alpha) * c
    return torch.where(acts, least, c), torch.where(acts, 0.0, alpha)


class _Normalise(torch.autograd.Function):
    """Divide x, centred if `centred`, by s = σ^(1−α)·c; also return σ. Gradients in closed form, without temporaries.

    With y = (x − μ)/s, gradients g of y and h of σ, width d and C the centring (the identity under RMSNorm):
    dx = C(g/s) + y · [h·s/(d·σ) − (1−α)·s/σ² · mean(g·y)]. At α = 1 the live term vanishes. With `least` = 1/κ (None:
    no guard) and `held` = η, the fraction to hold back, c and α are those of `_guard`, and the factor of the live term
    is 1 − α·(1−η) instead of 1 − α.
    """

    @staticmethod
    def forward(
        x: Tensor, c: Tensor, alpha: Tensor, eps: float, centred: bool, least: Tensor | None, held: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = _centre(x, centred)
        std = _std(x, eps)
        if least is not None:
            c, alpha = _guard(std, c, alpha, least)
        return x / (std.pow(1 - alpha) * c), std

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, c, alpha, _, ctx.centred, least, held = inputs
        ctx.save_for_backward(*output, c, alpha, least, held)

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
        y, std, c, alpha, least, held = ctx.saved_tensors
        if least is not None:
            c, alpha = _guard(std, c, alpha, least)
        scale = std.pow(1 - alpha) * c
        live = 1 - alpha if held is None else 1 - alpha * (1 - held)
        width = y.shape[-1]
        along = torch.linalg.vecdot(g, y).unsqueeze(-1) / width
        slope = h * scale / (width * std) - live * scale / std.square() * along
        return torch.addcmul(_centre(g, ctx.centred) / scale, y, slope), None, None, None, None, None, None


class FakeNorm(nn.Module):
    """A norm whose divisor can be frozen. It is read on one path or, in front of attention, on several (QK and V).

    It has one `Divisor` per path. It shares the parameters of `norm` and initially computes exactly what `norm` does.
    If it `has_readers`, they are `NormedReader`s, which multiply its gain and bias into their weights rather than into
    the activations. `live_std`, [batch pos], is the σ of the last forward, with its graph: the auxiliary loss trains
    through it.

    Until a path begins to freeze, `live` may be set: the norm is then run as an ordinary one. Once every path is frozen
    and every class is merged, `constant` may be set: the norm is then folded into the readers' weights. Both only save
    time.
    """

    divisors: Sequence[Divisor]

    def __init__(
        self,
        norm: nn.Module,
        style: NormStyle,
        n_paths: int,
        classes: TokenClasses,
        std_mean: StdMean = "arithmetic",
        has_readers: bool = True,
    ) -> None:
        super().__init__()
        self.weight: Tensor = norm.weight  # type: ignore[assignment]
        self.bias: Tensor | None = getattr(norm, "bias", None)
        self.eps: float = getattr(norm, style.eps)
        self.style, self.has_readers = style, has_readers
        dtype = _statistics_dtype(self.weight.dtype)
        divisors = (Divisor(dtype, self.weight.device, std_mean) for _ in range(n_paths))
        self.divisors = nn.ModuleList(divisors)  # type: ignore[assignment]
        self.classes = classes
        self.live = self.constant = False
        self.guards = False
        """Whether the divisors may be guarded."""
        self.noise = 1.0
        """The largest factor by which outlier noise lengthens what is read of a token in training."""
        self.live_graph = False
        """Whether to keep the graph of the live std, for a penalty on it, even if the norm is ordinary or constant."""
        self.live_std: Float[Tensor, "batch pos"]
        self.ratios: list[Float[Tensor, "batch pos 1"]]
        """The first path's scale divided by each other path's, in the last forward."""

    @property
    def gain(self) -> Float[Tensor, " d"]:
        """The vector that multiplies the normalised vector."""
        return self.weight + self.style.gain_offset if self.style.gain_offset else self.weight

    @property
    def is_live(self) -> bool:
        """Whether to run as an ordinary norm. Never in a compiled model: each site that freezes would recompile it."""
        return not torch.compiler.is_compiling() and self.live

    def normalise(
        self, x: Float[Tensor, "batch pos d"]
    ) -> tuple[Float[Tensor, "batch pos d"], list[Float[Tensor, "batch pos 1"]]]:
        """Return x, centred for LayerNorm, divided by the first path's scale, and that scale divided by each other."""
        first, *others = self.divisors
        classes = self.classes.index
        frozen_part = first.frozen_part(classes)
        x = x.to(_statistics_dtype(x.dtype))
        guard = (first.least, first.held) if self.guards else (None, None)
        y, std = _Normalise.apply(x, frozen_part, first.alpha, self.eps, self.style.centred, *guard)
        self.live_std = std.squeeze(-1)
        if self.noise > 1 and self.training:
            y = y * self._draw_noise(std).pow(first.alpha)
        if self.guards:
            std = std + first.held * (std.detach() - std)  # the same number, with the gradient that is not held back
            return y, [first.scale(std, classes) / other.scale(std, classes) for other in others]
        return y, [std.pow(other.alpha - first.alpha) * frozen_part / other.frozen_part(classes) for other in others]

    def _draw_noise(self, std: Float[Tensor, "batch pos 1"]) -> Float[Tensor, "batch pos 1"]:
        """Draw a factor for each token: for one in 16 log-uniform from 1 to `noise`, for the others 1."""
        chosen, exponent = torch.rand(2, *std.shape, dtype=std.dtype, device=std.device)
        return torch.where(chosen < _NOISY, self.noise**exponent, 1.0)

    def ordinary(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """Return the output of the ordinary norm, computed by fused kernels. `live_std` then has no graph."""
        dtype = _statistics_dtype(x.dtype)
        wide, gain = x.to(dtype), self.gain.to(dtype)
        if self.style.centred:
            bias = None if self.bias is None else self.bias.to(dtype)
            y, _, reciprocal = torch.native_layer_norm(wide, x.shape[-1:], gain, bias, self.eps)
            self.live_std = reciprocal.detach().reciprocal().squeeze(-1)
        else:
            y = F.rms_norm(wide, x.shape[-1:], gain, self.eps)
            self.live_std = _std(wide.detach(), self.eps).squeeze(-1)
        return y.to(x.dtype)

    def forward(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """Return the input of the readers or, without readers, the normalised x times the gain plus the bias."""
        if self.has_readers:
            if self.is_live:
                y = self.ordinary(x)
                if self.live_graph:
                    self._measure(x)
                return y
            if self.constant:
                self._measure(x)
                return x
            y, self.ratios = self.normalise(x)
            return y.to(x.dtype)
        y = self.normalise(x)[0] * self.gain
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _measure(self, x: Float[Tensor, "batch pos d"]) -> None:
        """Record the live std, for the log or a penalty, although the output does not depend on it."""
        with torch.set_grad_enabled(self.live_graph and torch.is_grad_enabled()):
            x = x.to(_statistics_dtype(x.dtype))
            self.live_std = _std(_centre(x, self.style.centred), self.eps).squeeze(-1)


class NormedReader(nn.Module):
    """A linear module that reads a `FakeNorm`, and multiplies the norm's gain and bias into its own weights.

    It shares the parameters of `linear`, an `nn.Linear` or a `Conv1D`, under their names. Its output consists of
    `groups` groups of `len(paths)` equally wide parts, and `paths` gives the norm's path that each part belongs to.
    Within a group, the parts of the first path come first.
    """

    norm: FakeNorm

    def __init__(self, norm: FakeNorm, linear: nn.Module, paths: tuple[int, ...] = (0,), groups: int = 1) -> None:
        super().__init__()
        assert list(paths) == sorted(paths)
        self.__dict__["norm"] = norm  # a module of the model, but not of this one
        self.weight: Tensor = linear.weight  # type: ignore[assignment]
        self.bias: Tensor | None = linear.bias  # type: ignore[assignment]
        self.paths, self.groups, self.is_linear = paths, groups, isinstance(linear, nn.Linear)

    @property
    def matrix(self) -> Float[Tensor, "out d"]:
        """The weight in the orientation of `F.linear`."""
        return self._oriented(self.weight)

    def _oriented(self, weight: Float[Tensor, "_ _"]) -> Float[Tensor, "out d"]:
        return weight if self.is_linear else weight.T

    def forward(
        self, y: Float[Tensor, "batch pos d"], delta: Float[Tensor, "_ _"] | None = None
    ) -> Float[Tensor, "batch pos out"]:
        """Return norm(x)·W + b, each part with the scale of its path. `y` is the norm's output for x.

        `delta`, in the shape of the weight, is added to it by an adapter.
        """
        norm = self.norm
        matrix = self.matrix if delta is None else self._oriented(self.weight + delta)
        if norm.is_live:
            return F.linear(y, matrix, self.bias)
        bias = self.bias
        if norm.bias is not None:
            # A sum rather than a matrix product, which autocast would round.
            through = (norm.bias * matrix).sum(-1)
            bias = through if bias is None else bias + through
        matrix = norm.gain * matrix
        if norm.constant:
            if norm.style.centred:
                matrix = matrix - matrix.mean(-1, keepdim=True)
            return F.linear(y, (matrix / self._stds().unsqueeze(-1)).to(y.dtype), bias)
        if not any(self.paths):
            return F.linear(y, matrix, bias)
        # The ratios scale (x − μ)γW but not the bias: the product adds the first path's bias, the loop the others'.
        first = self.paths.count(0)
        biases = None if bias is None else bias.view(self.groups, len(self.paths), -1)
        first_bias = None if biases is None or not first else _zero_from(biases, first).flatten()
        z = F.linear(y, matrix, first_bias).unflatten(-1, (self.groups, len(self.paths), -1))
        parts = [z[..., :first, :]] if first else []
        for i in range(first, len(self.paths)):
            part, ratio = z[..., i : i + 1, :], norm.ratios[self.paths[i] - 1][..., None, None]
            scaled = part * ratio if biases is None else torch.addcmul(biases[:, i : i + 1], part, ratio)
            parts.append(scaled.to(z.dtype))
        return torch.cat(parts, dim=-2).flatten(-3)

    def _stds(self) -> Float[Tensor, " out"]:
        """Return the constant by which each output is divided."""
        of_parts = torch.stack([self.norm.divisors[path].frozen[0] for path in self.paths])
        width = len(self.matrix) // (self.groups * len(self.paths))
        return of_parts[:, None].expand(self.groups, -1, width).flatten()


def _zero_from(biases: Float[Tensor, "groups part width"], first: int) -> Float[Tensor, "groups part width"]:
    """Return `biases` with zeros from part `first` on."""
    return F.pad(biases[:, :first], (0, 0, 0, biases.shape[1] - first))
