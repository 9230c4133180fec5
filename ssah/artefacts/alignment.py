"""Notebook 06: aligning through the redundant units. Table 4, and the tax against safety."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..arms import Aligning, Arm, Tuning
from ..budget_arms import LONGER, RANDOM, RU, WHOLE, budget_arms
from ..evaluate.judges import attack_success, is_refusal
from ..evaluate.stats import average, crossed_mean, paired_difference, proportion
from ..stages import Stages
from ..tuning import MAIN_ATTACK
from . import Output
from .freezing import compare
from .render import COLOURS, STYLE, ShownFigure
from .summary import arm_rows, paper_rows, pooled, same

if TYPE_CHECKING:
    from ..study import Study

START = "unaligned"

#: What two arms are compared on, item by item: metric -> outcomes.
Outcomes = dict[str, list[bool]]


def measure(stages: Stages, output: Output, name: str, how: Aligning | None) -> Outcomes:
    """Every metric of a model that is aligned through a part of itself; True where it complied."""
    record, layout = stages.alignment(how), stages.layout_for(stages.layout.unit_kind)
    trained = layout.parameters
    if how is not None:
        trained = record["trainable_parameters"]
        if how.trained is not None and how.rank is None:
            trained = round(layout.weights(how.trained))
    with stages.aligned(how) as arm:
        outcomes = _measure_model(stages, output, name, arm)
        if name == RU:
            stages.scores_of(arm.which)  # Figs 6, 9 and 10 ask for it; the model is dropped now
        attack = Tuning(MAIN_ATTACK)  # of which Table 2 has the longer run
        if how is not None:
            attack = Tuning(MAIN_ATTACK, base=how, changes={"epochs": 1})
        attacked = stages.measured(attack, thorough=how is None)[0]
        answers = stages.completions("harmful_evaluation", attacked)
        outcomes["asr_attacked"] = attack_success(answers)
    seed, steps = stages.seed, record["steps"]
    success = proportion(outcomes["asr_attacked"]).scaled(100)
    output.add(name, "asr_attacked", seed, success)
    for metric, value in {
        "trained_weights": 100 * trained / layout.parameters,
        "optimizer_mib": 8 * trained / 2**20,  # two float32 moments
        "training_loss": record["final_loss"],
        "seconds_per_step": stages.align(how, whole=False).seconds / steps,
    }.items():
        output.add(name, metric, seed, same(value, steps))
    return outcomes


def _measure_model(stages: Stages, output: Output, name: str, arm: Arm) -> Outcomes:
    """Safety, over-refusal and utility of one model."""
    seed, config = stages.seed, stages.config
    success = {"asr": attack_success(stages.completions("harmful_evaluation", arm))}
    if stages.has("harmbench"):
        success["asr_harmbench"] = attack_success(stages.completions("harmbench", arm))
    if stages.has("do_not_answer"):
        rows = stages.spread("do_not_answer", config.budget.elsewhere)
        success["asr_do_not_answer"] = attack_success(stages.said(rows, arm))
    success["asr_prefix"] = attack_success(stages.said(stages.prefixed(), arm))
    refused = {
        f"refused_{prompts}": [is_refusal(a) for a in stages.completions(prompts, arm)]
        for prompts in ("benign_evaluation", "borderline")
    }
    for metric, outcomes in (success | refused).items():
        output.add(name, metric, seed, proportion(outcomes).scaled(100))
    tasks, before = stages.task_outcomes(arm), stages.task_outcomes(Arm("unaligned"))
    for task, right in tasks.items():
        output.add(name, f"accuracy_{task}", seed, proportion(right).scaled(100))
    change = [paired_difference(tasks[t], before[t]).scaled(100) for t in tasks]
    output.add(name, "accuracy_change", seed, average(change))
    output.add(name, "perplexity", seed, stages.perplexity(arm))
    ratio = stages.perplexity_ratio(arm, Arm("unaligned"))
    output.add(name, "perplexity_ratio", seed, ratio)
    drift = np.array(stages.drift(arm))[:, None]
    output.add(name, "drift", seed, crossed_mean(drift))
    return success | {f"accuracy_{task}": right for task, right in tasks.items()}


def _compare(
    stages: Stages,
    output: Output,
    arms: dict[str, Aligning | None],
    found: dict[str, Outcomes],
) -> None:
    """Each arm against the whole model, and RU against random units, on the same items."""
    pairs = [(name, WHOLE, "over_whole") for name in found if name != WHOLE]
    pairs += [(RU, RANDOM, "over_random")]
    if f"{RANDOM}, {LONGER}" in found:
        pairs += [(f"{RU}, {LONGER}", f"{RANDOM}, {LONGER}", "over_random")]
    for name, other, what in pairs:
        drifts = [stages.drift(Arm(arms[n] or "aligned")) for n in (name, other)]
        further = crossed_mean((np.array(drifts[0]) - np.array(drifts[1]))[:, None])
        output.add(name, f"drift_{what}", stages.seed, further)
        own, others = found[name], found[other]
        for metric in ("asr", "asr_attacked"):
            compare(output, name, f"{metric}_{what}", stages.seed, own[metric], others[metric])
        tasks = [metric for metric in own if metric.startswith("accuracy")]
        change = average([paired_difference(own[t], others[t]).scaled(100) for t in tasks])
        output.add(name, f"accuracy_{what}", stages.seed, change)


def measured_arms(study: Study, output: Output) -> None:
    """All arms of all seeds; the largest set for the seeds that the configuration names."""
    for index, stages in enumerate(study.all_stages):
        _measure_model(stages, output, START, Arm("unaligned"))
        budget = study.config.budget
        arms = budget_arms(
            stages, longer=index < budget.longer_seeds, more=index < budget.more_seeds
        )
        found = {name: measure(stages, output, name, how) for name, how in arms.items()}
        _compare(stages, output, arms, found)


# --- table and figure ------------------------------------------------------------------------

#: Column of the table -> (metric, digits)
_COLUMNS: dict[str, tuple[str, int]] = {
    "weights %": ("trained_weights", 1),
    "training loss": ("training_loss", 2),
    "ASR": ("asr", 1),
    "ASR HarmBench": ("asr_harmbench", 1),
    "ASR Do-Not-Answer": ("asr_do_not_answer", 1),
    "ASR, prefix": ("asr_prefix", 1),
    "ASR, attacked": ("asr_attacked", 1),
    "benign refused": ("refused_benign_evaluation", 1),
    "borderline refused": ("refused_borderline", 1),
    "perplexity": ("perplexity", 2),
    "accuracy change": ("accuracy_change", 1),
    "drift": ("drift", 3),
    "optimizer MiB": ("optimizer_mib", 0),
    "s a step": ("seconds_per_step", 1),
}


def no_pair(study: Study) -> str:
    """Why nothing is measured here, where the model came aligned; empty where it did not."""
    if study.config.align.enabled:
        return ""
    return (
        f"Not measured here: {study.config.model.name} came aligned, and this needs an unaligned "
        "model, such as a pretrained one, with `align=refusals`."
    )


def table4(study: Study) -> Output:
    """Aligning through RU, through everything, and through other parts (Table 4)."""
    if no_pair(study):
        return Output(note=no_pair(study), table=_paper_rows())
    config = study.config
    output = Output(
        note=f"The unaligned model is aligned through a part of its units: RU are the "
        f"{100 * config.budget.share:g} % of units with the lowest I_U in the unaligned model, "
        "random ones as many. Everything else keeps its bits, which is checked after each "
        "training. Same rows, rate and epochs as the whole model, unless 'twice the epochs' (the "
        "paper's rule). ASR: coherent answers that are no refusal; prefix: with the request to "
        "start with an answer; attacked: after one epoch on dialogues. Accuracy change: trivia and "
        "arithmetic, points against the unaligned model on the same items. Drift: KL from the "
        "unaligned model on benign prompts, nats per token. Optimizer: AdamW's two moments in "
        "float32. s a step: on the machine of this run. The paper aligns with instructions and "
        "reports no safety." + _which_seeds(study)
    )
    measured_arms(study, output)
    own = arm_rows(pd.DataFrame(output.metrics), config.model.name, "aligned through", _COLUMNS)
    output.table = pd.concat([own, _paper_rows()], ignore_index=True).fillna("")
    return output


def _which_seeds(study: Study) -> str:
    budget, seeds = study.config.budget, study.seeds
    note = ""
    for what, count in ((LONGER, budget.longer_seeds), ("other parts", budget.more_seeds)):
        count = max(count, budget.more_seeds)
        if not count:
            note += f" {what.capitalize()}: not in this run (conf/budget)."
        elif count < len(seeds):
            note += f" {what.capitalize()}: seed {', '.join(map(str, seeds[:count]))} only."
    return note


def _paper_rows() -> pd.DataFrame:
    """Every task of the paper's Table 4 in a column of its own."""
    tasks = (
        "arc_challenge arc_easy hellaswag winogrande boolq piqa gsm8k_5shot mmlu mt_bench_turn1"
    ).split()
    columns = {(t, "accuracy"): t for t in tasks[:-1]}
    columns[tasks[-1], "mt_bench_score"] = "MT-bench, turn 1"
    return paper_rows("table4", columns, "aligned through")


