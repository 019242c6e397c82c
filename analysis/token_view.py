"""What each model expected, token by token: a text to read, coloured by how the models differ on it."""

from typing import Any

import pandas as pd
from jaxtyping import Int
from torch import Tensor

from analysis.batches import forwards
from finetune.evaluate import js_divergence, losses


def measure(
    models: dict[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    reference: str = "original",
    top: int = 5,
    batch_size: int = 8,
) -> pd.DataFrame:
    """Measure each model at every token of `tokens` that has one before it, from which it is predicted.

    Returns:
        A row a model and token: model, block, position, token; loss, of predicting the token, and jsd, of the
        prediction to that of the model called `reference`, both in nats; tokens and probabilities, the likeliest
        `top`.
    """
    rows = []
    first = 0
    for batch, outputs in forwards(models, tokens, batch_size=batch_size, description="Token by token"):
        log_probs = {name: output.logits.float().log_softmax(-1) for name, output in outputs.items()}
        for name in models:
            loss = losses(log_probs[name], batch)
            jsd = js_divergence(log_probs[reference], log_probs[name])[:, :-1]
            likeliest = log_probs[name][:, :-1].topk(top)
            for block, position in [(b, p) for b in range(len(batch)) for p in range(batch.shape[1] - 1)]:
                rows.append(
                    {
                        "model": name,
                        "block": first + block,
                        "position": position + 1,
                        "token": batch[block, position + 1].item(),
                        "loss": loss[block, position].item(),
                        "jsd": jsd[block, position].item(),
                        "tokens": likeliest.indices[block, position].tolist(),
                        "probabilities": likeliest.values[block, position].exp().tolist(),
                    }
                )
        first += len(batch)
    return pd.DataFrame(rows)
