import pytest
import torch
from contract import TOKENS, trio

from analysis import load_bridge
from analysis.readout import Readout, hook_names
from analysis.stream import Stream


@torch.no_grad()
def test_neurons_and_their_bias_are_their_mlp(make_gpt2):
    model = trio(make_gpt2)["ln_free"]
    _, cache = model.run_with_cache(TOKENS, names_filter=hook_names(model, neurons=True))
    readout, stream = Readout(model, TOKENS, cache), Stream(model)
    for neurons, mlp in zip(stream.neurons, [c for c in stream.components if c.kind == "mlp"], strict=True):
        b_out = (model.blocks[neurons.layer].mlp.b_out.double() * readout.w).sum(-1)
        written = readout.effects(neurons).dla.sum(-1) + b_out
        torch.testing.assert_close(written, readout.effects(mlp).dla[..., 0], rtol=1e-4, atol=1e-4)


def test_a_norm_with_weights_is_refused(make_gpt2, monkeypatch):
    model = load_bridge(make_gpt2())
    _, cache = model.run_with_cache(TOKENS)
    monkeypatch.setattr(model.cfg, "normalization_type", "LN")
    with pytest.raises(ValueError, match=r"of type LN;.*load_bridge"):
        Readout(model, TOKENS, cache)
