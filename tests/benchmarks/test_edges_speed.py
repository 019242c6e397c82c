"""Seconds and memory for all components into all readers of micro, against the same numbers from hooked forwards.

1. A forward per component: it takes the component out of what every norm of the model sees, by a hook before each, and
   puts back what attention and MLPs wrote in the clean run. Its cache then holds every query, key, value and
   pre-activation without the component and with nothing else changed: one forward serves all readers and positions.
2. A forward per component and point where the stream is read, as path patching is commonly done: it takes the component
   out at that point alone.

All three compute the same direct effects on the same tokens. Neither forwards nor edges can do with less than one value
per component, token and unit of a reader. Forwards spend on it a product as long as the model is wide, in float32;
edges one as long as a head, in float64, and some ten passes over the values, and they multiply the weights of heads and
readers once per batch. That is a few times less, at any width, so that 20 times is out of reach of the first.

`python tests/benchmarks/test_edges_speed.py` prints the table, with seconds and share of a graph of one prompt.
"""

import json
import sys
import time
from typing import Any

import pandas as pd
import torch
from machine import alone, describe, markdown, peak
from torch import Tensor

from analysis import edges, graph, load_bridge, load_trio
from analysis.readout import Written
from analysis.stream import Stream
from analysis.texts import read_text

TOKENS = 256
GRAPH_TOKENS = 24
NO_PART = ("bias", "reader", "residue")


def clean_cache(model: Any, tokens: Tensor) -> Any:
    stream = Stream(model)
    hooks = [hook for component in stream.components for hook in component.hooks]
    hooks += [f"blocks.{layer}.hook_{x}_out" for layer in range(model.cfg.n_layers) for x in ("attn", "mlp")]
    hooks += [*stream.points, *(reader.hook for reader in stream.readers)]
    return model.run_with_cache(tokens, names_filter=list(dict.fromkeys(hooks)), return_cache_object=False)[1]


def ablated(model: Any, tokens: Tensor, clean: Any, vectors: Tensor, points: set[str]) -> Any:
    """The cache of a forward that reads the stream without some vectors, and writes what it wrote with them."""
    handles, hooks = [], []
    for layer, block in enumerate(model.blocks):
        for norm, where in ((block.ln1, "pre"), (block.ln2, "mid")):
            if f"blocks.{layer}.hook_resid_{where}" in points:
                handles.append(norm.register_forward_pre_hook(lambda _, inputs: (inputs[0] - vectors,)))
        for x in ("attn", "mlp"):
            name = f"blocks.{layer}.hook_{x}_out"
            hooks.append((name, lambda _, hook, name=name: clean[name]))
    with model.hooks(fwd_hooks=hooks):
        names = [reader.hook for reader in Stream(model).readers]
        cache = model.run_with_cache(tokens, names_filter=names, return_cache_object=False)[1]
    for handle in handles:
        handle.remove()
    return cache


@torch.inference_mode()
def by_forwards(model: Any, tokens: Tensor, by_point: bool = False) -> dict[tuple[str, str], float]:
    """The mean |direct effect| of every component on every reader but the logit, in one forward or one per point."""
    stream, clean = Stream(model), clean_cache(model, tokens)
    found = {}
    for component in stream.components:
        written = Written(stream, component, clean.__getitem__).vectors()
        written = written.expand(*tokens.shape, *written.shape[-2:])
        readers = [reader for reader in stream.readers if component in stream.components_at(reader.point)]
        points = {reader.point for reader in readers}
        for part in range(written.shape[-2]):
            for some in [{point} for point in points] if by_point else [points] * bool(points):
                cache = ablated(model, tokens, clean, written[..., part, :].float(), some)
                for reader in (reader for reader in readers if reader.point in some):
                    effect = (clean[reader.hook] - cache[reader.hook]).abs()
                    means = effect.flatten(0, 1).mean(0)
                    means = means.mean(-1) if means.ndim == 2 else means.mean(-1, keepdim=True)
                    for head, mean in enumerate(means):
                        found[reader.label(head), component.label(part)] = float(mean)
    return found


def measure(model: Any, tokens: Tensor) -> tuple[pd.DataFrame, float]:
    """A table of seconds, and the largest relative difference from the numbers of forwards."""
    ways = {
        "measure_edges": lambda some: edges.measure_edges({"m": model}, some),
        "a forward per component": lambda some: by_forwards(model, some),
        "a forward per component and point": lambda some: by_forwards(model, some, by_point=True),
    }
    rows, results = {}, []
    for way, run in ways.items():
        run(tokens[:, :8])  # what is imported and compiled once
        start, used = time.perf_counter(), time.process_time()
        results.append(run(tokens))
        rows[way] = {"seconds": time.perf_counter() - start, "CPU seconds": time.process_time() - used}
    frame, *others = results
    found = frame.set_index(["reader", "label"])["direct_effect_abs"].to_dict()
    scale = frame[frame["label"] != "reader"].groupby("reader")["direct_effect_abs"].max()
    difference = max(abs(found[key] - value) / scale[key[0]] for each in others for key, value in each.items())
    assert all({*each} == {key for key in found if key[0] != "logit" and key[1] not in NO_PART} for each in others)
    table = pd.DataFrame(rows).T
    table["times ours"] = table["CPU seconds"] / table["CPU seconds"].iloc[0]
    return table, difference


def test_the_numbers_are_those_of_forwards():
    for name in ("micro", "micro-ln-free"):
        model = load_bridge(name)
        tokens = read_text("books-report", model, 16, context=16).tokens
        _, difference = measure(model, tokens)
        assert difference < 1e-4


def test_all_edges_of_a_context_in_little_memory():
    assert alone(__file__, "edges")["MiB"] < 2048


def one(what: str) -> dict[str, float]:
    """What all edges of one context, or the graphs of one prompt and their interventions, take."""
    models = load_trio("micro", None, "micro-ln-free")
    model = models["ln_free"]
    tokens = read_text("books-report", model, TOKENS).tokens
    start = time.perf_counter()
    if what == "edges":
        edges.measure_edges({"ln_free": model}, tokens)
    else:
        found = graph.build(model, tokens[0, :GRAPH_TOKENS])
        if what == "interventions":
            graph.intervene(found)
    return {"seconds": time.perf_counter() - start, "MiB": peak("cpu")}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(one(sys.argv[1])))
    else:
        micro = load_bridge("micro-ln-free")
        block = read_text("books-report", micro, TOKENS).tokens
        speed, apart = measure(micro, block)
        print(f"{describe('cpu')}\n\n{markdown(speed, 'all edges of 256 tokens')}\n\ndifference {apart:.2g}\n")
        rows = {name: alone(__file__, name) for name in ("edges", "graph", "interventions")}
        print(markdown(pd.DataFrame(rows).T, "by itself"))
