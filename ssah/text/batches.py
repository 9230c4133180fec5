"""Token sequences of different lengths as padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ..core.valid import require_word
from .settings import Tokens


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


def dialogue_batches(
    pairs: Sequence[tuple[list[int], list[int]]],
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
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    for start in range(0, len(order), batch_size):
        chosen = [pairs[i] for i in order[start : start + batch_size]]
        counted = []
        for prompt, response in chosen:
            if tokens == "response":
                counted.append([0] * len(prompt) + [1] * len(response))
            else:
                total = len(prompt) + len(response)
                counted.append([int(not drop_first)] + [1] * (total - 1))
        yield Batch(
            pad([[*p, *r] for p, r in chosen], 0, side),
            pad([[1] * (len(p) + len(r)) for p, r in chosen], 0, side),
            pad(counted, 0, side).bool(),
        )


@dataclass(frozen=True)
class Batch:
    """One padded batch. All tensors have shape ``[samples, tokens]``."""

    input_ids: Tensor
    attention_mask: Tensor  #: 1 where a token is real
    counted: Tensor  #: bool: tokens whose activations enter the statistics
