"""What is measured of models that are aligned through a part of themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import SsahError
from ..evaluate.judges import Completion, attack_success, not_refused, refused
from ..evaluate.stats import Estimate, average, crossed_mean, paired_difference, proportion
from ..lab.arms import Aligning, Arm, Tuning
from ..lab.budget_arms import FASTER, LONGER, RANDOM, RU, WHOLE, budget_arms, instruction_arms
from ..lab.stages import Stages, paper_rule
from ..lab.tuning import MAIN_ATTACK
from . import Output
from .freezing import compare
from .summary import same

if TYPE_CHECKING:
    from ..app.study import Study

START = "unaligned"

#: What two arms are compared on, item by item: metric -> outcomes.
Outcomes = dict[str, list[bool]]


def measure(stages: Stages, output: Output, name: str, how: Aligning | None) -> Outcomes:
    """Every metric of a model that is aligned through a part of itself; True where it complied."""
    record, layout = stages.alignment(how), stages.layout
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
    for metric, value in {
        "trained_weights": 100 * trained / layout.parameters,
        "optimizer_mib": 8 * trained / 2**20,  # two float32 moments
        "training_loss": record["final_loss"],
    }.items():
        output.add(name, metric, seed, same(value, steps))
    return outcomes


def _measure_safety(stages: Stages, output: Output, name: str, arm: Arm) -> Outcomes:
    """Attack success and over-refusal of one model."""
    config = stages.config
    answers = stages.completions("harmful_evaluation", arm)
    success = {"asr": attack_success(answers), "not_refused": not_refused(answers)}
    if stages.has("harmbench"):
        success["asr_harmbench"] = attack_success(stages.harmbench(arm))
    if stages.has("do_not_answer"):
        rows = stages.spread("do_not_answer", config.budget.elsewhere)
        success["asr_do_not_answer"] = attack_success(stages.said(rows, arm))
    # What was asked is the request, without the words about how to begin.
    asked = [row.prompt for row in stages.rows("harmful_evaluation")]
    said = [c.text for c in stages.said(stages.prefixed(), arm)]
    success["asr_prefix"] = attack_success([*map(Completion, asked, said)])
    declined = {
        f"refused_{prompts}": refused(stages.completions(prompts, arm))
        for prompts in ("benign_evaluation", "borderline")
    }
    for metric, outcomes in (success | declined).items():
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


def _measure_instructions(stages: Stages, output: Output, arms: dict[str, Tuning]) -> None:
    """The unaligned model after learning from harmless rows, as in the paper's Table 4."""
    seed, layout, tuned, found = stages.seed, stages.layout, {}, {}
    for name, tuning in arms.items():
        with stages.tuned(tuning) as by_epoch:
            arm = tuned[name] = paper_rule(by_epoch)
            success = attack_success(stages.completions("harmful_evaluation", arm))
            found[name] = _measure_tax(stages, output, name, arm)
            gain = stages.heldout_gain(arm, tuning.attack, Arm("unaligned"))
        record, weights = stages.training(tuning), layout.parameters
        if tuning.trained is not None:
            weights = layout.weights(tuning.trained)
        for metric, estimate in {
            "asr": proportion(success).scaled(100),
            "heldout_gain": gain,
            "trained_weights": same(100 * weights / layout.parameters, layout.units),
            "optimizer_mib": same(8 * weights / 2**20, layout.units),  # two float32 moments
            "training_loss": same(record.final_loss, record.steps),
        }.items():
            output.add(name, metric, seed, estimate)
    for name, tuning in arms.items():
        for part, what in ((WHOLE, "over_whole"), (f"{RANDOM}, {LONGER}", "over_random")):
            other = f"{tuning.attack}: {part}"
            if name == f"{tuning.attack}: {RU}, {LONGER}" and other in tuned:
                gain = stages.heldout_gain(tuned[name], tuning.attack, tuned[other])
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
    for how in ("", f", {LONGER}", f", {FASTER}"):
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


def measured_arms(study: Study, output: Output, *, instructions: bool) -> dict[str, int]:
    """Measure the arms that the configuration names, for all seeds, with or without instructions.

    Returns the places of arms in a table, also of those that these seeds have but were not named.
    """
    places: dict[str, int] = {START: 0}
    for stages, arms, lessons, names in [_chosen_arms(stages) for stages in study.all_stages]:
        for name in names:
            places.setdefault(name, len(places))
        _measure_safety(stages, output, START, Arm("unaligned"))
        _measure_tax(stages, output, START, Arm("unaligned"))
        found = {name: measure(stages, output, name, how) for name, how in arms.items()}
        _compare(stages, output, arms, found)
        if instructions:
            _measure_instructions(stages, output, lessons)
    return places


def _chosen_arms(
    stages: Stages,
) -> tuple[Stages, dict[str, Aligning | None], dict[str, Tuning], list[str]]:
    """The arms of one seed, all of them or those that are named, those with instructions, and
    the names of all that there are."""
    budget, seed = stages.config.budget, stages.seed
    more = seed in budget.more_seeds
    arms = budget_arms(stages, longer=seed in budget.longer_seeds, more=more)
    lessons: dict[str, Tuning] = {}
    for attack in budget.instructions if more else ():
        lessons |= instruction_arms(stages, attack)
    names = [*arms, *lessons]
    if not budget.arms:
        return stages, arms, lessons, names
    unknown = set(budget.arms) - set(names)
    if unknown:
        raise SsahError(
            f"budget.arms: '{min(unknown)}' is no arm of seed {seed}, which has {'; '.join(names)} "
            "(budget.longer_seeds and budget.more_seeds add others)."
        )
    chosen = {name: how for name, how in arms.items() if name in budget.arms}
    taught = {name: how for name, how in lessons.items() if name in budget.arms}
    return stages, chosen, taught, names
