"""How a model reads a target off its final residual stream, and what each component of the stream does to it.

The final residual stream r of a token is a sum of components c: the embeddings, every head, every attention bias and
every MLP. The logit of a target is read off it as LN(r) · w + b, w being the target's column of the unembedding. Where
the model soft-caps its logits, as Gemma 2 does, that is the logit before: what is capped is not a sum any more.

1. The target is the next token, whose w is taken less its mean over the vocabulary unless asked otherwise (the logit
   then counts from the mean logit), or the difference of two given tokens.
2. The DLA of c is its share at the scale of the full r: c · w / σ(r).
3. The direct effect of c is what the logit loses when c is taken out of r and the final norm, as the model has it, is
   applied afresh: logit(r) − logit(r − c).
4. No vector r − c is made. With r, c and w centred, logit(r − c) = (r·w − c·w) / σ(r − c) + b, where
   d_model · σ²(r − c) = ‖r‖² − 2 r·c + ‖c‖² + d_model · eps: three dot products a component. That of a head is
   c = z W_O, so that c·w = z·(W_O w), c·r = z·(W_O r) and ‖c‖² = z (W_O W_Oᵀ) z. Under RMSNorm nothing is centred.
5. Where skips have gains, as those of `load_hooked_blocks` may, c is what is written times the gains of the skips after
   it. A layer without a skip lets nothing from before it through but what it reads: those components are 0.
6. Where a live norm lies between a head and the stream (Gemma 2), c is the head's share of what the norm returns, at
   the scale by which it divides the whole attention output. The direct effect keeps that scale.

Activations have the model's dtype; from the final residual stream on everything is float64.
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
    """What components do to the logit of the target, float64."""

    dla: Float[Tensor, "batch pos component"]
    direct_effect: Float[Tensor, "batch pos component"]


class Written:
    """What a component writes to the residual stream, in float64 and centred as the norm that reads it centres.

    It is activations times weights, of heads and neurons, and of the others a vector. All that is asked of it is linear
    in the activations: a vector of a head or neuron is made only by `vectors`.
    """

    def __init__(
        self,
        stream: Stream,
        component: Component,
        cached: Callable[[str], Float[Tensor, "*token width"] | Float[Tensor, "*token part width"]],
    ) -> None:
        """Take what `component` wrote from the activations that `cached` returns by name, of any tokens."""
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
        """Return the dot products of each part with vectors."""
        if self._W is None:
            return torch.linalg.vecdot(self._a, x.unsqueeze(-2))
        return torch.linalg.vecdot(self._a, (x @ self._W.flatten(0, 1).T).unflatten(-1, self._W.shape[:2]))

    def square(self) -> Float[Tensor, "*token part"]:
        """Return the squared norm of each part."""
        if self._W is None:
            return self._a.square().sum(-1)
        return torch.einsum("...ci,cij,...cj->...c", self._a, self._W @ self._W.mT, self._a)

    def vectors(self) -> Float[Tensor, "*token part d_model"]:
        """Return the vectors of the parts themselves, which are many."""
        return self._a if self._W is None else torch.einsum("...ci,cij->...cj", self._a, self._W)

    def into(self, R: Float[Tensor, "d_model unit"]) -> Float[Tensor, "#part d_in unit"]:
        """Return the weights from activations to what `R` reads of each part: no prompt changes them."""
        return R.unsqueeze(0) if self._W is None else self._W @ R

    def through(self, into: Float[Tensor, "#part d_in unit"], at: slice) -> Float[Tensor, "part _ unit"]:
        """Return what is read of each part at some tokens, of which there is one axis, by the weights of `into`."""
        a = self._a[at] if self._a.ndim > 2 else self._a[None]  # a bias is the same at all tokens
        return a.transpose(0, 1) @ into


class Readout:
    """How one model reads the target of every token of a batch off its final residual stream, in float64."""

    def __init__(
        self,
        model: Any,
        tokens: Int[Tensor, "batch all_pos"],
        cache: Mapping[str, Tensor],
        pair: tuple[int, int] | None = None,
        centre_unembedding: bool = True,
    ) -> None:
        """Take the target of each token: the next token, which the last one lacks, or the difference of `pair`.

        `cache` holds the final residual stream and the activations of the components that are asked for later.

        Raises:
            ValueError: a final norm whose weights are not folded into the unembedding.
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
        """Return the target's logit read off residual vectors that went through the final norm."""
        return torch.linalg.vecdot(normalised[:, : self._targets.shape[1]], self.w) + self.b

    def logit(self, logits: Float[Tensor, "batch all_pos vocab"]) -> Float[Tensor, "batch pos"]:
        """Return the target's logit among the model's own, before soft-capping."""
        logits = logits[:, : self._targets.shape[1]]
        return logits.gather(-1, self._targets.unsqueeze(-1)).squeeze(-1).double() - self._base(logits)

    def normalise(
        self, x: Float[Tensor, "batch pos d_model"]
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos 1"]]:
        """Return the final norm of any residual vectors at their own scale, and that scale."""
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

    def effects(self, component: Component) -> Effects:
        """Return the effects of a component, of heads and neurons one by one.

        The attention's bias is none of the heads', the MLP's none of the neurons'.
        """
        written = Written(self._stream, component, self.cached)
        return self._effects(written.dot(self.w), written.dot(self.r), written.square())

    def components(
        self, logits: Float[Tensor, "batch all_pos vocab"], neurons: bool = False
    ) -> Iterator[tuple[str, int | None, Effects]]:
        """Yield (kind, layer, effects) of everything that adds up to the logit, of that, and of what is left over.

        Neurons are in the sum as parts of their MLP, whose bias is in it too. The model's own `logits` are the sum to
        be reached, before soft-capping; unlike the DLA, the direct effects of a model with norms do not reach it.
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
    """Return what the target's entry counts from: the other token's, the mean over the vocabulary, or zero."""
    if pair is not None:
        return by_token[..., pair[1]].double()
    if not centre_unembedding:
        return torch.zeros_like(by_token[..., 0], dtype=torch.float64)
    rows = by_token.flatten(0, -2) if by_token.ndim > 1 else by_token[None]
    # On a CPU the mean makes a copy in float64 of all that it is taken of.
    means = [rows[piece].mean(-1, dtype=torch.float64) for piece in pieces(len(rows), rows.shape[-1])]
    return torch.cat(means).view(by_token.shape[:-1])


def hook_names(model: Any, neurons: bool = False) -> list[str]:
    """Return the activations that `Readout.components` needs."""
    stream = Stream(model)
    written = [*stream.components, *(stream.neurons if neurons else ())]
    return [*dict.fromkeys(hook for component in written for hook in component.hooks), stream.final]
