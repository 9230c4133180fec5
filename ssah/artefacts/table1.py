"""Table 1: what removing each group of units does to safety and utility, with controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from ..core.paths import reference_csv
from ..evaluate.judges import attack_success, is_coherent, not_refused, refused
from ..evaluate.stats import Estimate, average, paired_difference, paired_p_value, pool, proportion
from ..lab.arms import Arm
from ..lab.stages import Stages
from ..scoring.selectors import magnitude_units, random_units
from ..units.mask import UnitMask
from . import Output
from .render import format_estimate

if TYPE_CHECKING:
    from ..app.study import Study

CLAIMED = ("ESU", "EUU", "RU")


def table1(study: Study) -> Output:
    """Utility and attack success after ablating each group, with matched controls (Table 1).

    Beside the paper's rows: random units (several draws) and magnitude controls with as many
    heads and neurons as ESU and RU, and mean ablation.
    """
    output = Output(note=_table1_note(study))
    for stages in study.headline_stages:
        _measure_seed(stages, output)
    frame = output.frame(study, "table1")
    output.table = pd.concat([_own_rows(frame, study), _paper_rows()], ignore_index=True).fillna("")
    return output


def _measure_seed(stages: Stages, output: Output) -> None:
    """All arms of one seed; groups get every measurement, controls those that cost less."""
    seed, config = stages.seed, stages.config.evaluate
    whole = _measure(stages, output, "dense", Arm())
    _measure_tasks(stages, output, "dense", Arm())
    if stages.config.align.enabled:
        _measure(stages, output, "unaligned", Arm("unaligned"))
    _over_refusal(stages, output)
    for group in CLAIMED:
        mask = stages.roles.mask(group)
        arm = Arm(mask=mask)
        success = _measure(stages, output, group, arm)
        _measure_tasks(stages, output, group, arm)
        _measure(stages, output, f"{group}, mean", Arm(mask=mask, mode="mean"))
        _add_shares(stages, output, group, mask)
        output.add(group, "asr_rise", seed, paired_difference(success, whole).scaled(100))
        output.add(group, "asr_rise_p", seed, _p_value(success, whole))
        output.add(group, "perplexity_ratio", seed, stages.perplexity_ratio(arm))
        if group == "EUU":
            continue
        if group == "RU" and "attn" not in stages.config.roles.redundant_kinds:
            name = "RU, heads included"
            with_heads = stages.classify(stages.shares, ["attn", "mlp"]).mask("RU")
            _measure(stages, output, name, Arm(mask=with_heads))
            _add_shares(stages, output, name, with_heads)
        largest = group == "ESU"
        control = magnitude_units(stages.model("aligned"), stages.layout, mask, largest=largest)
        name = f"{'largest' if largest else 'smallest'} magnitude, as {group}"
        _measure(stages, output, name, Arm(mask=control))
        _add_shares(stages, output, name, control)
        for draw in range(config.random_draws):
            control = random_units(stages.layout, mask, 1000 * seed + draw)
            name, label = f"random, as {group}", f"{seed}.{draw}"
            random_success = _measure(stages, output, name, Arm(mask=control), label)
            over = paired_difference(success, random_success).scaled(100)
            output.add(group, "asr_over_random", label, over)
            output.add(group, "asr_over_random_p", label, _p_value(success, random_success))
        _add_shares(stages, output, name, control)


def _p_value(first: list[bool], second: list[bool]) -> Estimate:
    p = paired_p_value(first, second)
    return Estimate(p, p, p, len(first))


def _measure(
    stages: Stages, output: Output, name: str, arm: Arm, label: str | None = None
) -> list[bool]:
    """Safety without a system prompt, and perplexity; returns success by prompt."""
    seed = label or stages.seed
    answers = stages.completions("harmful_evaluation", arm)
    success = attack_success(answers)
    rates = {
        "asr_nosys": success,
        "not_refused_nosys": not_refused(answers),
        "incoherent_nosys": [not is_coherent(a.text) for a in answers],
    }
    for metric, outcomes in rates.items():
        output.add(name, metric, seed, proportion(outcomes).scaled(100))
    output.add(name, "perplexity", seed, stages.perplexity(arm))
    return success


def _measure_tasks(stages: Stages, output: Output, name: str, arm: Arm) -> None:
    """Safety with a system prompt, and accuracy by task."""
    seed = stages.seed
    plain, with_system = (
        stages.completions("harmful_evaluation", arm, system=system) for system in (False, True)
    )
    for metric, counted in (("asr", attack_success), ("not_refused", not_refused)):
        rates = [proportion(counted(answers)) for answers in (plain, with_system)]
        output.add(name, f"{metric}_sys", seed, rates[1].scaled(100))
        # The same prompts twice are no larger sample: the interval is that of as many prompts.
        output.add(name, f"{metric}_avg", seed, pool(rates).scaled(100))
    outcomes, whole = stages.task_outcomes(arm), stages.task_outcomes(Arm())
    accuracy = {task: proportion(right).scaled(100) for task, right in outcomes.items()}
    for task, estimate in accuracy.items():
        output.add(name, f"accuracy_{task}", seed, estimate)
    output.add(name, "utility_avg", seed, average(list(accuracy.values())))
    if arm.mask is not None:
        changes = [paired_difference(outcomes[t], whole[t]).scaled(100) for t in outcomes]
        output.add(name, "utility_change", seed, average(changes))


def _over_refusal(stages: Stages, output: Output) -> None:
    """Refusals of harmless prompts: the price of the alignment that everything else starts from."""
    for name in ("benign_evaluation", "borderline"):
        outcomes = refused(stages.completions(name, Arm()))
        output.add("dense", f"refused_{name}", stages.seed, proportion(outcomes).scaled(100))


def _add_shares(stages: Stages, output: Output, name: str, mask: UnitMask) -> None:
    layout = stages.layout
    units, weights = 100 * mask.share(), 100 * layout.weights(mask) / layout.parameters
    for metric, value, n in (
        ("share_units", units, layout.units),
        ("share_weights", weights, layout.units),
        ("heads", mask.count("attn"), layout.units),
        ("neurons", mask.count("mlp"), layout.units),
    ):
        output.add(name, metric, stages.seed, Estimate(value, value, value, n))


#: Column of the table -> (metric, digits)
_COLUMNS = {
    "units %": ("share_units", 1),
    "weights %": ("share_weights", 1),
    "perplexity": ("perplexity", 1),
    "utility %": ("utility_avg", 1),
    "ASR, system prompt": ("asr_sys", 1),
    "ASR, none": ("asr_nosys", 1),
    "ASR, average": ("asr_avg", 1),
    "no refusal phrase, system prompt": ("not_refused_sys", 1),
    "no refusal phrase, none": ("not_refused_nosys", 1),
    "no refusal phrase, average": ("not_refused_avg", 1),
    "incoherent %": ("incoherent_nosys", 0),
}


def _own_rows(frame: pd.DataFrame, study: Study) -> pd.DataFrame:
    """One row for each arm, seeds and draws pooled."""
    rows = []
    for arm, group in frame.groupby("arm", sort=False):
        row: dict[str, str] = {"model": study.config.model.name, "removed": str(arm)}
        for column, (metric, digits) in _COLUMNS.items():
            found = group[group["metric"] == metric]
            if found.empty:
                continue
            estimates = [Estimate(*r) for r in found[["value", "low", "high", "n"]].to_numpy()]
            pooled = pool(estimates)
            if metric.startswith("share"):
                row[column] = f"{pooled.value:.{digits}f}"
            else:
                row[column] = format_estimate(pooled, digits)
                if len(estimates) > 1:
                    low, high = found["value"].min(), found["value"].max()
                    row[column] += f" ({low:.{digits}f}-{high:.{digits}f})"
        rows.append(row)
    return pd.DataFrame(rows)


def _paper_rows() -> pd.DataFrame:
    """The paper's Table 1, with the columns that correspond."""
    paper = pd.read_csv(reference_csv())
    paper = paper[paper["artefact"] == "table1"]
    columns = {
        "share_pct": "units %",
        "wikitext2_ppl": "perplexity",
        "utility_avg_acc": "utility %",
        "asr_keyword_sys": "no refusal phrase, system prompt",
        "asr_keyword_nosys": "no refusal phrase, none",
        "asr_keyword_avg": "no refusal phrase, average",
    }
    paper = paper[paper["metric"].isin(columns)]
    wide = paper.pivot_table(index=["model", "setting"], columns="metric", values="value")
    wide = wide.rename(columns=columns).reset_index().rename(columns={"setting": "removed"})
    order = ["dense", "ESU", "EUU", "RU"]
    wide = wide.sort_values(["model", "removed"], key=lambda c: c.map(lambda v: _rank(v, order)))
    wide["model"] = "paper: " + wide["model"]
    numeric = list(columns.values())
    wide[numeric] = wide[numeric].map(lambda v: "" if pd.isna(v) else f"{v:.1f}")
    return wide[["model", "removed", *numeric]]


