"""How strongly the loss of some texts depends on each unit's weights: ESI, Fisher information."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.errors import InvalidValueError
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


def expected_impact(
    model: PreTrainedModel, layout: UnitLayout, refusals: Iterable[Batch]
) -> dict[str, Tensor]:
    """Expected Safety Impact (Qi et al., arXiv 2604.08297), summed over a unit's weights.

    By block, ``[units]``, float32 on the CPU: the sum of ``|sigma dS / dw|`` over the unit's
    weights w, where sigma is the standard deviation of the weights of w's matrix (or bias) and S
    the log-likelihood of the refusals' counted tokens. Rows that heads share count for each of
    them. Raises ``ValueError`` where a gradient is not finite.
    """
    slopes = summed_gradients(model, layout, refusals)
    spread = {name: float(model.get_parameter(name).detach().float().std()) for name in slopes}
    return layout.totals({name: spread[name] * slope.abs() for name, slope in slopes.items()})


def fisher_information(
    model: PreTrainedModel, layout: UnitLayout, refusals: Iterable[Batch]
) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher information of refusals, summed over a unit's weights.

    By block, ``[units]``, float32 on the CPU: squared gradients of each refusal's log-likelihood
    (of its counted tokens), added up over the refusals. ``refusals`` are batches of one text each.
    Rows that heads share count for each of them. Raises ``ValueError`` for a larger batch, or where
    a gradient is not finite.
    """
    squares = summed_gradients(model, layout, map(_of_one_text, refusals), squared=True)
    return layout.totals(squares)


def _of_one_text(batch: Batch) -> Batch:
    if len(batch.input_ids) != 1:
        raise InvalidValueError(
            f"A batch of {len(batch.input_ids)} texts: the square of their summed gradient is not "
            "the sum of their squares, so give them one by one."
        )
    return batch