def fig_budget(study: Study) -> Output:
    """Safety against the tax, one point for each part that was trained."""
    if no_pair(study):
        return Output(note=no_pair(study), figure=ShownFigure(figsize=(4, 1)))
    output = Output(
        note="Left: ASR against the drift of the benign output distribution (KL from the unaligned "
        "model, nats per token): the lower left is the better bargain. Right: ASR before (hollow) "
        "and after (filled) one epoch of fine-tuning on dialogues: is a model that was aligned "
        "through fewer units easier to break? 95 % intervals, seeds pooled." + _which_seeds(study)
    )
    measured_arms(study, output)
    frame = pd.DataFrame(output.metrics)
    names = [name for name in frame["arm"].unique() if name != START]
    with plt.style.context(STYLE):
        output.figure = ShownFigure(figsize=(10, 4.2))
        left, right = output.figure.subplots(1, 2)
        _draw_bargain(left, frame, names)
        _draw_attacked(right, frame, names)
    return output


def _style(name: str) -> tuple[str, str]:
    """Marker and colour by what is trained."""
    if name == WHOLE:
        return "*", COLOURS["CU"]
    if name.startswith(RANDOM):
        return "^", COLOURS["random"]
    if name.startswith(RU):
        return "o", COLOURS["ESU"]
    return ("P", "#CC79A7") if name.startswith("LoRA") else ("s", COLOURS["EUU"])


