"""Exceptions that the command line turns into a single sentence and a non-zero exit."""


class SsahError(RuntimeError):
    """Bad input or a missing prerequisite; the message names the cause and the remedy."""


class UnsupportedModelError(SsahError, ValueError):
    """The model's architecture has no unit layout."""
