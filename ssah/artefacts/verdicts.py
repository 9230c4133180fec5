"""Notebook 09: what each arm's completions are, and how far the judges can be trusted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..evaluate.judges import VERDICTS
from ..lab import catalogue
from ..lab.arms import Arm
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.metrics.behaviour import AGREEMENT, CORRECTED
from . import Output
from .draw import new_figure, styled
from .pick import arms_of, estimate, format_estimate

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


def _name(arm: dict[str, Any]) -> str:
    return Arm(lambda: None, **arm).name  # type: ignore[arg-type, return-value]


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
    names = [_name(arm) for arm in arms]
    with styled():
        output.figure = new_figure(8, 1 + 0.24 * len(arms))
        axes = output.figure.subplots()
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
                e.value, row, xerr=[[e.value - e.low], [e.high - e.value]], fmt="D", ms=3,
                color="black", capsize=2, lw=0.8, label="answered, corrected" if row == 0 else None,
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
            if found["labelled"] is not None:
                numbers = {
                    name: format_estimate(e, 0 if name in ("labelled", "judged") else 2)
                    for name, e in found.items()
                    if name != "accuracy of the judges"
                }
                accuracy = found["accuracy of the judges"]
                rows.append(
                    {
                        "completions of": _name(arm),
                        "verdict": verdict,
                        "n": str(found["labelled"].n),
                        "accuracy %": format_estimate(accuracy),
                        **numbers,
                    }
                )
    return Output(
        "Completions of this run that have a label (results/reference/labels.csv, found by a hash "
        "of prompt and completion), in the half that was not used to choose phrases or to fit "
        "weights: accuracy with its 95 % interval (Wilson), Cohen's kappa, precision and recall, "
        "by verdict and by arm. docs/judging.md has the guideline, and what all labels say.",
        pd.DataFrame(
            rows, columns=["completions of", "verdict", "n", "accuracy %", *AGREEMENT[1:]]
        ),
    )
