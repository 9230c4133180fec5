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
    #: of what happens: ``removed``, ``frozen``, ``patched``, ``trained``, ``defended``
    method: str = ""
    rule: str = ""  #: which units: ``ESU``, ``random`` ..., or which defence
    like: str = ""  #: for a control: the rule whose numbers of heads and neurons it has
    attack: str = ""  #: what the model was fine-tuned on
    epoch: int = 0  #: of that
    setting: str = ""  #: what is unusual: ``mean``, ``lower rate`` ...
    draw: int | None = None

    @functools.cached_property
    def model(self) -> Model:
        return self.make()

    def columns(self) -> dict[str, Any]:
        """Everything but the model."""
        names = (f.name for f in dataclasses.fields(self) if f.name != "make")
        return {name: getattr(self, name) for name in names}

    @property
    def units(self) -> str:
        """Which units, under which setting, as in the lists of ``conf/experiment``."""
        return units_name(self.rule, self.like, self.setting)

    @property
    def name(self) -> str:
        """For people: ``ESU removed``, ``instructions, 2 epochs: nothing frozen`` and so on."""
        units, setting = units_name(self.rule, self.like), units_name("", "", self.setting)
        draw = f", draw {self.draw}" if self.draw else ""
        trained = f"{self.attack}, {self.epoch} epoch{'s' if self.epoch > 1 else ''}: "
        after = trained if self.attack else ""
        if self.method == "removed":
            return f"{units} removed{setting}{draw}"
        if self.method == "frozen":
            return f"{after}{units} frozen{setting}{draw}"
        if self.method == "patched":
            return f"{after}{units} patched{setting}{draw}"
        if self.method == "defended":
            return f"{after}defended by {units}{setting}"
        if self.method == "trained":
            return f"{after}aligned through {units}{setting}{draw}"
        return f"{self.base}{setting}"


def units_name(rule: str, like: str = "", setting: str = "") -> str:
    """``random, as RU, twice the epochs``: a rule, whose sizes it has, what is unusual."""
    return rule + (f", as {like}" if like else "") + (f", {setting}" if setting else "")
