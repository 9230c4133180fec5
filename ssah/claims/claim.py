"""What a statement is, and when it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..evaluate.stats import Estimate


@dataclass(frozen=True)
class Claim:
    """One statement that a measurement can decide.

    It holds where the whole 95 % interval lies above (or below) ``limit``, does not hold where the
    whole interval lies on the other side, and is undecided otherwise.
    """

    id: str
    artefact: str
    text: str
    arm: str
    metric: str
    limit: float
    above: bool
    unit: str
    paper: Callable[[Callable[[str, str], float]], float] | None
    paper_model: str = "Llama-2-7B-Chat"  #: of which the paper's number is

    def verdict(self, estimate: Estimate) -> str:
        if self.above:
            holds, fails = estimate.low > self.limit, estimate.high <= self.limit
        else:
            holds, fails = estimate.high < self.limit, estimate.low >= self.limit
        return "holds" if holds else "does not hold" if fails else "undecided"
