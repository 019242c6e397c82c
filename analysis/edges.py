"""The edges of a model: what every component writes into every reader of the residual stream, and whether it is exact.

DLA considers one reader, the unembedding. Queries, keys, values and the pre-activations of MLPs read the stream in the
same way: x ↦ N(x) · w + b, where N is the norm in front, w and b are weights that do not depend on the prompt, and x is
the sum of what components wrote before (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").

1. The contribution of a component c to a reader is its share at the scale of the full x: c · w / σ(x), with c centred
   if N centres. Contributions and b add up to the reader even with a norm, but then σ(x) is specific to this x.
2. The direct effect of c is how much the reader loses when c is removed from the stream in front of it and the norm, if
   there is one, is applied again: reader(x) − reader(x − c). Other readers are not affected, and nothing else is rerun.
3. NMAE = 100 · mean|contribution − direct effect| / mean|direct effect|, with means over tokens and the units of a
   reader (the width of a head, the neurons of an MLP). For the logit, it is the NMAE of DLA (Baroni et al. 2025, arXiv
   2507.02559). Without norms it is 0 %: edges are exact, whatever else is removed, and the same for every prompt.
4. An edge needs neither a vector x − c nor a forward: as for the logit (`analysis.readout`), c·w, c·x and c·c suffice.
   For a head, c = z W_O: the weights W_O w from head to reader are multiplied once, and then applied to all z.
5. An attention score is a product of two readers, and therefore a double sum: `measure_scores`.

If there is a live norm between a head or MLP and the stream (Gemma 2), its scale is held fixed, as in
`analysis.readout`. A gated MLP has two readers, its input and its gate. Activations have the model's dtype; everything
from the residual stream on is in float64.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from analysis import figures, palette
from analysis.batches import Forward, forwards, pieces
from analysis.readout import Readout, Written, hook_names, target_base
from analysis.stream import Component, Stream

KINDS = {"logit": "Logit", "query": "Queries", "key": "Keys", "value": "Values", "mlp": "MLPs"}
"""Kinds of readers, with their titles in figures."""
Target = int | tuple[int, int]
"""A token, or two tokens: the logit of the first minus that of the second."""

_READER = ("kind", "reader", "reader_layer", "reader_head")
_LOGIT = (("logit", "logit", None, None),)
_NUMBERS = ("reader_layer", "reader_head", "layer", "head")
_AT_ONCE = 2**17
"""How many contributions to compute at once: they fit into a core's cache, which makes it 1.5 times as fast."""
_NO_PART = ["bias", "reader", "residue"]
_SUMS = ["contribution_abs", "direct_effect_abs", "error_abs"]
_MAXIMA = ["contribution_max", "direct_effect_max"]


class Reading:
    """Readers of one point of the residual stream, at some tokens, in float64."""

    def __init__(
        self,
        stream: Stream,
        W: Float[Tensor, "d_model unit"],
        b: Float[Tensor, " unit"],
        x: Float[Tensor, "token d_model"],
    ) -> None:
        """`W` and `b` are the weight and bias of the readers, `x` the residual vectors that they read."""
        self._stream = stream
        self._x = stream.centre(x.double())
        self._xx = self._x.square().sum(-1, keepdim=True)
        self._W, self.b = W.double(), b.double()
        self.xw, self.scale = self._x @ self._W, stream.scale(self._xx)
        self._per_scale = 1 / self.scale
        self._read = self.xw * self._per_scale

    def products(
        self, written: Written
    ) -> Iterator[tuple[slice, Float[Tensor, "part token unit"], Float[Tensor, "part token 1"]]]:
        """Yield c·w and 1/σ(x − c) of a component's parts, one piece of the tokens at a time."""
        into = written.into(self._W)
        without = 1 / self._stream.scale(self._xx - 2 * written.dot(self._x) + written.square()).T.unsqueeze(-1)
        for at in pieces(len(self._x), len(into) * len(self.b), most=_AT_ONCE):
            yield at, written.through(into, at), without[:, at]

    def effects(
        self, written: Written
    ) -> Iterator[tuple[slice, Float[Tensor, "part token unit"], Float[Tensor, "part token unit"]]]:
        """Yield contributions and direct effects of a component's parts, one piece of the tokens at a time."""
        for at, cw, without in self.products(written):
            effect = (cw - self.xw[at]).mul_(without).add_(self._read[at])  # in place, to write less memory
            yield at, cw * self._per_scale[at], effect


