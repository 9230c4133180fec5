"""Tables 1 and 12: what removing each group of units does to safety and utility, with controls."""

from __future__ import annotations

import pandas as pd

from ..lab import catalogue
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.metrics.behaviour import SYSTEM
from ..lab.units_of import ESU, EUU, RU
from . import Output
from .pick import (
    arms_of,
    estimate,
    filled,
    format_estimate,
    is_other_family,
    other_family_unmeasured,
    paper,
    printed_model,
    rows_of,
)

GROUPS = (ESU, EUU, RU)

_SAFETY = ("ASR", "no refusal phrase", "incoherent", "perplexity")


def ask_table1(lab: Lab) -> list[Measure]:
    """The arms of the experiment, and as many random units as ESU and RU."""
    whole, config = catalogue.whole(lab), lab.config
    named = catalogue.removals(lab)
    removed = {arm.units: arm for arm in named if arm.units in GROUPS}
    controls = [
        catalogue.without_control(lab, "random", name, draw)
        for name in (ESU, RU)
        if name in removed
        for draw in range(config.experiment.removed_draws)
    ]
    arms = [whole, *named, *controls, *catalogue.unaligned(lab)]
    asked = [Measure(arm, metric) for arm in arms for metric in _SAFETY]
    asked += [Measure(arm, "units") for arm in arms if arm.method == "removed"]
    for arm in (whole, *removed.values()):
        for metric in ("ASR", "no refusal phrase"):
            asked += [Measure(arm, metric, on) for on in config.experiment.removed_asked]
        asked.append(Measure(arm, "accuracy"))
    asked += [Measure(whole, "refused", on) for on in ("benign", "borderline")]
    asked.append(Measure(whole, "search"))
    for arm in removed.values():
        for metric in ("ASR", "perplexity", "accuracy"):
            asked.append(Measure(arm, metric, against=whole, than="whole"))
    for arm in controls:
        asked.append(Measure(removed[arm.like], "ASR", "", arm, f"random, draw {arm.draw}"))
    return asked


def ask_table12(lab: Lab) -> list[Measure]:
    """The same, where the model under study is of another family than the paper's main one."""
    return ask_table1(lab) if is_other_family(lab.config) else []


def table1(table: pd.DataFrame, config: Config) -> Output:
    """Utility and attack success after removing each group, with matched controls (Table 1)."""
    return _removal_table("table1", table, config)


def table12(table: pd.DataFrame, config: Config) -> Output:
    """The same of another family (Table 12)."""
    if is_other_family(config):
        return _removal_table("table12", table, config)
    columns = {
        ("units", "share_pct"): "units %",
        ("pruning", "wikitext2_ppl"): "perplexity",
        ("pruning", "utility_avg_acc"): "utility %",
        ("pruning", "asr_keyword_sys"): "no refusal phrase, system prompt",
        ("pruning", "asr_keyword_nosys"): "no refusal phrase",
    }
    return other_family_unmeasured("table12", config, columns, "removed")


def _removal_table(artefact: str, table: pd.DataFrame, config: Config) -> Output:
    printed = paper(artefact, printed_model(artefact))
    arms = [*arms_of(table, method="removed", attack="")]
    arms = [arm for arm in arms if not arm["setting"].endswith("%")]  # those are the sweep's
    arms.sort(key=_place)
    rows = [_row(table, "nothing", {}, printed, "dense")]
    if not rows_of(table, "ASR", base="unaligned").empty:
        rows.append(_row(table, "nothing, before alignment", {"base": "unaligned"}, printed))
    for arm in arms:
        name = arm["rule"] + (f", as {arm['like']}" if arm["like"] else "")
        name += f", {arm['setting']}" if arm["setting"] else ""
        paper_name = "" if arm["like"] or arm["setting"] else arm["rule"]
        rows.append(_row(table, name, arm, printed, paper_name))
    return Output(_note(table, config, printed_model(artefact)), filled(pd.DataFrame(rows)))


def _place(arm: dict[str, str]) -> tuple[int, bool, str]:
    """Groups in their order, each followed by what it is compared with."""
    return GROUPS.index(arm["like"] or arm["rule"]), bool(arm["like"]), arm["setting"]


def _row(
    table: pd.DataFrame,
    name: str,
    arm: dict[str, str],
    printed: dict[tuple[str, str], float],
    paper_name: str = "",
) -> dict:
    found = {"removed": name}
    units = estimate(table, "units", **arm)
    found["units %"] = f"{units.value:.1f}" if units else ""
    for column, metric, on, digits in (
        ("perplexity", "perplexity", "", 1),
        ("utility %", "accuracy", "average", 1),
        ("ASR", "ASR", "", 1),
        ("ASR, system prompt", "ASR", SYSTEM, 1),
        ("no refusal phrase", "no refusal phrase", "", 1),
        ("incoherent %", "incoherent", "", 0),
    ):
        found[column] = format_estimate(estimate(table, metric, set=on, **arm), digits)
    if (paper_name, "wikitext2_ppl") in printed:
        asr, perplexity = (printed[paper_name, m] for m in ("asr_keyword_nosys", "wikitext2_ppl"))
        found["paper: no refusal phrase, perplexity"] = f"{asr:.0f}, {perplexity:.1f}"
    return found


def _note(table: pd.DataFrame, config: Config, printed: str) -> str:
    evaluate = config.evaluate
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
        "without one, whether or not it answers, which is what the paper measures (its numbers are "
        f"for {printed}). docs/judging.md says how both judges agree with labels. "
        f"Perplexity: held-out answers given their prompts, not WikiText. Utility: {utility}. "
        "Values are followed by 95 % intervals (Wilson; bootstrap for perplexity); with several "
        "seeds they cover prompts and seeds (perplexity is averaged in nats). Random and magnitude "
        "controls have as many heads and as many neurons, hence as many weights, as the group that "
        "they are named after. *mean*: "
        "what the units say on average is put in their place; *resampled*: at each token, what "
        "they said at a random token of an answer to a harmless prompt; *fitted*: the constant "
        "with which the model's own answers to harmless prompts are likeliest (optimal ablation)."
        + _system_prompt(table)
        + _unmet_criteria(table)
    )


def _system_prompt(table: pd.DataFrame) -> str:
    """What that column means, where it was measured."""
    if SYSTEM not in set(table["set"]):
        return ""
    return (
        " System prompt: evaluate.system_prompt in a turn of its own or, where the chat template "
        "has none (Gemma's), at the head of the user's."
    )


def _unmet_criteria(table: pd.DataFrame) -> str:
    """A warning for each group of which no share did in the search what the group means."""
    unmet = []
    for name in GROUPS:
        found = rows_of(table, f"{name} criterion met")
        unmet += [f"{name} (seed {seed})" for seed in found[found["value"] == 0]["seed"]]
    if not unmet:
        return ""
    return f" No share met the search's criterion for {', '.join(unmet)}; the smallest was taken."
