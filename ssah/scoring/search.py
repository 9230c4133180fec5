"""The ablation search for the sizes of the groups (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Effect:
    """What removing some units did: rates in [0, 1], perplexity relative to the whole model."""

    asr: float
    perplexity_ratio: float


@dataclass(frozen=True)
class Trial:
    """One step of the ablation search."""

    group: str
    share: float
    effect: Effect
    accepted: bool


def search_share(
    group: str,
    shares: Sequence[float],
    removed: Callable[[float], Effect],
    accept: Callable[[Effect], bool],
) -> tuple[float, list[Trial]]:
    """Ablation search (paper, section 3.2): the largest share whose removal does what is expected.

    Shares are tried from large to small, ``removed`` says what the removal of each does, and the
    first that ``accept`` takes is kept. Where none is accepted the smallest is returned, and no
    trial in the trace is marked accepted.
    """
    trials = []
    for share in sorted(shares, reverse=True):
        effect = removed(share)
        trials.append(Trial(group, share, effect, accept(effect)))
        if trials[-1].accepted:
            break
    return trials[-1].share, trials
