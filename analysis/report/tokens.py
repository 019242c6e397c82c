"""The token view: a text coloured by how the models differ at each token, with what each model expected."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from analysis import palette
from analysis.batches import predictions
from analysis.texts import Sample
from finetune.evaluate import js_divergence

TOKENS_SHOWN = 512
"""The number of tokens in the view, in two blocks."""


def measure(
    models: dict[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    reference: str = "original",
    top: int = 5,
    batch_size: int = 8,
) -> pd.DataFrame:
    """Measure each model at every token of `tokens` that has one before it.

    Returns:
        One row per model and token: model, block, position, token; loss (nats) of the token; jsd (nats) of the
        prediction to that of the model `reference`; tokens and probabilities of the `top` most likely tokens.
    """
    rows = []
    number = 0  # the index of the token among those that have one before them
    for targets, log_probs in predictions(models, tokens, batch_size):
        for name in models:
            loss = -log_probs[name].gather(-1, targets[:, None])[:, 0]
            jsd = js_divergence(log_probs[reference], log_probs[name])
            likeliest = log_probs[name].topk(min(top, log_probs[name].shape[-1]))
            for i, token in enumerate(targets.tolist()):
                block, position = divmod(number + i, tokens.shape[1] - 1)
                rows.append(
                    {
                        "model": name,
                        "block": block,
                        "position": position + 1,
                        "token": token,
                        "loss": loss[i].item(),
                        "jsd": jsd[i].item(),
                        "tokens": likeliest.indices[i].tolist(),
                        "probabilities": likeliest.values[i].exp().tolist(),
                    }
                )
        number += len(targets)
    return pd.DataFrame(rows)


def view(models: Mapping[str, Any], samples: Mapping[str, Sample], batch_size: int) -> dict[str, Any]:
    """Return the text of the token view, and the data that its script needs for each token."""
    name, sample = next(iter(samples.items()))
    length = min(sample.tokens.shape[1], TOKENS_SHOWN // 2)
    tokens = sample.tokens[[0, len(sample.tokens) // 2] if len(sample.tokens) > 1 else [0], :length]
    frame = measure(dict(models), tokens, batch_size=batch_size)
    decode = functools.cache(lambda token: models["original"].tokenizer.decode([token]))

    def per_token(model: str, column: str) -> list[Any]:
        """Return a column, with None at position 0 of each block, which is not predicted."""
        values = frame.loc[frame["model"] == model].sort_values(["block", "position"])[column].tolist()
        return [
            value
            for start in range(0, len(values), length - 1)
            for value in [None, *values[start : start + length - 1]]
        ]

    data = {}
    losses = per_token("original", "loss")
    for model in models:
        top = zip(per_token(model, "tokens"), per_token(model, "probabilities"), strict=True)
        data[model] = {
            "colour": palette.colour(model),
            "losses": per_token(model, "loss"),
            "loss": [None if a is None else a - b for a, b in zip(per_token(model, "loss"), losses, strict=True)],
            "jsd": per_token(model, "jsd"),
            "top": [None if ids is None else [[decode(i), p] for i, p in zip(ids, ps, strict=True)] for ids, ps in top],
        }
    compared = [model for model in models if model != "original"]
    scale = {
        measure: np.quantile([abs(x) for model in compared for x in data[model][measure] if x is not None], 0.99)
        for measure in ("loss", "jsd")
    }
    return {
        "sentence": f"{tokens.numel():,} tokens of {name}.",
        "compared": compared,
        "blocks": [[decode(token) for token in block] for block in tokens.tolist()],
        "data": {"models": data, "scale": scale},
    }
