"""The errors that the packages raise for the user to mend: the base of all, and those that several modules raise."""


class NolnError(Exception):
    """Something that the user can mend: the message says what is wrong, where, and what to do."""


class CheckpointError(NolnError):
    """A model that cannot be read or written as asked; the message says what is wrong and what to do."""


class NoTokenizerError(CheckpointError):
    """A model without a tokenizer beside it."""
