"""The loss of responses: right tokens to learn, or the distribution of another model to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..text.batches import pad, scored_logits
from ..text.chat import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dialogues = Sequence[Pair]

#: (log-probability, that under a reference, position in its response from 1) of each response
#: token, ``[tokens]`` each -> its weight in the loss.
TokenWeights = Callable[[Tensor, Tensor, Tensor], Tensor]


def as_rows(dialogues: Dialogues, anchors: Dialogues = ()) -> list[dict[str, Any]]:
    """What :func:`collate` takes: dialogues to learn, and those that are ``anchored``."""
    rows = [{"prompt": p, "response": r} for p, r in dialogues]
    return rows + [{"prompt": p, "response": r, "anchored": True} for p, r in anchors]


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels`` (-100 off the response).

    Where any row is ``anchored``, also which rows are.
    """
    ids = [row["prompt"] + row["response"] for row in rows]
    labels = [[-100] * len(row["prompt"]) + row["response"] for row in rows]
    batch = {
        "input_ids": pad(ids, 0),
        "attention_mask": pad([[1] * len(i) for i in ids], 0),
        "labels": pad(labels, -100),
    }
    anchored = torch.tensor([row.get("anchored", False) for row in rows])
    return batch | ({"anchored": anchored} if anchored.any() else {})


def summed_loss(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    reference: PreTrainedModel | None = None,
    anchor_weight: float = 1.0,
    token_weights: TokenWeights | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of a batch in nats, summed over its response tokens, and how many of these there are.

    Logits are computed only at response tokens: on a small model with a large vocabulary the head
    is a third of the work, and half of the positions are prompt. Rows marked ``anchored`` have no
    right answer to learn: their loss is KL(reference || model) at each response token, times
    ``anchor_weight``. Tokens of the other rows count by ``token_weights``, through which no
    gradient flows.
    """
    target = batch["labels"][:, 1:]
    scored = target != -100
    ids, attention = batch["input_ids"], batch["attention_mask"]
    logits = scored_logits(model, ids, attention, scored)
    anchored = batch.get("anchored", torch.zeros(len(target), dtype=torch.bool)).to(scored.device)
    soft = anchored[scored.nonzero()[:, 0]]
    learned = scored & ~anchored[:, None]
    taught, tokens = (logits[~soft] if soft.any() else logits), target[learned]
    if token_weights is None:
        total = nn.functional.cross_entropy(taught, tokens, reduction="sum")
    else:
        assert reference is not None
        own = -nn.functional.cross_entropy(taught, tokens, reduction="none")
        with torch.no_grad():
            others = scored_logits(reference, ids, attention, learned)
            theirs = -nn.functional.cross_entropy(others, tokens, reduction="none")
        position = learned.cumsum(1)[learned]
        total = -(token_weights(own.detach(), theirs, position) * own).sum()
    if soft.any():
        assert reference is not None
        with torch.no_grad():
            part = ids[anchored], attention[anchored], scored[anchored]
            wanted = scored_logits(reference, *part).log_softmax(-1)
        total = total + anchor_weight * nn.functional.kl_div(
            logits[soft].log_softmax(-1), wanted, reduction="sum", log_target=True
        )
    return total, scored.sum()


def add_gradient(
    model: PreTrainedModel,
    dialogues: Dialogues,
    at_once: int,
    reference: PreTrainedModel | None = None,
) -> None:
    """Add the gradient of the mean loss in nats per response token: of the tokens as they are, or
    with a ``reference`` the divergence from it. ``at_once`` dialogues are in memory at a time."""
    tokens = sum(len(response) for _, response in dialogues)
    for start in range(0, len(dialogues), at_once):
        part = dialogues[start : start + at_once]
        rows = as_rows(part) if reference is None else as_rows((), part)
        batch = {name: values.to(model.device) for name, values in collate(rows).items()}
        (summed_loss(model, batch, reference)[0] / tokens).backward()
