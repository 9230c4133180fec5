"""Which part of a model trains: everything, some units, all but some, or adapters."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..units.layout import UnitLayout, owned
from ..units.mask import UnitMask
from .lora import adapters
from .slicing import freeze_units, train_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Part:
    """What trains; everything, unless units are named.

    ``freeze``: all but these units. ``train``: these units alone. ``rank``: LoRA adapters of that
    rank, everywhere or, with ``train``, only where they change these units.
    """

    freeze: UnitMask | None = None
    train: UnitMask | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.freeze is not None and (self.train is not None or self.rank is not None):
            raise ValueError("A part says what is frozen or what trains, not both.")

    def training(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """A block in which this part of the model trains; adapters are drawn where it begins."""
        if self.rank is not None:
            return adapters(model, self.rank, self.train)
        if self.train is not None:
            return train_only(model, self.train)
        if self.freeze is not None:
            return freeze_units(model, self.freeze)
        return nullcontext()

    def require_kept(
        self, model: PreTrainedModel, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
    ) -> None:
        """Raise :class:`RuntimeError` where only some units train and a weight outside of them
        changed a bit."""
        if self.train is not None:
            layout = UnitLayout.of(model, self.train.unit_kind)
            changed = changed_outside(layout, self.train, before, after)
            if changed:
                raise RuntimeError(
                    f"{changed} frozen weights changed: the training cannot be trusted."
                )


#: The whole model trains.
EVERYTHING = Part()


def changed_outside(
    layout: UnitLayout, trained: UnitMask, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> int:
    """Number of weights, of all parameters, that changed a bit without belonging to a unit.

    Positions that several units share belong to the trained ones where all of them are.
    """
    allowed = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in after.items()}
    for path, part in owned(layout, trained).items():
        index = part.chosen.nonzero().flatten()
        allowed[f"{path}.weight"].index_fill_(part.dim, index, True)
        if part.dim == 0 and f"{path}.bias" in allowed:
            allowed[f"{path}.bias"][index] = True
    changed = 0
    for name, tensor in after.items():
        differs = _bits(before[name]) != _bits(tensor)
        changed += int((differs & ~allowed[name]).sum())
    return changed


def _bits(tensor: Tensor) -> Tensor:
    """The raw bits as integers: 0.0 and -0.0 differ, a NaN equals itself."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(kinds[tensor.element_size()])
