"""How far the groups are the same ones where they are found in another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import get_args

from ...scoring.selectors import matched_by
from ...units.families import BlockKind
from ...units.mask import UnitMask
from ...units.roles import classify
from ..lab import Lab
from ..samples import Alone, Found, Sample, exact
from ..specs import Model
from ..stages.attribution import CATEGORY, HALF, Scores, scores
from ..stages.roles import shares
from ..units_of import CU6
from .units import OTHER_PROMPTS

#: ``on`` of the comparison with the aligned model of the next seed, and of that with the model
#: itself after an attack, or whatever else became of it.
OTHER_SEED, ITSELF = "another seed", "after the attack"

#: As many units as ESU by I_S alone: nothing is subtracted.
BY_SAFETY = "highest I_S, as ESU"

#: What can be compared, and what is scored for it: model and lab, and on which prompts.
COMPARISONS: Mapping[str, Callable[[Lab, Model], tuple[Scores, Scores]]] = {
    OTHER_PROMPTS: lambda lab, model: scores(lab, resample=1),
    HALF: lambda lab, model: scores(lab, part=HALF),
    CATEGORY: lambda lab, model: scores(lab, part=CATEGORY),
    OTHER_SEED: lambda lab, model: scores(Lab(lab.config, lab.store, lab.seed + 1)),
    ITSELF: lambda lab, model: scores(lab, model),
}


def overlaps(
    first: Mapping[str, UnitMask], second: Mapping[str, UnitMask], comparison: str
) -> Found:
    """Groups found in two ways: units that are in both over units that are in either (IoU), and
    what that would be if equally many heads and neurons were drawn at random."""
    for name, mask in first.items():
        other, where = second[name], {"set": name, "at": comparison}
        together, expected = mask.count() + other.count(), 0.0
        for kind in get_args(BlockKind):
            expected += mask.count(kind) * other.count(kind) / (mask | ~mask).count(kind)
        found = {"overlap": (mask & other).count(), "overlap by chance": expected}
        for metric, shared in found.items():
            value = shared / (together - shared) if together else 0.0
            yield {"metric": metric, **where}, exact(value, mask.count()), None


def _groups(lab: Lab, found: tuple[Scores, Scores]) -> dict[str, UnitMask]:
    """The groups at the shares of the search, ESU with the top of CU, and the units of the highest
    I_S."""
    roles = classify(lab.layout, *found, shares(lab), lab.config.roles.redundant_kinds)
    masks = {group: roles.mask(group) for group in ("ESU", "EUU", "RU")}
    masks[CU6] = roles.select("ESU", "CU:6%")
    return masks | {BY_SAFETY: matched_by(lab.layout, masks["ESU"], found[0])}


def stability(lab: Lab, model: Model, on: str) -> Sample:
    """The aligned model's groups, and those that are found in another way."""
    first, second = (_groups(lab, found) for found in (scores(lab), COMPARISONS[on](lab, model)))
    return Alone("Overlaps", overlaps, first, second, on)
