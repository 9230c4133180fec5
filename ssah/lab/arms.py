"""What is measured: a model, whole or with some units ablated, as shipped, aligned or tuned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..training.part import Part
from ..units.mask import UnitMask


@dataclass(frozen=True)
class Aligning:
    """The unaligned model, aligned through a part of it: the aligned one is aligned as a whole.

    Only the ``trained`` units train, or with a ``rank`` LoRA adapters of that rank do: everywhere,
    or only where they change trained units. ``changes`` replace settings of ``align``.
    """

    trained: UnitMask | None = None
    rank: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def part(self) -> Part:
        """What trains."""
        return Part(train=self.trained, rank=self.rank)


@dataclass(frozen=True)
class Tuning:
    """A model after ``epoch`` epochs on an attack's rows, with the ``frozen`` units kept.

    With ``trained`` units named, everything else is kept instead. ``changes`` replace settings of
    ``finetune``; ``base`` is the model that is fine-tuned.
    """

    attack: str
    frozen: UnitMask | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    epoch: int = 1
    base: Literal["aligned", "unaligned"] | Aligning = "aligned"
    trained: UnitMask | None = None

    @property
    def part(self) -> Part:
        """What trains."""
        return Part(self.frozen, self.trained)

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
