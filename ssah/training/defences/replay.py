"""The distribution of the model before, kept on refusals (dark experience replay; Alssum et al.
2025, arXiv 2512.10150)."""

from __future__ import annotations

import random

from ..loss import Dialogues
from .base import Defence

#: Of the rows: as many refusals as the strongest mixing has.
SHARE = 0.1


class Replay(Defence):
    """In the place of a tenth of the rows, KL(before || now) on some of the model's own refusals,
    times ``strength``."""

    name = "replay"
    looks_at = ("refusals", "reference")

    @property
    def anchor_weight(self) -> float:
        return self.strength

    def lesson(self, taught: Dialogues, rng: random.Random) -> tuple[Dialogues, Dialogues]:
        return self.in_their_place(SHARE, taught, rng)