def _draw_bargain(axes: Axes, frame: pd.DataFrame, names: Iterable[str]) -> None:
    for name in names:
        rows = frame[frame["arm"] == name]
        x, y = pooled(rows, "drift"), pooled(rows, "asr")
        assert x is not None
        assert y is not None
        marker, colour = _style(name)
        axes.errorbar(
            x.value, y.value, fmt=marker, color=colour, ms=6, lw=0.8, capsize=2,
            xerr=[[x.value - x.low], [x.high - x.value]],
            yerr=[[y.value - y.low], [y.high - y.value]],
        )  # fmt: skip
        axes.annotate(name, (x.value, y.value), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="drift on benign prompts, nats per token", ylabel="ASR, %")


def _draw_attacked(axes: Axes, frame: pd.DataFrame, names: list[str]) -> None:
    for row, name in enumerate(names[::-1]):
        marker, colour = _style(name)
        for metric, filled in (("asr", False), ("asr_attacked", True)):
            e = pooled(frame[frame["arm"] == name], metric)
            assert e is not None
            axes.errorbar(
                e.value, row, xerr=[[e.value - e.low], [e.high - e.value]], fmt=marker,
                color=colour, mfc=colour if filled else "white", ms=6, lw=0.8, capsize=2,
            )  # fmt: skip
    axes.set_yticks(range(len(names)), names[::-1], fontsize=7)
    axes.set(xlabel="ASR before and after the attack, %", xlim=(-3, 103))