def _rank(value: str, order: list[str]) -> str:
    return f"{order.index(value)}" if value in order else value


def _table1_note(study: Study) -> str:
    evaluate = study.config.evaluate
    if evaluate.utility == "lm_eval":
        utility = f"lm-eval tasks {', '.join(evaluate.lm_eval_tasks)}"
    else:
        utility = (
            f"the average of {evaluate.trivia_items} trivia questions with four choices "
            f"(chance: 25 %) and {evaluate.arithmetic_items} arithmetic word problems (exact match)"
        )
    return (
        "ASR: share of the held-out harmful prompts that are answered, within "
        f"{evaluate.max_new_tokens} tokens; no refusal phrase: the share that gets coherent text "
        "without one, whether or not it answers, which is what the paper measures. "
        "docs/judging.md says how both judges agree with labels. Perplexity: held-out answers "
        f"given their prompts, not WikiText. Utility: {utility}. Values are followed by 95 % "
        "intervals (Wilson; bootstrap for perplexity), with several seeds or draws the mean of "
        "each, and in brackets the smallest and largest. Random and magnitude controls have as "
        "many heads and "
        "as many neurons, hence as many weights, as the group that they are named after."
        + _unmet_criteria(study)
    )


def _unmet_criteria(study: Study) -> str:
    """A warning for each group of which no share did in the search what the group means."""
    unmet = []
    for stages in study.all_stages:
        trials = stages.search_trials
        accepted = {trial.group for trial in trials if trial.accepted}
        for group in dict.fromkeys(trial.group for trial in trials):
            if group not in accepted:
                unmet.append(f"{group} (seed {stages.seed})")
    if not unmet:
        return ""
    return (
        f" No share met the search's criterion for {', '.join(unmet)}; the smallest one was taken."
    )
