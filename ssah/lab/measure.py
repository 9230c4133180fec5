"""Ask, plan, run: what artefacts ask for is measured together, each model trained once."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from ..core.errors import require_known
from ..core.store import NotBuilt, behind
from .arms import Arm
from .lab import Lab
from .metrics import METRICS
from .samples import Found, Result
from .specs import Model, Train
from .table import COLUMNS, merged, typed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measure:
    """One question about an arm: a metric, on some prompts or rows, perhaps against another arm.

    ``than`` names the comparison in the table; ``against_on`` is what the other arm is measured
    on, where that differs.
    """

    arm: Arm
    metric: str
    on: str = ""
    against: Arm | None = None
    than: str = ""
    against_on: str | None = None

    def __post_init__(self) -> None:
        require_known(self.metric, METRICS, "There is no metric")
        if (self.against is None) != (self.than == ""):
            raise ValueError("A comparison says with which arm, and what that is called.")

    @property
    def questions(self) -> list[tuple[Arm, str]]:
        """The arms that are measured, and on what."""
        own = [(self.arm, self.on)]
        if self.against is None:
            return own
        return [*own, (self.against, self.on if self.against_on is None else self.against_on)]

    def found(self, lab: Lab) -> Found:
        """Estimates, out of what was collected."""
        own, *others = (METRICS[self.metric](lab, a.model, on) for a, on in self.questions)
        return own.against(others[0]) if others else own.rows()


def trainings(model: Model) -> tuple[Model, ...]:
    """The trained models that a model came out of, the first one first; itself if it is one."""
    before = trainings(model.base) if model.base is not None else ()
    return (*before, model) if isinstance(model.step, Train) else before


def _order(lab: Lab, model: Model) -> tuple[str, ...]:
    """Models that share a training stand together, and one without some units, or with those of
    another model, behind the whole."""
    keys = [lab.training(trained).key for trained in trainings(model)]
    return tuple(keys) if model.whole == model else (*keys, lab.identity(model))


#: A question about an arm: a metric, and on what.
Question = tuple[str, str]


def questions(measures: Iterable[Measure]) -> dict[Arm, list[Question]]:
    """What is asked of each arm, once."""
    asked: dict[Arm, dict[Question, None]] = {}
    for measure in measures:
        for arm, on in measure.questions:
            asked.setdefault(arm, {})[measure.metric, on] = None
    return {arm: list(found) for arm, found in asked.items()}


def collect(lab: Lab, measures: Sequence[Measure]) -> None:
    """Compute everything that is asked, model by model; a trained model is dropped when nothing
    more is asked about it or about what is made of it, unless it is the aligned one."""
    asked = questions(measures)
    todo = sorted(asked, key=lambda arm: _order(lab, arm.model))
    left = Counter(lab.training(t).key for arm in todo for t in trainings(arm.model))
    for arm in todo:
        for metric, on in asked[arm]:
            METRICS[metric](lab, arm.model, on)
        for trained in reversed(trainings(arm.model)):
            key = lab.training(trained).key
            left[key] -= 1
            if not left[key] and trained != lab.aligned:
                lab.forget(trained)


def is_there(lab: Lab, arm: Arm, asked: Iterable[Question]) -> bool:
    """Whether all of this is computed; nothing is computed or loaded to know it.

    Which units an arm is about may not be known yet: then it is not.
    """
    with lab.store.only_reading():
        try:
            for metric, on in asked:
                METRICS[metric](lab, arm.model, on)
        except NotBuilt:
            return False
    return True


def measured(lab: Lab, measures: Sequence[Measure]) -> tuple[pd.DataFrame, set[str]]:
    """The table of these measures, collected first, and the keys of all runs that were read.

    Each row has its own runs and their commits.
    """
    lab.store.touched.clear()
    collect(lab, measures)
    records, used = lab.store.records(), set(lab.store.touched)
    rows: list[dict[str, Any]] = []
    for measure in dict.fromkeys(measures):
        found, keys = _found(lab, measure)
        used |= set(keys)
        commits = sorted({records[key]["commit"] for key in behind(records, set(keys))})
        rows += _rows(lab, measure, found, keys, commits)
    table = typed(pd.DataFrame(rows, columns=COLUMNS))
    return merged([table]) if len(table) else table, used


@functools.cache
def _found(lab: Lab, measure: Measure) -> tuple[Sequence[Result], Sequence[str]]:
    """Its estimates, once for all artefacts that ask for them, and the keys of the runs behind."""
    lab.store.touched.clear()
    found = tuple(measure.found(lab))
    return found, sorted(lab.store.touched)


def _rows(
    lab: Lab, measure: Measure, found: Sequence[Result], keys: Sequence[str], commits: list[str]
) -> Iterator[dict[str, Any]]:
    own = measure.arm.columns()
    for columns, estimate, p_value in found:
        yield {
            "model": lab.config.model.name,
            "seed": lab.seed,
            **own,
            "metric": measure.metric,
            "set": measure.on,
            "against": measure.than,
            **columns,
            **asdict(estimate),
            "p": p_value,
            "runs": " ".join(key[:10] for key in keys),
            "commits": " ".join(commits),
        }
