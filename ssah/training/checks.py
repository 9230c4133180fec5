"""Frozen means frozen: weights that must have kept their bits, compared on raw bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..units.layout import UnitLayout
from ..units.mask import UnitMask
from ..units.positions import owned


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
        same = _bits(before[name]) == _bits(tensor)
        changed += int((~same & ~allowed[name]).sum())
    return changed


def _bits(tensor: Tensor) -> Tensor:
    """The raw bits as integers: 0.0 and -0.0 differ, a NaN equals itself."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(kinds[tensor.element_size()])
