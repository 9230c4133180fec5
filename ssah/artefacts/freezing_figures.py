"""Notebook 04: the ratio sweep (Fig. 8), and when freezing works."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..lab.selections import (
    ALL,
    CONFLICT,
    CONFLICT_ARM,
    CU6,
    FULL,
    conditions,
    headline,
    label,
    ratios,
)
from ..lab.stages import Stages
from ..lab.tuning import MAIN_ATTACK
from . import Output
from .freezing import compare, measure, measure_contenders, measure_random
from .render import COLOURS, STYLE, ShownFigure
from .summary import pooled

if TYPE_CHECKING:
    from ..app.study import Study

#: Colours of the two epochs: the group colours mean something else.
EPOCH_COLOURS = {1: "#56B4E9", 2: "#CC79A7"}


def fig8(study: Study) -> Output:
    """ASR against the percentage of CU frozen beside the ESU (Fig. 8)."""
    output = Output(
        note="Share of CU (top of the ranking by I_S - I_U, in per cent of all units) that is "
        "frozen beside the ESU while the model is fine-tuned on instructions. Lines: after one "
        "epoch and after two; dotted: the arm that freezes nothing; crosses: random units, as many "
        "as ESU + 6 % CU; right: ESU and all CU. Shaded and bars: smallest to largest over seeds "
        f"(and draws). ASR is of {study.config.data.evaluation} prompts; the csv file has the "
        "interval of each point. `finetune=wide` sweeps over more shares."
    )
    for stages in study.all_stages:
        base = measure(stages, output, FULL, headline(stages, MAIN_ATTACK)[FULL], thorough=True)
        for percent, tuning in ratios(stages).items():
            # The paper's own ratio is a headline arm, of which more is measured.
            name = f"ESU + {percent:g} % CU"
            success = measure(stages, output, name, tuning, thorough=name == CU6)
            for epoch, own in enumerate(success, 1):
                arm = label(MAIN_ATTACK, name, epoch)
                compare(output, arm, "saved_equal_epochs", stages.seed, base[epoch - 1], own)
        measure(stages, output, ALL, headline(stages, MAIN_ATTACK)[ALL], thorough=True)
        measure_random(stages, output, CU6, study.config.finetune.random_draws)
    output.figure = _draw_ratios(output.frame(study, "fig8"))
    return output


def _spread(frame: pd.DataFrame, name: str, epoch: int) -> tuple[float, float, float]:
    """Mean, smallest and largest ASR of an arm over seeds and draws."""
    chosen = (frame["arm"] == label(MAIN_ATTACK, name, epoch)) & (frame["metric"] == "asr")
    values = frame[chosen]["value"]
    return values.mean(), values.min(), values.max()


def _draw_ratios(frame: pd.DataFrame) -> Figure:
    found = frame["arm"].str.extract(r": ESU \+ ([\d.]+) % CU, 1 epoch$")[0].dropna()
    percents = sorted(set(found.astype(float)))
    right = max(percents) * 1.25 + 1
    with plt.style.context(STYLE):
        figure = ShownFigure(figsize=(6.5, 3.6))
        axes = figure.subplots()
        for epoch, marker in ((1, "o"), (2, "s")):
            colour = EPOCH_COLOURS[epoch]
            spread = [_spread(frame, f"ESU + {p:g} % CU", epoch) for p in percents]
            mean, low, high = zip(*spread, strict=True)
            axes.plot(
                percents,
                mean,
                marker=marker,
                ms=4,
                color=colour,
                label=f"{epoch} epoch{'s' if epoch > 1 else ''}",
            )
            axes.fill_between(percents, low, high, color=colour, alpha=0.2, lw=0)
            axes.axhline(_spread(frame, FULL, epoch)[0], color=colour, ls=":", lw=1.2)
            for place, name, shape in ((6, f"random, as {CU6}", "x"), (right, ALL, marker)):
                value, least, most = _spread(frame, name, epoch)
                bars = [[value - least], [most - value]]
                axes.errorbar(
                    place, value, yerr=bars, fmt=shape, ms=5, color=colour, capsize=2, lw=1
                )
        axes.set_xticks([*percents, right], [*(f"{p:g}" for p in percents), "all"])
        axes.set(xlabel="CU frozen beside the ESU, % of all units", ylabel="ASR, %", ylim=(-3, 103))
        axes.legend(title="dotted: nothing frozen; x: random units")
    return figure


# --- conditions ------------------------------------------------------------------------------


def fig_conditions(study: Study) -> Output:
    """When does freezing work? Safety against what is learned, by rule, budget and setting."""
    output = Output(
        note="Fine-tuning on instructions, one epoch. Left: ASR against the held-out gain (what "
        "the fine-tuning is for); a rule is better the lower it lies at the same gain; means over "
        "seeds and draws. Right: points of ASR saved against the arm that freezes nothing under "
        "the same setting, same prompts, mean over seeds (and draws) with 95 % interval (paired). "
        "Budgets: 7 % is ESU + 6 % CU, 25 % ESU and CU up to a quarter of all units; the other "
        "rules freeze as many heads and as many neurons. The csv file says what share of the "
        "weights each arm freezes."
    )
    for stages in study.all_stages:
        more = stages.seed in study.config.finetune.condition_seeds
        _measure_conditions(stages, output, more=more)
    frame = output.frame(study, "fig_conditions")
    own = frame["seed"].astype(str).str.split(".").str[0]
    full, note = _full_seeds(frame, own)
    output.note += note
    output.figure = _draw_conditions(frame, frame[own.isin(full)])
    return output


def _full_seeds(frame: pd.DataFrame, own: pd.Series) -> tuple[set[str], str]:
    """The seeds that have the arms beyond table 2's, or all where none has; and a note on them.

    ``own`` is each row's seed.
    """
    full, every = set(own[frame["arm"] == label(MAIN_ATTACK, "all heads", 1)]), set(own)
    if not full:
        return every, " Only the arms of table 2 are shown: `finetune=wide` runs the others."
    if full == every:
        return every, ""
    some = ", ".join(sorted(full))
    return full, f" The left panel and the arms beyond table 2's: seed {some} only."


def _measure_conditions(stages: Stages, output: Output, *, more: bool) -> None:
    success = measure_contenders(stages, output, MAIN_ATTACK)
    first = {name: by_epoch[0] for name, by_epoch in success.items()}

    def against_full(name: str, own: list[bool], seed: int | str, base: str = FULL) -> None:
        compare(output, label(MAIN_ATTACK, name, 1), "saved", seed, first[base], own)

    for name in [n for n in success if n != FULL]:
        against_full(name, first[name], stages.seed)
    for like, count in ((CU6, stages.config.finetune.random_draws), (ALL, 1)):
        for draw, control in measure_random(stages, output, like, count).items():
            against_full(f"random, as {like}", control[0], draw)
    if not more:
        return
    for name, tuning in conditions(stages).items():
        first[name] = measure(stages, output, name, tuning)[0]
        base = f"{FULL}, {name.partition(', ')[2]}"  # nothing frozen under the same setting
        if name != base:
            against_full(name, first[name], stages.seed, base if base in first else FULL)


def _draw_conditions(frame: pd.DataFrame, comparable: pd.DataFrame) -> Figure:
    """``comparable``: the rows of those seeds that have every arm."""
    with plt.style.context(STYLE):
        figure = ShownFigure(figsize=(10, 5))
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
        _draw_trade_off(left, _first_epoch(comparable))
        _draw_saved(right, _first_epoch(frame))
    return figure


def _first_epoch(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of one epoch, with the arm's ``name`` alone."""
    frame = frame[frame["arm"].str.endswith(", 1 epoch")]
    names = frame["arm"].str.removeprefix(f"{MAIN_ATTACK}: ").str.removesuffix(", 1 epoch")
    return frame.assign(name=names)


