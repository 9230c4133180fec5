"""What there is to do, what it takes, and how much is left."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...core.store import Handle

logger = logging.getLogger(__name__)

#: What steps are made of: prompts that are answered, and tokens that are read.
Kind = Literal["prompt", "token"]

#: Learning from a token takes as long as reading so many: a backward pass costs two forward ones,
#: and the optimizer's step the rest (measured with 494 million parameters on two cores: 5.3).
LEARNED = 5


@dataclass(frozen=True)
class Step:
    """One thing to do: ``size`` prompts or tokens."""

    title: str
    kind: Kind
    size: float


class Schedule:
    """Steps in their order; says before each of them how long all that are left take.

    A speed is what the last finished step of its kind took, at first one of a few prompts.
    """

    def __init__(self, steps: Sequence[Step]):
        self.left = list(steps)
        self.count = len(steps)
        self.speed: dict[Kind, float] = {}  #: seconds a unit

    def run(self, step: Step, run: Handle) -> None:
        """Build this step's run, where it is not there; how long it took tells of others."""
        if not run.has():
            left = self.seconds()  # 0 in a first look, which tells how long the steps will take
            place = f"{self.count - len(self.left) + 1} of {self.count}"
            about = f" (about {spoken(left)} left)" if left else ""
            logger.info("%s: %s%s", place if self.left else "First look", step.title, about)
        run.path("")
        record = run.store.record(run.folder)
        if record is not None and step.size:
            self.speed[step.kind] = record["seconds"] / step.size
        self.left = [later for later in self.left if later.title != step.title]

    def seconds(self) -> float:
        """What is left takes, as far as it is known; 0 where nothing is."""
        return sum(step.size * self.speed.get(step.kind, 0) for step in self.left)


def spoken(seconds: float) -> str:
    """A time in words: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
