"""Notebook 02: what each arm's completions are, and how far the judges can be trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ..evaluate.judges import VERDICTS
from ..evaluate.stats import corrected, proportion
from ..labels import agreement, errors_of_answered, judged, key, known_labels
from ..reading import headline_arms
from . import Output
from .render import STYLE, ShownFigure
from .summary import pooled

if TYPE_CHECKING:
    from ..study import Study

#: Answered comes first, so that its bar and its corrected share start at the same place; a hatch
#: tells the others apart without colour.
_STYLES = {
    "answered": ("#D55E00", ""),
    "evaded": ("#56B4E9", "//"),
    "refused": ("#999999", ""),
    "incoherent": ("#F0E442", "xx"),
}

#: Metric: answered, as a judge without errors would find it.
CORRECTED = "answered, corrected"


def fig_verdicts(study: Study) -> Output:
    """What becomes of the evaluation prompts: a bar of verdicts for every headline arm."""
    output = Output(
        note="Verdicts on the completions of the held-out harmful prompts, per cent, means over "
        "seeds. ASR is answered; the paper's measure counts evaded as well. Evaded: coherent text "
        "that does not begin to do what was asked, such as a remark about the speaker. Black: the "
        "share that a judge without errors would call answered (Rogan and Gladen), with a 95 % "
        "interval over prompts and over the labels that the judge's errors are known from "
        "(docs/judging.md). dense is "
        "the aligned model; ESU, RU, EUU and random: removed; the others are fine-tuned "
        "(what is frozen, epochs) or aligned through a part of the model."
    )
    errors = errors_of_answered(study.config.model.name)
    for stages in study.all_stages:
        for name, said in headline_arms(stages).items():
            verdicts = judged(said())
            answered = corrected([v == "answered" for v in verdicts], *errors).scaled(100)
            output.add(name, CORRECTED, stages.seed, answered)
            for verdict in VERDICTS:
                share = proportion([v == verdict for v in verdicts]).scaled(100)
                output.add(name, verdict, stages.seed, share)
    frame = output.frame(study, "fig_verdicts")
    means = frame.pivot_table(
        index="arm", columns="metric", values="value", aggfunc="mean", sort=False
    )
    with plt.style.context(STYLE):
        figure = ShownFigure(figsize=(7, 1 + 0.24 * len(means)))
        axes = figure.subplots()
        left = np.zeros(len(means))
        for kind, (colour, hatch) in _STYLES.items():
            axes.barh(
                list(means.index), means[kind], left=left, color=colour, hatch=hatch,
                edgecolor="white", label=kind,
            )  # fmt: skip
            left += means[kind].to_numpy()
        for row, (_, rows) in enumerate(frame.groupby("arm", sort=False)):
            e = pooled(rows, CORRECTED)
            assert e is not None
            axes.errorbar(
                e.value, row, xerr=[[e.value - e.low], [e.high - e.value]], fmt="D", ms=3,
                color="black", capsize=2, lw=0.8, label="answered, corrected" if row == 0 else None,
            )  # fmt: skip
        axes.invert_yaxis()
        axes.set(xlabel="% of the evaluation prompts", xlim=(0, 100))
        axes.legend(ncols=3, fontsize=7, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    output.figure = figure
    return output


def table_judges(study: Study) -> Output:
    """Agreement of both judges with labels, on the half that chose nothing."""
    output = Output(
        note="Completions of this run that have a label (results/reference/labels.csv, found by a "
        "hash of prompt and completion), in the half that was not used to choose phrases or to fit "
        "weights: accuracy with its 95 % interval (Wilson), Cohen's kappa, precision and recall, "
        "by verdict and by arm. docs/judging.md has the guideline, and what all labels say."
    )
    known = known_labels()
    tested = known[known["half"] == "test"].set_index("key")["label"]
    rows = []
    for stages in study.all_stages:
        found: dict[str, tuple[str, str]] = {}
        for name, said in headline_arms(stages).items():
            completions = said()
            own = {
                key(c): (tested[key(c)], verdict)
                for c, verdict in zip(completions, judged(completions), strict=True)
                if key(c) in tested.index
            }
            found |= own
            rows += _rows(output, name, stages.seed, own)
        rows += _rows(output, "all arms", stages.seed, found)
    columns = ["completions of", "verdict", "n", "labelled", "judged", "accuracy", "kappa"]
    output.table = pd.DataFrame(rows, columns=[*columns, "precision", "recall"])
    return output


def _rows(
    output: Output, name: str, seed: int, pairs: dict[str, tuple[str, str]]
) -> list[dict[str, str]]:
    """Rows of the table, one for each verdict that occurs; nothing where nothing is labelled."""
    if not pairs:
        return []
    labels, verdicts = zip(*pairs.values(), strict=True)
    rows = []
    for record in agreement(labels, verdicts).to_dict("records"):
        right = [(a == record["verdict"]) == (b == record["verdict"]) for a, b in pairs.values()]
        output.add(name, f"accuracy, {record['verdict']}", seed, proportion(right).scaled(100))
        rows.append(
            {
                "completions of": name,
                "verdict": record["verdict"],
                "accuracy": f"{100 * record['accuracy']:.1f} [{100 * record['low']:.1f}, "
                f"{100 * record['high']:.1f}]",
                **{m: f"{record[m]:.2f}" for m in ("kappa", "precision", "recall")},
                **{m: str(record[m]) for m in ("n", "labelled", "judged")},
            }
        )
    return rows
