"""Token sequences of different lengths as padded batches, and logits at their scored positions.

On a small model with a large vocabulary the head is a third of the work, and half of the positions
are prompt: it reads only what is scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from ..core.valid import require_word
from .chat import Pair
from .settings import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pad(sequences: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Pad integer sequences to a rectangle, ``[len(sequences), longest]``."""
    width = max(len(s) for s in sequences)
    rows = []
    for sequence in sequences:
        fill = [value] * (width - len(sequence))
        rows.append([*fill, *sequence] if side == "left" else [*sequence, *fill])
    return torch.tensor(rows)


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of positions, shortest first, so that little is padded; ties keep their order."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@dataclass(frozen=True)
class Batch:
    """One padded batch. All tensors have shape ``[samples, tokens]``."""

    input_ids: Tensor
    attention_mask: Tensor  #: 1 where a token is real
    counted: Tensor  #: bool: tokens whose activations enter the statistics

    @classmethod
    def of(
        cls,
        pairs: Sequence[Pair],
        tokens: Tokens = "response",
        drop_first: bool = False,
        side: str = "right",
    ) -> Batch:
        """(prompt ids, response ids); arguments as of :func:`dialogue_batches`."""
        counted = []
        for prompt, response in pairs:
            if tokens == "response":
                counted.append([0] * len(prompt) + [1] * len(response))
            else:
                total = len(prompt) + len(response)
                counted.append([int(not drop_first)] + [1] * (total - 1))
        return cls(
            pad([[*p, *r] for p, r in pairs], 0, side),
            pad([[1] * (len(p) + len(r)) for p, r in pairs], 0, side),
            pad(counted, 0, side).bool(),
        )


def dialogue_batches(
    pairs: Sequence[Pair],
    batch_size: int,
    *,
    tokens: Tokens = "response",
    drop_first: bool = False,
    side: str = "right",
) -> Iterator[Batch]:
    """Padded batches of (prompt ids, response ids), longest first.

    Counted are the positions that carry a response token (``tokens="response"``) or every real
    token (``"all"``, with ``drop_first`` without the first, an attention sink).
    """
    require_word("tokens", tokens, get_args(Tokens))
    order = sorted(pairs, key=lambda pair: -len(pair[0]) - len(pair[1]))
    for start in range(0, len(order), batch_size):
        yield Batch.of(order[start : start + batch_size], tokens, drop_first, side)


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
        **{"use_cache": False, **options},
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
