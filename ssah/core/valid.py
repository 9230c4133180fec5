"""Which values a setting may have: written beside the setting, checked before anything runs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import InvalidValueError, suggestion

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Within:
    """A number, or each number of a list or dictionary."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf  #: as ``low``, itself left out

    def require(self, name: str, value: float) -> None:
        """Raise :class:`InvalidValueError` for a number out of the range."""
        if math.isfinite(value) and self.low <= value <= self.high and value > self.above:
            return
        low = f"more than {self.above}" if self.above > -math.inf else f"{self.low} or more"
        high = f" and at most {self.high}" if self.high < math.inf else ""
        raise InvalidValueError(f"{name}={value} is out of range: it must be {low}{high}.")


def within(
    default: Any, low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf
) -> Any:
    """A field that holds a number of a range."""
    metadata = {"valid": Within(low, high, above).require}
    return dataclasses.field(default=default, metadata=metadata)


def all_within(
    defaults: Sequence[float], low: float, high: float = math.inf, *, fewest: int = 0
) -> Any:
    """A field that holds a list of numbers of a range, at least ``fewest``."""
    metadata = {"valid": Within(low, high).require, "fewest": fewest}
    return dataclasses.field(default_factory=lambda: list(defaults), metadata=metadata)


def within_each(low: float) -> Any:
    """A field that holds a dictionary of numbers, each of at least ``low``."""
    return dataclasses.field(default_factory=dict, metadata={"valid": Within(low).require})


def one_of(default: Any, *words: str) -> Any:
    """A field that holds one of some words."""
    metadata = {"valid": functools.partial(require_word, words=words)}
    return dataclasses.field(default=default, metadata=metadata)


def some_of(*words: str) -> Any:
    """A field that holds a list of some words, at least one; by default all."""
    metadata = {"valid": functools.partial(require_word, words=words), "fewest": 1}
    return dataclasses.field(default_factory=lambda: list(words), metadata=metadata)


def require_word(name: str, value: str, words: Sequence[str]) -> None:
    """Raise :class:`InvalidValueError` for a word that is none of these, naming the nearest."""
    if value not in words:
        raise InvalidValueError(f"{name}={value!r} is unknown{suggestion(str(value), list(words))}")


def require_finite(values: Tensor, what: str) -> None:
    """Raise :class:`InvalidValueError` where a number is infinite or not a number."""
    if not values.isfinite().all():
        raise InvalidValueError(
            f"{what[0].upper()}{what[1:]} has numbers that are not finite: the model has damaged "
            "weights, or overflows in half precision (load it in bfloat16 or float32)."
        )


def check(settings: Any, name: str = "") -> None:
    """Raise :class:`InvalidValueError` for the first value of a dataclass, or of one in it, that
    its field does not allow. What is None is left to its default."""
    for field in dataclasses.fields(settings):
        key, value = f"{name}{field.name}", getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            check(value, f"{key}.")
            continue
        if isinstance(value, Mapping):
            for part_name, part in value.items():
                if dataclasses.is_dataclass(part):
                    check(part, f"{key}.{part_name}.")
        parts = list(_parts(key, value))
        if len(parts) < field.metadata.get("fewest", 0):
            raise InvalidValueError(f"{key} is empty: name at least {field.metadata['fewest']}.")
        for part_name, part in parts if "valid" in field.metadata else ():
            field.metadata["valid"](part_name, part)


def _parts(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What is to be checked, and what it is called."""
    if isinstance(value, Mapping):
        yield from ((f"{key}.{name}", part) for name, part in value.items())
    elif isinstance(value, list):
        yield from ((key, part) for part in value)
    elif value is not None:
        yield key, value
