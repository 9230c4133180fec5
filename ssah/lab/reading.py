"""The headline arms of one seed by name, and what they say: to count verdicts, and to be read."""

from __future__ import annotations

import random
from collections.abc import Callable

from ..core.errors import SsahError, suggestion
from ..evaluate.judges import Completion
from ..scoring.selectors import random_units
from .arms import Arm
from .budget_arms import WHOLE, budget_arms
from .selections import CU6, available_attacks, headline, label, random_controls
from .stages import Stages
from .tuning import MAIN_ATTACK

#: Name -> the arm's completions of the evaluation prompts, when they are asked for.
Readable = dict[str, Callable[[], list[Completion]]]


def headline_arms(stages: Stages) -> Readable:
    """Every headline arm, by the name that it has in Tables 1, 2, 4 and 13.

    Asking for the names measures nothing but what the roles need; asking an arm computes what is
    missing.
    """

    def said(arm: Arm) -> Callable[[], list[Completion]]:
        return lambda: stages.completions("harmful_evaluation", arm)

    arms: Readable = {"dense": said(Arm())}
    if stages.config.align.enabled:
        arms["unaligned"] = said(Arm("unaligned"))
    for group in ("ESU", "RU", "EUU"):
        arms[group] = said(Arm(mask=stages.roles.mask(group)))
    control = random_units(stages.layout, stages.roles.mask("ESU"), 1000 * stages.seed)
    arms["random, as ESU"] = said(Arm(mask=control))
    for attack in available_attacks(stages):
        tunings = headline(stages, attack)
        if attack == MAIN_ATTACK:
            tunings[f"random, as {CU6}"] = next(iter(random_controls(stages, CU6, 1).values()))
        for name, tuning in tunings.items():
            epochs = tuning.changes.get("epochs", stages.config.finetune.epochs)
            for epoch in range(1, epochs + 1):

                def after(tuning=tuning, epoch=epoch) -> list[Completion]:
                    arm = stages.measured(tuning, thorough=True)[epoch - 1]
                    return stages.completions("harmful_evaluation", arm)

                arms[label(attack, name, epoch)] = after
    if stages.config.align.enabled:
        for name, how in budget_arms(stages).items():
            if name != WHOLE:

                def aligned(how=how) -> list[Completion]:
                    with stages.aligned(how) as arm:
                        return stages.completions("harmful_evaluation", arm)

                arms[f"aligned through {name}"] = aligned
    return arms


def random_completions(stages: Stages, name: str, count: int) -> list[Completion]:
    """Up to ``count`` random completions of one arm; :class:`SsahError` for an unknown one."""
    arms = headline_arms(stages)
    if name not in arms:
        raise SsahError(f"There is no arm '{name}'{suggestion(name, list(arms))}")
    said = arms[name]()
    return random.sample(said, min(count, len(said)))
