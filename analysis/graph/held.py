"""A model at one prompt with patterns, gates and norms held fixed: what writes, what reads, and what flows between."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis.edges import Target, logit_side, run, target_logit
from analysis.readout import Written
from analysis.stream import Component, Reader, Stream

ROOT = "logit"
"""The label of the node that reads the logit."""


class Consumer(NamedTuple):
    """A component that reads the stream, at all positions."""

    row: int
    """Its row among the writers; −1 for the logit."""
    reader: Reader | None
    direction: Float[Tensor, "pos d_model"]
    """The direction in which it reads at each position, through all paths after it, without the attention pattern."""
    pattern: Float[Tensor, "pos source"] | None
    """The attention to each source position. None: it reads only its own position."""


class Held:
    """A model at one prompt, with patterns, gates and norms held fixed: its writers and readers."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Any,
        prompt: Int[Tensor, " pos"],
        target: Target | None = None,
        centre_unembedding: bool = True,
        neurons: int = 0,
    ) -> None:
        """Run the model on the prompt. The target is read at its end (None: the model's most likely token).

        `neurons` is the number of neurons, per MLP and position, that are separate nodes.

        Raises:
            NolnError: the model is one of `finetune.blocks`.
            ValueError: the weights of the final norm are not folded into the unembedding.
        """
        self.model, self.prompt, self.stream = model, prompt, Stream(model)
        self.centre_unembedding = centre_unembedding
        stream, cfg = self.stream, model.cfg
        self.readers = {(reader.layer, reader.part): reader for reader in stream.readers}
        written = (*stream.components, *stream.neurons)
        hooks = [*stream.points, *(hook for component in written for hook in component.hooks)]
        hooks += [self.readers[layer, "in"].hook for layer in range(cfg.n_layers)]
        hooks += [f"blocks.{layer}.attn.hook_pattern" for layer in range(cfg.n_layers)]
        logits, cache = run(model, prompt, hooks)
        self.target = int(logits[0, -1].argmax()) if target is None else target
        self.logit = float(self.read(logits, cache[stream.final]))
        first = self.target[0] if isinstance(self.target, tuple) else self.target
        self.probability = float(logits[0, -1].double().softmax(-1)[first])
        self.pattern = [cache[f"blocks.{layer}.attn.hook_pattern"] for layer in range(cfg.n_layers)]
        self.gate = []
        for layer, each in enumerate(stream.neurons):
            pre = cache[self.readers[layer, "in"].hook]
            # At a pre-activation of 0 nothing passes, whatever the gate. 0.5 is the limit for GELU and SiLU.
            self.gate.append(torch.where(pre == 0, 0.5, cache[each.hook] / torch.where(pre == 0, 1, pre)))
        self.labels: list[list[str]] = []
        self.components: list[Component] = []
        self._vectors: list[Tensor] = []
        self._values: dict[int, Tensor] = {}
        self.consumers: list[Consumer] = []
        self._cache = {hook: activation[0] for hook, activation in cache.items()}
        rows = {component: self._add_writer(component) for component in stream.components}
        self._read_backwards(rows, neurons)
        self.vectors: Float[Tensor, "row pos d_model"] = torch.stack(self._vectors)
        self.values: Float[Tensor, "row pos"] = torch.stack([self._values[row] for row in range(len(self.labels))])

    def read(
        self, logits: Float[Tensor, "batch pos vocab"], resid: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, " batch"]:
        """Return the target's logit at the end, before soft-capping."""
        uncapped = self.stream.uncapped(logits[:, -1:], resid[:, -1:])[:, 0]
        return target_logit(uncapped, self.target, self.centre_unembedding)

    def _add_writer(self, component: Component) -> slice:
        """Add the parts of a component as rows, and return their range."""
        vectors = Written(self.stream, component, self._cache.__getitem__).vectors()
        vectors = vectors.expand(len(self.prompt), *vectors.shape[-2:]).transpose(0, 1)
        first = len(self.labels)
        for part, vector in enumerate(vectors):
            self.labels.append([component.label(part)] * len(self.prompt))
            self.components.append(component)
            self._vectors.append(vector)
        return slice(first, len(self.labels))

    def _read_backwards(self, rows: dict[Component, slice], neurons: int) -> None:
        """Find, from the logit down, the direction in which each node reads, and the value of each node."""
        stream = self.stream
        side = logit_side(stream, self.target, self.centre_unembedding)
        end = torch.zeros_like(self._cache[stream.final], dtype=torch.float64)
        end[-1] = stream.centre(side.W[:, 0].double())
        self.consumers.append(Consumer(-1, None, end, None))
        self.bias = float(side.b)
        G = end / self.scale(stream.final)
        by_kind = {(component.kind, component.layer): part for component, part in rows.items()}
        for layer in reversed(range(self.model.cfg.n_layers)):
            into_mlp, into_values = self.readers[layer, "in"], self.readers[layer, "V"]
            after, G = G, G + self._read_mlp(layer, into_mlp, G, by_kind["mlp", layer].start, neurons)
            is_parallel = into_mlp.point == into_values.point
            between = after if is_parallel else G
            if ("b_O", layer) in by_kind:
                self._set_values(by_kind["b_O", layer], between)
            G = G + self._read_heads(layer, into_values, between, by_kind["head", layer])
        for kind in ("embed", "pos_embed"):
            if (kind, None) in by_kind:
                self._set_values(by_kind[kind, None], G)

    def _set_values(self, rows: slice, G: Float[Tensor, "pos d_model"]) -> None:
        for row in range(rows.start, rows.stop):
            self._values[row] = torch.linalg.vecdot(self._vectors[row], G)

    def scale(self, point: str) -> Float[Tensor, "pos 1"]:
        """Return the divisor of the norm at a point of the stream, or 1 without a norm."""
        x = self.stream.centre(self._cache[point].double())
        return self.stream.scale(x.square().sum(-1, keepdim=True))

    def written_scale(self, component: Component) -> Float[Tensor, "pos 1"] | int:
        """Return the divisor of a live norm between a component and the stream, or 1 without one."""
        return self._cache[component.scale].double() if component.scale else 1

    def _read_mlp(
        self, layer: int, reader: Reader, G: Float[Tensor, "pos d_model"], row: int, neurons: int
    ) -> Float[Tensor, "pos d_model"]:
        """Add an MLP and its most important neurons as consumers. Return the direction in which it reads the stream."""
        each = self.stream.neurons[layer]
        W_out = self.stream.weight(each).double()
        through = (G / self.written_scale(each)) @ W_out.T * self.gate[layer][0].double()
        W_in = self.stream.read_weights(reader)[0][:, 0].double()
        rest = through.clone()
        activation = self._cache[each.hook].double()
        worth = activation * (G / self.written_scale(each) @ W_out.T)
        for top in worth.abs().topk(min(neurons, len(W_out)), dim=-1).indices.T.unsqueeze(-1):  # one per position
            alone = torch.zeros_like(rest).scatter(1, top, rest.gather(1, top))
            rest = rest - alone
            written = activation.gather(1, top) / self.written_scale(each) * W_out[top[:, 0]]
            written = self.stream.centre(written)
            self._vectors[row] = self._vectors[row] - written
            self.labels.append([each.label(int(neuron)) for neuron in top])
            self.components.append(each)
            self._vectors.append(written)
            self._set_values(slice(len(self.labels) - 1, len(self.labels)), G)
            self.consumers.append(Consumer(len(self.labels) - 1, reader, self.stream.centre(alone @ W_in.T), None))
        self._set_values(slice(row, row + 1), G)
        self.consumers.append(Consumer(row, reader, self.stream.centre(rest @ W_in.T), None))
        return self.stream.centre(through @ W_in.T) / self.scale(reader.point)

    def _read_heads(
        self, layer: int, reader: Reader, G: Float[Tensor, "pos d_model"], rows: slice
    ) -> Float[Tensor, "pos d_model"]:
        """Add the heads of a layer as consumers, and return the direction in which their values read the stream."""
        heads = self.stream.heads[layer]
        W_O, W_V = self.stream.weight(heads).double(), self.stream.read_weights(reader)[0].double()
        self._set_values(rows, G)
        direction = torch.zeros_like(G)
        for head, row in enumerate(range(rows.start, rows.stop)):
            value = head * W_V.shape[1] // len(W_O)
            reads = (G / self.written_scale(heads)) @ W_O[head].T @ W_V[:, value].T
            pattern = self.pattern[layer][0, head].double()
            self.consumers.append(Consumer(row, reader, self.stream.centre(reads), pattern))
            direction += pattern.T @ self.consumers[-1].direction
        return direction / self.scale(reader.point)

    def sources(self, consumer: Consumer) -> Int[Tensor, " row"]:
        """Return the rows that a consumer reads."""
        point = self.stream.final if consumer.reader is None else consumer.reader.point
        there = self.stream.components_at(point)
        layers = {component.layer for component in there if component.kind == "mlp"}
        known = [c in there or (c.kind == "neuron" and c.layer in layers) for c in self.components]
        return torch.tensor(known).nonzero()[:, 0]

    def flows(self, consumer: Consumer, positions: Int[Tensor, " node"]) -> Float[Tensor, "node source seen"]:
        """Return the flows into a consumer at some positions, from each of its `sources`.

        A head sees all positions. Any other consumer sees only its own.
        """
        point = self.stream.final if consumer.reader is None else consumer.reader.point
        vectors = self.vectors[self.sources(consumer)] / self.scale(point)
        reads = consumer.direction[positions]
        if consumer.pattern is None:
            return torch.einsum("snd,nd->ns", vectors[:, positions], reads).unsqueeze(-1)
        return torch.einsum("spd,nd->nsp", vectors, reads) * consumer.pattern[positions].unsqueeze(1)

    def units(self, row: int, position: int) -> Float[Tensor, " neuron"]:
        """Return which neurons of its MLP belong to a row at a position, as ones and zeros."""
        of_layer = [
            r for r, c in enumerate(self.components) if c.kind == "neuron" and c.layer == self.components[row].layer
        ]
        alone = torch.zeros_like(self.gate[0][0, 0])
        for neuron in of_layer if self.components[row].kind == "mlp" else [row]:
            alone[int(self.labels[neuron][position].split("N")[-1])] = 1
        return 1 - alone if self.components[row].kind == "mlp" else alone

    def direct_effect(self, consumer: Consumer, position: int, row: int, source: int) -> float:
        """Return how much a node loses, along the direction in which it reads, when one source is removed for it."""
        point = self.stream.final if consumer.reader is None else consumer.reader.point
        x = self.stream.centre(self._cache[point][source].double())
        reads = consumer.direction[position]
        reads = reads if consumer.pattern is None else reads * consumer.pattern[position, source]
        before, after = ((y @ reads / self.stream.scale(y @ y)) for y in (x, x - self.vectors[row, source]))
        return float(before - after)
