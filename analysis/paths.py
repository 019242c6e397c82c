"""The largest paths from the tokens of a prompt to one logit, through at most a few components.

With attention patterns, the gates of MLPs and the divisors of norms held fixed at a prompt (`graph.Held`), a model is
linear from its embeddings to the logit. It is a product of sums, which expands into a sum over paths: from the
embedding of a token or position, through heads and MLPs one after another, to the logit (Elhage et al. 2021, "A
Mathematical Framework for Transformer Circuits"). Each path is exact, and without norms it does not change when others
are removed. There are too many paths to enumerate, so a search follows only the largest.

1. A path is built from the logit down. A partial path reads the stream in a direction r. With an embedding e at its
   start, its value is e · r logits.
2. For all beginnings of a partial path, |e·r| ≤ ‖r‖ · U, where U is the length of the longest vector into which the
   remaining number of components can turn an embedding, at that place. For one component U is exact; for more it
   follows from spectral norms.
3. The partial path with the largest bound is expanded first. All of its extensions are computed at once: their values
   are kept if they are among the largest, and their bounds are added to the queue. The search ends when no bound
   exceeds the smallest kept value, so that the kept paths are certainly the largest, or after a number of steps.
4. The sum of all paths through at most that many components needs no enumeration: each component is applied to the sum
   of what was written through one component fewer.
"""

import heapq
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix

from analysis.graph import ROOT, Held
from analysis.logit_attribution import token_text
from analysis.stream import Component

STEPS = 2_000
"""The maximum number of partial paths to expand."""


@dataclass(frozen=True)
class Paths:
    """The largest paths to a logit, and the rest of the logit."""

    frame: pd.DataFrame
    """One row per path, the largest first. Columns: path, nodes as in `graph.Graph`; token and position, where it
    begins; components, their number; value, in logits."""
    within: float
    """The sum of all paths from tokens and positions through at most the given number of components, in logits."""
    remainder: float
    """The logit minus the bias of the unembedding and the sum of the paths in `frame`, in logits. It consists of
    smaller paths, longer paths, and paths that begin at a bias."""
    at_most: float
    """An upper bound on the size of paths that are not in `frame`, in logits. If the search is complete, it is the
    smallest size in `frame`, or 0 if there are no other paths."""
    is_complete: bool
    """Whether the search is complete, so that the paths are certainly the largest."""


class _End(NamedTuple):
    """The end of a path: from a point of the stream, where it reads, to the logit."""

    direction: Float[Tensor, " d_model"]
    point: str
    """The point of the stream where it reads."""
    position: int
    left: int
    """How many components may still precede it."""
    nodes: tuple[str, ...]


