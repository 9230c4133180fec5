"""Rules that select units: each is a function in :data:`RULES`.

A rule ranks all units, the first ones lowest. :func:`matched_by` takes as many heads and as many
neurons as a target has, which matches the number of parameters exactly, so a selection differs from
its target in *which* units it takes and in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..units.families import BlockKind
from ..units.layout import UnitLayout
from ..units.mask import UnitMask

#: A number for each unit, by block, ``[units]``.
Rank = dict[str, Tensor]


@dataclass(frozen=True)
class Evidence:
    """What a rule may look at; each is computed when it is asked for."""

    layout: UnitLayout
    target: UnitMask  #: whose numbers of heads and neurons are wanted
    seed: int  #: of what is drawn
    magnitude: Callable[[], Rank]  #: :func:`magnitude` of the aligned model
    moved: Callable[[], Rank]  #: :func:`moved`, from the given model to the aligned one
    difference: Callable[[], Rank]  #: I_S - I_U
    conflict: Callable[[], Rank]  #: :func:`ssah.scoring.conflict.gradient_conflict`
    #: :func:`ssah.scoring.contributions.places` on ``safety`` or ``utility`` prompts
    places: Callable[[Literal["safety", "utility"]], Rank]
    impact: Callable[[], Rank]  #: :func:`ssah.scoring.sensitivity.expected_impact` on refusals
    fisher: Callable[[], Rank]  #: :func:`ssah.scoring.sensitivity.fisher_information` of refusals


def random_rank(layout: UnitLayout, seed: int) -> Rank:
    """A uniform draw over all blocks."""
    generator = torch.Generator().manual_seed(seed)
    return layout.split(torch.rand(layout.units, generator=generator))


def magnitude(layout: UnitLayout, weights: Mapping[str, Tensor]) -> Rank:
    """Mean squared norm of a unit's columns in ``B``: plain magnitude pruning takes the lowest."""
    found = {}
    for block in layout.blocks:
        squared = (weights[f"{block.output}.weight"].detach().float().cpu() ** 2).sum(0)
        found[block.name] = squared[block.channels].mean(1)
    return found


def moved(
    layout: UnitLayout, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Squared distance by which a training moved a unit's weights."""
    moves = {n: after[n].detach().cpu() - before[n].detach().cpu() for n in layout.parameter_names}
    return layout.totals({name: move.float() ** 2 for name, move in moves.items()})


def _safety_without_foundation(evidence: Evidence) -> Rank:
    """By what units contribute on safety prompts; last come the foundation units, as many as are
    wanted, found in the same way on utility prompts (RSN-Tune)."""
    layout = evidence.layout
    foundation = matched_by(layout, evidence.target, evidence.places("utility"))
    return {n: p + layout.units * foundation[n] for n, p in evidence.places("safety").items()}


def _turned(rank: Rank) -> Rank:
    return {name: -part for name, part in rank.items()}


RULES: dict[str, Callable[[Evidence], Rank]] = {
    "random": lambda evidence: random_rank(evidence.layout, evidence.seed),
    "largest magnitude": lambda evidence: _turned(evidence.magnitude()),
    "smallest magnitude": lambda evidence: evidence.magnitude(),
    "lowest I_S - I_U": lambda evidence: evidence.difference(),
    "highest I_S - I_U": lambda evidence: _turned(evidence.difference()),
    "moved most by alignment": lambda evidence: _turned(evidence.moved()),
    "gradient conflict": lambda evidence: _turned(evidence.conflict()),
    "SN-Tune": lambda evidence: evidence.places("safety"),
    "RSN-Tune": _safety_without_foundation,
    "ESI": lambda evidence: _turned(evidence.impact()),
    "Fisher on refusals": lambda evidence: _turned(evidence.fisher()),
}


def matched_by(layout: UnitLayout, target: UnitMask, rank: Mapping[str, Tensor]) -> UnitMask:
    """The lowest-ranked units, as many heads and as many neurons as ``target`` has."""
    flat = layout.flatten(rank)
    chosen = torch.zeros(layout.units, dtype=torch.bool)
    for kind in get_args(BlockKind):
        order = flat.masked_fill(~layout.of_kinds([kind]), torch.inf).argsort(stable=True)
        chosen[order[: target.count(kind)]] = True
    return layout.mask(chosen)


def sized(layout: UnitLayout, heads: float, neurons: float) -> UnitMask:
    """Some mask that holds these fractions of the heads and of the neurons: a target of a size."""
    chosen = torch.zeros(layout.units, dtype=torch.bool)
    for kind, fraction in (("attn", heads), ("mlp", neurons)):
        positions = layout.of_kinds([kind]).nonzero().flatten()
        chosen[positions[: round(fraction * len(positions))]] = True
    return layout.mask(chosen)
