"""Which weights a selection of units owns: rows and columns of linear layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Shared, UnitLayout
from .mask import UnitMask


@dataclass(frozen=True)
class Positions:
    """Rows (``dim=0``, with their biases) or columns (``dim=1``) of one linear layer.

    Both tensors are bool ``[positions along dim]``.
    """

    dim: int
    of_units: Tensor  #: belongs to any unit; a fused projection may have rows that do not
    chosen: Tensor  #: belongs to the selection


def owned(layout: UnitLayout, mask: UnitMask, shared: Shared = "all") -> dict[str, Positions]:
    """By path of each linear layer of the layout.

    A position that several units share (a key row of a group of heads) is the selection's where
    *all* of these units are chosen, or with ``shared="any"`` where one is.
    Raises ``ValueError`` where the mask is not of this layout.
    """
    layout.require(mask)
    found: dict[str, Positions] = {}
    for block in layout.blocks:
        for part in block.slices:
            path, _, kind = part.parameter.rpartition(".")
            if kind != "weight":
                continue  # a bias goes with the rows of its weight
            if path not in found:
                none = torch.zeros(part.length, dtype=torch.bool)
                found[path] = Positions(part.dim, none, none.clone())
            found[path].of_units[part.index.flatten()] = True
            found[path].chosen[part.selected(mask[block.name], shared)] = True
    return found
