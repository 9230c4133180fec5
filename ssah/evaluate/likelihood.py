"""Losses and divergences of given continuations, batched by length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..text.batches import Batch, by_length, label_logits, read, scored_logits, sum_by_row
from ..text.chat import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def continuation_losses(
    model: PreTrainedModel, pairs: Sequence[Pair], batch_size: int
) -> list[float]:
    """Negative log-likelihood (nats, summed) of each continuation given its context."""
    losses = [0.0] * len(pairs)
    for chosen in by_length([len(c) + len(t) for c, t in pairs], batch_size):
        batch = Batch.of([pairs[i] for i in chosen])
        ids, scored = batch.input_ids, batch.counted[:, 1:]
        logits = scored_logits(model, ids, batch.attention_mask, scored)
        target = ids[:, 1:][scored].to(logits.device)
        token_loss = nn.functional.cross_entropy(logits, target, reduction="none")
        for i, value in zip(chosen, sum_by_row(token_loss, scored).tolist(), strict=True):
            losses[i] = value
    return losses


@torch.inference_mode()
def choice_losses(
    model: PreTrainedModel, items: Sequence[tuple[list[int], list[list[int]]]], batch_size: int
) -> list[list[float]]:
    """The same for several continuations of each context, which is read once for all of them.

    At most ``batch_size`` continuations are in memory at a time, or those of one context.
    """
    step = max(batch_size // max((len(texts) for _, texts in items), default=1), 1)
    found: list[list[float]] = [[]] * len(items)
    for chosen in by_length([len(context) for context, _ in items], step):
        asked = Batch.of([(items[i][0], []) for i in chosen], side="left")
        texts = [text for i in chosen for text in items[i][1]]
        owner = torch.tensor([n for n, i in enumerate(chosen) for _ in items[i][1]])
        owner = owner.to(model.device)
        attention = asked.attention_mask.to(model.device)
        heard = read(model, asked, use_cache=True)
        cache = heard.past_key_values
        cache.batch_select_indices(owner)
        said = Batch.of([([], text) for text in texts])
        tails, known = said.input_ids.to(model.device), said.attention_mask.to(model.device)
        hidden = model.base_model(
            input_ids=tails,
            attention_mask=torch.cat([attention[owner], known], 1),
            position_ids=attention.sum(1)[owner, None] + known.cumsum(1) - 1,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        predicting = torch.cat([heard.last_hidden_state[owner, -1:], hidden[:, :-1]], 1)
        scored = known.bool()
        logits = label_logits(model, predicting[scored])
        token_loss = nn.functional.cross_entropy(logits, tails[scored], reduction="none")
        sums = sum_by_row(token_loss, scored)
        for n, i in enumerate(chosen):
            found[i] = sums[owner == n].tolist()
    return found


@torch.inference_mode()
def divergences(
    reference: PreTrainedModel, model: PreTrainedModel, pairs: Sequence[Pair], batch_size: int
) -> list[float]:
    """KL(reference || model) in nats per continuation token, by pair; 0 where there is none."""
    found = [0.0] * len(pairs)
    for chosen in by_length([len(c) + len(t) for c, t in pairs], batch_size):
        batch = Batch.of([pairs[i] for i in chosen])
        scored = batch.counted[:, 1:]
        wanted, given = (
            scored_logits(m, batch.input_ids, batch.attention_mask, scored).log_softmax(-1)
            for m in (reference, model)
        )
        by_token = (wanted.exp() * (wanted - given)).sum(-1).cpu()
        means = sum_by_row(by_token, scored) / scored.sum(1).clamp(min=1)
        for i, mean in zip(chosen, means.tolist(), strict=True):
            found[i] = mean
    return found
