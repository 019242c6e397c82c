"""Greedy continuations of the same prompts by several models: the texts, and for how long they agree.

1. Prompts are excerpts that are spread evenly over a text, or texts that the caller provides.
2. Every model continues each prompt with its most likely token, until end-of-text or a maximum number of new tokens.
3. A model's continuation is compared with the reference's, token by token, and scored by the reference.

Greedy continuations diverge for good at the first difference, however close the two predictions were. So the length of
the agreement says less about faithfulness than the JSD does. The text after it is for reading.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Int
from plotly.subplots import make_subplots
from torch import Tensor

from analysis import figures, palette
from finetune.progress import progress

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 10, 16, 24
"""The number of prompts from a text, their length, and the maximum number of new tokens."""


def measure(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    prefix: str | None = None,
    new_tokens: int = NEW_TOKENS,
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Let each model continue the text from ten places spread over the blocks. Returns the table of `measure_prompts`.

    If blocks begin with a `prefix`, so do the prompts.
    """
    blocks, width = tokens.shape
    longest = min(width, *(model.cfg.n_ctx for model in models.values()))
    length = max(1, min(PROMPT_TOKENS, longest // 2))
    starts = np.linspace(0, blocks * width, PROMPTS, endpoint=False).astype(int)
    # No prompt extends beyond the end of its block, and places that coincide are used once.
    places = dict.fromkeys((start // width, min(start % width, width - length)) for start in starts)
    prompts = [tokens[block, start : start + length] for block, start in places]
    if prefix is not None:
        prompts = [torch.cat([tokens[0, :1], prompt[:-1]]) for prompt in prompts]
    return measure_prompts(models, prompts, new_tokens=new_tokens, reference=reference, batch_size=batch_size)


def measure_prompts(
    models: Mapping[str, Any],
    prompts: Sequence[str | Int[Tensor, " pos"]],
    *,
    new_tokens: int = NEW_TOKENS,
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Let each model continue prompts, which are texts (no special token is added) or token ids.

    A text may be a chat, as returned by `tokenizer.apply_chat_template(messages, tokenize=False)`.

    Returns one row per model and prompt. Columns: prompt, its number; prompt_text; text, what the model wrote;
    new_tokens, their number; agreed, how many of them, from the first on, are the same as the reference's;
    reference_loss, the mean cross-entropy of the new tokens under the reference, in nats/token. Without a tokenizer,
    texts are token ids.
    """
    tokenizer = models[reference].tokenizer
    ids = [
        torch.tensor(tokenizer.encode(prompt, add_special_tokens=False)) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    end = getattr(tokenizer, "eos_token_id", None)
    written = {
        name: _continue(model, ids, new_tokens, end, batch_size, f"Writing with {name}")
        for name, model in models.items()
    }
    rows = []
    for name, continuations in written.items():
        losses = _losses(models[reference], ids, continuations)
        for i, (prompt, own, loss) in enumerate(zip(ids, continuations, losses, strict=True)):
            pairs = zip(own, written[reference][i], strict=False)
            agreed = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
            rows.append(
                {
                    "model": name,
                    "prompt": i,
                    "prompt_text": _text(tokenizer, prompt.tolist()),
                    "text": _text(tokenizer, own),
                    "new_tokens": len(own),
                    "agreed": len(own) if agreed is None else agreed,
                    "reference_loss": loss,
                }
            )
    return pd.DataFrame(rows)


def side_by_side(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the texts of `measure` in one row per prompt and one column per model."""
    texts = frame.pivot(index=["prompt", "prompt_text"], columns="model", values="text")
    return texts[list(frame["model"].unique())].rename_axis(columns=None).reset_index()


@figures.of_text
def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot the table of `measure`: for each prompt, how many tokens agree, and the loss under the reference."""
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    quantities = {
        "agreed": "Agreement with the reference<br>(tokens, from the first)",
        "reference_loss": "Loss under the reference<br>(nats/token)",
    }
    for row, (quantity, title) in enumerate(quantities.items(), start=1):
        for model, part in frame.groupby("model", sort=False):
            figure.add_bar(
                x=part["prompt"],
                y=part[quantity],
                name=model,
                legendgroup=model,
                marker={"color": palette.colour(str(model))},
                customdata=part["text"],
                hovertemplate="prompt %{x}: %{y:.3g}<br>%{customdata}",
                showlegend=row == 1,
                row=row,
                col=1,
            )
        figure.update_yaxes(title=title, row=row)
    return figure.update_xaxes(title="Prompt", row=2).update_xaxes(dtick=1)


def _text(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)


@torch.inference_mode()
def _continue(
    model: Any,
    prompts: Sequence[Int[Tensor, " pos"]],
    new_tokens: int,
    end: int | None,
    batch_size: int,
    description: str,
) -> list[list[int]]:
    """Return what a model writes after each prompt, until end-of-text or the end of its context.

    Each token takes a whole forward, which every tool supports and which is fast enough for short prompts. A batch
    contains prompts of one length, so none is padded.
    """
    written: dict[int, list[int]] = {}
    lengths = {i: len(prompt) for i, prompt in enumerate(prompts)}
    batches = [
        chosen[start : start + batch_size]
        for length in sorted(set(lengths.values()))
        for chosen in [[i for i in lengths if lengths[i] == length]]
        for start in range(0, len(chosen), batch_size)
    ]
    for batch in progress(batches, desc=description, unit="batch", leave=False):
        tokens = torch.stack([prompts[i] for i in batch]).to(model.cfg.device)
        length = tokens.shape[1]
        for _ in range(min(new_tokens, model.cfg.n_ctx - length)):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
            if end is not None and (tokens[:, length:] == end).any(-1).all():
                break
        for i, row in zip(batch, tokens[:, length:].tolist(), strict=True):
            written[i] = row[: row.index(end) + 1] if end in row else row
    return [written[i] for i in range(len(prompts))]


@torch.inference_mode()
def _losses(model: Any, prompts: Sequence[Int[Tensor, " pos"]], continuations: Sequence[list[int]]) -> list[float]:
    """Return the mean cross-entropy of each continuation under a model, in nats/token."""
    losses = []
    for prompt, own in zip(prompts, continuations, strict=True):
        tokens = torch.cat([prompt, torch.tensor(own, dtype=prompt.dtype)])[None].to(model.cfg.device)
        log_probs = model(tokens)[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        losses.append(-log_probs.gather(-1, tokens[0, len(prompt) :, None]).mean().item())
    return losses
