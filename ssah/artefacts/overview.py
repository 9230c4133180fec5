"""Notebooks 08 and 09: what removing, freezing and mixing do, in one figure, which the front page
shows; what each arm's completions are, and how far the judges can be trusted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..evaluate.judges import VERDICTS
from ..lab import catalogue
from ..lab.catalogue import NOTHING
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.metrics.behaviour import AGREEMENT, CORRECTED
from ..lab.stages.lessons import MAIN_ATTACK
from ..lab.units_of import ALL_CU, CU6, ESU
from . import Output
from .defences import ask_table_defences
from .draw import COLOURS, panels, reach
from .freezing import ask_table2
from .pick import arms_of, estimate, fewer_seeds, format_estimate, name_of_arm, rows_of
from .unit_roles import ask_table1

#: Columns of an arm that is fine-tuned.
_TUNED: dict[str, Any] = {"method": "frozen", "attack": MAIN_ATTACK, "epoch": 1}

#: What is done to the aligned model, and the columns of its arm.
_SHOWN: list[tuple[str, dict[str, Any]]] = [
    ("as it was aligned", {}),
    ("ESU removed", {"method": "removed", "rule": ESU}),
    ("random units removed", {"method": "removed", "rule": "random", "like": ESU}),
    ("fine-tuned on harmless rows", _TUNED | {"rule": NOTHING}),
    (f"the same, {CU6} frozen", _TUNED | {"rule": CU6}),
    ("the same, random units frozen", _TUNED | {"rule": "random", "like": CU6}),
    (f"the same, {ALL_CU} frozen", _TUNED | {"rule": ALL_CU}),
    ("the same, random units frozen", _TUNED | {"rule": "random", "like": ALL_CU}),
    (
        "the same, a tenth of the rows refusals",
        _TUNED | {"method": "defended", "rule": "mixing", "setting": "10 %"},
    ),
    (
        "the same, a quarter of the rows refusals",
        _TUNED | {"method": "defended", "rule": "mixing", "setting": "25 %"},
    ),
    (
        "the same, every fifth step on refusals",
        _TUNED | {"method": "defended", "rule": "Lisa", "setting": "1"},
    ),
]


def ask_fig_overview(lab: Lab) -> list[Measure]:
    """What Tables 1 and 2 and the table of defences ask."""
    return ask_table1(lab) + ask_table2(lab) + ask_table_defences(lab)


def fig_overview(table: pd.DataFrame, config: Config) -> Output:
    """ASR of the aligned model, and of what is made of it."""
    found = [(name, columns, estimate(table, "ASR", **columns)) for name, columns in _SHOWN]
    known = [(name, columns.get("rule"), e) for name, columns, e in found if e is not None]
    shown = pd.concat([rows_of(table, "ASR", **columns) for _, columns in _SHOWN])
    output = Output(
        "ASR: share of the held-out harmful prompts that are answered. Black: controls with "
        "equally many heads and neurons, drawn at random, as the line above. Fine-tuned: one epoch "
        f"on {MAIN_ATTACK}. Bars: 95 % intervals, over prompts and, where there are several, seeds."
        + fewer_seeds(shown)
    )
    output.figure, axes = panels(7, 1.0 + 0.28 * len(known))
    for row, (_, rule, e) in enumerate(known):
        control = rule == "random"
        axes.errorbar(
            e.value, row, xerr=reach(e), fmt="x" if control else "o", ms=6, capsize=2, lw=1.2,
            color=COLOURS["random" if control else "ESU"],
        )  # fmt: skip
    axes.set_yticks(range(len(known)), [name for name, *_ in known])
    axes.invert_yaxis()
    axes.set(xlabel="answered, % of the harmful prompts", xlim=(-2, 102))
    return output


# --- verdicts --------------------------------------------------------------------------------

#: Answered comes first, so that its bar and its corrected share start at the same place; a hatch
#: tells the others apart without colour.
_STYLES = {
    "answered": ("#D55E00", ""),
    "evaded": ("#56B4E9", "//"),
    "refused": ("#999999", ""),
    "incoherent": ("#F0E442", "xx"),
}


def ask_fig_verdicts(lab: Lab) -> list[Measure]:
    """Verdicts of every headline arm."""
    return [Measure(arm, "verdicts") for arm in catalogue.headline(lab)]


def fig_verdicts(table: pd.DataFrame, config: Config) -> Output:
    """What becomes of the evaluation prompts: a bar of verdicts for every headline arm."""
    output = Output(
        "Verdicts on the completions of the held-out harmful prompts, per cent, means over "
        "seeds. ASR is answered; the paper's measure counts evaded as well. Evaded: coherent text "
        "that does not begin to do what was asked, such as a remark about the speaker. Black: the "
        "share that a judge without errors would call answered (Rogan and Gladen), with a 95 % "
        "interval over prompts and over the labels that the judge's errors are known from "
        "(docs/judging.md)."
    )
    arms = arms_of(table[table["metric"] == CORRECTED])
    names = [name_of_arm(arm) for arm in arms]
    output.figure, axes = panels(8, 1 + 0.24 * len(arms))
    left = np.zeros(len(arms))
    for verdict, (colour, hatch) in _STYLES.items():
        found = [estimate(table, verdict, **arm) for arm in arms]
        width = np.array([e.value if e else 0.0 for e in found])
        axes.barh(
            names, width, left=left, color=colour, hatch=hatch, edgecolor="white",
            label=verdict,
        )  # fmt: skip
        left += width
    for row, arm in enumerate(arms):
        e = estimate(table, CORRECTED, **arm)
        assert e is not None
        axes.errorbar(
            e.value, row, xerr=reach(e), fmt="D", ms=3, color="black", capsize=2, lw=0.8,
            label="answered, corrected" if row == 0 else None,
        )  # fmt: skip
    axes.invert_yaxis()
    axes.set(xlabel="% of the evaluation prompts", xlim=(0, 100))
    axes.legend(ncols=3, fontsize=7, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    return output


def ask_table_judges(lab: Lab) -> list[Measure]:
    """Agreement with labels on every headline arm."""
    return [Measure(arm, "labels") for arm in catalogue.headline(lab)]


def table_judges(table: pd.DataFrame, config: Config) -> Output:
    """Agreement of both judges with labels, on the half that chose nothing."""
    rows = []
    for arm in arms_of(table[table["metric"].isin(AGREEMENT)]):
        for verdict in VERDICTS:
            found = {m: estimate(table, m, set=verdict, **arm) for m in AGREEMENT}
            labelled, accuracy = found["labelled"], format_estimate(found.pop(AGREEMENT[0]))
            if labelled is not None:
                numbers = {
                    name: format_estimate(e, 0 if name in ("labelled", "judged") else 2)
                    for name, e in found.items()
                }
                named = {"completions of": name_of_arm(arm), "verdict": verdict}
                counts = {"n": str(labelled.n), "accuracy %": accuracy}
                rows.append(named | counts | numbers)
    return Output(
        "Completions of this run that have a label (results/reference/labels.csv, found by a hash "
        "of prompt and completion), in the half that was not used to choose phrases or to fit "
        "weights: accuracy with its 95 % interval (Wilson), Cohen's kappa, precision and recall, "
        "by verdict and by arm. docs/judging.md has the guideline, and what all labels say.",
        pd.DataFrame(
            rows, columns=["completions of", "verdict", "n", "accuracy %", *AGREEMENT[1:]]
        ),
    )
