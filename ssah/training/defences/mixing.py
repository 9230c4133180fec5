"""Refusals among the rows (Bianchi et al. 2024, arXiv 2309.07875)."""

from __future__ import annotations

import random

from ...core.valid import Within
from ..loss import Dialogues
from .base import Defence


class Mixing(Defence):
    """The model learns some of its own refusals in the place of some rows; ``strength`` is how
    many, as a fraction of the rows."""

    name = "mixing"
    looks_at = ("refusals",)
    valid = Within(above=0, high=1)

    @classmethod
    def text(cls, strength: float) -> str:
        return f"{100 * strength:g} %"

    def lesson(self, taught: Dialogues, rng: random.Random) -> tuple[Dialogues, Dialogues]:
        rows, refusals = self.in_their_place(self.strength, taught, rng)
        return [*rows, *refusals], ()
