"""Jobs: parts of a study that can run apart, on one machine after the other or on many at once.

All that a job computes goes to the run store. Two jobs never compute a run twice: the second waits
for the first. When all are done, the study is a matter of reading.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .arms import Arm
from .lab import Lab
from .measure import Measure, Question, is_there, questions

#: The job that all others of its seed need: alignment, attribution and the search for roles, and
#: everything that is asked of the aligned and the given model, whole or without some units.
FIRST = "the aligned model"


@dataclass(frozen=True)
class Job:
    """One model that is trained, and all that is asked about it; or the first job of a seed."""

    name: str
    lab: Lab
    arms: dict[Arm, list[Question]]
    measures: tuple[Measure, ...]

    @property
    def asked(self) -> int:
        return sum(map(len, self.arms.values()))

    def missing(self) -> int:
        """Questions that are not answered yet, or that cannot be known to be."""
        return sum(
            not is_there(self.lab, arm, [q]) for arm, asked in self.arms.items() for q in asked
        )


def jobs_of(lab: Lab, measures: Iterable[Measure]) -> list[Job]:
    """The jobs of one seed, the first one first.

    An arm and what is compared with it may be in different jobs: each measures its own models.
    """
    wanted = tuple(measures)
    parts: dict[str, dict[Arm, list[Question]]] = {FIRST: {}}
    for arm, asked in questions(wanted).items():
        parts.setdefault(_job_of(arm), {})[arm] = asked
    return [
        Job(name, lab, arms, tuple(_alone(arm, q) for arm, asked in arms.items() for q in asked))
        for name, arms in parts.items()
        if arms
    ]


def _alone(arm: Arm, question: Question) -> Measure:
    metric, on = question
    return Measure(arm, metric, on)


def _job_of(arm: Arm) -> str:
    """Epochs of one training are one job; so are a model and what an attack makes of it."""
    if arm.method not in ("frozen", "trained"):
        return FIRST
    units = arm.rule + (f", as {arm.like}" if arm.like else "")
    settings = "".join(f", {part}" for part in (arm.setting,) if part)
    draw = "" if arm.draw is None else f", draw {arm.draw}"
    what = f"{arm.attack}: frozen: " if arm.method == "frozen" else "aligned through "
    return f"{what}{units}{settings}{draw}"
