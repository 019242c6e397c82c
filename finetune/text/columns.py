"""Which column of a source is the text."""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from finetune.text.files import TextError

_SAMPLE = 1000  # rows, by which columns are judged
_NOT_TEXT = re.compile(
    r"(.*[_-])?(u?id|uuid|guid|key|ur[li]|version|hash|md5|sha\d*|lang(uage)?|source|date|time(stamp)?|split|label|"
    r"license|file_?name|path)",
    re.IGNORECASE,
)
_SHORT = 200  # characters: longer values are text, whatever they are called
_TURNS = re.compile(r"messages?|conversations?|dialogu?e?s?|turns|chats?", re.IGNORECASE)
_OF_A_TURN = {"text", "content", "value"}


def of_rows(rows: Iterable[Mapping[str, Any]], column: str | None, name: str) -> tuple[str, str | None]:
    """Return the text's column in a source without a schema, by its first rows: what `choose` returns.

    Raises:
        TextError: there are no rows, or as `choose`.
    """
    kinds: dict[str, str] = {}
    sample = [*itertools.islice(rows, _SAMPLE)]
    if not sample:
        raise TextError(f"{name} is empty: it holds no documents.")
    for row in sample:
        for key, value in row.items():
            if kinds.get(key, "null") == "null":
                kinds[key] = _kind(value)
    return choose(kinds, sample, column, name)


def choose(
    kinds: Mapping[str, str], rows: Iterable[Mapping[str, Any]], column: str | None, name: str
) -> tuple[str, str | None]:
    """Return `column`, or the one called text, or else the only one of strings, if nothing else looks like the text.

    With the last comes its first words, to be said.

    Args:
        kinds: what each column holds.
        rows: some rows, which are asked for only where they are needed.
        column: the one that is named.
        name: what messages call the source.

    Raises:
        TextError: it does not hold strings, or it cannot be told which it is.
    """
    strings = [key for key, kind in kinds.items() if kind in ("string", "large_string")]
    asked = column or ("text" if "text" in kinds else None)
    if asked in strings or (asked is not None and kinds.get(asked) == "null"):  # null: as far as was looked
        return asked, None
    columns = ", ".join(f"{key} ({kind})" for key, kind in kinds.items())
    if asked is not None or len(strings) != 1:
        problem = "which column is the text?" if asked is None else f"there is no column {asked!r} of strings."
        remedy = "name one of strings as text.column" + "; nested text has to be put into one first" * (not strings)
        raise TextError(f"{name}: {problem} Its columns are {columns}: {remedy}.")
    sample = [*itertools.islice(rows, _SAMPLE)]
    if doubt := _doubt(strings[0], sample):
        raise TextError(
            f"{name}: is {strings[0]!r} the text? It is the only column of strings, but {doubt}. Its columns are "
            f"{columns}: put nested text into a column of strings, and name the text's column as text.column."
        )
    return strings[0], next((" ".join(row[strings[0]].split())[:60] for row in sample if row.get(strings[0])), "")


def _doubt(column: str, rows: list[Mapping[str, Any]]) -> str | None:
    """Return why a column of strings may not be the text."""
    values = [row[column] for row in rows if row.get(column)]
    nested: dict[str, int] = {}
    for row in rows:
        for key, value in row.items():
            if characters := _characters(value) if isinstance(value, list | dict) else 0:
                nested[key] = nested.get(key, 0) + characters
    for key, characters in nested.items():
        if characters >= sum(map(len, values)) or _TURNS.fullmatch(key) or any(_is_turns(row.get(key)) for row in rows):
            return f"{key!r}, which is nested, looks like the text"
    if _NOT_TEXT.fullmatch(column) and sum(map(len, values)) < _SHORT * len(values):
        return "is called what is not text"
    if values and all(re.fullmatch(r"https?://\S+", value) for value in values):
        return "holds addresses"
    return None


def _characters(value: Any) -> int:
    """Return how many characters the strings in a nested value hold."""
    if isinstance(value, dict):
        value = [*value.values()]
    return sum(map(_characters, value)) if isinstance(value, list) else len(value) if isinstance(value, str) else 0


def _is_turns(value: Any) -> bool:
    """Return whether a value is a list of texts, each in an object, as a chat is."""
    return isinstance(value, list) and any(
        isinstance(entry, dict) and any(isinstance(entry.get(key), str) for key in _OF_A_TURN) for entry in value
    )


def _kind(value: Any) -> str:
    kinds = {str: "string", bool: "bool", int: "int64", float: "double", list: "list", dict: "struct"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
