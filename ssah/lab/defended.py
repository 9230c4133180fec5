"""Fine-tunings that are defended, against the arms of Table 2 that are plain or freeze units."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from ..core.errors import SsahError, require_known
from ..training.defences import DEFENCES, Defence
from . import catalogue
from .arms import Arm
from .lab import Lab
from .specs import Defended
from .stages.lessons import MAIN_ATTACK
from .units_of import CU6, group

#: Epochs of the runs that show whether a defence prevents or delays.
LONG = 6

#: Defences beside which units are frozen: name -> defence, and which units.
COMBINED = {"mixing_and_frozen": ("mixing", CU6)}


def require_strengths(chosen: Mapping[str, Sequence[float]]) -> None:
    """Raise :class:`SsahError` for a name that is no defence, or a strength that it cannot have."""
    for name, strengths in chosen.items():
        require_known(name, [*DEFENCES, *COMBINED], "experiment.defences: there is no")
        if not strengths:
            raise SsahError(
                f"experiment.defences.{name} is empty: name strengths, the recommended one first, "
                f"or leave the defence out (~experiment.defences.{name})."
            )
        for strength in strengths:
            _kind(name)[0].valid.require(f"experiment.defences.{name}", strength)


def shown(lab: Lab) -> dict[str, list[float]]:
    """The experiment's defences and their strengths.

    What the alignment moved is not known of a model that came aligned.
    """
    return {
        name: strengths
        for name, strengths in lab.config.experiment.defences.items()
        if "unaligned" not in _kind(name)[0].looks_at or lab.config.align.enabled
    }


def setting(name: str, strength: float, epochs: int = 1) -> str:
    """What the table calls a strength, and a run that is longer."""
    text = _kind(name)[0].text(strength)
    return text if epochs == 1 else f"{text}, {_longer(epochs)}"


def arms(lab: Lab, attack: str) -> list[Arm]:
    """One epoch of an attack under each defence, with each strength: which one is chosen is not
    known before they are measured."""
    return [
        arm
        for name, strengths in shown(lab).items()
        for strength in strengths
        for arm in defended(lab, attack, name, strength)
    ]


def plain(lab: Lab, attack: str) -> list[Arm]:
    """One epoch of Table 2's trainings: with nothing frozen, and with ESU + 6 % CU."""
    return [catalogue.unfrozen(lab, attack)[0], catalogue.with_frozen(lab, attack, CU6)[0]]


def longer(lab: Lab) -> list[Arm]:
    """The main attack for :data:`LONG` epochs, epoch by epoch: undefended, with frozen units, and
    with the recommended strength of some defences."""
    chosen, mask = lab.config.experiment.defended_longer, functools.partial(group, lab, CU6)
    fine_tuned = functools.partial(catalogue.fine_tuned, setting=_longer(LONG), epochs=LONG)
    found = fine_tuned(lab, MAIN_ATTACK)
    found += fine_tuned(lab, MAIN_ATTACK, CU6, mask)
    for name, strengths in shown(lab).items():
        if name in chosen:
            found += defended(lab, MAIN_ATTACK, name, strengths[0], LONG)
    return found


def defended(lab: Lab, attack: str, name: str, strength: float, epochs: int = 1) -> list[Arm]:
    """An arm for each epoch of a fine-tuning under a defence."""
    kind, units = _kind(name)
    mask = functools.partial(group, lab, units) if units is not None else None
    found = catalogue.fine_tuned(
        lab, attack, name, mask, setting=setting(name, strength, epochs), epochs=epochs,
        defence=Defended(kind.name, strength),
    )  # fmt: skip
    return [dataclasses.replace(arm, method="defended") for arm in found]


def without_freezing(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """Of some arms the one that does the same but freezes nothing, where there is one."""
    defence, units = COMBINED.get(arm.rule, (arm.rule, None))
    same = (a for a in arms if a.rule == defence and a.setting == arm.setting)
    return next(same, None) if units is not None else None


def _kind(name: str) -> tuple[type[Defence], str | None]:
    """A defence, and which units are frozen beside it."""
    defence, units = COMBINED.get(name, (name, None))
    return DEFENCES[defence], units


def _longer(epochs: int) -> str:
    return f"for {epochs} epochs"
