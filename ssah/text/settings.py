"""Choices of batches."""

from __future__ import annotations

from typing import Literal

#: What is counted: the response's tokens, or every token of a dialogue.
Tokens = Literal["response", "all"]