def measure(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    batch_size: int = 8,
    pair: tuple[int, int] | None = None,
    centre_unembedding: bool = True,
) -> pd.DataFrame:
    """Measure how far contributions are from direct effects, by model and kind of reader.

    Arguments and errors are those of `measure_edges`, columns those of `summarise`.
    """
    return summarise(
        measure_edges(models, tokens, batch_size=batch_size, pair=pair, centre_unembedding=centre_unembedding)
    )


def summarise(edges: pd.DataFrame) -> pd.DataFrame:
    """Summarise the table of `measure_edges`: one row per model and kind of reader.

    Columns: model; kind, one of logit, query, key, value, mlp; nmae, the mean NMAE of the edges from heads, in %, as in
    `logit_attribution` for the logit (NaN if the kind reads no heads, in a model with one layer); nmae_all, the mean
    over the edges from all components, in %; nmae_pooled, 100 · Σ mean|contribution − direct effect| / Σ
    mean|direct effect| over these, in %; residue_relative, the largest |reader − sum of contributions| over tokens and
    units divided by the largest |reader|, the maximum over readers, dimensionless, and effect_residue_relative, the
    same with direct effects instead of contributions; edges, their number; tokens.
    """
    return _summarise(edges, ["model", "kind"])


def measure_layers(models: Mapping[str, Any], tokens: Int[Tensor, "block pos"], *, batch_size: int = 8) -> pd.DataFrame:
    """Measure the same as `measure`, but by layer of the reader: `summarise_layers` of `measure_edges`."""
    return summarise_layers(measure_edges(models, tokens, batch_size=batch_size))


def summarise_layers(edges: pd.DataFrame) -> pd.DataFrame:
    """Summarise the table of `measure_edges`: one row per model, kind of reader and layer of the reader.

    Columns: reader_layer, missing for the logit, and those of `summarise`.
    """
    return _summarise(edges, ["model", "kind", "reader_layer"])


