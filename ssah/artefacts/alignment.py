"""Notebook 06: aligning through the redundant units. Table 4, and the tax against safety."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..arms import Aligning, Arm, Tuning
from ..budget_arms import LONGER, RANDOM, RU, WHOLE, budget_arms, instruction_arms
from ..errors import SsahError
from ..evaluate.judges import attack_success, is_refusal
from ..evaluate.stats import Estimate, average, crossed_mean, paired_difference, proportion
from ..stages import Stages, paper_rule
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
        outcomes = _measure_safety(stages, output, name, arm)
        outcomes |= _measure_tax(stages, output, name, arm)
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
    if "memory_mib" in record:  # else the model was aligned by an earlier version
        output.add(name, "memory_mib", seed, same(record["memory_mib"], steps))
    for metric, value in {
        "trained_weights": 100 * trained / layout.parameters,
        "optimizer_mib": 8 * trained / 2**20,  # two float32 moments
        "training_loss": record["final_loss"],
        "seconds_per_step": stages.align(how, whole=False).seconds / steps,
    }.items():
        output.add(name, metric, seed, same(value, steps))
    return outcomes


def _measure_safety(stages: Stages, output: Output, name: str, arm: Arm) -> Outcomes:
    """Attack success and over-refusal of one model."""
    config = stages.config
    success = {"asr": attack_success(stages.completions("harmful_evaluation", arm))}
    if stages.has("harmbench"):
        success["asr_harmbench"] = attack_success(stages.harmbench(arm))
    if stages.has("do_not_answer"):
        rows = stages.spread("do_not_answer", config.budget.elsewhere)
        success["asr_do_not_answer"] = attack_success(stages.said(rows, arm))
    success["asr_prefix"] = attack_success(stages.said(stages.prefixed(), arm))
    refused = {
        f"refused_{prompts}": [is_refusal(a) for a in stages.completions(prompts, arm)]
        for prompts in ("benign_evaluation", "borderline")
    }
    for metric, outcomes in (success | refused).items():
        output.add(name, metric, stages.seed, proportion(outcomes).scaled(100))
    return success


def _measure_tax(stages: Stages, output: Output, name: str, arm: Arm) -> Outcomes:
    """Utility of one model, and how far it is from the unaligned one."""
    seed = stages.seed
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
    return {f"accuracy_{task}": right for task, right in tasks.items()}


def _measure_instructions(stages: Stages, output: Output, attack: str) -> None:
    """The unaligned model after learning from harmless rows, as in the paper's Table 4."""
    arms, seed = instruction_arms(stages, attack), stages.seed
    tuned, found = {}, {}
    for name, tuning in arms.items():
        with stages.tuned(tuning) as by_epoch:
            arm = tuned[name] = paper_rule(by_epoch)
            success = attack_success(stages.completions("harmful_evaluation", arm))
            found[name] = _measure_tax(stages, output, name, arm)
            gain = stages.heldout_gain(arm, attack, Arm("unaligned"))
        output.add(name, "asr", seed, proportion(success).scaled(100))
        output.add(name, "heldout_gain", seed, gain)
        record, layout = stages.training(tuning), stages.layout
        weights = layout.parameters
        if tuning.trained is not None:
            weights = round(layout.weights(tuning.trained))
        output.add(name, "trained_weights", seed, same(100 * weights / layout.parameters, weights))
        output.add(name, "training_loss", seed, same(record.final_loss, record.steps))
    whole, redundant, drawn = arms
    for name, other, what in ((redundant, whole, "over_whole"), (redundant, drawn, "over_random")):
        gain = stages.heldout_gain(tuned[name], attack, tuned[other])
        output.add(name, f"gain_{what}", seed, gain)
        change = _mean_difference(found[name], found[other])
        output.add(name, f"accuracy_{what}", seed, change)


def _mean_difference(first: Outcomes, second: Outcomes) -> Estimate:
    """Of accuracy, over tasks, in points, on the same items."""
    tasks = [metric for metric in first if metric.startswith("accuracy")]
    return average([paired_difference(first[t], second[t]).scaled(100) for t in tasks])


