"""Notebook 04: the ratio sweep (Fig. 8), when freezing works, and what drifted under the attack."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from ..lab import catalogue
from ..lab.arms import units_name
from ..lab.catalogue import NOTHING, WIDER
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.stages.lessons import MAIN_ATTACK
from ..lab.units_of import ALL_CU, CU6
from . import Output
from .draw import COLOURS, panels, reach
from .freezing import (
    BEFORE,
    CONFLICT,
    ONE_EPOCH,
    SAME_EPOCHS,
    ask_against,
    ask_arms,
    ask_random,
    ask_table2,
    name_of,
)
from .pick import arms_of, estimate, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# --- how much to freeze ----------------------------------------------------------------------


def ask_fig8(lab: Lab) -> list[Measure]:
    """ESU and the top percent of CU, all CU, and random units."""
    full = catalogue.unfrozen(lab, MAIN_ATTACK)
    asked = ask_arms(lab, full, MAIN_ATTACK)
    names = [f"ESU + {percent:g} % CU" for percent in lab.config.experiment.cu_percents]
    for name in (*names, ALL_CU):
        arms = catalogue.with_frozen(lab, MAIN_ATTACK, name)
        asked += ask_arms(lab, arms, MAIN_ATTACK) + ask_against(arms, full, MAIN_ATTACK)
    return asked + ask_random(lab, CU6, lab.config.experiment.frozen_draws, [])


def fig8(table: pd.DataFrame, config: Config) -> Output:
    """ASR against the percentage of CU frozen beside the ESU (Fig. 8)."""
    arms = rows_of(table, "ASR", method="frozen", attack=MAIN_ATTACK, rule=None, epoch=None)
    counts = ", ".join(map(str, sorted(set(arms["n"].astype(int)))))
    output = Output(
        "Share of CU (top of the ranking by I_S - I_U, in per cent of all units) that is frozen "
        "beside the ESU while the model is fine-tuned on instructions. Lines: after one epoch and "
        "after the last; dotted: the arm that freezes nothing; crosses: equally many random units "
        "as ESU + 6 % CU has; right: ESU and all CU. Shaded and bars: smallest to largest over "
        "seeds "
        f"(and draws). ASR is of {counts} prompts; measurements.csv has the "
        "interval of each point. `experiment=published` sweeps over more shares."
    )
    frozen = set(arms["rule"])
    asked = sorted(config.experiment.cu_percents)
    percents = [p for p in asked if f"ESU + {p:g} % CU" in frozen] or asked
    right = max(percents) * 1.25 + 1

    def spread(rule: str, epoch: int, like: str = "") -> tuple[float, float, float]:
        """Mean, smallest and largest ASR of an arm over seeds and draws."""
        values = rows_of(
            table, "ASR", method="frozen", attack=MAIN_ATTACK, rule=rule, epoch=epoch, like=like
        )["value"]
        return values.mean(), values.min(), values.max()

    output.figure, axes = panels(6.5, 3.6)
    # The group colours mean something else.
    epochs = [(1, "o", "#56B4E9"), (config.finetune.epochs, "s", "#CC79A7")]
    for epoch, marker, colour in epochs[: config.finetune.epochs]:
        points = [spread(f"ESU + {p:g} % CU", epoch) for p in percents]
        mean, low, high = zip(*points, strict=True)
        label = f"{epoch} epoch{'s' if epoch > 1 else ''}"
        axes.plot(percents, mean, marker=marker, ms=4, color=colour, label=label)
        axes.fill_between(percents, low, high, color=colour, alpha=0.2, lw=0)
        axes.axhline(spread(NOTHING, epoch)[0], color=colour, ls=":", lw=1.2)
        for place, (value, least, most), shape in (
            (6, spread("random", epoch, CU6), "x"),
            (right, spread(ALL_CU, epoch), marker),
        ):
            bars = [[value - least], [most - value]]
            axes.errorbar(place, value, yerr=bars, fmt=shape, ms=5, color=colour, capsize=2, lw=1)
    axes.set_xticks([*percents, right], [*(f"{p:g}" for p in percents), "all"])
    axes.set(xlabel="CU frozen beside the ESU, % of all units", ylabel="ASR, %", ylim=(-3, 103))
    axes.legend(title="dotted: nothing frozen; x: random units")
    return output


# --- conditions ------------------------------------------------------------------------------


def ask_fig_conditions(lab: Lab) -> list[Measure]:
    """What Table 2 asks; and other rules, budgets and settings."""
    asked = ask_table2(lab)
    arms = catalogue.conditions(lab)
    plain = catalogue.unfrozen(lab, MAIN_ATTACK)[0]
    unfrozen = {arm.setting: arm for arm in arms if arm.rule == NOTHING}
    for arm in arms:
        asked += ask_arms(lab, [arm], MAIN_ATTACK)
        if arm.rule != NOTHING:  # against the same setting, where it is one of the training
            base = unfrozen.get(arm.setting, plain)
            asked.append(Measure(arm, "ASR", "", base, SAME_EPOCHS))
            asked.append(Measure(arm, "held-out gain", MAIN_ATTACK, base, ONE_EPOCH))
    return asked


#: Rule -> marker, colour, line; a budget is that of ESU + 6 % CU, of a quarter, or of all CU.
_RULES = {
    "highest I_S - I_U": ("o", COLOURS["ESU"], "-"),
    "random": ("^", COLOURS["random"], "--"),
    "lowest I_S - I_U": ("s", COLOURS["EUU"], "-"),
    "largest magnitude": ("D", "#CC79A7", "-."),
    "moved most by alignment": ("v", "#E69F00", "-"),
    CONFLICT: ("P", "#56B4E9", "-"),
    "ESI": ("X", "#009E73", ":"),
    "Fisher on refusals": ("p", "#F0E442", ":"),
    "all heads": ("*", COLOURS["CU"], ":"),
}


def fig_conditions(table: pd.DataFrame, config: Config) -> Output:
    """When does freezing work? Safety against what is learned, by rule, budget and setting."""
    wider = f"{100 * WIDER:g} %"
    frozen = table[(table["method"] == "frozen") & (table["attack"] == MAIN_ATTACK)]
    frozen = frozen[frozen["epoch"] == 1]
    full = set(frozen[frozen["rule"] == "all heads"]["seed"]) or set(frozen["seed"])
    output = Output(
        "Fine-tuning on instructions, one epoch. Left: ASR against the held-out gain (what the "
        "fine-tuning is for); a rule is better the lower it lies at the same gain; means over "
        "seeds and draws. Right: points of ASR saved against the arm that freezes nothing under "
        "the same setting, same prompts, mean over seeds (and draws) with 95 % interval (paired). "
        f"Budgets: that of ESU + 6 % CU, and {wider}, which is ESU and CU up to a quarter of all "
        "units; the other rules freeze equally many heads and neurons. measurements.csv says "
        "what share of the weights each arm freezes." + _which_seeds(frozen, full)
    )
    output.figure, (left, right) = panels(10, 5, 1, 2, width_ratios=(1, 1.1))
    _draw_trade_off(left, frozen[frozen["seed"].isin(full)], wider)
    _draw_saved(right, frozen)
    return output


def _which_seeds(frozen: pd.DataFrame, full: set[int]) -> str:
    if "all heads" not in set(frozen["rule"]):
        return " Only the arms of table 2 are shown: `experiment=published` runs the others."
    if full == set(frozen["seed"]):
        return ""
    some = ", ".join(map(str, sorted(full)))
    return f" The left panel and the arms beyond table 2's: seed {some} only."


def _budgets(rule: str, wider: str) -> list[dict[str, str]]:
    """The arms of one rule, from a small budget to a large one."""
    if rule == "highest I_S - I_U":
        return [{"rule": CU6}, {"rule": "ESU + CU", "setting": wider}, {"rule": ALL_CU}]
    if rule == "all heads":
        return [{"rule": rule}]
    sizes = ({"like": CU6}, {"like": "ESU + CU", "setting": wider}, {"like": ALL_CU})
    return [{"rule": rule, **size} for size in sizes]


def _draw_trade_off(axes: Axes, frozen: pd.DataFrame, wider: str) -> None:
    def point(arm: dict[str, str]) -> tuple[float, float] | None:
        columns = {"method": "frozen", "attack": MAIN_ATTACK, "epoch": 1, **arm}
        gain = estimate(frozen, "held-out gain", set=MAIN_ATTACK, against=BEFORE, **columns)
        asr = estimate(frozen, "ASR", **columns)
        return None if gain is None or asr is None else (gain.value, asr.value)

    for rule, (marker, colour, line) in _RULES.items():
        path = map(point, [{"rule": NOTHING}, *_budgets(rule, wider)])
        known = [found for found in path if found is not None]
        if len(known) > 1:
            gains, asr = zip(*known, strict=True)
            axes.plot(gains, asr, line, marker=marker, color=colour, ms=5, lw=1, label=rule)
    axes.set(xlabel="held-out gain, nats per token", ylabel="ASR after one epoch, %")
    axes.set_title("Each line: from nothing frozen to the largest budget", loc="left")
    axes.legend(fontsize=7)


def _draw_saved(axes: Axes, frozen: pd.DataFrame) -> None:
    found = ((arm, estimate(frozen, "ASR", against=SAME_EPOCHS, **arm)) for arm in arms_of(frozen))
    shown = [(name_of(arm), e) for arm, e in found if e is not None]
    for row, (name, e) in enumerate(shown[::-1]):
        drawn = "random" in name
        colour = COLOURS["random"] if drawn else COLOURS["EUU" if CONFLICT in name else "ESU"]
        turned = reach(e)[::-1]  # what is saved is a difference turned round
        axes.errorbar(-e.value, row, xerr=turned, fmt="o", ms=4, color=colour, capsize=2, lw=1)
    axes.axvline(0, color="grey", lw=0.8)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown[::-1]], fontsize=7)
    axes.set(xlabel="points of ASR saved", title="Against nothing frozen, same setting")


# --- what drifted: the safety units, or what reaches them? ------------------------------------

_SAFETY = ("ASR", "no refusal phrase", "perplexity", "units")


def ask_fig_sufficiency(lab: Lab) -> list[Measure]:
    """The aligned model, the attacked one, and the attacked one with units of the aligned one."""
    experiment = lab.config.experiment
    if not experiment.patched:
        return []
    before = catalogue.attacked_longest(lab)
    asked = [Measure(arm, m) for arm in (catalogue.whole(lab), before) for m in _SAFETY[:3]]
    for name in experiment.patched:
        arm = catalogue.patched(lab, name)
        controls = [
            catalogue.patched_control(lab, name, draw) for draw in range(experiment.patched_draws)
        ]
        for own in (arm, *controls):
            asked += [Measure(own, metric) for metric in _SAFETY]
            asked.append(Measure(own, "ASR", "", before, "nothing patched"))
        asked += [Measure(arm, "ASR", "", c, f"random, draw {c.draw}") for c in controls]
    return asked


def fig_sufficiency(table: pd.DataFrame, config: Config) -> Output:
    """ASR of the attacked model with the aligned model's activations in some units."""
    output = Output(
        f"The model after {config.finetune.epochs} epochs of the main attack ({MAIN_ATTACK}, "
        "nothing frozen); in the units that are named, activations are those of the aligned model "
        "on the same tokens (activation patching). Where refusals return, the attack changed what "
        "reaches these units or how they read it, and what they say is enough to refuse. Random: "
        "equally many heads and neurons. ASR is answered; beside it, hollow, the share without a "
        "refusal phrase. Bars: 95 % intervals."
    )
    arms = arms_of(table, method="patched")
    if not arms:
        return Output(
            "Not measured here: activation patching is part of `experiment=published` "
            "(experiment.patched names the groups)."
        )
    attacked = catalogue.ATTACKED_LONGEST | {"epoch": config.finetune.epochs}
    shown = [("aligned, before the attack", {}), ("attacked, nothing patched", attacked)]
    shown += [(units_name(arm["rule"], arm["like"]), arm) for arm in arms]
    output.figure, axes = panels(7, 1.1 + 0.32 * len(shown))
    for metric, shift, filled in (("ASR", -0.12, True), ("no refusal phrase", 0.12, False)):
        found = [(row, estimate(table, metric, **arm)) for row, (_, arm) in enumerate(shown)]
        known = [(row, e) for row, e in found if e is not None]
        axes.errorbar(
            [e.value for _, e in known], [row + shift for row, _ in known],
            xerr=reach(*(e for _, e in known)),
            fmt="o", ms=5, color=COLOURS["ESU"] if filled else COLOURS["random"],
            mfc=None if filled else "white", capsize=2, lw=1, label=metric,
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.invert_yaxis()
    axes.set(xlabel="% of the evaluation prompts", xlim=(-2, 102))
    axes.legend(fontsize=7, loc="upper right")  # where the model before the attack leaves room
    return output
