"""Which units an arm is about: groups of roles, and controls of the same size by other rules."""

from __future__ import annotations

import re

from ..core.errors import SsahError, require_known
from ..scoring.selectors import RULES, Evidence, matched_by
from ..units.mask import UnitMask
from ..units.roles import GROUPS
from .lab import Lab
from .stages.criteria import conflict, fisher, impact, places, weights_of_units
from .stages.lessons import lesson
from .stages.roles import roles

#: Groups by the name that they have in tables; a percentage is of all units.
ESU, EUU, RU = "ESU", "EUU", "RU"
CU6, ALL_CU = "ESU + 6 % CU", "ESU + all CU"

SAFETY_LAYERS = "safety layers"

#: Other papers' rules at the sizes of Tables 7 to 10: by name, the rule, and which share of the
#: heads and of the neurons it takes; safety layers have the size that they have.
RULED: dict[str, tuple[str, float | None]] = {
    **{
        f"{rule}, {100 * size:g} %": (rule, size)
        for rule in ("SN-Tune", "RSN-Tune")
        for size in (0.004, 0.063)
    },
    SAFETY_LAYERS: (SAFETY_LAYERS, None),
}


def group(lab: Lab, name: str) -> UnitMask:
    """``ESU``, ``ESU + 6 % CU``, ``ESU + all CU`` and so on, in the aligned model."""
    return roles(lab).select(*selection(name))


def selection(name: str) -> list[str]:
    """A group's name as :meth:`ssah.units.roles.Roles.select` takes it.

    Raises :class:`SsahError` where a part is no group.
    """
    parts = []
    for part in name.split(" + "):
        found = re.fullmatch(r"(?:all |(\d+(?:\.\d+)?) % )?(\w+)", part)
        if found is None or found[2] not in GROUPS:
            raise SsahError(
                f"'{name}' is no group of units: name some of {', '.join(GROUPS)}, such as "
                f"'{CU6}' or '{ALL_CU}', or a rule: {', '.join(RULES)}."
            )
        parts.append(f"{found[2]}:{found[1]}%" if found[1] else found[2])
    return parts


def matched(lab: Lab, rule: str, target: UnitMask, attack: str = "", draw: int = 0) -> UnitMask:
    """As many heads and neurons as ``target``, by a rule of :data:`ssah.scoring.selectors.RULES`.

    ``attack`` is for rules that look at the rows to be trained on, ``draw`` for those that draw.
    """
    require_known(rule, RULES, "There is no rule")
    evidence = Evidence(
        lab.layout,
        target,
        seed=1000 * lab.seed + draw,
        magnitude=lambda: weights_of_units(lab, "magnitude"),
        moved=lambda: weights_of_units(lab, "moved"),
        difference=lambda: roles(lab).difference,
        conflict=lambda: conflict(lab, lesson(lab, attack)),
        places=lambda prompts: places(lab, prompts),
        impact=lambda: impact(lab),
        fisher=lambda: fisher(lab),
    )
    return matched_by(lab.layout, target, RULES[rule](evidence))
