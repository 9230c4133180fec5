"""What a model is: the given one, or one that was made of another by training or ablation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..core.store import Handle
from ..training.ablation import Mode
from ..training.part import EVERYTHING, Part
from ..units.mask import UnitMask

#: The rows of an alignment; every other name is an attack's.
REFUSALS = "refusals"


@dataclass(frozen=True)
class Defended:
    """With a defence of :data:`ssah.training.defences.DEFENCES`, of some strength."""

    name: str
    strength: float


@dataclass(frozen=True)
class Train:
    """Training on some rows: refusals, with the benign distribution held in place, or an attack's.

    ``changes`` replace settings of ``align`` or ``finetune``; ``epoch`` is the one after which the
    model is meant, the last where it is None.
    """

    rows: str
    part: Part = EVERYTHING
    changes: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    defence: Defended | None = None


@dataclass(frozen=True)
class Ablate:
    """Some units say nothing, or something that has nothing to do with the text
    (:func:`ssah.ablate`)."""

    mask: UnitMask
    mode: Mode = "zero"
    source: Handle | None = None  #: of what they say instead: activation statistics, or activations


@dataclass(frozen=True)
class Patch:
    """Some units say what they say in another model (:func:`ssah.training.ablation.patch`)."""

    mask: UnitMask
    donor: Model


@dataclass(frozen=True)
class Model:
    """A base, and what was done to it; with neither it is the given model."""

    base: Model | None = None
    step: Train | Ablate | Patch | None = None

    def trained(
        self,
        rows: str,
        part: Part = EVERYTHING,
        epoch: int | None = None,
        defence: Defended | None = None,
        **changes: Any,
    ) -> Model:
        """This model after training on some rows."""
        return Model(self, Train(rows, part, changes, epoch, defence))

    def ablated(self, mask: UnitMask, mode: Mode = "zero", source: Handle | None = None) -> Model:
        """This model without some units."""
        return Model(self, Ablate(mask, mode, source))

    def patched(self, mask: UnitMask, donor: Model) -> Model:
        """This model with what some units say in another one."""
        return Model(self, Patch(mask, donor))

    def at(self, epoch: int) -> Model:
        """The same training after another epoch."""
        assert isinstance(self.step, Train)
        return Model(self.base, replace(self.step, epoch=epoch))

    @property
    def whole(self) -> Model:
        """The model whose units are removed or patched; itself where nothing is."""
        if isinstance(self.step, (Ablate, Patch)):
            assert self.base is not None
            return self.base.whole
        return self


GIVEN = Model()
