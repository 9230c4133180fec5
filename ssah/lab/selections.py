"""Which units are frozen while the aligned model is attacked: the arms of tables and figures."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..scoring.selectors import magnitude_units, matched_by, random_units, sized
from ..units.layout import UnitLayout
from ..units.mask import UnitMask
from ..units.roles import Roles
from .arms import Tuning
from .stages import Stages
from .tuning import ATTACKS, LESSON, MAIN_ATTACK

FULL, CU6, ALL = "nothing", "ESU + 6 % CU", "ESU + all CU"

#: As many units as ESU + 6 % CU, by :mod:`ssah.scoring.conflict`; not in the paper.
CONFLICT = "gradient conflict"
CONFLICT_ARM = f"{CONFLICT}, as {CU6}"

#: Share of all units at the second budget of the conditions: the paper's comparison with frozen
#: layers (Table 9) freezes ESU and 26.8 % of CU; all heads together hold a quarter of the weights.
WIDER = 0.25


def label(attack: str, name: str, epoch: int) -> str:
    """How an arm is called in metrics: ``instructions: ESU + 6 % CU, 2 epochs``."""
    return f"{attack}: {name}, {epoch} epoch{'s' if epoch > 1 else ''}"


def headline(stages: Stages, attack: str) -> dict[str, Tuning]:
    """The paper's arms. Where an attack does not have all arms, the one that freezes nothing is
    trained for as long as the paper's rule needs it, one epoch, and only the main attack has the
    third. The lesson has no other than the one that freezes nothing.
    """
    at_length = attack in (MAIN_ATTACK, *stages.config.finetune.wide_attacks)
    arms = {FULL: Tuning(attack, changes={} if at_length else {"epochs": 1})}
    if attack == LESSON:
        return arms
    arms[CU6] = freeze(stages, attack, stages.roles.select("ESU", "CU:6%"))
    if at_length:
        arms[ALL] = freeze(stages, attack, stages.roles.select("ESU", "CU"))
    return arms


def available_attacks(stages: Stages) -> list[str]:
    """The attacks that there are rows for."""
    return [name for name in ATTACKS if name != LESSON or stages.has(name)]


def freeze(stages: Stages, attack: str, mask: UnitMask) -> Tuning:
    """An arm that freezes units of the study's kind."""
    return Tuning(attack, mask)


def conflicting(stages: Stages, attack: str, target: UnitMask) -> UnitMask:
    """As many heads and neurons as ``target``, those through which the attack hurts refusals."""
    conflict = stages.conflict(attack)
    return matched_by(stages.layout, target, {name: -part for name, part in conflict.items()})


def contenders(stages: Stages, attack: str) -> dict[str, Tuning]:
    """The paper's arms, and one that freezes as much as ESU + 6 % CU by gradient conflict, where
    the attack has all arms."""
    arms = headline(stages, attack)
    if attack not in stages.config.finetune.wide_attacks:
        return arms
    chosen = conflicting(stages, attack, frozen(arms[CU6]))
    return arms | {CONFLICT_ARM: freeze(stages, attack, chosen)}


def ratios(stages: Stages) -> dict[float, Tuning]:
    """ESU and the top percent of CU (Fig. 8)."""
    return {
        percent: freeze(stages, MAIN_ATTACK, stages.roles.select("ESU", f"CU:{percent}%"))
        for percent in stages.config.finetune.cu_percents
    }


def random_controls(stages: Stages, like: str, draws: int) -> dict[str, Tuning]:
    """Draws of as many heads and neurons as a headline arm freezes, by seed and draw."""
    target = frozen(headline(stages, MAIN_ATTACK)[like])
    return {
        f"{stages.seed}.{draw}": freeze(
            stages, MAIN_ATTACK, random_units(stages.layout, target, 1000 * stages.seed + draw)
        )
        for draw in range(draws)
    }


def frozen(tuning: Tuning) -> UnitMask:
    assert tuning.frozen is not None
    return tuning.frozen


def ranked_controls(stages: Stages, target: UnitMask) -> dict[str, UnitMask]:
    """As many heads and neurons as ``target`` by other rules than I_S - I_U from the top."""
    by_rule = {
        "lowest I_S - I_U": matched_by(stages.layout, target, stages.roles.difference),
        "largest magnitude": magnitude_units(
            stages.model("aligned"), stages.layout, target, largest=True
        ),
    }
    if stages.config.align.enabled:  # otherwise nobody knows what the alignment moved
        by_rule["moved most by alignment"] = matched_by(stages.layout, target, _stillness(stages))
    return by_rule


