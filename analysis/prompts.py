"""Pairs of prompts for patching: reading them from JSON, creating them for any tokenizer, and tokenising them."""

import itertools
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from finetune.errors import NolnError
from finetune.names import expanded
from finetune.recipe import Text
from finetune.text import prefix_of

MICRO = Path(__file__).parent / "pairs" / "micro.json"
"""Pairs that the bundled `micro` solves: pronouns and verbs that agree with a noun."""

_NAMES = (
    *("Mary", "John", "Jane", "Tom", "Emma", "Paul", "Amy", "George", "Bella", "James", "Alice", "Henry", "Anna"),
    *("Robert", "Sarah", "William", "Kate", "David", "Laura", "Peter", "Martha", "Richard", "Amelia", "Philip", "Lucy"),
    *("Frank", "Rose", "Fred", "Susan", "Jim", "Ruth", "Joe", "Helen", "Jack", "Emily", "Michael", "Lisa", "Daniel"),
)
_PLACES = "shop", "garden", "house", "school", "station", "church"
_THINGS = "book", "letter", "flower", "drink", "ring", "key"
_TEMPLATES = (
    "When {receiver} and {giver} went to the {place}, {repeated} gave a {thing} to",
    "When {giver} and {receiver} went to the {place}, {repeated} gave a {thing} to",
)


class PairError(NolnError):
    """A pair of prompts cannot be patched; the message names it and says what is wrong."""


@dataclass(frozen=True)
class Pair:
    """Two prompts with different answers, as text. The space before a word belongs to the answer."""

    clean: str
    corrupt: str
    correct: str
    """The answer to `clean`."""
    wrong: str
    """The answer to `corrupt`."""


class PairTokens(NamedTuple):
    """A pair as token ids."""

    clean: Int[Tensor, " pos"]
    corrupt: Int[Tensor, " pos"]
    correct: int
    wrong: int


def read_pairs(path: str | Path) -> list[Pair]:
    """Read pairs from a JSON file: a list of objects with the texts `clean`, `corrupt`, `correct` and `wrong`.

    Raises:
        PairError: the file does not exist or is not JSON, its content is not such a list, or an object has other keys
            or values.
    """
    try:
        entries = json.loads(expanded(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PairError(f"The prompt pairs of {path} cannot be read: {error}.") from error
    if not isinstance(entries, list) or not entries:
        raise PairError(f"{path} does not contain a list of prompt pairs.")
    keys = [field.name for field in fields(Pair)]
    for number, entry in enumerate(entries, 1):
        if not (isinstance(entry, dict) and set(entry) == set(keys) and all(isinstance(entry[k], str) for k in keys)):
            raise PairError(f"Pair {number} of {path} does not have the texts {', '.join(keys)}: {json.dumps(entry)}.")
    return [Pair(**entry) for entry in entries]


def choose_pairs(tokenizer: PreTrainedTokenizerBase, path: str | Path | None = None) -> list[Pair]:
    """Return the pairs of a file or, if `path` is None, the bundled ones.

    If the tokenizer splits the answers of the bundled pairs into several tokens, pairs are created for it instead.

    Raises:
        PairError: as in `read_pairs` and `indirect_object_pairs`.
    """
    pairs = read_pairs(path if path is not None else MICRO)
    try:
        encode_pairs(pairs, tokenizer, sys.maxsize)
    except PairError:
        return pairs if path is not None else indirect_object_pairs(tokenizer)
    return pairs


def indirect_object_pairs(tokenizer: PreTrainedTokenizerBase, count: int = 10, seed: int = 0) -> list[Pair]:
    """Create pairs for any tokenizer, in which one of two names is repeated and the other is the answer.

    "When Mary and John went to the shop, John gave a book to" → " Mary"; the corrupt prompt repeats Mary instead.
    Only names that are one token after a space are used, so that both prompts have the same number of tokens. The task
    is that of Wang et al. 2022, arXiv 2211.00593.

    Raises:
        PairError: there are fewer than two such names.
    """
    names = [name for name in _NAMES if _single_token(tokenizer, f" {name}") is not None]
    if len(names) < 2:
        raise PairError(
            f"Only {len(names)} of {len(_NAMES)} names are a single token of this tokenizer. Provide pairs as JSON."
        )
    choices = list(itertools.product(itertools.permutations(names, 2), _PLACES, _THINGS, _TEMPLATES))
    pairs = []
    for (giver, receiver), place, thing, template in random.Random(seed).sample(choices, count):
        fill = partial(template.format, giver=giver, receiver=receiver, place=place, thing=thing)
        pairs.append(Pair(fill(repeated=giver), fill(repeated=receiver), f" {receiver}", f" {giver}"))
    return pairs


def encode_pairs(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, n_ctx: int, prefix: str | None = None
) -> list[PairTokens]:
    """Tokenise pairs for a model with a context of `n_ctx` tokens, and prepend `prefix`, as `text.prefix` in a recipe.

    Raises:
        TextError: the tokenizer does not have the prefix.
        PairError: prompts are empty, the same, too long, or of different numbers of tokens; or an answer is not one
            token or unknown to the tokenizer; or both answers are the same.
    """
    first = prefix_of(Text(prefix=prefix), tokenizer)
    before = [] if first is None else [first]
    return [_encode_pair(number, pair, tokenizer, n_ctx, before) for number, pair in enumerate(pairs, 1)]


def _encode_pair(
    number: int, pair: Pair, tokenizer: PreTrainedTokenizerBase, n_ctx: int, before: list[int]
) -> PairTokens:
    name = f"Prompt pair {number} ({pair.clean!r}, {pair.corrupt!r})"
    clean, corrupt = (tokenizer.encode(text, add_special_tokens=False) for text in (pair.clean, pair.corrupt))
    if len(clean) != len(corrupt):
        raise PairError(
            f"{name}: the prompts have {len(clean)} and {len(corrupt)} tokens; both must have the same number."
        )
    if not 0 < len(clean) <= n_ctx - len(before):
        raise PairError(
            f"{name}: the prompts have {len(clean)} tokens; for this model they must have from 1 to "
            f"{n_ctx - len(before)}."
        )
    if clean == corrupt:
        raise PairError(f"{name}: the prompts have the same tokens.")
    answers = []
    for answer in (pair.correct, pair.wrong):
        token = _single_token(tokenizer, answer)
        if token is None:
            raise PairError(
                f"{name}: the answer {answer!r} is not one token of this tokenizer's vocabulary. Check the space "
                "before it, or use another word."
            )
        answers.append(token)
    if answers[0] == answers[1]:
        raise PairError(f"{name}: both answers are {pair.correct!r}.")
    return PairTokens(torch.tensor(before + clean), torch.tensor(before + corrupt), *answers)


def _single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """Return the single token that `text` is, or None if it is several tokens or the tokenizer drops part of it."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
        return None
    whole = str(tokenizer.decode(tokens)).strip().casefold() == text.strip().casefold()
    return tokens[0] if whole else None  # some tokenizers drop characters that they do not know
