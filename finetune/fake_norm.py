"""The norm whose divisor can be frozen, and the only place with its arithmetic.

LayerNorm divides a token's centred residual vector by its live standard deviation σ = √(var + eps). RMSNorm is the same
without the centring: in what follows σ is then the root mean square, √(mean x² + eps). Here the scale is

    s = σ^(1−α) · σ̄^α

with σ̄ a constant: α = 0 is the live norm, α = 1 is a constant and linear in the residual vector (FakeLN of Heimersheim
2024, arXiv 2409.13710, section 2). α and σ̄ are buffers, so that freezing neither recompiles a compiled model nor waits
for the device. Tokens at position 0 and end-of-text tokens have constants of their own until these are merged into
the ordinary one.

While training, the scale may be guarded: it is then at least σ/κ, κ > 1, so that a token of uncommonly large σ leaves
the norm at most κ times as long as it would leave a live one. A gated MLP is quadratic in what it reads, and such
excesses multiply from block to block. The guard is lifted, κ = ∞, before the norms fold into weights.

So do gradients: what a live norm removes from them, the part along the vector that it divides, passes a constant, and
in a deep gated model grows a thousandfold on its way down. Under the guard that part may be held back: the forward
divides by a constant, the backward is a live norm's, and only a penalty on the std trains how long vectors are.

The norm in front of attention is read on two paths, QK and V, that freeze at different times. The scale is one number
a token, so it commutes with the weights: every product is taken of the vector scaled for QK, and what belongs to V is
rescaled, be it columns of a packed QKV or a Linear of its own.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

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
    least: Float[Tensor, ""]
    """1/κ, the least share of the live std that divides; 0 without a guard. Not saved: it follows from the step."""
    held: Float[Tensor, ""]
    """Which share of the gradient along a vector is held back, as a live norm does. Not saved either."""

    def __init__(self, dtype: torch.dtype, device: torch.device, std_mean: StdMean = "arithmetic") -> None:
        super().__init__()
        self._from_mean = STD_MEANS[std_mean][1]
        for name, value in (("std_sum", 0), ("std_count", 0), ("frozen", 1), ("merged", 0)):
            self.register_buffer(name, torch.full((len(CLASSES),), float(value), dtype=dtype, device=device))
        self.register_buffer("alpha", torch.zeros((), dtype=dtype, device=device))
        for name in ("least", "held"):
            self.register_buffer(name, torch.zeros((), dtype=dtype, device=device), persistent=False)

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

    def typical(self) -> Float[Tensor, "3"]:
        """Return what a live std is compared with, by class: the running mean, and the constant as far as it counts.

        NaN before the first step has been measured, unless the site is frozen.
        """
        return self.running_std().pow(1 - self.alpha) * self.constants().pow(self.alpha)

    def scale(
        self, std: Float[Tensor, "batch pos 1"], classes: Int[Tensor, "batch pos"], guarded: bool = True
    ) -> Float[Tensor, "batch pos 1"]:
        """Return what divides tokens with these live stds, with the guard or, not `guarded`, without."""
        scale = std.pow(1 - self.alpha) * self.frozen_part(classes)
        return torch.maximum(scale, std * self.least) if guarded else scale

    def frozen_part(self, classes: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos 1"]:
        """Return σ̄^α of each token: what the live part σ^(1−α) is to be multiplied by."""
        return self.constants().pow(self.alpha)[classes].unsqueeze(-1)


class NormStyle(NamedTuple):
    """What distinguishes the norms of families."""

    centred: bool = True
    """LayerNorm; False: RMSNorm."""
    gain_offset: float = 0.0
    """What is added to the weight: 1 in Gemma, where a norm multiplies by 1 + weight."""
    eps: str = "eps"
    """The attribute of the module."""


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def _std(centred: Float[Tensor, "batch pos d"], eps: float) -> Float[Tensor, "batch pos 1"]:
    """Return σ = √(mean square + eps) of vectors. A vector norm is an order faster than torch.var on the CPU."""
    norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    return (norm.square() / centred.shape[-1] + eps).sqrt()


def _centre(x: Float[Tensor, "*shape d"], centred: bool) -> Float[Tensor, "*shape d"]:
    return x - x.mean(-1, keepdim=True) if centred else x


def _guard(std: Tensor, c: Tensor, alpha: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Return c and α of the scale σ^(1−α)·c where it is at least σ/κ: there it is a live one, σ·(1/κ)."""
    acts = std * least > std.pow(1 - alpha) * c
    return torch.where(acts, least, c), torch.where(acts, 0.0, alpha)


