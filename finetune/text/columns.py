"""Choosing the column of a source that contains the text."""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from finetune.text.files import TextError

_SAMPLE = 1000  # the number of rows from which columns are judged
_NOT_TEXT = re.compile(
    r"(.*[_-])?(u?id|uuid|guid|key|ur[li]|version|hash|md5|sha\d*|lang(uage)?|source|date|time(stamp)?|split|label|"
    r"license|file_?name|path)",
    re.IGNORECASE,
)
_SHORT = 200  # characters: longer values are text, whatever the column's name
_TURNS = re.compile(r"messages?|conversations?|dialogu?e?s?|turns|chats?", re.IGNORECASE)
_OF_A_TURN = {"text", "content", "value"}


def of_rows(rows: Iterable[Mapping[str, Any]], column: str | None, name: str) -> tuple[str, str | None]:
    """Choose the text's column in a source without a schema, from its first rows. Returns what `choose` returns.

    Raises:
        TextError: there are no rows; or as in `choose`.
    """
    kinds: dict[str, str] = {}
    sample = [*itertools.islice(rows, _SAMPLE)]
    if not sample:
        raise TextError(f"{name} is empty: it contains no documents.")
    for row in sample:
        for key, value in row.items():
            if kinds.get(key, "null") == "null":
                kinds[key] = _kind(value)
    return choose(kinds, sample, column, name)


def choose(
    kinds: Mapping[str, str], rows: Iterable[Mapping[str, Any]], column: str | None, name: str
) -> tuple[str, str | None]:
    """Return the column that contains the text, and its first words if it was guessed, else None.

    The column is `column` if given; else the one named `text`; else the only column of strings, if nothing else looks
    like the text. Only the last is a guess.

    Args:
        kinds: the type of each column.
        rows: some rows, which are read only if they are needed.
        column: the column that the user named, or None.
        name: the source's name in messages.

    Raises:
        TextError: the named column does not contain strings, or it is unclear which column is the text.
    """
    strings = [key for key, kind in kinds.items() if kind in ("string", "large_string")]
    asked = column or ("text" if "text" in kinds else None)
    if asked in strings or (asked is not None and kinds.get(asked) == "null"):  # null: in all rows that were sampled
        return asked, None
    columns = ", ".join(f"{key} ({kind})" for key, kind in kinds.items())
    if asked is not None or len(strings) != 1:
        problem = "which column is the text?" if asked is None else f"there is no column {asked!r} of strings."
        remedy = "Set text.column to one of strings" + "; put nested text into such a column first" * (not strings)
        raise TextError(f"{name}: {problem} Its columns are {columns}. {remedy}.")
    sample = [*itertools.islice(rows, _SAMPLE)]
    if doubt := _doubt(strings[0], sample):
        raise TextError(
            f"{name}: is {strings[0]!r} the text? It is the only column of strings, but {doubt}. The columns are "
            f"{columns}. Put nested text into a column of strings, and set text.column to the text's column."
        )
    return strings[0], next((" ".join(row[strings[0]].split())[:60] for row in sample if row.get(strings[0])), "")


def _doubt(column: str, rows: list[Mapping[str, Any]]) -> str | None:
    """Return why a column of strings may not be the text, or None."""
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
        return "its name suggests that it is not text"
    if values and all(re.fullmatch(r"https?://\S+", value) for value in values):
        return "it contains URLs"
    return None


def _characters(value: Any) -> int:
    """Return the total length of the strings in a nested value."""
    if isinstance(value, dict):
        value = [*value.values()]
    return sum(map(_characters, value)) if isinstance(value, list) else len(value) if isinstance(value, str) else 0


def _is_turns(value: Any) -> bool:
    """Return whether a value is a list of objects that contain text, like the turns of a chat."""
    return isinstance(value, list) and any(
        isinstance(entry, dict) and any(isinstance(entry.get(key), str) for key in _OF_A_TURN) for entry in value
    )


def _kind(value: Any) -> str:
    kinds = {str: "string", bool: "bool", int: "int64", float: "double", list: "list", dict: "struct"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
