"""What was measured of one model, item by item: enough for an estimate, and for a comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from ..evaluate.stats import (
    Estimate,
    average,
    crossed_mean,
    paired_difference,
    paired_p_value,
    perplexity,
    pool,
    proportion,
)

#: Columns of a row beyond those of its measure, its estimate, and the p-value of a comparison.
Result = tuple[dict[str, Any], Estimate, float | None]

Found = Iterator[Result]


class Sample(Protocol):
    """Items of one model; another model's are on the same items, in the same order."""

    def rows(self) -> Found:
        """The estimates of this model alone."""
        ...

    def against(self, other: Self) -> Found:
        """How this model differs from another, item by item."""
        ...


class Alone:
    """A sample that is shown and never compared."""

    def against(self, other: Self) -> Found:
        raise NotImplementedError(f"{type(self).__name__} of two models are not compared.")


@dataclass(frozen=True)
class Rates:
    """True or false by item; per cent, and differences in points (McNemar's test)."""

    outcomes: Sequence[bool]

    def rows(self) -> Found:
        yield {}, proportion(self.outcomes).scaled(100), None

    def against(self, other: Rates) -> Found:
        difference = paired_difference(self.outcomes, other.outcomes).scaled(100)
        yield {}, difference, paired_p_value(self.outcomes, other.outcomes)


@dataclass(frozen=True)
class Pooled:
    """The same items under several conditions: no larger sample, so the mean of the intervals."""

    parts: Sequence[Rates]

    def rows(self) -> Found:
        yield {}, pool([proportion(part.outcomes) for part in self.parts]).scaled(100), None

    def against(self, other: Pooled) -> Found:
        pairs = zip(self.parts, other.parts, strict=True)
        found = [paired_difference(a.outcomes, b.outcomes) for a, b in pairs]
        yield {}, pool(found).scaled(100), None


@dataclass(frozen=True)
class Tasks:
    """Right or wrong by item, by task; per cent for each task and on average."""

    outcomes: Mapping[str, Sequence[bool]]

    def rows(self) -> Found:
        found = {task: proportion(right).scaled(100) for task, right in self.outcomes.items()}
        for task, estimate in found.items():
            yield {"set": task}, estimate, None
        yield {"set": "average"}, average(list(found.values())), None

    def against(self, other: Tasks) -> Found:
        differences = [
            paired_difference(right, other.outcomes[task]).scaled(100)
            for task, right in self.outcomes.items()
        ]
        yield {"set": "average"}, average(differences), None


@dataclass(frozen=True)
class TextLosses:
    """Token counts and summed losses by text; perplexity, and its ratio to another model's."""

    counts: Sequence[int]
    losses: Sequence[float]

    def rows(self) -> Found:
        yield {}, perplexity(self.counts, self.losses), None

    def against(self, other: TextLosses) -> Found:
        differences = [a - b for a, b in zip(self.losses, other.losses, strict=True)]
        yield {}, perplexity(self.counts, differences), None


@dataclass(frozen=True)
class LessonLosses:
    """The same of held-out rows of a lesson: nats per token by which this model does better."""

    counts: Sequence[int]
    losses: Sequence[float]

    def rows(self) -> Found:
        ratio = perplexity(self.counts, self.losses)
        yield {}, _logarithm(ratio), None

    def against(self, other: LessonLosses) -> Found:
        gains = [b - a for a, b in zip(self.losses, other.losses, strict=True)]
        yield {}, _logarithm(perplexity(self.counts, gains)), None


def _logarithm(e: Estimate) -> Estimate:
    return Estimate(math.log(e.value), math.log(e.low), math.log(e.high), e.n)


@dataclass(frozen=True)
class Values:
    """A number for each item: their mean."""

    values: Sequence[float]

    def rows(self) -> Found:
        yield {}, crossed_mean(np.array(self.values)[:, None]), None

    def against(self, other: Values) -> Found:
        differences = np.array(self.values) - np.array(other.values)
        yield {}, crossed_mean(differences[:, None]), None


@dataclass(frozen=True)
class Counted(Alone):
    """Numbers that are counted, not estimated, by name."""

    numbers: Mapping[str, tuple[float, int]]  #: name -> value, and what it was counted among

    def rows(self) -> Found:
        for name, (value, n) in self.numbers.items():
            yield {"metric": name}, Estimate(value, value, value, n), None
