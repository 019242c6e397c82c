"""How good models are on held-out blocks, and how far from a reference: CE, KL and JSD, in nats/token."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GPT2LMHeadModel

from finetune.text import Blocks

_LOGITS_AT_ONCE = 2**21
"""Numbers in one model's logits of one batch: few enough for a cache, and no result depends on it."""


def losses(
    log_probs: Float[Tensor, "batch pos vocab"], input_ids: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos-1"]:
    """Return the cross-entropy of each next token, nats."""
    return -log_probs[:, :-1].gather(-1, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)


def kl_divergence(p: Float[Tensor, "*token vocab"], q: Float[Tensor, "*token vocab"]) -> Float[Tensor, "*token"]:
    """Return KL(p ‖ q) of each token from log-probabilities, nats."""
    return (p.exp() * (p - q)).sum(-1)


def js_divergence(p: Float[Tensor, "*token vocab"], q: Float[Tensor, "*token vocab"]) -> Float[Tensor, "*token"]:
    """Return the Jensen-Shannon divergence of each token from log-probabilities, nats: from 0 to log 2."""
    mixture = torch.logaddexp(p, q) - np.log(2)
    return (kl_divergence(p, mixture) + kl_divergence(q, mixture)) / 2


def mean_and_error(values: Float[np.ndarray, " token"], documents: Int[np.ndarray, " token"]) -> tuple[float, float]:
    """Return the mean over tokens and its standard error, with documents as the independent draws.

    The linearised error of a ratio: with S_d the sum of a document's deviations from the mean, N tokens and D
    documents, √(D/(D−1) · Σ_d S_d²) / N. NaN for a single document.
    """
    mean = values.mean()
    sums = pd.Series(values - mean).groupby(documents).sum().to_numpy()
    if len(sums) == 1:
        return float(mean), float("nan")
    return float(mean), float(np.sqrt(len(sums) / (len(sums) - 1) * np.square(sums).sum()) / len(values))


@torch.inference_mode()
def measure_tokens(
    models: Mapping[str, GPT2LMHeadModel], blocks: Blocks, reference: str = "original"
) -> dict[str, dict[str, Float[np.ndarray, "block target"]]]:
    """Measure each model at every token of `blocks` that has a next one: model -> measure -> float64 values, nats.

    Measures are `loss`, and to the model called `reference` `kl`, KL(reference ‖ model), and `jsd`. The models share
    one device and are put in evaluation mode; log-probabilities are taken in float32.
    """
    models = {reference: models[reference].eval()} | {name: model.eval() for name, model in models.items()}
    device = models[reference].device
    size = max(1, _LOGITS_AT_ONCE // (blocks.blocks.shape[1] * models[reference].config.vocab_size))
    measured: dict[str, dict[str, list[Tensor]]] = {name: {"loss": [], "kl": [], "jsd": []} for name in models}
    for start in tqdm(range(0, len(blocks), size), desc="Measuring on held-out text", unit="batch", leave=False):
        batch = range(start, min(start + size, len(blocks)))
        input_ids = torch.stack([blocks[i]["input_ids"] for i in batch]).to(device)
        for name, model in models.items():
            log_probs = model(input_ids, use_cache=False).logits.float().log_softmax(-1)
            if name == reference:
                reference_log_probs = log_probs
            for measure, values in (
                ("loss", losses(log_probs, input_ids)),
                ("kl", kl_divergence(reference_log_probs, log_probs)[:, :-1]),
                ("jsd", js_divergence(reference_log_probs, log_probs)[:, :-1]),
            ):
                measured[name][measure].append(values.double().cpu())
    return {
        name: {measure: torch.cat(values).numpy() for measure, values in measures.items()}
        for name, measures in measured.items()
    }


def compare(
    models: Mapping[str, GPT2LMHeadModel], blocks: Blocks, reference: str = "original", control: str = "control"
) -> pd.DataFrame:
    """Compare models on held-out blocks, averaging over tokens.

    Returns a row a model: loss, kl and jsd to `reference`, and gap, the loss less that of the model called `control`
    (NaN without one), each in nats/token and with its standard error over documents, `…_error`; tokens; documents.
    """
    measured = measure_tokens(models, blocks, reference)
    documents = blocks.document_ids[:, :-1].ravel()
    rows = []
    for name in models:
        values = {measure: tokens.ravel() for measure, tokens in measured[name].items()}
        if control in models:
            values["gap"] = values["loss"] - measured[control]["loss"].ravel()
        row: dict[str, str | float] = {"model": name}
        for measure in ("loss", "gap", "kl", "jsd"):
            row[measure], row[f"{measure}_error"] = (
                mean_and_error(values[measure], documents) if measure in values else (float("nan"), float("nan"))
            )
        rows.append(row | {"tokens": documents.size, "documents": len(np.unique(documents))})
    return pd.DataFrame(rows)
