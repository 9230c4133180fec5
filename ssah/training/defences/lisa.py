"""Lazy safety alignment: task and alignment in turn, with a proximal term (Huang et al. 2024,
arXiv 2405.18641)."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import clip_grad_norm_

from ..loss import add_gradient
from ..settings import LISA_PERIOD
from .base import Defence, Step, trained


class Lisa(Defence):
    """After every fourth step on the task one on refusals; between them the weights are drawn back
    to where the last one left them, by ``strength / 2`` times the squared distance."""

    name = "Lisa"
    looks_at = ("refusals",)

    def begin(self, model: nn.Module) -> None:
        self.state = {name: p.detach().clone() for name, p in trained(model).items()}

    def before_step(self, step: Step) -> None:
        parameters = trained(step.model)
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                pull = parameter.detach() - self.state[name]
                parameter.grad.add_(pull, alpha=self.strength)
        clip_grad_norm_(parameters.values(), step.max_norm)

    def after_step(self, step: Step) -> None:
        if (step.number + 1) % LISA_PERIOD:
            return
        step.optimizer.zero_grad()
        add_gradient(step.model, self.refusals_for(step), step.at_once)
        clip_grad_norm_(trained(step.model).values(), step.max_norm)
        step.optimizer.step()
        self.begin(step.model)
