"""The base class of all errors that the packages raise for the user to mend."""


class NolnError(Exception):
    """Something that the user can mend: the message says what is wrong, where, and what to do."""
