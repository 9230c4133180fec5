"""The refusals of a model that defences rest on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NoReturn

from ...core.errors import SsahError
from ...core.store import Handle
from ...data.rows import Row
from ...evaluate import judges, refusals
from ...evaluate.judges import Completion
from ..config import AttributionConfig
from ..lab import Lab
from ..specs import REFUSALS, Model
from .attribution import encoded, own_answers
from .lessons import Pairs, lesson

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusals:
    """What a model refuses of the prompts that units are scored on, in its own words; prompts that
    it is evaluated with are never among them. ``judge`` is the identity of the phrases, which
    decide alone what is refused."""

    rows: tuple[Row, ...]
    answers: Handle
    config: AttributionConfig
    judge: str

    def pairs(self, lab: Lab) -> Pairs:
        """Prompt and response ids.

        Of a model that refuses none of them, and was aligned here, those that it was taught.
        """
        pairs = encoded(lab, self.rows, self.answers, self.config)
        said = self.answers.json("answers.json")
        asked = [Completion(row.prompt, text) for row, text in zip(self.rows, said, strict=True)]
        own = [p for p, declined in zip(pairs, judges.refused(asked), strict=True) if declined]
        if own or not lab.config.align.enabled:
            return own or _refuses_nothing(lab, len(pairs))
        logger.warning("The aligned model refuses nothing: refusals that it was taught stand in.")
        return lesson(lab, REFUSALS).taught(lab)


def own_refusals(lab: Lab, model: Model) -> Refusals:
    """The refusals that a defence of a model can rest on."""
    rows, said = own_answers(lab, "safety", model)
    return Refusals(rows, said, lab.config.attribution, refusals.identity())


def _refuses_nothing(lab: Lab, asked: int) -> NoReturn:
    raise SsahError(
        f"{lab.config.model.name} refuses none of the {asked} harmful prompts that units are "
        "scored on, so that there is nothing to defend: take an aligned model, align this one "
        "(align=refusals), or leave experiment.defences empty."
    )
