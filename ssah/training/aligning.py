"""How an unaligned model is aligned: as a whole, through some units, or through adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.runtime import seed_everything
from .part import Part
from .settings import AlignConfig
from .supervised import supervised_finetune

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
    part: Part | None = None,
) -> dict[str, Any]:
    """Teach ``model`` the refusals in ``taught`` and hold it to ``reference`` on those in ``held``.

    Returns the training's record; with trained units named it says that nothing outside of them
    changed a bit, which is checked against the reference.
    """
    part = part or Part()
    seed_everything(seed)  # adapters begin with random factors
    with part.training(model):
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
    if part.train is not None:
        part.require_kept(model, reference.state_dict(), model.state_dict())
        training["changed_outside"] = 0
    return training