#: Rule -> its arms from a small budget to a large one; all start where nothing is frozen.
_RULES = {
    "highest I_S - I_U": (CU6, "ESU + CU, 25 %", ALL),
    "random": (f"random, as {CU6}", "random, 25 %", f"random, as {ALL}"),
    "lowest I_S - I_U": ("lowest I_S - I_U, 7 %", "lowest I_S - I_U, 25 %"),
    "largest magnitude": ("largest magnitude, 7 %", "largest magnitude, 25 %"),
    "moved most by alignment": ("moved most by alignment, 7 %", "moved most by alignment, 25 %"),
    CONFLICT: (CONFLICT_ARM, f"{CONFLICT}, 25 %"),
    "all heads": ("all heads",),
}
_RULE_STYLES = {
    "highest I_S - I_U": ("o", COLOURS["ESU"], "-"),
    "random": ("^", COLOURS["random"], "--"),
    "lowest I_S - I_U": ("s", COLOURS["EUU"], "-"),
    "largest magnitude": ("D", "#CC79A7", "-."),
    "moved most by alignment": ("v", "#E69F00", "-"),
    CONFLICT: ("P", "#56B4E9", "-"),
    "all heads": ("*", COLOURS["CU"], ":"),
}


def _draw_trade_off(axes: Axes, frame: pd.DataFrame) -> None:
    wide = frame.pivot_table(index="name", columns="metric", values="value")
    for rule, arms in _RULES.items():
        path = wide.loc[[FULL, *(arm for arm in arms if arm in wide.index)]]
        if len(path) > 1:
            marker, colour, line = _RULE_STYLES[rule]
            gains, asr = path["heldout_gain"], path["asr"]
            axes.plot(gains, asr, line, marker=marker, color=colour, ms=5, lw=1, label=rule)
    axes.set(xlabel="held-out gain, nats per token", ylabel="ASR after one epoch, %")
    axes.set_title("Each line: from nothing frozen to the largest budget", loc="left")
    axes.legend(fontsize=7)


def _draw_saved(axes: Axes, frame: pd.DataFrame) -> None:
    saved = {name: pooled(group, "saved") for name, group in frame.groupby("name", sort=False)}
    shown = [(name, estimate) for name, estimate in saved.items() if estimate is not None][::-1]
    for row, (name, e) in enumerate(shown):
        drawn = "random" in name
        colour = COLOURS["random"] if drawn else COLOURS["EUU" if CONFLICT in name else "ESU"]
        bars = [[e.value - e.low], [e.high - e.value]]
        axes.errorbar(e.value, row, xerr=bars, fmt="o", ms=4, color=colour, capsize=2, lw=1)
    axes.axvline(0, color="grey", lw=0.8)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=7)
    axes.set(xlabel="points of ASR saved", title="Against nothing frozen, same setting")