class _Layer(NamedTuple):
    """One layer with its pattern and gates held fixed, in float64."""

    heads: Component
    mlp: Component
    before_heads: str
    before_mlp: str
    W_V: Float[Tensor, "head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    W_in: Float[Tensor, "d_model neuron"]
    W_out: Float[Tensor, "neuron d_model"]
    pattern: Float[Tensor, "head pos source"]
    gate: Float[Tensor, "pos neuron"]


class _Linear:
    """A model at a prompt, as a linear map from embeddings to the logit."""

    def __init__(self, held: Held) -> None:
        self.held, stream = held, held.stream
        rows = [row for row, component in enumerate(held.components) if component.layer is None]
        self.labels = [held.components[row].kind for row in rows]
        self.sources = held.vectors[rows]
        self.layers = []
        for layer, (heads, neurons) in enumerate(zip(stream.heads, stream.neurons, strict=True)):
            values, into = held.readers[layer, "V"], held.readers[layer, "in"]
            W_O, W_out = (stream.weight(each).double() for each in (heads, neurons))
            W_V, W_in = (stream.read_weights(each)[0].movedim(1, 0).double() for each in (values, into))
            W_V, W_in = (stream.centre(W.mT).mT for W in (W_V, W_in))
            self.layers.append(
                _Layer(
                    heads,
                    next(c for c in stream.components if (c.kind, c.layer) == ("mlp", layer)),
                    values.point,
                    into.point,
                    W_V.repeat_interleave(len(W_O) // len(W_V), dim=0),
                    stream.centre(W_O),
                    W_in[0],
                    stream.centre(W_out),
                    held.pattern[layer][0].double(),
                    held.gate[layer][0].double(),
                )
            )
        points = dict.fromkeys([*stream.points, *(layer.before_mlp for layer in self.layers)])
        self.scales = {point: held.scale(point) for point in points}
        self.there = {point: {*stream.components_at(point)} for point in points}

    def attend(self, layer: _Layer, x: Float[Tensor, "*some pos d_model"]) -> Float[Tensor, "*some pos d_model"]:
        """Return the sum of what the heads of a layer write when they read `x`."""
        z = layer.pattern @ ((x / self.scales[layer.before_heads]).unsqueeze(-3) @ layer.W_V)
        return (z @ layer.W_O).sum(-3) / self.held.written_scale(layer.heads)

    def activate(self, layer: _Layer, x: Float[Tensor, "*some pos d_model"]) -> Float[Tensor, "*some pos d_model"]:
        """Return what the MLP of a layer writes when it reads `x`, without its bias."""
        post = (x / self.scales[layer.before_mlp]) @ layer.W_in * layer.gate
        return post @ layer.W_out / self.written_by_mlp(layer)

    def written_by_mlp(self, layer: _Layer) -> Float[Tensor, "pos 1"] | int:
        assert layer.heads.layer is not None
        return self.held.written_scale(self.held.stream.neurons[layer.heads.layer])

    def within(self, most: int) -> float:
        """Return the sum of all paths through at most `most` components."""
        x = dict.fromkeys(self.there, self.sources.sum(0))
        root = self.held.consumers[0].direction[-1] / self.scales[self.held.stream.final][-1]
        total = float(x[self.held.stream.final][-1] @ root)
        for _ in range(most):
            written: dict[Component, Tensor] = {}
            for layer in self.layers:
                written[layer.heads] = self.attend(layer, x[layer.before_heads])
                written[layer.mlp] = self.activate(layer, x[layer.before_mlp])
            x = {point: self._sum_at(point, written) for point in x}
            total += float(x[self.held.stream.final][-1] @ root)
        return total

    def _sum_at(self, point: str, written: dict[Component, Tensor]) -> Float[Tensor, "pos d_model"]:
        some = [vectors for component, vectors in written.items() if component in self.there[point]]
        return torch.stack(some).sum(0) if some else torch.zeros_like(self.sources[0])

    def bounds(self, most: int) -> list[dict[str, Float[Tensor, " pos"]]]:
        """Return the maximum length, at each point, of a vector that up to 1, 2, … components make of an embedding."""
        longest: dict[Component, Tensor] = {}
        for layer in self.layers:
            each = (self.sources / self.scales[layer.before_heads]).unsqueeze(-3) @ layer.W_V @ layer.W_O
            lengths = each.norm(dim=-1).amax(0)
            longest[layer.heads] = (layer.pattern * lengths.unsqueeze(1)).amax((0, 2))
            longest[layer.mlp] = self.activate(layer, self.sources).norm(dim=-1).amax(0)
            self._divide(layer, longest, heads=True)
        found = [self._longest_at(longest)]
        norms = [
            (
                FactoredMatrix(layer.W_V, layer.W_O).S[:, 0],
                torch.linalg.matrix_norm(layer.W_in, 2) * torch.linalg.matrix_norm(layer.W_out, 2),
            )
            for layer in (self.layers if most > 1 else ())
        ]
        for _ in range(1, most):
            further = {}
            for layer, (of_heads, of_mlp) in zip(self.layers, norms, strict=True):
                before = found[-1][layer.before_heads] / self.scales[layer.before_heads][:, 0]
                further[layer.heads] = (layer.pattern * before * of_heads[:, None, None]).amax((0, 2))
                before = found[-1][layer.before_mlp] / self.scales[layer.before_mlp][:, 0]
                further[layer.mlp] = layer.gate.abs().amax(-1) * before * of_mlp
                self._divide(layer, further, heads=True, mlp=True)
            longest = {component: torch.maximum(length, further[component]) for component, length in longest.items()}
            found.append(self._longest_at(longest))
        return found

    def _divide(self, layer: _Layer, lengths: dict[Component, Tensor], heads: bool = False, mlp: bool = False) -> None:
        """Divide by live norms between heads or MLPs and the stream, if there are any."""
        for component, scale, wanted in (
            (layer.heads, self.held.written_scale(layer.heads), heads),
            (layer.mlp, self.written_by_mlp(layer), mlp),
        ):
            if wanted and isinstance(scale, Tensor):
                lengths[component] = lengths[component] / scale[:, 0]

    def _longest_at(self, lengths: dict[Component, Tensor]) -> dict[str, Float[Tensor, " pos"]]:
        zero = torch.zeros_like(self.sources[0, :, 0])
        return {
            point: torch.stack([zero, *(length for c, length in lengths.items() if c in there)]).amax(0)
            for point, there in self.there.items()
        }

    def before(self, end: _End) -> list[tuple[Component, str, list[int], Float[Tensor, "part source d_model"]]]:
        """Return what can precede the end of a path: (component, point where it reads, positions, directions)."""
        made = []
        at, r = end.position, end.direction
        for layer in self.layers:
            if layer.heads in self.there[end.point]:
                scale = self.held.written_scale(layer.heads)
                reads = (r / (scale[at] if isinstance(scale, Tensor) else 1) @ layer.W_O.mT).unsqueeze(-2)
                reads = (reads @ layer.W_V.mT) / self.scales[layer.before_heads][: at + 1]
                reads = reads * layer.pattern[:, at, : at + 1, None]
                made.append((layer.heads, layer.before_heads, [*range(at + 1)], reads))
            if layer.mlp in self.there[end.point]:
                scale = self.written_by_mlp(layer)
                through = r / (scale[at] if isinstance(scale, Tensor) else 1) @ layer.W_out.T * layer.gate[at]
                reads = through @ layer.W_in.T / self.scales[layer.before_mlp][at]
                made.append((layer.mlp, layer.before_mlp, [at], reads.view(1, 1, -1)))
        return made


@torch.inference_mode()
def find(held: Held, count: int = 20, most: int = 3, *, steps: int = STEPS) -> Paths:
    """Find the `count` largest paths from the tokens of a prompt to its logit, through at most `most` components.

    Args:
        held: the model at the prompt, such as `graph.Graph.held`.
        count: the number of paths.
        most: the maximum number of heads and MLPs on a path. 0: only from the embeddings directly to the logit.
        steps: the maximum number of steps of the search. With many components it may not be complete: `Paths.at_most`
            bounds what may be missing.

    Raises:
        ValueError: `count` is below 1, or `most` is below 0.
    """
    if count < 1 or most < 0:
        raise ValueError(f"count is {count} and most is {most}; they must be at least 1 and at least 0.")
    linear, last, final = _Linear(held), len(held.prompt) - 1, held.stream.final
    bounds = linear.bounds(most) if most else []
    best: list[tuple[float, int, float, int, tuple[str, ...]]] = []
    number = itertools.count()

    def keep(values: Float[Tensor, "source"], position: int, nodes: tuple[str, ...]) -> None:
        for label, value in zip(linear.labels, values.tolist(), strict=True):
            entry = (abs(value), -next(number), value, position, (f"{label}@{position}", *nodes))
            (heapq.heappush if len(best) < count else heapq.heappushpop)(best, entry)

    root = _End(held.consumers[0].direction[-1] / linear.scales[final][-1], final, last, most, (ROOT,))
    keep(linear.sources[:, last] @ root.direction, last, root.nodes)
    line: list[tuple[float, int, _End]] = [(-torch.inf, next(number), root)] if most else []
    for _ in range(steps):
        smallest = best[0][0] if len(best) == count else 0.0
        if not line or -line[0][0] <= smallest:
            break
        end = heapq.heappop(line)[2]
        for component, point, positions, reads in linear.before(end):
            values = torch.einsum("psd,ksd->psk", reads, linear.sources[:, positions])
            lengths = reads.norm(dim=-1)
            limits = lengths * bounds[end.left - 2][point][positions] if end.left > 1 else torch.zeros_like(lengths)
            smallest = best[0][0] if len(best) == count else 0.0
            for part, source in ((values.abs().amax(-1) > smallest) | (limits > smallest)).nonzero().tolist():
                nodes = (f"{component.label(part)}@{end.position}", *end.nodes)
                keep(values[part, source], positions[source], nodes)
                if limits[part, source] > smallest:
                    further = _End(reads[part, source], point, positions[source], end.left - 1, nodes)
                    heapq.heappush(line, (-float(limits[part, source]), next(number), further))
    frame = pd.DataFrame(
        [
            {
                "path": " → ".join(nodes),
                "token": token_text(held.model, held.prompt[position]),
                "position": position,
                "components": len(nodes) - 2,
                "value": value,
            }
            for _, _, value, position, nodes in sorted(best, reverse=True)
        ]
    )
    smallest = best[0][0] if len(best) == count else 0.0
    at_most = max(smallest, -line[0][0] if line else 0.0)
    remainder = held.logit - held.bias - float(frame["value"].sum())
    return Paths(frame, linear.within(most), remainder, at_most, at_most <= smallest)
