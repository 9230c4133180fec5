"""Settings of trainings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainingConfig:
    """What every fine-tuning needs to know. AdamW with betas (0.9, 0.95)."""

    epochs: int = 1
    learning_rate: float = 1e-4
    batch_size: int = 24
    micro_batch_size: int = 12
    weight_decay: float = 0.0
    warmup_steps: int = 2
    max_grad_norm: float = 1.0
    train_embeddings: bool = False  #: and with them a tied language-model head


@dataclass
class AlignConfig(TrainingConfig):
    """Making the aligned model out of the unaligned one; ``enabled=false``: it is aligned as is."""

    enabled: bool = True
    harmful: int = 120
    benign: int = 120
    safe_alternative: float = 0.3  #: fraction of refusals that end with an offer
    anchor_tokens: int = 24  #: of each benign answer; whether to refuse is decided early
    anchor_weight: float = 10.0  #: of the divergence on benign rows, against the refusals' loss
    epochs: int = 2
