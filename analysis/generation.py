"""What models write, greedily, from the same prompts: side by side, and how long they agree.

1. Prompts are the beginnings of pieces spread evenly over a text, or texts of one's own.
2. Every model goes on from each, the most probable token at a time, until end-of-text or so many new tokens.
3. What a model wrote is compared with what the reference did, token by token, and scored by the reference.

Greedy continuations part for good at the first difference, however near the two predictions were: how long they agree
tells less of faithfulness than the JSD does, and what they say after that is for reading.
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
"""How many prompts a text gives, how long they are, and how many tokens are written at most."""


def measure(
    models: Mapping[str, Any],
    tokens: Int[Tensor, "block pos"],
    *,
    prefix: str | None = None,
    new_tokens: int = NEW_TOKENS,
    reference: str = "original",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Let each model continue the text from ten places spread over the blocks. Returns what `measure_prompts` does.

    Where blocks begin with a `prefix`, so do the prompts.
    """
    blocks, width = tokens.shape
    longest = min(width, *(model.cfg.n_ctx for model in models.values()))
    length = max(1, min(PROMPT_TOKENS, longest // 2))
    starts = np.linspace(0, blocks * width, PROMPTS, endpoint=False).astype(int)
    # None goes beyond the end of its block, and places that coincide count once.
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
    """Let each model continue prompts, texts (no special token is added) or token ids.

    A text may be a chat, as `tokenizer.apply_chat_template(messages, tokenize=False)` writes it.

    Returns one row per model and prompt: prompt (its number), prompt_text, text, what the model wrote; new_tokens, how
    many that are; agreed, how many of them, from the first on, are the reference's; reference_loss, the mean
    cross-entropy of what it wrote under the reference, nats/token. Without a tokenizer texts are token ids.
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
    """Return what `measure` returns with one row per prompt: its text, and one column per model: what that wrote."""
    texts = frame.pivot(index=["prompt", "prompt_text"], columns="model", values="text")
    return texts[list(frame["model"].unique())].rename_axis(columns=None).reset_index()


@figures.of_text
def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot for each prompt of `measure` how many tokens agree, and the loss of the text under the reference."""
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
    """Return what a model writes after each prompt, to end-of-text and its context at most.

    Whole forwards, which every tool has: prompts are short. Those of one length go together, so that none is padded.
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
    """Return the mean cross-entropy of each continuation under a model, nats/token."""
    losses = []
    for prompt, own in zip(prompts, continuations, strict=True):
        tokens = torch.cat([prompt, torch.tensor(own, dtype=prompt.dtype)])[None].to(model.cfg.device)
        log_probs = model(tokens)[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        losses.append(-log_probs.gather(-1, tokens[0, len(prompt) :, None]).mean().item())
    return losses
