"""Arms that freeze what other papers' rules select, at the sizes of Tables 7 to 10."""

from __future__ import annotations

from ..scoring.selectors import sized
from ..units.mask import UnitMask
from .arms import Arm
from .catalogue import fine_tuned, with_frozen
from .lab import Lab
from .units_of import CU6, RULED, SAFETY_LAYERS, esu_and_cu, matched, of_safety_layers


def ruled(lab: Lab, attack: str, name: str) -> list[Arm]:
    """What a rule of :data:`ssah.lab.units_of.RULED` selects is frozen."""
    rule, size = RULED[name]

    def mask() -> UnitMask:
        target = _as_large(lab, size)
        return target if size is None else matched(lab, rule, target, attack)

    return fine_tuned(lab, attack, rule, mask, setting=_setting(size))


def ruled_control(lab: Lab, attack: str, name: str, draw: int) -> list[Arm]:
    """As many random heads and neurons are frozen: the same for all rules of one size."""

    def mask() -> UnitMask:
        return matched(lab, "random", _as_large(lab, RULED[name][1]), draw=draw)

    rule, like, setting = control_name(name)
    return fine_tuned(lab, attack, rule, mask, like=like, draw=draw, setting=setting)


def control_name(name: str) -> tuple[str, str, str]:
    """What a rule's random controls are called: rule, like and setting."""
    _, size = RULED[name]
    return "random", SAFETY_LAYERS if size is None else "", _setting(size)


def ours(lab: Lab, attack: str, name: str) -> list[Arm]:
    """What the paper sets against a rule: ESU + 6 % CU; against safety layers the ESU, and CU until
    there are as many units."""
    if name != SAFETY_LAYERS:
        return with_frozen(lab, attack, CU6)

    def mask() -> UnitMask:
        return esu_and_cu(lab, of_safety_layers(lab).count())

    return fine_tuned(lab, attack, "ESU + CU", mask, like=SAFETY_LAYERS)


def _as_large(lab: Lab, size: float | None) -> UnitMask:
    """Some mask of a size: that share of heads and of neurons, or the safety layers."""
    return of_safety_layers(lab) if size is None else sized(lab.layout, size, size)


def _setting(size: float | None) -> str:
    return "" if size is None else f"{100 * size:g} %"
