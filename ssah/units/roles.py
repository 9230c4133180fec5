"""Roles of units (paper, section 3.2): ESU, EUU, CU and RU from two attribution scores.

The paper's third arXiv version calls ESU and EUU "SCU" and "UCU"; the groups are the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.errors import InvalidValueError
from ..core.valid import require_word
from .families import BlockKind, UnitKind
from .layout import UnitLayout
from .mask import UnitMask

#: Integer codes of the stored labels. RU is claimed first, then ESU, then EUU; CU is the rest.
GROUPS = ("RU", "ESU", "EUU", "CU")


@dataclass(frozen=True)
class Shares:
    """Size of each claimed group as a fraction of all units; CU is what remains."""

    ru: float
    esu: float
    euu: float

    def __post_init__(self) -> None:
        parts = (self.ru, self.esu, self.euu)
        if min(parts) < 0 or sum(parts) > 1 + 1e-9:  # 0.34 + 0.55 + 0.11 exceeds 1 by rounding
            raise InvalidValueError(f"Shares must be >= 0 and sum to at most 1, not {parts}.")


@dataclass(frozen=True)
class Roles:
    """One role for each unit: the groups are disjoint and cover all units.

    ``labels`` are indices into :data:`GROUPS` and ``difference`` is I_S - I_U, both by block with
    shape ``[units]``.
    """

    labels: dict[str, Tensor]
    difference: dict[str, Tensor]
    unit_kind: UnitKind = "head"

    def mask(self, group: str) -> UnitMask:
        """The units of one group: ``"ESU"``, ``"EUU"``, ``"CU"`` or ``"RU"``."""
        require_word("group", group, GROUPS)
        code = GROUPS.index(group)
        chosen = {name: part == code for name, part in self.labels.items()}
        return UnitMask(chosen, self.unit_kind)

    def top(self, group: str, fraction: float) -> UnitMask:
        """The units of a group with the highest I_S - I_U, up to ``fraction`` of *all* units.

        This is the paper's "top 6 % of CU": 1.3 % ESU and 6 % make its 7.3 % of all units.
        """
        member = torch.cat(list(self.mask(group).values()))
        difference = torch.cat(list(self.difference.values()))
        wanted = round(fraction * len(member))
        if fraction < 0:
            raise InvalidValueError(f"{fraction:.1%} of all units is negative: ask for 0 or more.")
        if wanted > int(member.sum()):
            raise InvalidValueError(
                f"{fraction:.1%} of all units is more than {group} has "
                f"({int(member.sum()) / len(member):.1%}): ask for less."
            )
        order = difference.masked_fill(~member, -torch.inf).argsort(descending=True, stable=True)
        chosen = torch.zeros_like(member)
        chosen[order[:wanted]] = True
        sizes = [len(part) for part in self.labels.values()]
        parts = dict(zip(self.labels, chosen.split(sizes), strict=True))
        return UnitMask(parts, self.unit_kind)

    def select(self, *groups: str) -> UnitMask:
        """Union of groups such as ``select("ESU", "CU:6%")``; a percentage is of all units."""
        union: UnitMask | None = None
        for item in groups:
            group, colon, percent = item.partition(":")
            if not colon:
                mask = self.mask(group)
            # Without the sign, 0.06 might mean a fraction.
            elif re.fullmatch(r"\d+(\.\d+)?%|[1-9]\d*(\.\d+)?", percent):
                mask = self.top(group, float(percent.removesuffix("%")) / 100)
            else:
                raise InvalidValueError(
                    f"'{item}' is no group of units: write a group, or a group and a percentage of "
                    "all units, such as CU:6%."
                )
            union = mask if union is None else union | mask
        if union is None:
            raise InvalidValueError("Name at least one group to select.")
        return union

    def save(self, path: Path) -> None:
        labels = {f"{name}/label": t for name, t in self.labels.items()}
        save_file(labels | {f"{name}/difference": t for name, t in self.difference.items()}, path)

    @classmethod
    def load(cls, path: Path, layout: UnitLayout) -> Roles:
        tensors = load_file(path)
        return cls(
            {b.name: tensors[f"{b.name}/label"] for b in layout.blocks},
            {b.name: tensors[f"{b.name}/difference"] for b in layout.blocks},
            layout.unit_kind,
        )


def classify(
    layout: UnitLayout,
    safety: dict[str, Tensor],
    utility: dict[str, Tensor],
    shares: Shares,
    redundant_kinds: Sequence[str] = ("attn", "mlp"),
) -> Roles:
    """Assign roles by one global ranking over all blocks.

    RU are the units with the lowest I_U + I_S; of the others, ESU have the highest and EUU the
    lowest I_S - I_U; the rest are CU. ``safety`` and ``utility`` are the unit scores I_S and I_U
    by block, shape ``[units]``. Only blocks of ``redundant_kinds`` may hold RU; ``shares.ru`` is a
    fraction of all units nevertheless.
    """
    total, difference = _rankings(layout, safety, utility)
    labels = torch.full((layout.units,), GROUPS.index("CU"), dtype=torch.int8)
    eligible = layout.of_kinds(redundant_kinds)
    if round(shares.ru * layout.units) > int(eligible.sum()):
        raise InvalidValueError(
            f"RU cannot be {shares.ru:.1%} of all units, since the units of "
            f"{', '.join(redundant_kinds)} are fewer: choose a smaller share."
        )
    total = total.masked_fill(~eligible, torch.inf)
    for group, share, rank in (
        ("RU", shares.ru, total), ("ESU", shares.esu, -difference), ("EUU", shares.euu, difference),
    ):  # fmt: skip
        free = labels == GROUPS.index("CU")
        order = rank.masked_fill(~free, torch.inf).argsort(stable=True)
        # Rounding may ask for a unit more than is left; it must not take one that is claimed.
        wanted = min(round(share * layout.units), int(free.sum()))
        labels[order[:wanted]] = GROUPS.index(group)
    return Roles(layout.split(labels), layout.split(difference), layout.unit_kind)


def _rankings(
    layout: UnitLayout, safety: dict[str, Tensor], utility: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """I_S + I_U and I_S - I_U, ``[units]``."""
    score_s, score_u = layout.flatten(safety), layout.flatten(utility)
    return score_s + score_u, score_s - score_u


@dataclass(frozen=True)
class Thresholds:
    """The scores at which a classification's groups end."""

    ru: float  #: I_U + I_S of the last RU
    esu: float  #: I_S - I_U of the last ESU
    euu: float  #: I_S - I_U of the last EUU

    @classmethod
    def of(cls, roles: Roles, safety: dict[str, Tensor], utility: dict[str, Tensor]) -> Thresholds:
        """Read off a classification and the scores that it was made from."""

        def scores_in(group: str, sign: int) -> Tensor:
            mask = roles.mask(group)
            found = torch.cat([(safety[n] + sign * utility[n])[mask[n]] for n in mask])
            return found if len(found) else torch.tensor([torch.nan])  # nothing compares to it

        return cls(
            float(scores_in("RU", 1).max()),
            float(scores_in("ESU", -1).min()),
            float(scores_in("EUU", -1).max()),
        )


