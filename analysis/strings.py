"""Correct tokenisation of texts in TransformerLens, for any tokenizer.

TransformerLens tokenises a text with special tokens, and removes the first token if that seems to be BOS. Here a text
is tokenised without special tokens, and BOS is prepended. So tokens that the tokenizer appends are never included, and
no token of the text is lost. A tokenizer needs neither an end-of-text token nor a padding token.
"""

import copy
from importlib.metadata import version
from typing import Any, Literal

import torch
import transformer_lens
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from finetune.errors import NolnError

TL4 = int(version("transformer-lens").split(".")[0]) >= 4


def around_text(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a text, found with a text that is not empty.

    Around an empty text, ids before it cannot be distinguished from ids after it.
    """
    for text in ("a", "A", "1", *(tokenizer.decode([token]) for token in range(min(1000, len(tokenizer))))):
        alone, whole = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
        if not alone or set(alone) & set(tokenizer.all_special_ids):
            continue
        for start in range(len(whole) - len(alone) + 1):
            if whole[start : start + len(alone)] == alone:
                return whole[:start], whole[start + len(alone) :]
    return [], []


def with_padding(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer that can pad, for a model with a vocabulary of `vocabulary` tokens.

    The first of these that exists is used for padding: the padding, end-of-text, unknown or last token.
    """
    made = copy.deepcopy(tokenizer)
    candidates = made.pad_token_id, made.eos_token_id, made.unk_token_id, min(len(made), vocabulary) - 1
    pad = next(token for token in candidates if token is not None and 0 <= token < vocabulary)
    if pad != made.pad_token_id:
        made.pad_token = made.convert_ids_to_tokens(pad)
    return made


class TextTokens:
    """Tokenises texts, for a model with a `cfg` and a `tokenizer`, which `take_tokenizer` sets."""

    tokenizer: PreTrainedTokenizerBase | None
    own_padding = True
    """Whether padding has its own token."""

    def take_tokenizer(self: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set the tokenizer to a copy of `tokenizer` that can pad, and pads on the right.

        BOS is the token that it puts before a text; else its BOS token; else, as in TransformerLens, end-of-text.
        TransformerLens's own method would load the tokenizer again by name, from the Hub if that is not a path.
        """
        vocabulary = self.cfg.d_vocab
        made = with_padding(tokenizer, vocabulary)
        made.padding_side = "right"  # on the left, HookedTransformer mistakes a block's first token for padding
        before, behind = around_text(tokenizer)
        bos = (before[-1] if before else None), tokenizer.bos_token_id, tokenizer.eos_token_id
        known = [token for token in bos if token is not None and token < vocabulary]
        made.bos_token = made.convert_ids_to_tokens(known[0]) if known else None
        self.own_padding = bool({tokenizer.pad_token_id, tokenizer.eos_token_id} & set(range(vocabulary)))
        self.tokenizer = made
        self.cfg.d_vocab = vocabulary
        self.cfg.tokenizer_prepends_bos = before[-1:] == [made.bos_token_id]
        if hasattr(self.cfg, "tokenizer_appends_eos"):
            self.cfg.tokenizer_appends_eos = behind[-1:] == [tokenizer.eos_token_id]

    def to_tokens(
        self: Any,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "text pos"]:
        """Return the tokens of a text or of a list of texts, as TransformerLens's own `to_tokens` should.

        Raises:
            NolnError: there is no tokenizer, or padding on the left could not be distinguished from text.
        """
        if self.tokenizer is None:
            raise NolnError("The model has no tokenizer. Put one in its directory, or run the model on token ids.")
        tokenizer, before = self.tokenizer, []
        if (
            self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        ) and tokenizer.bos_token_id is not None:
            before = [tokenizer.bos_token_id]
        texts = [input] if isinstance(input, str) else input
        rows = [before + tokenizer.encode(text, add_special_tokens=False) for text in texts]
        rows = [row[: self.cfg.n_ctx] for row in rows] if truncate else rows
        width, on_left = max(map(len, rows), default=0), (padding_side or tokenizer.padding_side) == "left"
        for i, row in enumerate(rows):
            padding = [tokenizer.pad_token_id] * (width - len(row))
            rows[i] = padding + row if on_left else row + padding
            if on_left and not self.own_padding and padding and row[:1] == padding[:1]:
                raise NolnError(
                    f"{texts[i]!r} begins with the token that is used for padding, because the tokenizer has no "
                    "padding token. Pad on the right, or run this text separately."
                )
        tokens = torch.tensor(rows, dtype=torch.long)
        return tokens.to(self.cfg.device) if move_to_device else tokens


class TextInput(TextTokens):
    """Overrides how a model of TransformerLens handles texts."""

    def generate(
        self: Any,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: Any = None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """Generate like TransformerLens's own `generate`; without an end-of-text token, until `max_new_tokens`."""
        stop_at_eos = self._stops(stop_at_eos, eos_token_id)
        given = max_new_tokens, stop_at_eos, eos_token_id, *arguments
        of_lens: Any = super()
        if isinstance(input, list) and not self.own_padding and options.get("return_type", "input") in ("input", "str"):
            return [of_lens.generate(text, *given, **options) for text in input]
        return of_lens.generate(input, *given, **options)

    def generate_stream(
        self: Any,
        input: Any = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        stop_at_eos: bool = True,
        eos_token_id: Any = None,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        """Generate like `generate`, but piece by piece."""
        stop_at_eos = self._stops(stop_at_eos, eos_token_id)
        given = max_new_tokens, max_tokens_per_yield, stop_at_eos, eos_token_id, *arguments
        of_lens: Any = super()
        return of_lens.generate_stream(input, *given, **options)

    def _stops(self: Any, stop_at_eos: bool, eos_token_id: Any) -> bool:
        known = eos_token_id, getattr(self.cfg, "eos_token_id", None), getattr(self.tokenizer, "eos_token_id", None)
        return stop_at_eos and (self.tokenizer is None or any(token is not None for token in known))


class TextBridge(TextInput, TransformerBridge):
    """A `TransformerBridge` that handles texts as `TextInput` does."""


if not TL4:

    class TextTransformer(TextInput, transformer_lens.HookedTransformer):
        """A `HookedTransformer` that handles texts as `TextInput` does."""


def taking_texts(model: Any) -> Any:
    """Make a model of TransformerLens handle texts as `TextInput` does, and return it."""
    model.__class__ = TextBridge if isinstance(model, TransformerBridge) else TextTransformer
    return model
