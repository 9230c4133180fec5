"""How strongly the loss of refusals depends on each unit's weights: ESI, and Fisher information."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from ..core.errors import InvalidValueError
from ..text.batches import Batch
from ..units.layout import UnitLayout
from .gradients import summed_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
