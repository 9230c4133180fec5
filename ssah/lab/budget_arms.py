"""Through what the unaligned model is aligned: the arms of Table 4."""

from __future__ import annotations

from ..scoring.selectors import matched_by, random_units, sized
from ..training.lora import rank_for
from .arms import Aligning, Tuning
from .stages import Stages

#: All units train (this is the aligned model of everything else), redundant ones, and as many
#: random ones.
WHOLE, RU, RANDOM = "all units", "RU", "random, as RU"

#: As long again: the paper trains RU for twice the epochs.
LONGER = "twice the epochs"

#: In as many epochs: fewer weights may need larger steps.
FASTER = "3 x the rate"


def budget_arms(
    stages: Stages, *, longer: bool = False, more: bool = False
) -> dict[str, Aligning | None]:
    """Whole, redundant units, and the control; ``longer`` adds the paper's rule for the number of
    epochs, ``more`` that and everything else that a reviewer asks."""
    budget, layout = stages.config.budget, stages.layout
    redundant = stages.redundant(budget.share)
    drawn = random_units(layout, redundant, 1000 * stages.seed)
    arms: dict[str, Aligning | None] = {
        WHOLE: None,
        RU: Aligning(redundant),
        RANDOM: Aligning(drawn),
    }
    parts = {RU: redundant, RANDOM: drawn}
    if longer or more:
        twice = {"epochs": 2 * stages.config.align.epochs}
        arms |= {f"{n}, {LONGER}": Aligning(mask, changes=twice) for n, mask in parts.items()}
    if not more:
        return arms
    steps = {"learning_rate": 3 * stages.config.align.learning_rate}
    arms |= {f"{n}, {FASTER}": Aligning(mask, changes=steps) for n, mask in parts.items()}
    rank = rank_for(layout, round(layout.weights(redundant)))
    highest = {name: -part for name, part in stages.utility_scores.items()}
    arms["highest I_U, as RU"] = Aligning(matched_by(layout, redundant, highest))
    for share in budget.sweep:
        arms[f"{RU} {100 * share:g} %"] = Aligning(stages.redundant(share))
    return arms | {
        "ESU of the aligned model": Aligning(stages.roles.mask("ESU")),
        "all heads": Aligning(sized(layout, heads=1, neurons=0)),
        f"LoRA, rank {rank}": Aligning(rank=rank),
        f"LoRA inside RU, rank {rank}": Aligning(redundant, rank),
    }


def instruction_arms(stages: Stages, attack: str) -> dict[str, Tuning]:
    """The paper's alignment: the unaligned model learns from instructions, by the paper's rule
    for the number of epochs."""
    layout, redundant = stages.layout, stages.redundant(stages.config.budget.share)
    parts = {RU: redundant, RANDOM: random_units(layout, redundant, 1000 * stages.seed)}
    return {f"{attack}: {WHOLE}": Tuning(attack, base="unaligned", changes={"epochs": 1})} | {
        f"{attack}: {name}, {LONGER}": Tuning(attack, base="unaligned", trained=mask)
        for name, mask in parts.items()
    }
