"""Measures of models on held-out blocks: CE, and KL and JSD to a reference, in nats/token."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from finetune.progress import progress
from finetune.text import Blocks

_LOGITS_AT_ONCE = 2**21
"""The maximum number of logits per model and batch, so that they fit into a CPU's cache. No result depends on it."""


def losses(
    log_probs: Float[Tensor, "batch pos vocab"], input_ids: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos-1"]:
    """Return the cross-entropy of each next token, in nats."""
    return -log_probs[:, :-1].gather(-1, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)


def kl_divergence(p: Float[Tensor, "*token vocab"], q: Float[Tensor, "*token vocab"]) -> Float[Tensor, "*token"]:
    """Return KL(p ‖ q) of each token from log-probabilities, in nats."""
    return (p.exp() * (p - q)).sum(-1)


def js_divergence(p: Float[Tensor, "*token vocab"], q: Float[Tensor, "*token vocab"]) -> Float[Tensor, "*token"]:
    """Return the Jensen-Shannon divergence of each token from log-probabilities, in nats: from 0 to log 2."""

    def kl_to_mixture(one: Tensor, other: Tensor) -> Tensor:
        # log mixture = one + softplus(other − one) − log 2, so the result is exactly 0 where the two are equal.
        return (one.exp() * (np.log(2) - F.softplus(other - one))).sum(-1)

    return (kl_to_mixture(p, q) + kl_to_mixture(q, p)) / 2


def mean_and_error(
    values: Float[np.ndarray, " draw"],
    documents: Int[np.ndarray, " draw"],
    weights: Float[np.ndarray, " draw"] | Int[np.ndarray, " draw"] | None = None,
) -> tuple[float, float]:
    """Return a weighted mean and its standard error, treating documents as independent samples.

    `values` are one per token, or means over `weights` tokens each. The error is the linearised error of a ratio. With
    S_d the sum of document d's deviations from the mean, N the sum of the weights and D the number of documents, it is
    √(D/(D−1) · Σ_d S_d²) / N, or NaN for a single document. If documents are pieces of one book, it is the error for
    that book rather than for books in general.
    """
    weights = np.ones_like(values) if weights is None else weights
    mean = np.average(values, weights=weights)
    sums = pd.Series(weights * (values - mean)).groupby(documents).sum().to_numpy()
    if len(sums) == 1:
        return float(mean), float("nan")
    return float(mean), float(np.sqrt(len(sums) / (len(sums) - 1) * np.square(sums).sum()) / weights.sum())


@contextlib.contextmanager
def float32_logits(
    unembedding: nn.Module, weight: Float[Tensor, "vocab d"], bias: Float[Tensor, " vocab"] | None = None
) -> Iterator[None]:
    """Make an unembedding return logits in at least float32, whatever the model's dtype.

    In bfloat16, logits near 65 have steps of 0.5. Such rounding errors exceed the differences between the models that
    are compared.
    """

    def product(_: nn.Module, given: tuple[Any, ...], __: Tensor) -> Tensor:
        return F.linear(given[0].to(wide), weight.to(wide), None if bias is None else bias.to(wide))

    wide = torch.promote_types(weight.dtype, torch.float32)
    hook = unembedding.register_forward_hook(product) if weight.dtype != wide else contextlib.nullcontext()
    with hook:
        yield


@torch.inference_mode()
def measure_tokens(
    models: Mapping[str, PreTrainedModel], blocks: Blocks, reference: str = "original"
) -> dict[str, dict[str, Float[np.ndarray, "block target"]]]:
    """Measure each model at every token of `blocks` that has a next one: model -> measure -> float64 values, in nats.

    The measures are `loss` and, relative to the model `reference`, `kl`, KL(reference ‖ model), and `jsd`. The models
    must be on the same device, and are put in evaluation mode. Logits and log-probabilities are computed in float32,
    whatever the models' dtype.
    """
    models = {reference: models[reference].eval()} | {name: model.eval() for name, model in models.items()}
    device = models[reference].device
    size = max(1, _LOGITS_AT_ONCE // (blocks.context * models[reference].config.vocab_size))
    measured: dict[str, dict[str, list[Tensor]]] = {name: {"loss": [], "kl": [], "jsd": []} for name in models}
    for start in progress(range(0, len(blocks), size), desc="Measuring on held-out text", unit="batch", leave=False):
        batch = range(start, min(start + size, len(blocks)))
        input_ids = torch.stack([blocks[i]["input_ids"] for i in batch]).to(device)
        for name, model in models.items():
            unembedding: Any = model.get_output_embeddings()
            with float32_logits(unembedding, unembedding.weight, unembedding.bias):
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


def measure_documents(
    models: Mapping[str, PreTrainedModel], blocks: Blocks, reference: str = "original"
) -> pd.DataFrame:
    """Measure each model on each document of `blocks`. Return one row per model and document.

    Columns: model; document; tokens, their number; loss, and kl and jsd to `reference`, means over tokens in nats/token
    (see `measure_tokens`); loss_max, the largest loss of a token, in nats.
    """
    measured = measure_tokens(models, blocks, reference)
    tokens = {"document": blocks.document_ids()[:, :-1].ravel()}
    frames = [
        pd.DataFrame(tokens | {measure: values.ravel() for measure, values in measured[name].items()})
        .groupby("document", as_index=False)
        .agg(
            tokens=("loss", "size"),
            loss=("loss", "mean"),
            kl=("kl", "mean"),
            jsd=("jsd", "mean"),
            loss_max=("loss", "max"),
        )
        for name in models
    ]
    return by_name(dict(zip(models, frames, strict=True)), "model")


def by_name(frames: Mapping[str, pd.DataFrame], column: str) -> pd.DataFrame:
    """Concatenate tables, with their names in a first column called `column`."""
    return pd.concat(frames, names=[column]).reset_index(column).reset_index(drop=True)


def compare(documents: pd.DataFrame, control: str = "control") -> pd.DataFrame:
    """Compare models by the results of `measure_documents`, averaged over tokens.

    Returns one row per model: loss; kl and jsd to the reference; gap, the loss minus that of the model `control` (NaN
    without one), each in nats/token and with its standard error over documents in `…_error`; loss_max, the largest loss
    of a token, in nats; tokens and documents, their numbers.
    """
    by_model = {name: frame.set_index("document") for name, frame in documents.groupby("model", sort=False)}
    rows = []
    for name, frame in by_model.items():
        if control in by_model:
            frame = frame.assign(gap=frame["loss"] - by_model[control]["loss"])
        row: dict[str, str | float] = {"model": str(name)}
        for measure in ("loss", "gap", "kl", "jsd"):
            row[measure], row[f"{measure}_error"] = (
                mean_and_error(frame[measure].to_numpy(), frame.index.to_numpy(), frame["tokens"].to_numpy())
                if measure in frame
                else (float("nan"), float("nan"))
            )
        whole = {"loss_max": frame["loss_max"].max(), "tokens": frame["tokens"].sum(), "documents": len(frame)}
        rows.append(row | whole)
    return pd.DataFrame(rows)
