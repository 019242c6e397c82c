"""Cover: blocks of tokens that need not be text, on which the LN-free model is trained to match the original.

A constant is right for the tokens and contexts that it was trained on. One text contains few of those that other texts
contain. A next-token target needs text, but the original's predictions are available for any sequence of tokens.

Count the blocks of a run from 0, starting at the beginning of `cover_span`. Block i is cover if and only if
⌊(i+1)·share⌋ > ⌊i·share⌋: with a share of 0.05, one block in twenty, evenly spread. Cover replaces the run's text at
its position, and is a function of that text and of a generator seeded with the run's seed and the position. So all
other blocks are the same as the control's, and a run that is resumed or shared by several processes sees the same
cover.
"""

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from finetune.recipe import Recipe, RecipeError
from finetune.text import Blocks, StreamedBlocks

_COUNTED_BLOCKS = 4096
"""The maximum number of blocks whose tokens `unigram` counts: evenly spaced ones, or the first ones of a stream."""
_LONGEST_PERIOD = 32
_SHORTEST_RUN = 4


class Cover:
    """Determines which blocks of a run are cover, and draws their tokens."""

    def __init__(
        self,
        recipe: Recipe,
        token_ids: Int[np.ndarray, " id"],
        text: Blocks | StreamedBlocks,
        first_token_id: int | None = None,
    ) -> None:
        """`token_ids` are those of the tokenizer; `text` is the training text, whose unigrams are counted if needed.

        `first_token_id` is the token with which prompts begin.

        Raises:
            RecipeError: the recipe has cover of the kind prompt, but there is no such token.
        """
        if "prompt" in recipe.cover_kinds and first_token_id is None:
            raise RecipeError(
                "cover_kinds has prompt, but the tokenizer has neither a beginning-of-sequence nor an end-of-text "
                "token. Remove prompt from cover_kinds."
            )
        self._first_token_id = first_token_id
        self._seed, self._kinds, self._ids = recipe.seed, recipe.cover_kinds, token_ids
        self._share = Fraction(str(recipe.cover))  # exactly the decimal in the recipe, not the nearest binary number
        self._first, self._end = (math.floor(part * recipe.steps) * recipe.batch for part in recipe.cover_span)
        unigrams = any(kind.startswith("unigram") for kind in recipe.cover_kinds)
        self._counts = _count(text, token_ids) if unigrams else np.ones(len(token_ids))
        self._kept = 0 if text.prefix is None else 1

    def number(self, position: int) -> int | None:
        """Return the index, from 0, of the cover block at a position of the run, or None if text is there."""
        if not self._first <= position < self._end:
            return None
        before, after = (math.floor((position - self._first + i) * self._share) for i in (0, 1))
        return before if after > before else None

    def at(self, position: int, block: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the run's block at a position whose text is `block`: its `input_ids`, and whether they are cover."""
        number = self.number(position)
        if number is not None:
            kind = self._kinds[number % len(self._kinds)]
            prefix, text = np.split(block["input_ids"].numpy(), [self._kept])
            drawn = self.draw(kind, text, np.random.default_rng([self._seed, position]))
            block = {"input_ids": torch.from_numpy(np.concatenate([prefix, drawn]))}
        return block | {"is_cover": torch.tensor(number is not None)}

    def over(self, blocks: Dataset[dict[str, Tensor]]) -> Dataset[dict[str, Tensor]]:
        """Return the blocks of a run, given in order, with some of them replaced by cover."""
        return _CoveredStream(blocks, self) if isinstance(blocks, IterableDataset) else _Covered(blocks, self)

    def draw(self, kind: str, text: Int[np.ndarray, " pos"], rng: np.random.Generator) -> Int[np.ndarray, " pos"]:
        """Draw a block of cover to replace a block of text. `Recipe.cover_kinds` describes the kinds."""
        name, _, number = kind.partition("-")
        match name:
            case "text":
                return text
            case "prompt":
                return np.concatenate([[self._first_token_id], text[:-1]]).astype(text.dtype)
            case "uniform":
                return rng.choice(self._ids, len(text))
            case "unigram":
                weights = self._counts ** (1 / float(number or 1))
                return rng.choice(self._ids, len(text), p=weights / weights.sum())
            case "shuffled":
                return rng.permutation(text)
            case "corrupted":
                part = float(number) if number else rng.random()
                return np.where(rng.random(len(text)) < part, self.draw("uniform", text, rng), text)
            case "renamed":
                used, places = np.unique(text, return_inverse=True)
                return rng.choice(self._ids, len(used), replace=len(used) > len(self._ids))[places]
            case "repeated":
                period = min(_log_uniform(rng, 1, _LONGEST_PERIOD), len(text))
                source = text if rng.random() < 0.5 else self.draw("uniform", text, rng)
                begin = rng.integers(len(text) - period + 1)
                return np.resize(source[begin : begin + period], len(text))
            case "runs":
                drawn, start = text.copy(), 0
                while start < len(text):
                    run = slice(start, start + _log_uniform(rng, _SHORTEST_RUN, max(_SHORTEST_RUN, len(text) // 2)))
                    drawn[run] = self.draw(str(rng.choice(_IN_RUNS)), text[run], rng)
                    start = run.stop
                return drawn
        raise ValueError(f"{kind} is not a kind of cover")


_IN_RUNS = ("text", "uniform", "shuffled", "corrupted", "renamed", "repeated")


def _log_uniform(rng: np.random.Generator, least: int, most: int) -> int:
    return math.floor(math.exp(rng.uniform(math.log(least), math.log(most + 1))))


def _count(text: Dataset[Any], token_ids: Int[np.ndarray, " id"]) -> Float[np.ndarray, " id"]:
    """Return each token's count in the text plus one, so that no token is impossible."""
    if isinstance(text, Blocks):
        rows = np.unique(np.linspace(0, len(text) - 1, _COUNTED_BLOCKS).round().astype(int))
        tokens = text.blocks[rows].ravel().astype(np.int64)
    else:
        tokens = np.concatenate([block["input_ids"] for block in itertools.islice(iter(text), _COUNTED_BLOCKS)])
    return 1.0 + np.bincount(tokens, minlength=token_ids.max() + 1)[token_ids]


class _Covered(Dataset):
    def __init__(self, blocks: Any, cover: Cover) -> None:
        self.blocks, self.cover = blocks, cover

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return self.cover.at(position, self.blocks[position])


class _CoveredStream(IterableDataset):
    """Every iteration begins at position 0, as the stream's does. A resumed run skips blocks after they are counted."""

    def __init__(self, blocks: Any, cover: Cover) -> None:
        self.blocks, self.cover = blocks, cover

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for position, block in enumerate(self.blocks):
            yield self.cover.at(position, block)
