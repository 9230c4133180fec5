"""Logits only at scored positions: the rest of the head's work is left out.

On a small model with a large vocabulary the head is a third of the work, and half of the positions
are prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .batches import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read(model: PreTrainedModel, batch: Batch, **options: Any) -> Any:
    """What the model below its head makes of a batch, padded on either side.

    Positions start at the first real token. Left to itself the model counts padding, which moves
    left-padded samples and the reach of length-dependent rotary scaling.
    """
    attention = batch.attention_mask.to(model.device)
    return model.base_model(
        input_ids=batch.input_ids.to(model.device),
        attention_mask=attention,
        position_ids=(attention.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        **options,
    )


def label_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Float32 logits of chosen hidden states: ``[n, hidden]`` -> ``[n, vocabulary]``."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return (cap * torch.tanh(logits / cap) if cap else logits).float()


def scored_logits(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, scored: Tensor
) -> Tensor:
    """Float32 logits that predict the scored tokens, ``[scored tokens, vocabulary]``.

    ``input_ids`` and ``attention_mask`` are ``[rows, tokens]``, padded on the right; ``scored`` is
    bool ``[rows, tokens - 1]``: entry t stands for token t + 1. All move to the model's device.
    """
    hidden = model.base_model(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        use_cache=False,
    ).last_hidden_state
    return label_logits(model, hidden[:, :-1][scored.to(model.device)])


def counted_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Summed cross-entropy of a batch's counted tokens, nats."""
    ids = batch.input_ids.to(model.device)
    counted = (batch.counted & batch.attention_mask.bool())[:, 1:].to(model.device)
    logits = scored_logits(model, ids, batch.attention_mask, counted)
    return nn.functional.cross_entropy(logits, ids[:, 1:][counted], reduction="sum")


def sum_by_row(values: Tensor, scored: Tensor) -> Tensor:
    """Sums over each row of numbers that belong to its scored tokens, ``[rows]``."""
    rows = scored.nonzero()[:, 0].to(values.device)
    return torch.zeros(len(scored), device=values.device).index_add_(0, rows, values)
