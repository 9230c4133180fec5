"""An exponential moving average of the weights (Kim et al. 2025, arXiv 2508.12531)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core.valid import Within
from .base import Defence, Step, trained


class EMA(Defence):
    """The average of all weights so far comes out, where each step keeps ``strength`` of the
    average before; it begins with the model before."""

    name = "EMA"
    valid = Within(above=0, high=1)

    def begin(self, model: nn.Module) -> None:
        self.state = {name: p.detach().clone() for name, p in trained(model).items()}

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        for name, parameter in trained(step.model).items():
            self.state[name].lerp_(parameter, 1 - self.strength)

    def outcome(self, model: nn.Module) -> Mapping[str, Tensor]:
        return self.state