def _summarise(edges: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    rows = []
    for values, frame in edges.groupby(keys, sort=False, dropna=False):
        parts = frame[~frame["component"].isin(_NO_PART)]
        of_reader, residue = (
            frame[frame["component"] == name].set_index("reader")[_MAXIMA] for name in ("reader", "residue")
        )
        relative = (residue / of_reader).max()
        rows.append(
            {
                **dict(zip(keys, values, strict=True)),
                "nmae": parts.loc[parts["component"] == "head", "nmae"].mean(),
                "nmae_all": parts["nmae"].mean(),
                "nmae_pooled": 100 * parts["error_abs"].sum() / parts["direct_effect_abs"].sum(),
                "residue_relative": relative["contribution_max"],
                "effect_residue_relative": relative["direct_effect_max"],
                "edges": len(parts),
                "tokens": frame["tokens"].iloc[0],
            }
        )
    return pd.DataFrame(rows)


def describe(frame: pd.DataFrame) -> str:
    """Describe how far sums of contributions and direct effects are from the readers, from the table of `measure`."""
    most = frame.groupby("model", sort=False)[["residue_relative", "effect_residue_relative"]].max()
    residues = [
        f"{row.Index}: {row.residue_relative:.2g} by contribution, {row.effect_residue_relative:.2g} by direct effect"
        for row in most.itertuples()
    ]
    return (
        "How far the sum over all components is from the value that is read, at the most, as a share of the largest "
        f"such value: {'; '.join(residues)}."
    )


@figures.of_text
def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure`: the NMAE of each kind of reader and model."""
    figure = go.Figure()
    for name, rows in frame.groupby("model", sort=False):
        figure.add_bar(
            name=name,
            legendgroup=name,
            x=rows["kind"].map(KINDS),
            y=rows["nmae"],
            marker_color=palette.colour(name),
            texttemplate="%{y:.3g}",
            textposition="outside",
        )
    figure.update_xaxes(title="What reads the output of heads")
    return figure.update_yaxes(title="Error of contributions (NMAE, %)")


@figures.of_text
def plot_layers(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure_layers`: NMAE over all components by layer of the reader, one panel per kind."""
    kinds = [kind for kind in KINDS if kind != "logit"]
    figure = make_subplots(1, len(kinds), shared_yaxes=True, column_titles=[KINDS[kind] for kind in kinds])
    for (name, kind), rows in frame[frame["kind"] != "logit"].groupby(["model", "kind"], sort=False):
        figure.add_scatter(
            name=name,
            legendgroup=name,
            showlegend=kind == kinds[0],
            x=rows["reader_layer"],
            y=rows["nmae_all"],
            line={"color": palette.colour(name)},
            row=1,
            col=kinds.index(kind) + 1,
        )
    figure.update_xaxes(title="Layer of the reader", dtick=max(1, int(frame["reader_layer"].max()) // 6))
    return figure.update_yaxes(title="Error of contributions of<br>all components (NMAE, %)", col=1)


@torch.inference_mode()
def measure_edges(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    batch_size: int = 8,
    pair: tuple[int, int] | None = None,
    centre_unembedding: bool = True,
) -> pd.DataFrame:
    """Measure the contribution and the direct effect of every component to every reader, over all tokens.

    Args:
        models: models by name, all on one device.
        tokens: blocks as in training.
        batch_size: blocks per forward. No result depends on it.
        pair: two token ids. The logit is then that of the first minus that of the second, at every position. None: the
            logit of the next token.
        centre_unembedding: whether to subtract from W_U its mean over the vocabulary. It cancels out in a pair.

    Returns one row per model, reader and component. Columns:

    - model; kind; reader, such as "L2H3 query", "L2 MLP", "logit"; reader_layer and reader_head if it has them;
    - component, one of embed, pos_embed, head, b_O, mlp (including its bias), bias (the reader's own), reader (the
      value that the others sum to) and residue (the difference); label, such as L2H3; layer and head if it has them;
    - contribution_abs, direct_effect_abs and error_abs: the means over tokens and units of the reader, in its own
      units, of |contribution|, |direct effect| and |their difference|; contribution_max and direct_effect_max: the
      maxima, only for reader and residue;
    - nmae, in %; tokens, their number.

    Raises:
        NolnError: a model is one of `finetune.blocks`.
        ValueError: the weights of the final norm are not folded into the unembedding.
    """
    tables: list[dict[str, np.ndarray]] = []
    for name, model in models.items():
        stream = Stream(model)
        sides = inner_sides(stream)
        sums, of_logit = [_Sums(side.readers, side.widths) for side in sides], _Sums(_LOGIT, (1,))
        hooks = dict.fromkeys([*hook_names(model), *(hook for side in sides for hook in (side.point, *side.hooks))])
        for batch, outputs in forwards({name: model}, tokens, list(hooks), batch_size, f"Edges of {name}"):
            logits, cache = outputs[name]
            readout = Readout(model, batch, cache, pair, centre_unembedding)
            for kind, layer, effects in readout.components(logits):
                kind = {"b_U": "bias", "logit": "reader"}.get(kind, kind)
                of_logit.add(Component(kind, layer, ""), *(values.flatten(0, 1).T.unsqueeze(-1) for values in effects))
            flat = {hook: activation.flatten(0, 1) for hook, activation in cache.items()}
            written = {component: Written(stream, component, flat.__getitem__) for component in stream.components}
            for side, total in zip(sides, sums, strict=True):
                reading = Reading(stream, side.W, side.b, flat[side.point])
                reader = torch.cat([flat[hook].flatten(1) for hook in side.hooks], dim=1).double()
                residue = torch.stack([reader - reading.b] * 2)
                for component in stream.components_at(side.point):
                    for at, contribution, effect in reading.effects(written[component]):
                        total.add(component, contribution, effect)
                        residue[0, at].sub_(contribution.sum(0))
                        residue[1, at].sub_(effect.sum(0))
                total.add(Component("bias", None, ""), *[reading.b.expand_as(reader).unsqueeze(0)] * 2)
                total.add(Component("reader", None, ""), *[reader.unsqueeze(0)] * 2)
                total.add(Component("residue", None, ""), *residue.unsqueeze(1))
        for total, count in (
            (of_logit, tokens.numel() - len(tokens) * (pair is None)),
            *((total, tokens.numel()) for total in sums),
        ):
            columns = total.columns(count)
            tables.append({"model": np.full(len(columns["label"]), name, object)} | columns)
    edges = _typed(pd.DataFrame({column: np.concatenate([table[column] for table in tables]) for column in tables[0]}))
    is_part = ~edges["component"].isin(_NO_PART)
    edges["nmae"] = (100 * edges["error_abs"] / edges["direct_effect_abs"]).where(is_part)
    return edges[["model", *edges.columns.drop(["model", "tokens"]), "tokens"]]


@torch.inference_mode()
def measure_prompt(
    models: Mapping[str, Any],
    prompt: Int[Tensor, " pos"],
    readers: Sequence[str] | None = None,
    *,
    position: int = -1,
    target: Target | None = None,
    centre_unembedding: bool = True,
    neurons: bool = False,
    sources: bool = False,
) -> pd.DataFrame:
    """Measure contribution and direct effect of every component to readers at one position of a prompt, unit by unit.

    Args:
        models: models by name.
        prompt: token ids.
        readers: names such as "logit", "L2H3 query", "L2 MLP", "L2N17" for one of its neurons, and for gated MLPs "L2
            MLP gate" and "L2N17 gate". None: all.
        position: the position of the readers.
        target: the target of the logit: a token, or two for the difference. None: the token after `position` or, at
            the end, the first model's most likely token.
        centre_unembedding: whether to subtract from W_U its mean over the vocabulary. It cancels out in a difference.
        neurons: also measure every neuron of every MLP before the reader. Neurons are parts of their MLP.
        sources: split heads by the positions that they attend to. The direct effect is that of removing one such part.

    Returns one row per model, reader, unit and component. Columns: model; kind, reader, reader_layer and reader_head,
    as in `measure_edges`; unit, the index in the head's width or of the MLP's neuron; component, label, layer and head,
    as there; neuron; source, the position, if `sources`; contribution and direct_effect, in units of the reader. The
    row `bias` contains the reader's own bias, and the row `reader` its value: the sum of all others except neurons.

    Raises:
        ValueError: there is no reader with one of the names; or as in `measure_edges`.
        NolnError: as in `measure_edges`.
    """
    position = range(len(prompt))[position]
    frames: list[pd.DataFrame] = []
    for name, model in models.items():
        stream = Stream(model)
        sides = inner_sides(stream)
        of_mlp = {("mlp", each.layer): each for each in stream.neurons} if neurons else {}
        hooks = [hook for side in sides for hook in (side.point, *side.hooks)] + [stream.final]
        hooks += [hook for written in (*stream.components, *of_mlp.values()) for hook in written.hooks]
        hooks += [hook for heads in stream.heads * sources for hook in _attention_hooks(heads)]
        logits, cache = run(model, prompt, hooks)
        if target is None:
            after = prompt[position + 1 :]
            target = int(after[0] if len(after) else logits[0, position].argmax())
        at = {hook: x[0, [position]] for hook, x in cache.items() if not hook.endswith("hook_pattern")}
        for side in (logit_side(stream, target, centre_unembedding), *sides):
            names = side.names
            wanted = np.ones(len(names), bool) if readers is None else _named(names, readers)
            if not wanted.any():
                continue
            names, units = names[wanted], torch.tensor(wanted)
            W, b = side.W[:, units], side.b[units]
            for component in stream.components_at(side.point):
                its_neurons = of_mlp.get((component.kind, component.layer))
                for each in (component,) if its_neurons is None else (component, its_neurons):
                    by_source = sources and each.kind == "head"
                    of = _by_source(each, position, cache) if by_source else at
                    reading = Reading(stream, W, b, at[side.point].expand(position + 1 if by_source else 1, -1))
                    effects = [found[1:] for found in reading.effects(Written(stream, each, of.__getitem__))]
                    both = [torch.cat(values, dim=1) for values in zip(*effects, strict=True)]
                    frames.append(_rows(names, each, *both).assign(model=name))
            if side.hooks:
                value = torch.cat([at[hook].flatten(1) for hook in side.hooks], dim=1)[:, units]
            else:
                uncapped = stream.uncapped(logits, cache[stream.final])[:, position]
                value = target_logit(uncapped, target, centre_unembedding).view(1, 1)
            for kind, values in {"bias": b.view(1, 1, -1), "reader": value.unsqueeze(0)}.items():
                frames.append(_rows(names, Component(kind, None, ""), *[values.double()] * 2).assign(model=name))
    if not frames:
        raise ValueError(
            f"No reader is called {', '.join(readers or ())}. Names are L0H0 query, L0 MLP, L0N0, logit and so on."
        )
    frame = pd.concat(frames, ignore_index=True)
    return frame[["model", *frame.columns.drop("model" if sources else ["model", "source"])]]


@torch.inference_mode()
def measure_scores(
    models: Mapping[str, Any], prompt: Int[Tensor, " pos"], layer: int, head: int, *, key: int, query: int = -1
) -> pd.DataFrame:
    """Decompose an attention score into pairs of components: which pairs make a head attend where it does.

    1. The query is Σ_c c · W_Q / σ(x) + b_Q over the components c at its position. The key is the same sum, with W_K
       and b_K, at its own position.
    2. If there are rotary embeddings, they rotate each term of both by the angles of its position.
    3. The score is the product of the two sums, times the head's scale: a sum Σ_c Σ_c′ over all pairs, including the
       biases b_Q and b_K. It is the score before soft-capping (in Gemma 2) and before the softmax over keys.

    With norms, this is valid for the σ of both positions. Without, the product of two components does not depend on
    what else there is at their positions.

    Args:
        models: models by name.
        prompt: token ids.
        layer: the head's layer.
        head: its index in the layer. With grouped queries, heads share keys.
        key: the position attended to, not after `query`.
        query: the position that attends.

    Returns one row per model and pair. Columns: model; layer; head; query and key, positions; query_label and
    key_label, components such as L0H3, embed or b_Q; contribution, in units of the score. Contributions sum to the
    score.

    Raises:
        ValueError: the key is after the query.
        NolnError: as in `measure_edges`; or the model has norms of queries and keys, after which a score is not a sum.
    """
    query, key = (range(len(prompt))[position] for position in (query, key))
    if key > query:
        raise ValueError(f"The key, position {key}, is after the query, position {query}, which cannot see it.")
    frames = []
    for name, model in models.items():
        stream = Stream(model)
        of_query, of_key = (r for r in stream.readers if r.layer == layer and r.kind in ("query", "key"))
        hooks = [hook for component in stream.components_at(of_query.point) for hook in component.hooks]
        hooks += [of_query.point, *stream.rotary_hooks(layer)]
        cache = run(model, prompt, hooks).cache
        sides = []
        for reader, position in ((of_query, query), (of_key, key)):
            at = {hook: activation[0, [position]] for hook, activation in cache.items() if hook in hooks}
            W, b = stream.read_weights(reader)
            group = head * len(b) // model.cfg.n_heads
            reading = Reading(stream, W[:, group], b[group], at[reader.point])
            labels, terms = [f"b_{reader.part}"], [reading.b.unsqueeze(0)]
            for component in stream.components_at(reader.point):
                for _, contribution, _ in reading.effects(Written(stream, component, at.__getitem__)):
                    labels += [component.label(i) for i in range(len(contribution))]
                    terms.append(contribution[:, 0])
            sides.append((labels, stream.rotate(layer, torch.cat(terms), position, cache)))
        (query_labels, q), (key_labels, k) = sides
        frame = pd.MultiIndex.from_product([query_labels, key_labels], names=["query_label", "key_label"])
        frame = frame.to_frame(index=False)
        frame["contribution"] = (q @ k.T * stream.score_scale(layer)).flatten().cpu().numpy()
        place = {"model": name, "layer": layer, "head": head, "query": query, "key": key}
        frames.append(pd.DataFrame({**place, **frame}))
    return pd.concat(frames, ignore_index=True)


class _Sums:
    """Sums, over tokens and the units of each reader, of the effects of components on the readers of one point."""

    def __init__(self, readers: Sequence[tuple[Any, ...]], widths: Sequence[int]) -> None:
        """`readers` and `widths` are those of a `Side`."""
        self._readers, self._widths = readers, list(widths)
        self._reader_of_unit = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))
        self._sums: dict[Component, Float[Tensor, "3 part reader"]] = {}
        self._maxima: dict[Component, Float[Tensor, "2 part reader"]] = {}

    def add(
        self,
        component: Component,
        contribution: Float[Tensor, "part token unit"],
        effect: Float[Tensor, "part token unit"],
    ) -> None:
        values = contribution.abs(), effect.abs(), (contribution - effect).abs_()
        of_units = torch.stack([value.sum(1) for value in values])
        sums = of_units.new_zeros(*of_units.shape[:2], len(self._widths))
        sums.index_add_(2, self._reader_of_unit.to(sums.device), of_units)
        self._sums[component] = sums + self._sums.get(component, 0)
        if component.kind in ("reader", "residue"):
            largest = torch.stack([value.amax(1) for value in values[:2]])
            maxima = torch.stack([units.amax(2) for units in largest.split(self._widths, dim=2)], dim=2)
            self._maxima[component] = maxima.maximum(self._maxima.get(component, maxima))

    def columns(self, tokens: int) -> dict[str, np.ndarray]:
        """Return the columns of a table with one row per component (one per head) and reader."""
        parts = [(component, part) for component, sums in self._sums.items() for part in range(sums.shape[1])]
        of_part = {
            "component": [component.kind for component, _ in parts],
            "label": [component.label(part) for component, part in parts],
            "layer": [component.layer for component, _ in parts],
            "head": [part if component.kind == "head" else None for component, part in parts],
        }
        count = len(self._widths)
        of_reader = dict(zip(_READER, zip(*self._readers, strict=True), strict=True))
        columns = {name: np.tile(np.array(values, dtype=object), len(parts)) for name, values in of_reader.items()}
        columns |= {name: np.repeat(np.array(values, dtype=object), count) for name, values in of_part.items()}
        means = torch.cat([*self._sums.values()], dim=1).cpu() / (tokens * torch.tensor(self._widths))
        unknown = {component: torch.full_like(sums[:2], torch.nan) for component, sums in self._sums.items()}
        maxima = torch.cat([*(unknown | self._maxima).values()], dim=1).cpu()
        values = torch.cat([means, maxima]).flatten(1).numpy()
        columns |= dict(zip((*_SUMS, *_MAXIMA), values, strict=True))
        return columns | {"tokens": np.full(len(parts) * count, tokens)}


def run(model: Any, prompt: Int[Tensor, " pos"], hooks: Iterable[str]) -> Forward:
    """Run a model on one prompt, a batch of one, and return its output with the activations of `hooks`."""
    tokens, names = prompt.unsqueeze(0).to(model.cfg.device), list(dict.fromkeys(hooks))
    return Forward(*model.run_with_cache(tokens, names_filter=names, return_cache_object=False))


class Side(NamedTuple):
    """The readers of one point of the stream: all heads there, or the MLP. Their units are concatenated."""

    point: str
    readers: tuple[tuple[str, str, int | None, int | None], ...]
    """Kind, name, layer and head of each reader. An MLP has no head, and the logit has no layer either."""
    widths: tuple[int, ...]
    """The number of units of each reader: the width of the head, or the neurons of the MLP."""
    W: Float[Tensor, "d_model unit"]
    b: Float[Tensor, " unit"]
    hooks: tuple[str, ...]
    """The activations that contain the units; none for the logit."""

    @property
    def names(self) -> pd.DataFrame:
        """One row per unit: the columns `_READER`, and unit, its index in the head or MLP."""
        units = [(*reader, i) for reader, width in zip(self.readers, self.widths, strict=True) for i in range(width)]
        return _typed(pd.DataFrame(units, columns=[*_READER, "unit"]))


def inner_sides(stream: Stream) -> list[Side]:
    """Return the readers inside the blocks, point by point, with heads and MLP in separate sides."""
    sides = []
    for (point, _), group in itertools.groupby(stream.readers, lambda reader: (reader.point, reader.kind == "mlp")):
        readers, rows, widths, weights, biases = list(group), [], [], [], []
        for reader in readers:
            W, b = stream.read_weights(reader)
            for head, its in enumerate(b):
                rows.append((reader.kind, reader.label(head), reader.layer, None if reader.kind == "mlp" else head))
                widths.append(len(its))
            weights.append(W.flatten(1))
            biases.append(b.flatten())
        hooks = tuple(reader.hook for reader in readers)
        sides.append(Side(point, tuple(rows), tuple(widths), torch.cat(weights, dim=1), torch.cat(biases), hooks))
    return sides


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table with its layers and heads as nullable integers."""
    return frame.astype({name: "Int64" for name in _NUMBERS if name in frame})


def logit_side(stream: Stream, target: Target, centre_unembedding: bool = True) -> Side:
    """Return the side that reads the logit of a target from the final stream.

    Raises:
        ValueError: the weights of the final norm are not folded into the unembedding.
    """
    stream.require_folded_norm()
    W, b = (target_logit(x, target, centre_unembedding) for x in (stream.model.W_U, stream.model.b_U))
    return Side(stream.final, _LOGIT, (1,), W.unsqueeze(1), b.view(1), ())


def target_logit(
    by_token: Float[Tensor, "*shape vocab"], target: Target, centre_unembedding: bool = True
) -> Float[Tensor, "*shape"]:
    """Return the entry of a target minus that of the other token or, if `centre_unembedding`, minus the mean of all."""
    pair = target if isinstance(target, tuple) else None
    first = target[0] if isinstance(target, tuple) else target
    return by_token[..., first].double() - target_base(by_token, pair, centre_unembedding)


def _named(names: pd.DataFrame, readers: Sequence[str]) -> np.ndarray:
    """Return which units belong to readers with these names, or are neurons with these names."""
    neuron = names["reader"].str.replace(" MLP", "N") + names["unit"].astype(str)
    gate = names["reader"].str.replace(" MLP gate", "N") + names["unit"].astype(str) + " gate"
    return (names["reader"].isin(readers) | neuron.isin(readers) | gate.isin(readers)).to_numpy()


def _attention_hooks(heads: Component) -> tuple[str, str]:
    """Return the activations that determine the sources of a layer's heads: pattern and values."""
    return tuple(heads.hook.replace("hook_z", hook) for hook in ("hook_pattern", "hook_v"))  # type: ignore[return-value]


def _by_source(heads: Component, position: int, cache: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the activations of heads at a position, split by source position, as if each source were a token."""
    pattern, values = (cache[hook][0] for hook in _attention_hooks(heads))
    attention, values = pattern[:, position, : position + 1].T.unsqueeze(-1), values[: position + 1]
    values = values.repeat_interleave(attention.shape[1] // values.shape[1], dim=1)
    scale = {heads.scale: cache[heads.scale][0, [position]].expand(position + 1, 1)} if heads.scale else {}
    return {heads.hook: attention * values} | scale


def _rows(
    names: pd.DataFrame,
    component: Component,
    contribution: Float[Tensor, "part source unit"],
    effect: Float[Tensor, "part source unit"],
) -> pd.DataFrame:
    """Return one row per part, source and unit. There is one source if parts are not split."""
    part, source, unit = np.indices(effect.shape).reshape(3, -1)
    frame = names.iloc[unit].reset_index(drop=True)
    frame["component"] = component.kind
    frame["label"] = np.array([component.label(i) for i in range(len(effect))], dtype=object)[part]
    frame["layer"] = pd.array([component.layer] * len(frame), "Int64")
    for kind, number in {"head": part, "neuron": part, "source": source}.items():
        is_known = effect.shape[1] > 1 if kind == "source" else component.kind == kind
        frame[kind] = pd.array(number if is_known else [None] * len(frame), "Int64")
    frame["contribution"], frame["direct_effect"] = (x.flatten().cpu().numpy() for x in (contribution, effect))
    return frame