def _compare(
    stages: Stages,
    output: Output,
    arms: dict[str, Aligning | None],
    found: dict[str, Outcomes],
) -> None:
    """Each arm against the whole model, and RU against random units, on the same items."""
    pairs = [(name, WHOLE, "over_whole") for name in found if name != WHOLE]
    for how in ("", f", {LONGER}"):
        pairs.append((f"{RU}{how}", f"{RANDOM}{how}", "over_random"))
    for name, other, what in pairs:
        if not {name, other} <= set(found):
            continue
        drifts = [stages.drift(Arm(arms[n] or "aligned")) for n in (name, other)]
        further = crossed_mean((np.array(drifts[0]) - np.array(drifts[1]))[:, None])
        output.add(name, f"drift_{what}", stages.seed, further)
        own, others = found[name], found[other]
        for metric in ("asr", "asr_attacked"):
            compare(output, name, f"{metric}_{what}", stages.seed, own[metric], others[metric])
        output.add(name, f"accuracy_{what}", stages.seed, _mean_difference(own, others))


def measured_arms(study: Study, output: Output) -> None:
    """All arms of all seeds; the largest set for the seeds that the configuration names."""
    for index, stages in enumerate(study.all_stages):
        _measure_safety(stages, output, START, Arm("unaligned"))
        _measure_tax(stages, output, START, Arm("unaligned"))
        budget = study.config.budget
        arms = budget_arms(
            stages, longer=index < budget.longer_seeds, more=index < budget.more_seeds
        )
        unknown = set(budget.arms) - set(arms)
        if unknown:
            raise SsahError(
                f"budget.arms: '{min(unknown)}' is no arm of seed {stages.seed}, which has "
                f"{', '.join(arms)} (budget.longer_seeds and budget.more_seeds add others)."
            )
        if budget.arms:
            arms = {name: arms[name] for name in budget.arms}
        found = {name: measure(stages, output, name, how) for name, how in arms.items()}
        _compare(stages, output, arms, found)
        if budget.arms or index >= budget.more_seeds:
            continue
        for attack in budget.instructions:
            _measure_instructions(stages, output, attack)


# --- table and figure ------------------------------------------------------------------------

#: Column of the table -> (metric, digits)
_COLUMNS: dict[str, tuple[str, int]] = {
    "weights %": ("trained_weights", 1),
    "training loss": ("training_loss", 2),
    "held-out gain": ("heldout_gain", 2),
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
    "memory MiB": ("memory_mib", 0),
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
        "float32; memory: the most that training held beside the model and the one that benign "
        "rows are held to; s a step: on the machine of this run. The paper aligns with "
        "instructions and reports no safety; 'arithmetic: RU' and the like are the unaligned model "
        "after learning from such harmless rows, and the held-out gain is what it learned."
    )
    measured_arms(study, output)
    frame = output.frame(study, "table4")
    output.note += _which_seeds(frame)
    own = arm_rows(frame, config.model.name, "aligned through", _COLUMNS)
    output.table = pd.concat([own, _paper_rows()], ignore_index=True).fillna("")
    return output


def _which_seeds(frame: pd.DataFrame) -> str:
    """Which arms were not measured for every seed."""
    arms: dict[str, list[str]] = {}
    for arm, rows in frame.groupby("arm", sort=False):
        arms.setdefault(", ".join(sorted(set(rows["seed"].astype(str)))), []).append(str(arm))
    every = ", ".join(sorted(set(frame["seed"].astype(str))))
    note = "".join(
        f" Seed {seeds} only: {'; '.join(names)}."
        for seeds, names in arms.items()
        if seeds != every
    )
    if frame["arm"].nunique() <= len((START, WHOLE, RU, RANDOM)):
        note += " `budget=wide` aligns through other parts, and for longer."
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
        "through fewer units easier to break? 95 % intervals, seeds pooled."
    )
    measured_arms(study, output)
    frame = output.frame(study, "fig_budget")
    output.note += _which_seeds(frame)
    names = list(frame[frame["metric"] == "asr_attacked"]["arm"].unique())
    with plt.style.context(STYLE):
        output.figure = ShownFigure(figsize=(10, 2.5 + 0.3 * len(names)))
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
