"""Jobs: parts of a study that can run apart, on one machine after the other or on many at once.

All that a job computes goes to the run store. Two jobs never compute a run twice: the second waits
for the first. When all are done, the study is a matter of reading.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..core.store import behind
from .arms import Arm
from .catalogue import ALIGNED_ESU, ALL_UNITS, NOTHING, whole
from .lab import Lab
from .measure import Measure, Question, is_there, questions

#: The job that most others of its seed need: alignment, attribution, and the search for roles.
FIRST = "alignment and roles"


@dataclass(frozen=True)
class Job:
    """A model that is trained, or one that is there, and what is asked about it."""

    name: str
    lab: Lab
    arms: dict[Arm, list[Question]]
    measures: tuple[Measure, ...]

    @property
    def waits(self) -> bool:
        """Whether it needs what the first job makes: it is about the aligned model or its units."""
        return self.name != FIRST and any(
            arm.base == "aligned" or arm.rule in (ALL_UNITS, ALIGNED_ESU) for arm in self.arms
        )

    @property
    def asked(self) -> int:
        return sum(map(len, self.arms.values()))

    def missing(self) -> int:
        """Questions that are not answered yet, or that cannot be known to be."""
        return sum(
            not is_there(self.lab, arm, [q]) for arm, asked in self.arms.items() for q in asked
        )


def costs(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """What finished jobs took: ``job``, ``seed``, ``seconds``, ``peak_memory_mib`` of the process.

    A run that several of them need is counted for the first one.
    """
    counted: set[str] = set()
    found = []
    for job in jobs:
        store = job.lab.store
        store.touched.clear()
        if job.missing():
            continue
        records = store.records()
        own = behind(records, set(store.touched)) - counted
        counted |= own
        parts = [records[key] for key in own]
        found.append(
            {
                "job": job.name,
                "seed": job.lab.seed,
                "seconds": round(sum(part["seconds"] for part in parts)),
                "peak_memory_mib": max((part["peak_memory_mib"] for part in parts), default=0),
            }
        )
    return found


def jobs_of(lab: Lab, measures: Iterable[Measure]) -> list[Job]:
    """The jobs of one seed, the first one first.

    An arm and what is compared with it may be in different jobs: each measures its own models.
    """
    asked = questions(measures)
    parts: dict[str, dict[Arm, list[Question]]] = {}
    if any(arm.method in ("removed", "frozen") for arm in asked):
        parts[FIRST] = {whole(lab): [("search", "")]}
    for arm, own in asked.items():
        parts.setdefault(_job_of(arm), {})[arm] = own
    return [
        Job(name, lab, arms, tuple(Measure(arm, *q) for arm, asked in arms.items() for q in asked))
        for name, arms in parts.items()
    ]


def _job_of(arm: Arm) -> str:
    """Epochs of one training are one job; so are a model and what an attack makes of it."""
    if arm.method == "patched":
        return f"{arm.attack}: frozen: {NOTHING}"  # which trains what is patched
    if arm.method not in ("frozen", "adapted", "defended", "trained"):
        return "units removed" if arm.method else f"the {arm.base} model"
    draw = "" if arm.draw is None else f", draw {arm.draw}"
    what = "aligned through " if arm.method == "trained" else f"{arm.attack}: {arm.method}: "
    return f"{what}{arm.units}{draw}"