class _Normalise(torch.autograd.Function):
    """Divide x, centred if `centred`, by s = σ^(1−α)·c; also return σ. Gradients in closed form, without temporaries.

    With y = (x − μ)/s, gradients g of y and h of σ, width d and C the centring (the identity under RMSNorm):
    dx = C(g/s) + y · [h·s/(d·σ) − (1−α)·s/σ² · mean(g·y)]. At α = 1 no live term is left. With a guard, c and α are
    those of `_guard` for `least` = 1/κ, and 1 − α·(1−η) takes the place of (1−α) for `held` = η.
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
    """A norm whose divisor can be frozen, read on one path or, as that in front of attention, on several (QK and V).

    It has a `Divisor` for each path. It takes over the parameters of `norm` and starts as that norm exactly. Where it
    `has_readers`, these are `NormedReader`s: they apply its gain and bias, which go into their weights and not into the
    activations. `live_std` holds the σ of the last forward, [batch pos], with its graph: the auxiliary loss trains
    through it.

    While no path has begun to freeze, `live` may be set: then the norm is an ordinary one. When every path is frozen
    and every class merged, `constant` may be set: then it disappears into the readers' weights. Both only save time.
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
        """Whether the divisors may have a guard."""
        self.live_graph = False
        """Whether an ordinary or a constant norm keeps the graph of its live std, for a penalty on it."""
        self.live_std: Float[Tensor, "batch pos"]
        self.ratios: list[Float[Tensor, "batch pos 1"]]
        """Of the last forward: the first path's scale over each other path's."""

    @property
    def gain(self) -> Float[Tensor, " d"]:
        """What the normalised vector is multiplied by."""
        return self.weight + self.style.gain_offset if self.style.gain_offset else self.weight

    @property
    def is_live(self) -> bool:
        """Whether it is run as an ordinary norm: never compiled, or each site that freezes would compile it again."""
        return not torch.compiler.is_compiling() and self.live

    def normalise(
        self, x: Float[Tensor, "batch pos d"]
    ) -> tuple[Float[Tensor, "batch pos d"], list[Float[Tensor, "batch pos 1"]]]:
        """Return x divided by the first path's scale, centred where it is LayerNorm, and that scale over each other."""
        first, *others = self.divisors
        classes = self.classes.index
        frozen_part = first.frozen_part(classes)
        x = x.to(_statistics_dtype(x.dtype))
        guard = (first.least, first.held) if self.guards else (None, None)
        y, std = _Normalise.apply(x, frozen_part, first.alpha, self.eps, self.style.centred, *guard)
        self.live_std = std.squeeze(-1)
        if self.guards:
            std = std + first.held * (std.detach() - std)  # the same number, with as much of its gradient as passes
            return y, [first.scale(std, classes) / other.scale(std, classes) for other in others]
        return y, [std.pow(other.alpha - first.alpha) * frozen_part / other.frozen_part(classes) for other in others]

    def ordinary(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """Return what the ordinary norm returns, in as few kernels as there are for it; `live_std` has no graph."""
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
        """Return what its readers take, or, without readers, x normalised, with gain and bias."""
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
        """Keep the live std for the log or a penalty, although the output does not depend on it."""
        with torch.set_grad_enabled(self.live_graph and torch.is_grad_enabled()):
            x = x.to(_statistics_dtype(x.dtype))
            self.live_std = _std(_centre(x, self.style.centred), self.eps).squeeze(-1)


class NormedReader(nn.Module):
    """A linear module that reads a `FakeNorm`: gain and bias of the norm go into its weights, not the activations.

    It takes over the parameters of `linear`, an `nn.Linear` or a `Conv1D`, by their names. Its output consists of
    `groups` times as many equally wide parts as `paths` has entries: `paths` says which path of the norm each part
    belongs to. Those of the first path come first.
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
        """The weight as `F.linear` takes it."""
        return self._oriented(self.weight)

    def _oriented(self, weight: Float[Tensor, "_ _"]) -> Float[Tensor, "out d"]:
        return weight if self.is_linear else weight.T

    def forward(
        self, y: Float[Tensor, "batch pos d"], delta: Float[Tensor, "_ _"] | None = None
    ) -> Float[Tensor, "batch pos out"]:
        """Return norm(x)·W + b, each part with the scale of its path, from what the norm returns of x.

        An adapter adds `delta` to the weight, in the weight's shape.
        """
        norm = self.norm
        matrix = self.matrix if delta is None else self._oriented(self.weight + delta)
        if norm.is_live:
            return F.linear(y, matrix, self.bias)
        bias = self.bias
        if norm.bias is not None:
            # Not a matrix product, which autocast would round.
            through = (norm.bias * matrix).sum(-1)
            bias = through if bias is None else bias + through
        matrix = norm.gain * matrix
        if norm.constant:
            if norm.style.centred:
                matrix = matrix - matrix.mean(-1, keepdim=True)
            return F.linear(y, (matrix / self._stds().unsqueeze(-1)).to(y.dtype), bias)
        if not any(self.paths):
            return F.linear(y, matrix, bias)
        # The ratios scale (x − μ)γW, never the bias: the first path's bias is added by the product, the others' after.
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
        """Return the constant that divides each output."""
        of_parts = torch.stack([self.norm.divisors[path].frozen[0] for path in self.paths])
        width = len(self.matrix) // (self.groups * len(self.paths))
        return of_parts[:, None].expand(self.groups, -1, width).flatten()


def _zero_from(biases: Float[Tensor, "groups part width"], first: int) -> Float[Tensor, "groups part width"]:
    """Return `biases` with zeros from part `first` on."""
    return F.pad(biases[:, :first], (0, 0, 0, biases.shape[1] - first))
