"""Control selections: as many units of each kind as a given mask, chosen by something else.

Matching the number of heads and of neurons matches the number of parameters exactly, so a control
differs from its target in *which* units it takes and in nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..units.families import BlockKind
from ..units.layout import UnitLayout
from ..units.mask import UnitMask

KINDS: tuple[BlockKind, ...] = ("attn", "mlp")


def sized(layout: UnitLayout, heads: float, neurons: float) -> UnitMask:
    """Some mask that holds these fractions of the heads and of the neurons: a target of a size."""
    kind = layout.flatten({b.name: torch.full((b.units,), b.kind == "attn") for b in layout.blocks})
    chosen = torch.zeros(layout.units, dtype=torch.bool)
    for members, fraction in ((kind, heads), (~kind, neurons)):
        positions = members.nonzero().flatten()
        chosen[positions[: round(fraction * len(positions))]] = True
    return layout.mask(chosen)


def matched_by(layout: UnitLayout, target: UnitMask, rank: dict[str, Tensor]) -> UnitMask:
    """The lowest-ranked units, as many heads and as many neurons as ``target`` has.

    ``rank`` holds one number for each unit, by block, ``[units]``.
    """
    flat = layout.flatten(rank)
    is_attention = torch.cat([torch.full((b.units,), b.kind == "attn") for b in layout.blocks])
    chosen = torch.zeros(layout.units, dtype=torch.bool)
    for kind in KINDS:
        eligible = is_attention if kind == "attn" else ~is_attention
        order = flat.masked_fill(~eligible, torch.inf).argsort(stable=True)
        chosen[order[: target.count(kind)]] = True
    return layout.mask(chosen)


def random_units(layout: UnitLayout, target: UnitMask, seed: int) -> UnitMask:
    """A uniform draw over all blocks, matched to ``target``."""
    generator = torch.Generator().manual_seed(seed)
    return matched_by(layout, target, layout.split(torch.rand(layout.units, generator=generator)))


def magnitude_units(
    model: nn.Module, layout: UnitLayout, target: UnitMask, *, largest: bool
) -> UnitMask:
    """Units with the largest (or smallest) norm of their columns in ``B``, matched to ``target``.

    The largest are the control for ESU (is any important unit a safety unit?), the smallest for
    RU (plain magnitude pruning).
    """
    norms = {}
    for block in layout.blocks:
        weight = block.projection(model).weight.detach().float().cpu()
        squared = (weight**2).sum(0)[block.channels].mean(1)
        norms[block.name] = -squared if largest else squared
    return matched_by(layout, target, norms)
