"""What can be measured of a model: one function for each metric.

A metric gives a :class:`ssah.lab.samples.Sample`: items of one model, from cached stages. ``on``
says on which prompts, rows or tasks.
"""

from __future__ import annotations

from collections.abc import Callable

from ..lab import Lab
from ..samples import Sample
from ..specs import Model
from .behaviour import BEHAVIOUR
from .direction import DIRECTION
from .stability import stability
from .units import UNITS

METRICS: dict[str, Callable[[Lab, Model, str], Sample]] = {
    **BEHAVIOUR,
    **UNITS,
    **DIRECTION,
    "stability": stability,
}
