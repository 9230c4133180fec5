"""Fine-tuning under a defence."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .defences import Defence
from .loss import Dialogues
from .settings import TrainingConfig
from .supervised import TrainingRecord, supervised_finetune

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def defended_finetune(
    model: PreTrainedModel,
    taught: Dialogues,
    config: TrainingConfig,
    seed: int,
    folder: Path,
    defence: Defence,
    on_epoch: Callable[[int], None] | None = None,
) -> TrainingRecord:
    """Fine-tune in place on (prompt ids, response ids) at a constant rate, with a defence.

    ``on_epoch`` sees the weights that would come out there. Units stay frozen inside
    :func:`ssah.training.slicing.freeze_units`, whatever the defence does.
    """
    rows, anchors = defence.lesson(taught, random.Random(seed))
    return supervised_finetune(
        model,
        rows,
        defence.settings(config),
        seed,
        folder,
        anchors,
        defence.reference,
        anchor_weight=defence.anchor_weight,
        constant_rate=True,
        on_epoch=on_epoch,
        defence=defence,
    )
