"""Which units an arm is about: groups of roles, and controls of the same size by other rules."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..core.errors import SsahError, suggestion
from ..scoring.selectors import RULES, Rank, matched_by, sized
from ..units.layout import UnitLayout
from ..units.mask import UnitMask
from .lab import Lab
from .specs import GIVEN
from .stages.lessons import lesson
from .stages.units import conflict, roles

#: Groups by the name that they have in tables; a percentage is of all units.
ESU, EUU, RU = "ESU", "EUU", "RU"
CU6, ALL_CU = "ESU + 6 % CU", "ESU + all CU"


def group(lab: Lab, name: str) -> UnitMask:
    """``ESU``, ``ESU + 6 % CU``, ``ESU + all CU`` and so on, in the aligned model."""
    parts = []
    for part in name.split(" + "):
        words = part.split()
        if words[0] == "all":
            parts.append(words[-1])
        elif len(words) == 3 and words[1] == "%":
            parts.append(f"{words[2]}:{words[0]}%")
        else:
            parts.append(part)
    return roles(lab).select(*parts)


class _Evidence:
    """What the rules may look at, of one lab."""

    def __init__(self, lab: Lab, attack: str, draw: int):
        self.lab, self.attack = lab, attack
        self.layout: UnitLayout = lab.layout
        self.seed = 1000 * lab.seed + draw

    def weights(self, which: str) -> Mapping[str, Tensor]:
        model = {"aligned": self.lab.aligned, "given": GIVEN}[which]
        with self.lab.use(model) as loaded:
            return {n: p.detach().float().cpu() for n, p in loaded.named_parameters()}

    def difference(self) -> Rank:
        return roles(self.lab).difference

    def conflict(self) -> Rank:
        return conflict(self.lab, lesson(self.lab, self.attack))


def matched(lab: Lab, rule: str, target: UnitMask, attack: str = "", draw: int = 0) -> UnitMask:
    """As many heads and neurons as ``target``, by a rule of :data:`ssah.scoring.selectors.RULES`.

    ``attack`` is for rules that look at the rows to be trained on, ``draw`` for those that draw.
    """
    if rule not in RULES:
        raise SsahError(f"There is no rule '{rule}'{suggestion(rule, list(RULES))}")
    return matched_by(lab.layout, target, RULES[rule](_Evidence(lab, attack, draw)))


def everything(lab: Lab, kind: str) -> UnitMask:
    """All heads, or all neurons."""
    return sized(lab.layout, heads=float(kind == "heads"), neurons=float(kind == "neurons"))
