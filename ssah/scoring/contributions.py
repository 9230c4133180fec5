"""What each unit adds to its block's output: what removing it alone would change there.

Zhao et al. (2025), *Understanding and Enhancing Safety Mechanisms of LLMs via Safety-Specific
Neuron*, call neurons safety neurons whose removal changes their layer's output most on *every*
harmful prompt (SN-Tune), and leave out those that are found on general text (RSN-Tune).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.errors import InvalidValueError
from ..core.valid import require_finite
from ..text.batches import Batch
from ..units.layout import Block, UnitLayout
from .attribution import NOTHING_COUNTED, listen

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def contributions(
    model: PreTrainedModel, layout: UnitLayout, batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """The norm of what each unit adds to its block's output, its mean over a text's counted tokens.

    By block, ``[texts, units]``, float32 on the CPU. A block's output is the sum of
    ``W[:, c] x_c`` over its units' channels c, so this is exactly what the removal of a unit
    changes there, before any norm that follows. Texts come in the order of the batches; those
    without a counted token are left out. Raises ``ValueError`` where none is left, or where a norm
    is not finite.
    """
    # |W x|^2 = x' (W'W) x needs no room for every unit's vector.
    grams = {block.name: _gram(model, block) for block in layout.blocks}
    channels = {block.name: block.channels.to(model.device) for block in layout.blocks}
    found: dict[str, list[Tensor]] = {block.name: [] for block in layout.blocks}

    def hear(name: str, entering: Tensor, counted: Tensor) -> None:
        values = entering[counted].float()[:, channels[name]]
        squared = torch.einsum("tuc,ucd,tud->tu", values, grams[name], values)
        norms = squared.clamp(min=0).sqrt()  # rounding may leave less than nothing
        total = norms.new_zeros(len(counted), norms.shape[1])
        total.index_add_(0, counted.nonzero()[:, 0], norms)
        present = counted.any(1)
        found[name].append((total[present] / counted.sum(1, keepdim=True)[present]).cpu())

    listen(model, layout, batches, hear)
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    for name, norms in joined.items():
        if not len(norms):
            raise InvalidValueError(NOTHING_COUNTED)
        require_finite(norms, f"what the units of {name} contribute")
    return joined


def _gram(model: PreTrainedModel, block: Block) -> Tensor:
    """Products of a unit's columns of ``B``, ``[units, channels, channels]``."""
    weight = block.projection(model).weight.detach().float()
    columns = weight.T[block.channels.to(weight.device)]
    return columns @ columns.transpose(1, 2)


def places(contribution: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A unit's last place over all texts, among the units of its block: float64 ``[units]``.

    Places count from 0, which contributes most. The units before place k are those that are among
    the k that contribute most on every text: the intersection that Zhao et al. take of the k
    neurons of each layer, with k left open. Units of one last place are in the order of their mean
    one.
    """
    found = {}
    for name, values in contribution.items():
        place = values.argsort(1, descending=True).argsort(1).double()
        found[name] = place.max(0).values + place.mean(0) / place.shape[1]
    return found
