"""Units through which a fine-tuning would hurt refusals: gradient conflict (not in the paper).

The paper's rule ranks units by what they do in the aligned model, whatever it will be trained on.
This one knows the training rows: it asks what a first step on them does to the loss of refusals.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.valid import require_finite
from ..text.batches import Batch
from ..text.forward import counted_loss
from ..units.layout import UnitLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def gradient_conflict(
    model: PreTrainedModel,
    layout: UnitLayout,
    training: Iterable[Batch],
    safety: Iterable[Batch],
) -> dict[str, Tensor]:
    """How much a first step on ``training`` raises the loss of ``safety``, by unit.

    By block, ``[units]``, float32 on the CPU: minus the sum over a unit's weights of the safety
    loss's gradient times the sign of the training loss's gradient. To first order, and times the
    rate, that is what Adam's first step on this unit alone does. Rows that heads share count for
    each of them. The losses are of the counted tokens. The model is left as it was. Raises
    ``ValueError`` where a gradient is not finite.
    """
    step = _gradients(model, layout, training)
    hurt = _gradients(model, layout, safety)
    for name in hurt:
        for gradient in (step[name], hurt[name]):
            require_finite(gradient, f"the gradient of {name}")
    return layout.totals({name: -hurt[name] * step[name].sign() for name in hurt})


def _gradients(
    model: PreTrainedModel, layout: UnitLayout, batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """Gradients of the summed loss for every weight of the layout, float32 on the CPU."""
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    was_training = model.training
    wanted = {part.parameter for block in layout.blocks for part in block.slices}
    try:
        model.eval()  # dropout would add noise
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        chosen = {name: p for name, p in model.named_parameters() if name in wanted}
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in chosen.items()}
        for batch in batches:
            found = torch.autograd.grad(counted_loss(model, batch), list(chosen.values()))
            for name, gradient in zip(chosen, found, strict=True):
                total[name] += gradient
    finally:
        model.train(was_training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
    return {name: gradient.cpu() for name, gradient in total.items()}
