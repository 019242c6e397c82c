"""Errors that the user can fix: their base class, and those that several modules raise."""


class NolnError(Exception):
    """An error that the user can fix: the message says what is wrong, where, and what to do."""


class CheckpointError(NolnError):
    """A model cannot be read or written as requested; the message says what is wrong and what to do."""


class NoTokenizerError(CheckpointError):
    """A model comes without a tokenizer."""
