"""Notebook 04: what fine-tuning with frozen units does to utility. Table 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from ..core.paths import reference_csv
from ..evaluate.stats import Estimate, average, paired_difference, proportion
from ..lab.arms import Arm
from ..lab.selections import FULL, available_attacks, headline
from ..lab.stages import paper_rule
from . import Output
from .render import format_estimate
from .summary import pooled

if TYPE_CHECKING:
    from ..app.study import Study


def table3(study: Study) -> Output:
    """Utility after fine-tuning, with and without frozen units (Table 3)."""
    output = Output(
        note="Accuracy on trivia (four choices, chance 25 %) and arithmetic word problems (exact "
        "match); change: against the aligned model before, on the same items. One epoch where "
        "nothing is frozen, else the last epoch. The paper's tasks are others (zero-shot, lm-eval)."
    )
    for stages in study.all_stages:
        whole = stages.task_outcomes(Arm())
        _add_tasks(output, "initial", stages.seed, whole)
        for attack in available_attacks(stages):
            outcomes = {}
            for name, tuning in headline(stages, attack).items():
                arm = paper_rule(stages.measured(tuning, thorough=True))
                outcomes[name] = stages.task_outcomes(arm)
                _add_tasks(output, f"{attack}: {name}", stages.seed, outcomes[name], whole)
            for name in [n for n in outcomes if n != FULL]:
                change = _task_change(outcomes[name], outcomes[FULL])
                output.add(f"{attack}: {name}", "against_full", stages.seed, change)
    frame = output.frame(study, "table3")
    rows = []
    for arm, group in frame.groupby("arm", sort=False):
        row = {"model": study.config.model.name, "fine-tuning: frozen": arm}
        for metric in group["metric"].unique():
            row[metric.replace("_", " ")] = format_estimate(pooled(group, metric))
        rows.append(row)
    output.table = pd.concat([pd.DataFrame(rows), _paper_tasks()], ignore_index=True).fillna("")
    return output


def _add_tasks(
    output: Output,
    arm: str,
    seed: int,
    outcomes: dict[str, list[bool]],
    whole: dict[str, list[bool]] | None = None,
) -> None:
    accuracies = {task: proportion(right).scaled(100) for task, right in outcomes.items()}
    for task, accuracy in accuracies.items():
        output.add(arm, task, seed, accuracy)
    output.add(arm, "average", seed, average(list(accuracies.values())))
    if whole is not None:
        output.add(arm, "change", seed, _task_change(outcomes, whole))


def _task_change(first: dict[str, list[bool]], second: dict[str, list[bool]]) -> Estimate:
    """Mean difference of accuracy over tasks, on the same items."""
    return average([paired_difference(first[t], second[t]).scaled(100) for t in first])


def _paper_tasks() -> pd.DataFrame:
    paper = pd.read_csv(reference_csv())
    means = paper[paper["artefact"] == "table3"].groupby(["model", "setting"], sort=False)["value"]
    return pd.DataFrame(
        [
            {
                "model": f"paper: {model}",
                "fine-tuning: frozen": setting,
                "average": f"{value:.1f}",
            }
            for (model, setting), value in means.mean().items()
        ]
    )
