"""What holds for every analysis."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2LMHeadModel

from analysis import load_bridge, load_hooked, load_trio, palette

TL4 = version("transformer-lens").startswith("4")
TOOLS = {"bridge": load_bridge} if TL4 else {"bridge": load_bridge, "hooked": load_hooked}
"""What loads one model into TransformerLens, by its name as a `tool`."""
only_tl3 = pytest.mark.skipif(TL4, reason="TransformerLens 4 has no HookedTransformer; `make test-tl3` runs this")
TOKENS = torch.randint(23, (7, 11), generator=torch.Generator().manual_seed(0))
EOT = 0
TOKENS[2, 0] = TOKENS[4, 5] = EOT


def trio(make_gpt2: Callable[..., GPT2LMHeadModel], tool: str = "bridge") -> dict[str, Any]:
    """Three small random models, one LN-free."""
    return load_trio(make_gpt2(seed=1), make_gpt2(seed=2), make_gpt2(seed=3, frozen=True), tool=tool)


def assert_same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(
        found.reset_index(drop=True), expected.reset_index(drop=True), rtol=1e-4, atol=1e-5, check_exact=False
    )


def assert_keeps_contract(measure: Callable[..., pd.DataFrame], make_gpt2: Callable[..., GPT2LMHeadModel]) -> None:
    """Numbers depend neither on the batch size nor on the other models nor on the tool, and equal models have equal."""
    models = trio(make_gpt2)
    frame = measure(models, TOKENS)
    assert list(frame["model"].unique()) == list(models)
    for batch_size in (1, 3, 7):
        assert_same(measure(models, TOKENS, batch_size=batch_size), frame)
    fewer = ["original", "ln_free"]
    assert_same(measure({name: models[name] for name in fewer}, TOKENS), frame[frame["model"].isin(fewer)])
    twins = measure({"original": models["original"], "twin": models["original"]}, TOKENS)
    one, other = (twins[twins["model"] == name].drop(columns="model") for name in ("original", "twin"))
    pd.testing.assert_frame_equal(one.reset_index(drop=True), other.reset_index(drop=True))
    if not TL4:
        assert_same(measure(trio(make_gpt2, "hooked"), TOKENS), frame)


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were made inside and lived at once; tracemalloc does not see them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._live.values()))
        return result


def assert_flat_in_memory(measure: Callable[..., pd.DataFrame], make_gpt2: Callable[..., GPT2LMHeadModel]) -> None:
    """Four times as many blocks take no more memory; four times as many at once do."""
    models = {"original": trio(make_gpt2)["original"]}
    peaks = {}
    for blocks, batch_size in ((1, 1), (4, 1), (4, 4)):
        with Peak() as peak:
            measure(models, TOKENS[:blocks], batch_size=batch_size)
        peaks[blocks, batch_size] = peak.bytes
    assert peaks[4, 1] < 1.02 * peaks[1, 1]
    assert peaks[4, 4] > 2 * peaks[4, 1], "this can see memory grow"


def assert_plots_by_model(figure: go.Figure, models: list[str]) -> None:
    """Every model is in the legend once, in its colour; axes have titles; the figure outlives JSON."""
    shown = [trace for trace in figure.data if trace.showlegend is not False]
    assert list(dict.fromkeys(trace.legendgroup for trace in shown)) == models
    for trace in figure.data:
        assert palette.colour(trace.legendgroup) in (trace.marker.color, trace.line.color if "line" in trace else None)
    assert any(axis.title.text for axis in figure.select_yaxes())
    assert plotly.io.from_json(figure.to_json()) == figure
