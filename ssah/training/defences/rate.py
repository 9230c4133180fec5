"""A lower learning rate, the simplest defence (Kim et al. 2025, arXiv 2508.12531)."""

from __future__ import annotations

import dataclasses

from ...core.valid import Within
from ..settings import TrainingConfig
from .base import Defence


class LowerRate(Defence):
    """The learning rate is multiplied by ``strength``."""

    name = "lower_rate"
    valid = Within(above=0, high=1)

    def settings(self, config: TrainingConfig) -> TrainingConfig:
        return dataclasses.replace(config, learning_rate=self.strength * config.learning_rate)
