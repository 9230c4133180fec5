"""The headline arms of one seed: their verdicts are counted, and their completions read."""

from __future__ import annotations

import random

from ..core.errors import SsahError, suggestion
from ..evaluate.judges import Completion
from . import catalogue
from .arms import Arm
from .lab import Lab
from .measure import Measure, collect
from .metrics.behaviour import said
from .stages.lessons import MAIN_ATTACK, available_attacks
from .units_of import CU6, ESU, EUU, RU


def headline(lab: Lab) -> list[Arm]:
    """Every headline arm of Tables 1, 2, 4 and 13."""
    arms = [catalogue.whole(lab), *catalogue.unaligned(lab)]
    if lab.config.model.use == "everything":
        arms += _changed(lab)
    if lab.config.align.enabled:
        through = catalogue.budget_arms(lab)
        arms += [arm for arm in through if arm.rule != catalogue.ALL_UNITS and not arm.setting]
    return arms


def _changed(lab: Lab) -> list[Arm]:
    """The aligned model without some units, and after each attack."""
    arms = [catalogue.without(lab, name) for name in (ESU, RU, EUU)]
    arms.append(catalogue.without_control(lab, "random", ESU, 0))
    for attack in available_attacks(lab):
        arms += catalogue.unfrozen(lab, attack)
        for name in catalogue.frozen_groups(lab, attack):
            arms += catalogue.with_frozen(lab, attack, name)
        if attack == MAIN_ATTACK:
            arms += catalogue.with_frozen_control(lab, attack, "random", CU6, 0)
    return arms


def random_completions(lab: Lab, name: str, count: int) -> list[Completion]:
    """Up to ``count`` random completions of one arm; :class:`SsahError` for an unknown one."""
    arms = {arm.name: arm for arm in headline(lab)}
    if name not in arms:
        raise SsahError(f"There is no arm '{name}'{suggestion(name, list(arms))}")
    collect(lab, [Measure(arms[name], "ASR")])
    found = said(lab, arms[name].model, "")
    return random.sample(found, min(count, len(found)))
