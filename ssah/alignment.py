"""How an unaligned model is aligned: as a whole, through some units, or through adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arms import Aligning
from .config import AlignConfig
from .finetune import supervised_finetune
from .lora import adapters
from .runtime import seed_everything
from .slicing import train_only
from .units import UnitLayout, UnitMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def align_model(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    taught: Sequence[tuple[list[int], list[int]]],
    held: Sequence[tuple[list[int], list[int]]],
    config: AlignConfig,
    seed: int,
    folder: Path,
    how: Aligning | None = None,
) -> dict[str, Any]:
    """Teach ``model`` the refusals in ``taught`` and hold it to ``reference`` on those in ``held``.

    Returns the training's record; with trained units named it says that nothing outside of them
    changed a bit, which is checked against the reference.
    """
    seed_everything(seed)  # adapters begin with random factors
    with _training(model, how):
        record = supervised_finetune(
            model,
            taught,
            config,
            seed,
            folder,
            held,
            reference,
            anchor_weight=config.anchor_weight,
        )
    training = dataclasses.asdict(record)
    if how is not None and how.trained is not None:
        layout = UnitLayout.of(model, how.unit_kind)
        require_kept(layout, how.trained, reference.state_dict(), model.state_dict())
        training["changed_outside"] = 0
    return training


def _training(model: PreTrainedModel, how: Aligning | None) -> AbstractContextManager[None]:
    """A block in which what ``how`` names trains; without it, the whole model."""
    if how is None:
        return nullcontext()
    layout = UnitLayout.of(model, how.unit_kind)
    if how.rank is not None:
        return adapters(model, layout, how.rank, how.trained)
    assert how.trained is not None, "what shall train?"
    return train_only(model, how.trained, unit_kind=how.unit_kind)


def require_kept(
    layout: UnitLayout,
    trained: UnitMask,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> None:
    """Raise :class:`RuntimeError` where a weight outside the trained units changed a bit."""
    changed = changed_outside(layout, trained, before, after)
    if changed:
        raise RuntimeError(f"{changed} frozen weights changed: the training cannot be trusted.")


def changed_outside(
    layout: UnitLayout,
    trained: UnitMask,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> int:
    """Number of weights, of all parameters, that changed a bit without belonging to a unit.

    Positions that several units share belong to the trained ones where all of them are.
    """
    allowed = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in after.items()}
    for block in layout.blocks:
        for part in block.slices:
            index = part.selected(trained[block.name])
            allowed[part.parameter].index_fill_(part.dim, index, True)
    changed = 0
    for name, tensor in after.items():
        same = _bits(before[name]) == _bits(tensor)
        changed += int((~same & ~allowed[name]).sum())
    return changed


def _bits(tensor: Tensor) -> Tensor:
    """The raw bits as integers: 0.0 and -0.0 differ, a NaN equals itself."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(kinds[tensor.element_size()])
