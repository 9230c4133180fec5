"""Units through which a fine-tuning would hurt refusals: gradient conflict (not in the paper).

The paper's rule ranks units by what they do in the aligned model, whatever it will be trained on.
This one knows the training rows: it asks what a first step on them does to the loss of refusals.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from ..text.batches import Batch
from ..units.layout import UnitLayout
from .sensitivity import summed_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def gradient_conflict(
    model: PreTrainedModel, layout: UnitLayout, training: Iterable[Batch], safety: Iterable[Batch]
) -> dict[str, Tensor]:
    """How much a first step on ``training`` raises the loss of ``safety``, by unit.

    By block, ``[units]``, float32 on the CPU: minus the sum over a unit's weights of the safety
    loss's gradient times the sign of the training loss's gradient. To first order, and times the
    rate, that is what Adam's first step on this unit alone does. Rows that heads share count for
    each of them. The losses are of the counted tokens. The model is left as it was. Raises
    ``ValueError`` where a gradient is not finite.
    """
    step = summed_gradients(model, layout, training)
    hurt = summed_gradients(model, layout, safety)
    return layout.totals({name: -hurt[name] * step[name].sign() for name in hurt})
