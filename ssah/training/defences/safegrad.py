"""Gradient surgery: what of the task's gradient works against refusals is taken out (Yi et al.
2025, arXiv 2508.07172)."""

from __future__ import annotations

import torch
from torch.nn.utils import clip_grad_norm_

from ..loss import add_gradient
from .base import Defence, Step, trained


class SafeGrad(Defence):
    """Where the task's gradient ``g`` and the alignment's ``a`` point against each other,
    ``g - (g.a / a.a) a`` takes the place of ``g``; then ``strength`` times ``a`` is added.

    ``a`` is the gradient of KL(before || now) on the model's own refusals, and the products are
    over all weights that train.
    """

    name = "SafeGrad"
    looks_at = ("refusals", "reference")

    def before_step(self, step: Step) -> None:
        parameters = [p for p in trained(step.model).values() if p.grad is not None]
        task = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        # Into .grad, so that the hooks that keep frozen units frozen see it.
        add_gradient(step.model, self.refusals_for(step), step.at_once, self.reference)
        alignment = [p.grad for p in parameters]
        pairs = [
            (g, a) for g, a in zip(task, alignment, strict=True) if g is not None and a is not None
        ]
        against = torch.stack([(g * a).sum() for g, a in pairs]).sum()
        size = torch.stack([(a * a).sum() for _, a in pairs]).sum()
        overlap = float(against / size) if against < 0 else 0.0
        for parameter, g, a in zip(parameters, task, alignment, strict=True):
            if g is not None and a is not None:
                g.add_(a, alpha=self.strength - overlap)
            parameter.grad = g
        clip_grad_norm_(parameters, step.max_norm)
