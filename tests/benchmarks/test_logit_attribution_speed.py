"""Seconds for DLA and direct effect of all heads at all positions, against TransformerLens's own route.

That route is `cache.stack_head_results`, the final LN applied to the residual stream without each head, and the product
with the target's column of the unembedding. Both start from the activations of one forward, whose seconds stand beside.
`python tests/benchmarks/test_logit_attribution_speed.py` does it at GPT-2 small's size, on CUDA where there is one.
"""

import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformers import GPT2Config, GPT2LMHeadModel

from analysis import load_bridge
from analysis.readout import Readout
from analysis.stream import Stream

SMALL = {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 2048}
ROUNDS = 3


def ours(model: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
    readout = Readout(model, tokens, cache, centre_unembedding=False)
    heads = [readout.effects(heads) for heads in Stream(model).heads]
    return tuple(torch.cat(effects, dim=-1) for effects in zip(*heads, strict=True))


def transformer_lens(model: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
    def read(normalised: Tensor) -> Tensor:
        return (normalised[..., :-1, :] * model.W_U.T[tokens[:, 1:]]).sum(-1)

    cache = ActivationCache(dict(cache.cache_dict), model)  # it keeps the results of heads
    heads = cache.stack_head_results()
    final = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    dla = read(cache.apply_ln_to_stack(heads))
    direct_effect = read(model.ln_final(final)) - read(model.ln_final(final - heads))
    return dla.movedim(0, -1), direct_effect.movedim(0, -1)


def seconds(function: Callable[[], Any]) -> float:
    measured = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        measured.append(time.perf_counter() - start)
    return statistics.median(measured)


@torch.inference_mode()
def measure(shape: dict[str, int], blocks: int, context: int) -> tuple[pd.DataFrame, float]:
    """A table of seconds, and the largest difference of the two routes over the largest effect."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    model = load_bridge(plain, device=device)
    tokens = torch.randint(shape["vocab_size"], (blocks, context), generator=generator).to(device)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(shape["n_layer"])]
    names += [f"blocks.{shape['n_layer'] - 1}.hook_resid_post", "ln_final.hook_scale"]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    difference = max(
        ((found - expected).abs().max() / expected.abs().max()).item()
        for found, expected in zip(ours(model, tokens, cache), transformer_lens(model, tokens, cache), strict=True)
    )
    routes = {
        "forward": lambda: model.run_with_cache(tokens, names_filter=names),
        "TransformerLens": lambda: transformer_lens(model, tokens, cache),
        "ours": lambda: ours(model, tokens, cache),
    }
    table = pd.DataFrame({"seconds": {route: seconds(function) for route, function in routes.items()}})
    table["tokens a second"] = tokens.numel() / table["seconds"]
    table["times ours"] = table["seconds"] / table.loc["ours", "seconds"]
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformer-lens"))
    print(f"\n{shape}, {blocks} × {context} tokens; {hardware}; {versions}\n{table.round(3)}", flush=True)
    print(f"largest difference: {difference:.2g} of the largest effect", flush=True)
    return table, difference


def test_the_numbers_are_those_of_transformer_lens():
    _, difference = measure(SMALL, blocks=2, context=128)
    assert difference < 1e-4


if __name__ == "__main__":
    measure({"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}, blocks=1, context=512)
