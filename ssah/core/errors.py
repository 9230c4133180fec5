"""Exceptions that the command line turns into a single sentence, and the nearest valid word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SsahError(RuntimeError):
    """Bad input or a missing prerequisite; the message names the cause and the remedy."""


class InvalidValueError(SsahError, ValueError):
    """An argument or a setting has a value that it cannot have."""


class UnsupportedModelError(SsahError, ValueError):
    """The model's architecture has no unit layout."""


def require_known(word: str, valid: Iterable[str], sentence: str) -> None:
    """Raise :class:`SsahError` for a word that is none of these: the sentence, then the word."""
    known = list(valid)
    if word not in known:
        raise SsahError(f"{sentence} '{word}'{suggestion(word, known)}")


def suggestion(word: str, valid: list[str] | tuple[str, ...]) -> str:
    """The end of an error sentence: the nearest valid word, or all of them where few."""
    ends = [v for v in valid if v.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    near = difflib.get_close_matches(word, valid, n=1)
    if len(ends) == 1 or (ends and not near):  # esu_shares: the group was forgotten
        near = ends[:1]
    if near:
        return f": did you mean '{near[0]}'?"
    return f": choose from {', '.join(valid)}."
