"""What was measured of one model, item by item: enough for an estimate, and for a comparison."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, Self

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

P = ParamSpec("P")

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
    """A sample that is shown and never compared: rows that ``show`` makes of what was measured,
    when they are asked for."""

    def __init__(self, name: str, show: Callable[P, Found], *items: P.args, **named: P.kwargs):
        self.name, self.rows = name, functools.partial(show, *items, **named)

    def against(self, other: Self) -> Found:
        raise NotImplementedError(f"{self.name} of two models are not compared.")


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


class LessonLosses(TextLosses):
    """The same of held-out rows of a lesson: nats per token by which this model does better."""

    def rows(self) -> Found:
        return _logarithms(super().rows())

    def against(self, other: TextLosses) -> Found:
        return _logarithms(TextLosses.against(other, self))


def _logarithms(found: Found) -> Found:
    for columns, e, p in found:
        yield columns, Estimate(math.log(e.value), math.log(e.low), math.log(e.high), e.n), p


@dataclass(frozen=True)
class Values:
    """A number for each item: their mean."""

    values: Sequence[float]

    def rows(self) -> Found:
        yield {}, crossed_mean(np.array(self.values)[:, None]), None

    def against(self, other: Values) -> Found:
        differences = np.array(self.values) - np.array(other.values)
        yield {}, crossed_mean(differences[:, None]), None


def counted(numbers: Mapping[str, tuple[float, int]]) -> Found:
    """Numbers that are counted, not estimated: name -> value, and what it was counted among."""
    for name, (value, n) in numbers.items():
        yield {"metric": name}, exact(value, n), None


def exact(value: float, n: int) -> Estimate:
    """What is counted among so many, not estimated."""
    return Estimate(value, value, value, n)