def classify_by_thresholds(
    layout: UnitLayout,
    safety: dict[str, Tensor],
    utility: dict[str, Tensor],
    thresholds: Thresholds,
    redundant_kinds: Sequence[str] = ("attn", "mlp"),
) -> Roles:
    """Assign roles by fixed scores, so that groups may grow and shrink (paper, Figs 5, 11-13).

    RU, then ESU, then EUU claim their units, as in :func:`classify`, which gives the same roles on
    the scores that the thresholds were read off.
    """
    total, difference = _rankings(layout, safety, utility)
    labels = torch.full((layout.units,), GROUPS.index("CU"), dtype=torch.int8)
    labels[difference <= thresholds.euu] = GROUPS.index("EUU")
    labels[difference >= thresholds.esu] = GROUPS.index("ESU")
    labels[(total <= thresholds.ru) & layout.of_kinds(redundant_kinds)] = GROUPS.index("RU")
    return Roles(layout.split(labels), layout.split(difference), layout.unit_kind)


def transfer(before: Roles, after: Roles, kind: BlockKind | None = None) -> Tensor:
    """Number of units that went from one group to another, ``[4, 4]`` in the order of GROUPS.

    Rows are the groups before, columns those after; of one kind of block where it is given.
    """
    names = [name for name in before.labels if kind is None or name.endswith(kind)]
    first = torch.cat([before.labels[name] for name in names]).long()
    second = torch.cat([after.labels[name] for name in names]).long()
    size = len(GROUPS)
    return torch.bincount(first * size + second, minlength=size * size).view(size, size)
