"""Gradients of the loss of some texts, for the weights of the units."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.valid import require_finite
from ..text.batches import Batch, counted_loss
from ..units.layout import UnitLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def summed_gradients(
    model: PreTrainedModel, layout: UnitLayout, batches: Iterable[Batch], *, squared: bool = False
) -> dict[str, Tensor]:
    """Gradients of the summed loss for every weight of the layout, float32 on the CPU.

    By parameter, of its shape; ``squared`` adds up the squares of each batch's gradient instead.
    The losses are of the counted tokens. The model is left as it was. Raises ``ValueError`` where a
    gradient is not finite.
    """
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    was_training = model.training
    wanted = layout.parameter_names
    try:
        model.eval()  # dropout would add noise
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        chosen = {name: p for name, p in model.named_parameters() if name in wanted}
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in chosen.items()}
        for batch in batches:
            found = torch.autograd.grad(counted_loss(model, batch), list(chosen.values()))
            for name, gradient in zip(chosen, found, strict=True):
                total[name] += gradient.float() ** 2 if squared else gradient
    finally:
        model.train(was_training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
    for name, gradient in total.items():
        require_finite(gradient, f"the gradient of {name}")
    return {name: gradient.cpu() for name, gradient in total.items()}