def _stillness(stages: Stages) -> dict[str, torch.Tensor]:
    """Minus the squared distance that alignment moved a unit's weights, by block ``[units]``."""
    before, after = (
        {name: p.detach().float().cpu() for name, p in stages.model(which).named_parameters()}
        for which in ("unaligned", "aligned")
    )
    return stages.layout.totals({name: -((after[name] - before[name]) ** 2) for name in after})


def conditions(stages: Stages) -> dict[str, Tuning]:
    """One epoch each: other rules at two budgets, and other settings (``fig_conditions``)."""

    def one_epoch(mask: UnitMask | None = None, **changes: Any) -> Tuning:
        return Tuning(MAIN_ATTACK, mask, {"epochs": 1, **changes})

    narrow = stages.roles.select("ESU", "CU:6%")
    esu = stages.shares.esu
    wide = stages.roles.select("ESU", f"CU:{100 * (WIDER - esu)}%")
    arms = {f"{rule}, 7 %": one_epoch(m) for rule, m in ranked_controls(stages, narrow).items()}
    arms |= {
        "ESU + CU, 25 %": one_epoch(wide),
        "random, 25 %": one_epoch(random_units(stages.layout, wide, 1000 * stages.seed)),
    }
    arms |= {f"{rule}, 25 %": one_epoch(m) for rule, m in ranked_controls(stages, wide).items()}
    arms[f"{CONFLICT}, 25 %"] = one_epoch(conflicting(stages, MAIN_ATTACK, wide))
    arms["all heads"] = one_epoch(sized(stages.layout, heads=1, neurons=0))
    for name, changes in (
        ("embeddings trained", {"train_embeddings": True}),
        ("lower rate", {"learning_rate": stages.config.finetune.learning_rate * 0.4}),
    ):
        arms[f"{FULL}, {name}"] = one_epoch(**changes)
        arms[f"{CU6}, {name}"] = one_epoch(narrow, **changes)
    everywhere = rescored(stages, tokens="all")
    arms[f"{CU6}, scored on all tokens"] = one_epoch(everywhere.select("ESU", "CU:6%"))
    by_channel = rescored(stages, unit_kind="channel")
    arms[f"{CU6}, channels as units"] = one_epoch(by_channel.select("ESU", "CU:6%"))
    for name, mask in _channels(stages, by_channel).items():
        arms[name] = one_epoch(mask)
    return arms


def _channels(stages: Stages, by_channel: Roles) -> dict[str, UnitMask]:
    """Attention's value-output path, whole and by halves: what a head's score averages away.

    Chosen are value rows, each with its columns of the output projection in all heads that share
    it, by the mean of these channels; so all halves hold the same number of weights.
    """
    layout = stages.layout_for("channel")
    target = sized(layout, heads=0.5, neurons=0)
    generator = torch.Generator().manual_seed(1000 * stages.seed)
    chance = layout.split(torch.rand(layout.units, generator=generator))
    lowest, drawn = (_by_value_row(layout, r) for r in (by_channel.difference, chance))
    highest = {name: -part for name, part in lowest.items()}
    return {
        "value-output path": sized(layout, heads=1, neurons=0),
        "half of it, highest I_S - I_U": matched_by(layout, target, highest),
        "half of it, random": matched_by(layout, target, drawn),
        "half of it, lowest I_S - I_U": matched_by(layout, target, lowest),
    }


def _by_value_row(layout: UnitLayout, rank: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rank of attention's channels, averaged over those that share a value row."""
    shared = dict(rank)
    for block in layout.blocks:
        if block.kind == "attn":
            rows = next(part for part in block.slices if part.dim == 0).index.flatten()
            sums = torch.zeros(int(rows.max()) + 1).index_add_(0, rows, rank[block.name].float())
            shared[block.name] = (sums / rows.bincount().clamp(min=1))[rows]
    return shared


def rescored(stages: Stages, **changes: Any) -> Roles:
    """Roles from another attribution, at the shares that the search found."""
    attribution = dataclasses.replace(stages.config.attribution, **changes)
    config = dataclasses.replace(stages.config, attribution=attribution)
    return Stages(config, stages.store, stages.seed).classify(stages.shares)
