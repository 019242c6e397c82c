"""How a model reads the logit of a target from its final residual stream, and the effect of each component on it.

The final residual stream r of a token is a sum of components c: the embeddings, every head, every attention bias and
every MLP. The logit of a target is LN(r) · w + b, where w is the target's column of the unembedding. If the model
soft-caps its logits, like Gemma 2, this is the logit before, because a capped logit is not a sum.

1. The target is the next token, or the difference of two given tokens. For the next token, the mean over the vocabulary
   is subtracted from w, unless requested otherwise. The logit is then relative to the mean logit.
2. The DLA of c is its share at the scale of the full r: c · w / σ(r).
3. The direct effect of c is how much the logit loses when c is removed from r and the model's own final norm is applied
   again: logit(r) − logit(r − c).
4. No vector r − c is needed. With r, c and w centred, logit(r − c) = (r·w − c·w) / σ(r − c) + b, where
   d_model · σ²(r − c) = ‖r‖² − 2 r·c + ‖c‖² + d_model · eps: three dot products per component. For a head, c = z W_O,
   so c·w = z·(W_O w), c·r = z·(W_O r) and ‖c‖² = z (W_O W_Oᵀ) z. For RMSNorm nothing is centred.
5. If skips have gains, as in models of `load_hooked_blocks`, c is what is written times the gains of the skips after
   it. A layer without a skip blocks everything before it except what it reads, so earlier components are 0.
6. If there is a live norm between a head and the stream (Gemma 2), c is the head's share of the norm's output, at the
   scale by which the norm divides the whole attention output. The direct effect keeps that scale.

Activations have the model's dtype; everything from the final residual stream on is in float64.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis.batches import pieces
from analysis.stream import Component, Stream


class Effects(NamedTuple):
    """The effects of components on the logit of the target, in float64."""

    dla: Float[Tensor, "batch pos component"]
    direct_effect: Float[Tensor, "batch pos component"]


class Written:
    """What a component writes to the residual stream, in float64, and centred if the norm that reads it centres.

    For heads and neurons it is activations times weights; for other components it is a vector. Products with it are
    computed from activations, so the vectors of heads and neurons are formed only by `vectors`.
    """

    def __init__(
        self,
        stream: Stream,
        component: Component,
        cached: Callable[[str], Float[Tensor, "*token width"] | Float[Tensor, "*token part width"]],
    ) -> None:
        """`cached` returns activations by name, at any tokens."""
        gain = stream.skip_gain(component)
        self._W: Float[Tensor, "part d_in d_model"] | None = None
        if component.kind in ("head", "neuron"):
            self._a = cached(component.hook).double()
            W = stream.weight(component) * gain
            if component.kind == "neuron":
                self._a, W = self._a.unsqueeze(-1), W.unsqueeze(1)
            self._W = stream.centre(W.double())
        else:
            vectors = cached(component.hook) if component.hook else stream.weight(component)
            self._a = stream.centre((vectors * gain).double()).unsqueeze(-2)
        if component.scale:
            self._a = self._a / cached(component.scale).double().unsqueeze(-1)

    def dot(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token part"]:
        """Return the dot products of each part with the vectors `x`."""
        if self._W is None:
            return torch.linalg.vecdot(self._a, x.unsqueeze(-2))
        return torch.linalg.vecdot(self._a, (x @ self._W.flatten(0, 1).T).unflatten(-1, self._W.shape[:2]))

    def square(self) -> Float[Tensor, "*token part"]:
        """Return the squared norm of each part."""
        if self._W is None:
            return self._a.square().sum(-1)
        return torch.einsum("...ci,cij,...cj->...c", self._a, self._W @ self._W.mT, self._a)

    def vectors(self) -> Float[Tensor, "*token part d_model"]:
        """Return the vectors of all parts, which take much memory."""
        return self._a if self._W is None else torch.einsum("...ci,cij->...cj", self._a, self._W)

    def into(self, R: Float[Tensor, "d_model unit"]) -> Float[Tensor, "#part d_in unit"]:
        """Return the weights from the activations of each part to the units of `R`, whatever the prompt."""
        return R.unsqueeze(0) if self._W is None else self._W @ R

    def through(self, into: Float[Tensor, "#part d_in unit"], at: slice) -> Float[Tensor, "part _ unit"]:
        """Return what the units read from each part at some tokens, which have one axis, by the weights of `into`."""
        a = self._a[at] if self._a.ndim > 2 else self._a[None]  # a bias is the same at all tokens
        return a.transpose(0, 1) @ into


class Readout:
    """Reads the target of every token of a batch from one model's final residual stream, in float64."""

    def __init__(
        self,
        model: Any,
        tokens: Int[Tensor, "batch all_pos"],
        cache: Mapping[str, Tensor],
        pair: tuple[int, int] | None = None,
        centre_unembedding: bool = True,
    ) -> None:
        """The target of each token is the next token, which the last token lacks, or the difference of `pair`.

        `cache` must contain the final residual stream, and the activations of the components that are used later.

        Raises:
            ValueError: the weights of the final norm are not folded into the unembedding.
        """
        self._stream, self._cache = Stream(model), cache
        self._stream.require_folded_norm()
        self._targets = tokens[:, 1:] if pair is None else torch.full_like(tokens, pair[0])
        self._base = functools.partial(target_base, pair=pair, centre_unembedding=centre_unembedding)
        self.w = self._centred(model.W_U.T[self._targets].double() - self._base(model.W_U))
        self.b = model.b_U[self._targets].double() - self._base(model.b_U)
        self.r = self._centred(self.cached(self._stream.final))
        self._rw, self._rr = (torch.linalg.vecdot(self.r, x).unsqueeze(-1) for x in (self.w, self.r))

    def cached(self, name: str) -> Float[Tensor, "batch pos *shape"]:
        """Return an activation at the tokens that have a target."""
        return self._cache[name][:, : self._targets.shape[1]]

    def _centred(self, x: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
        return self._stream.centre(x.double())

    def read(self, normalised: Float[Tensor, "batch all_pos d_model"]) -> Float[Tensor, "batch pos"]:
        """Return the target's logit, given residual vectors after the final norm."""
        return torch.linalg.vecdot(normalised[:, : self._targets.shape[1]], self.w) + self.b

    def logit(self, logits: Float[Tensor, "batch all_pos vocab"]) -> Float[Tensor, "batch pos"]:
        """Return the target's logit, given the model's own logits before soft-capping."""
        logits = logits[:, : self._targets.shape[1]]
        return logits.gather(-1, self._targets.unsqueeze(-1)).squeeze(-1).double() - self._base(logits)

    def normalise(
        self, x: Float[Tensor, "batch pos d_model"]
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos 1"]]:
        """Return residual vectors normalised by the final norm, at their own scale, and that scale."""
        x = self._centred(x)
        scale = self._stream.scale(x.square().sum(-1, keepdim=True))
        return x / scale, scale

    def _effects(
        self,
        cw: Float[Tensor, "batch pos component"],
        cr: Float[Tensor, "batch pos component"],
        cc: Float[Tensor, "*#token component"],
    ) -> Effects:
        """Return the effects of components from their dot products with w, with r and with themselves."""
        scale = self._stream.scale(self._rr)
        without = (self._rw - cw) / self._stream.scale(self._rr - 2 * cr + cc)
        return Effects(cw / scale, self._rw / scale - without)

    def dla(self, component: Component) -> Float[Tensor, "batch pos component"]:
        """Return the DLA of `effects`, without computing the direct effect."""
        return Written(self._stream, component, self.cached).dot(self.w) / self._stream.scale(self._rr)

    def effects(self, component: Component) -> Effects:
        """Return the effects of a component, separately for each head or neuron.

        The effects of heads do not include the bias of attention, nor those of neurons the bias of the MLP.
        """
        written = Written(self._stream, component, self.cached)
        return self._effects(written.dot(self.w), written.dot(self.r), written.square())

    def components(
        self, logits: Float[Tensor, "batch all_pos vocab"], neurons: bool = False
    ) -> Iterator[tuple[str, int | None, Effects]]:
        """Yield (kind, layer, effects) of every term of the logit, of the logit, and of the residue (logit − sum).

        Neurons are not additional terms, because they are parts of their MLP, which includes its bias. `logits` are the
        model's own. The logit is that before soft-capping. Unlike DLA, direct effects do not sum to it in a model with
        norms.
        """
        dla = direct_effect = self.b
        for component in self._stream.components:
            effects = self.effects(component)
            yield component.kind, component.layer, effects
            dla, direct_effect = dla + effects.dla.sum(-1), direct_effect + effects.direct_effect.sum(-1)
            if neurons and component.kind == "mlp" and component.layer is not None:
                yield "neuron", component.layer, self.effects(self._stream.neurons[component.layer])
        yield "b_U", None, Effects(self.b.unsqueeze(-1), self.b.unsqueeze(-1))
        logit = self.logit(self._stream.uncapped(logits, self._cache[self._stream.final]))
        yield "logit", None, Effects(logit.unsqueeze(-1), logit.unsqueeze(-1))
        yield "residue", None, Effects((logit - dla).unsqueeze(-1), (logit - direct_effect).unsqueeze(-1))


def target_base(
    by_token: Float[Tensor, "*shape vocab"], pair: tuple[int, int] | None, centre_unembedding: bool
) -> Float[Tensor, "*shape"]:
    """Return what to subtract from the target's entry: the other token's, the mean over the vocabulary, or zero."""
    if pair is not None:
        return by_token[..., pair[1]].double()
    if not centre_unembedding:
        return torch.zeros_like(by_token[..., 0], dtype=torch.float64)
    rows = by_token.flatten(0, -2) if by_token.ndim > 1 else by_token[None]
    # On a CPU, mean copies its whole input to float64.
    means = [rows[piece].mean(-1, dtype=torch.float64) for piece in pieces(len(rows), rows.shape[-1], rows.device)]
    return torch.cat(means).view(by_token.shape[:-1])


def hook_names(model: Any, neurons: bool = False) -> list[str]:
    """Return the activations that `Readout.components` needs."""
    stream = Stream(model)
    written = [*stream.components, *(stream.neurons if neurons else ())]
    return [*dict.fromkeys(hook for component in written for hook in component.hooks), stream.final]
