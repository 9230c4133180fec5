"""What is measured: a model, whole or with some units ablated, as shipped, aligned or tuned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .units import UnitKind, UnitMask


@dataclass(frozen=True)
class Tuning:
    """The aligned model after ``epoch`` epochs on an attack's rows, with the ``frozen`` units kept.

    ``changes`` replace settings of ``finetune``; ``unit_kind`` is that of the mask.
    """

    attack: str
    frozen: UnitMask | None = None
    unit_kind: UnitKind = "head"
    changes: dict[str, Any] = field(default_factory=dict)
    epoch: int = 1


Which = Literal["unaligned", "aligned"] | Tuning


@dataclass(frozen=True)
class Arm:
    """A model as it is evaluated: whole, or with some units ablated."""

    which: Which = "aligned"
    mask: UnitMask | None = None
    mode: Literal["zero", "mean"] = "zero"
