"""Arms: what is measured, named by columns of the table of measurements."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .specs import Model


@dataclass(frozen=True)
class Arm:
    """A model, and the columns that say what it is.

    ``make`` gives the model when it is needed: which units it is about may have to be searched
    for, and a plan is made before that.
    """

    make: Callable[[], Model] = field(compare=False, repr=False)
    base: str = "aligned"  #: or ``unaligned``: what was there before
    #: of what happens: ``removed``, ``frozen``, ``patched``, ``adapted``, ``defended``, ``trained``
    method: str = ""
    rule: str = ""  #: which units: ``ESU``, ``random`` ..., which adapter, or which defence
    like: str = ""  #: for a control: the rule whose size it has, in heads and neurons or in units
    attack: str = ""  #: what the model was fine-tuned on
    epoch: int = 0  #: of that
    setting: str = ""  #: what is unusual: ``mean``, ``lower rate`` ...
    draw: int | None = None

    @functools.cached_property
    def model(self) -> Model:
        return self.make()

    def columns(self) -> dict[str, Any]:
        """Everything but the model."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}

    @property
    def units(self) -> str:
        """Which units, under which setting, as in the lists of ``conf/experiment``."""
        return units_name(self.rule, self.like, self.setting)

    @property
    def name(self) -> str:
        """For people: ``random units removed (matched to ESU)``, ``instructions, 2 epochs: nothing
        frozen`` and so on."""
        units = "random units" if self.rule == "random" else self.rule
        rest = f" (matched to {self.like})" if self.like else ""
        rest += units_name("", "", self.setting) + (f", draw {self.draw}" if self.draw else "")
        if not self.method:
            return f"{self.base}{rest}"
        trained = f"{self.attack}, {self.epoch} epoch{'s' if self.epoch > 1 else ''}: "
        done = {
            "defended": f"defended by {units}", "adapted": units,
            "trained": f"aligned through {units}",
        }  # fmt: skip
        what = done.get(self.method, f"{units} {self.method}")
        return f"{trained if self.attack else ''}{what}{rest}"


def units_name(rule: str, like: str = "", setting: str = "") -> str:
    """``random, as RU, twice the epochs``: a rule, whose sizes it has, what is unusual."""
    return rule + (f", as {like}" if like else "") + (f", {setting}" if setting else "")
