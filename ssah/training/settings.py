"""Settings of trainings."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.valid import within

#: Of Lisa (:mod:`ssah.training.defences.lisa`): steps on rows between two steps on refusals.
LISA_PERIOD = 4


@dataclass
class TrainingConfig:
    """What every fine-tuning needs to know. AdamW with betas (0.9, 0.95)."""

    epochs: int = within(1, 1)
    learning_rate: float = within(1e-4, above=0)
    batch_size: int = within(24, 1)
    micro_batch_size: int = within(12, 1)  #: at once in memory; divides ``batch_size``
    weight_decay: float = within(0.0, 0)
    warmup_steps: int = within(2, 0)
    max_grad_norm: float = within(1.0, above=0)
    train_embeddings: bool = False  #: and with them a tied language-model head


@dataclass
class AlignConfig(TrainingConfig):
    """Making the aligned model out of the unaligned one; ``enabled=false``: it is aligned as is."""

    enabled: bool = True
    harmful: int = within(120, 1)
    benign: int = within(120, 0)
    safe_alternative: float = within(0.3, 0, 1)  #: fraction of refusals that end with an offer
    anchor_tokens: int = within(24, 1)  #: of each benign answer; whether to refuse is decided early
    anchor_weight: float = within(
        10.0, 0
    )  #: of the divergence on benign rows, against the refusals' loss
    epochs: int = within(2, 1)
