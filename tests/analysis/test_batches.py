import pytest
import torch
from contract import TL4, TOKENS
from models import random_model

from analysis import load_bridge, load_hooked
from analysis.batches import forwards, pieces

HOOK = "blocks.1.mlp.hook_post"


@pytest.mark.parametrize("load", [load_bridge] if TL4 else [load_bridge, load_hooked])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_activations_without_logits(family, load):
    models = {"m": load(random_model(family))}
    whole, without, after = (
        [outputs["m"] for _, outputs in forwards(models, TOKENS, [HOOK], batch_size=3, unembed=unembed)]
        for unembed in (True, False, True)
    )
    assert [output.logits.shape[1:] for output in without] == [(0, 23)] * 3
    assert [output.logits.shape[1:] for output in after] == [(11, 23)] * 3
    for one, other in zip(whole, without, strict=True):
        assert torch.equal(one.cache[HOOK], other.cache[HOOK])


@pytest.mark.parametrize(("device", "most"), [("cpu", None), ("cuda", None), ("cpu", 70)])
def test_pieces_are_all_tokens_and_never_none(device, most):
    for vocabulary in (23, 50_257, 10**7):
        found = [range(1000)[piece] for piece in pieces(1000, vocabulary, device, most)]
        assert [i for piece in found for i in piece] == list(range(1000))
        assert all(len(piece) * vocabulary <= (most or 2**22) or len(piece) == 1 for piece in found)
