"""Choices of attribution."""

from __future__ import annotations

from typing import Literal

#: What one observation of a variance is: a token, or the mean of a sample over its tokens.
VarianceOver = Literal["token", "sample_mean"]
