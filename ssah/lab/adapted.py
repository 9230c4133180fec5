"""Arms in which adapters are trained and the model's own weights stay as they are (Table 5)."""

from __future__ import annotations

import functools

from ..training.adapter import Adapter
from .arms import Arm
from .config import AdapterConfig
from .lab import Lab
from .specs import Model


def adapted(lab: Lab, attack: str) -> list[Arm]:
    """The aligned model after one epoch of an attack through each adapter that the experiment
    names, at each of its rates; those that peft lacks for its family are left out."""
    known = lab.config.adapters.methods
    return [
        arm
        for name in lab.config.experiment.adapters.get(attack, [])
        if _adapter(known[name]).fits(lab.skeleton)
        for arm in _at_each_rate(lab, attack, name)
    ]


def _adapter(config: AdapterConfig) -> Adapter:
    return Adapter(config.peft, config.blocks)


def _at_each_rate(lab: Lab, attack: str, name: str) -> list[Arm]:
    config = lab.config.adapters.methods[name]

    def make(rate: float) -> Model:
        return lab.aligned.trained(
            attack,
            _adapter(config),
            epochs=1,
            learning_rate=rate,
            batch_size=lab.config.adapters.batch_size,
        )

    first = config.rates[0]
    return [
        Arm(
            functools.cache(functools.partial(make, rate)),
            method="adapted", rule=name, attack=attack, epoch=1,
            setting="" if rate == first else f"{rate / first:g} x the rate",
        )
        for rate in config.rates
    ]  # fmt: skip
