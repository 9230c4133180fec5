"""What is measured: a model, whole or with some units ablated, as shipped, aligned or tuned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .units import UnitKind, UnitMask


@dataclass(frozen=True)
class Aligning:
    """The unaligned model, aligned through a part of it: the aligned one is aligned as a whole.

    Only the ``trained`` units train, or with a ``rank`` LoRA adapters of that rank do: everywhere,
    or only where they change trained units. ``changes`` replace settings of ``align``.
    """

    trained: UnitMask | None = None
    unit_kind: UnitKind = "head"
    rank: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning:
    """A model after ``epoch`` epochs on an attack's rows, with the ``frozen`` units kept.

    With ``trained`` units named, everything else is kept instead. ``changes`` replace settings of
    ``finetune``; ``unit_kind`` is that of the mask; ``base`` is the model that is fine-tuned.
    """

    attack: str
    frozen: UnitMask | None = None
    unit_kind: UnitKind = "head"
    changes: dict[str, Any] = field(default_factory=dict)
    epoch: int = 1
    base: Literal["aligned", "unaligned"] | Aligning = "aligned"
    trained: UnitMask | None = None

    @property
    def whole(self) -> bool:
        """Whether all units train."""
        return self.frozen is None and self.trained is None


Which = Literal["unaligned", "aligned"] | Aligning | Tuning


@dataclass(frozen=True)
class Arm:
    """A model as it is evaluated: whole, or with some units ablated."""

    which: Which = "aligned"
    mask: UnitMask | None = None
    mode: Literal["zero", "mean"] = "zero"
