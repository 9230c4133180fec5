"""Safety layers: the consecutive blocks in which harmful prompts part from harmless ones.

Li et al. (2024), *Safety Layers in Aligned Large Language Models* (arXiv 2408.17003): the angle
between the states of a harmless and a harmful prompt is that between two harmless ones in the first
blocks, and grows beyond it in some consecutive blocks in the middle.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.errors import InvalidValueError
from ..text.batches import Batch, read

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def last_states(model: PreTrainedModel, batches: Iterable[Batch]) -> Tensor:
    """The state at each text's last token after each block, ``[texts, blocks, hidden]``, float32 on
    the CPU; that of the last block after the final norm. Batches are padded on the left."""
    was_training = model.training
    model.eval()
    try:
        found = []
        for batch in batches:
            states = read(model, batch, output_hidden_states=True).hidden_states[1:]
            found.append(torch.stack([state[:, -1] for state in states], 1).float().cpu())
    finally:
        model.train(was_training)
    return torch.cat(found)


def angular_gap(harmless: Tensor, harmful: Tensor) -> Tensor:
    """By how many degrees a harmless state is further from a harmful one than from another harmless
    one, the mean over all pairs: float64 ``[blocks]``.

    Both are ``[texts, blocks, hidden]``. Raises ``ValueError`` with fewer than two harmless texts
    or no harmful one.
    """
    if len(harmless) < 2 or not len(harmful):
        raise InvalidValueError("An angular gap needs two harmless texts and a harmful one.")
    first, second = (
        nn.functional.normalize(states.double(), dim=-1).transpose(0, 1)
        for states in (harmless, harmful)
    )
    apart = torch.ones(len(harmless), len(harmless), dtype=torch.bool).triu(1)
    between = _degrees(first @ second.transpose(1, 2)).flatten(1).mean(1)
    return between - _degrees(first @ first.transpose(1, 2))[:, apart].mean(1)


def _degrees(cosines: Tensor) -> Tensor:
    return cosines.clamp(-1, 1).arccos().rad2deg()


def where_it_grows(gap: Tensor, width: int) -> range:
    """The ``width`` consecutive blocks over which the gap grows most, the first where several do.

    Before the first block there is none: all prompts end with the same token of the template.
    """
    before = torch.cat([gap.new_zeros(1), gap])[: len(gap) - width + 1]
    start = int((gap[width - 1 :] - before).argmax())
    return range(start, start + width)
