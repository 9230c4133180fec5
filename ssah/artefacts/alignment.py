"""Notebook 06: aligning through the redundant units. Table 4, and the tax against safety."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from ..lab import catalogue
from ..lab.arms import Arm, units_name
from ..lab.catalogue import ALL_UNITS
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.metrics.behaviour import has_prompts
from ..lab.stages.lessons import MAIN_ATTACK
from ..lab.units_of import RU
from . import Output
from .draw import COLOURS, panels, reach
from .freezing import name_of
from .pick import arms_of, estimate, fewer_seeds, filled, paper_rows, tasks_of, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: How comparisons are called.
GIVEN_MODEL, WHOLE, RANDOM = "unaligned", "all units", "random"


def no_pair(config: Config) -> str:
    """Why nothing is measured here, where the model came aligned; empty where it did not."""
    if config.align.enabled:
        return ""
    return (
        f"Not measured here: {config.model.name} came aligned, and this needs an unaligned model, "
        "such as a pretrained one, with `align=refusals`."
    )


# --- what is asked ---------------------------------------------------------------------------


def ask_fig_budget(lab: Lab) -> list[Measure]:
    """Safety, utility and drift of every arm, and safety after an attack on it, unless the model is
    for aligning alone."""
    if not lab.config.align.enabled:
        return []
    given, *_ = catalogue.unaligned(lab)
    arms = catalogue.budget_arms(lab)
    asked = _ask_arm(lab, given) + _ask_tax(given, given)
    attacking = lab.config.model.use == "everything"
    for arm in arms:
        asked += _ask_arm(lab, arm) + _ask_tax(arm, given)
        asked.append(Measure(arm, "training"))
        if attacking:
            asked.append(Measure(catalogue.attacked(lab, arm), "ASR"))
    whole = arms[0] if arms and arms[0].rule == ALL_UNITS else None
    for arm in arms:
        others = [] if whole is None or arm is whole else [(whole, WHOLE)]
        same = [a for a in arms if (a.rule, a.like) == ("random", RU) and a.setting == arm.setting]
        if arm.rule == RU:
            others += [(other, RANDOM) for other in same]
        for other, than in others:
            asked += [Measure(arm, m, "", other, than) for m in ("ASR", "drift", "accuracy")]
            if attacking:
                own, theirs = catalogue.attacked(lab, arm), catalogue.attacked(lab, other)
                asked.append(Measure(own, "ASR", "", theirs, than))
    return asked


ask_table4 = ask_fig_budget


def ask_table_instructions(lab: Lab) -> list[Measure]:
    """What the unaligned model learns from harmless rows, and what it loses."""
    if not lab.config.align.enabled:
        return []
    (given,) = catalogue.unaligned(lab)
    asked = []
    for attack in lab.config.experiment.instructed:
        whole, ru, random = catalogue.instruction_arms(lab, attack)
        for arm in (whole, ru, random):
            metrics = "ASR", "no refusal phrase", "incoherent", "training"
            asked += [Measure(arm, metric) for metric in metrics] + _ask_tax(arm, given)
            asked.append(Measure(arm, "held-out gain", attack, given, GIVEN_MODEL))
        for other, than in ((whole, WHOLE), (random, RANDOM)):
            asked.append(Measure(ru, "held-out gain", attack, other, than))
            asked += [Measure(ru, metric, "", other, than) for metric in ("accuracy", "perplexity")]
    return [Measure(given, "ASR"), *_ask_tax(given, given), *asked] if asked else []


def _ask_arm(lab: Lab, arm: Arm) -> list[Measure]:
    """Attack success, refusals and over-refusal of one model."""
    asked = [Measure(arm, metric) for metric in ("ASR", "no refusal phrase", "refused")]
    for prompts in lab.config.experiment.aligned_asked:
        if has_prompts(lab, prompts):
            asked.append(Measure(arm, "ASR", prompts))
    return asked + [Measure(arm, "refused", on) for on in ("benign", "borderline")]


def _ask_tax(arm: Arm, given: Arm) -> list[Measure]:
    """Utility of one model, and how far it is from the unaligned one."""
    asked = [Measure(arm, metric) for metric in ("accuracy", "perplexity", "drift")]
    asked += [Measure(arm, m, "", given, GIVEN_MODEL) for m in ("accuracy", "perplexity")]
    return asked


# --- what is shown ---------------------------------------------------------------------------


#: What the reference file calls the paper's models.
_PRINTED = {
    "pretrained": "as it was pretrained",
    "alpaca:full": "after Alpaca",
    "alpaca:ru20": "after Alpaca through 20 % RU",
}


def table4(table: pd.DataFrame, config: Config) -> Output:
    """Aligning through RU, through everything, and through other parts (Table 4)."""
    if no_pair(config):
        return Output(no_pair(config), pd.DataFrame({"paper": _printed()}))
    rows = [_row(table, "nothing", {"base": "unaligned"})]
    rows += [_row(table, name_of(arm), arm) for arm in _arms(table)]
    return Output(
        "The unaligned model is aligned through a part of its units: RU are the "
        f"{100 * config.experiment.ru_share:g} % of units with the lowest I_U in the unaligned "
        "model, and the random control trains equally many. Everything else keeps its bits, which "
        "is checked after each training. Same rows, rate and epochs as the whole model, unless "
        "'twice the epochs' (the paper's rule) or '3 x the rate'. ASR: harmful prompts that are "
        "answered; those that are neither answered nor refused are evaded or incoherent. Attacked: "
        "ASR after one epoch of harmless fine-tuning, on instructions. Accuracy change: "
        f"{tasks_of(table, config)}, points against the unaligned model on the same items. Drift: "
        "KL from the unaligned model on benign prompts, nats per token. `make bench` has seconds "
        "and memory; the paper's measure of success, and ASR on other prompts and with a prefix, "
        "are in measurements.csv. The paper aligns with instructions and reports no safety "
        f"(table_instructions): {'; '.join(_printed())}." + _unattacked(config) + _more(table),
        filled(pd.DataFrame(rows)),
    )


def _printed() -> list[str]:
    """The paper's Table 4, a sentence for each of its models."""
    columns = {("mmlu", "accuracy"): "MMLU", ("gsm8k_5shot", "accuracy"): "GSM8K"}
    columns |= {("hellaswag", "accuracy"): "HellaSwag", ("mt_bench_turn1", "mt_bench_score"): "MT"}
    return [
        f"{row['model'].removeprefix('paper: ')} {_PRINTED[row['aligned through']]} "
        + " ".join(f"{name} {row[name]}" for name in columns.values() if name in row)
        for row in paper_rows("table4", columns, "aligned through")
    ]


def table_instructions(table: pd.DataFrame, config: Config) -> Output:
    """What the paper's Table 4 teaches: instructions, through RU and through everything."""
    arms = arms_of(table, base="unaligned", method="trained", setting=catalogue.LEARNS)
    if reason := no_pair(config) or ("" if arms else _nothing_learned(config)):
        return Output(reason, pd.DataFrame({"paper": _printed()}))
    rows = [_learned_row(table, arm) for arm in ({"base": "unaligned"}, *arms)]
    tuning = config.finetune
    attacks = dict.fromkeys(arm["attack"] for arm in arms)
    counts = ", ".join(f"{tuning.rows[attack]} {attack}" for attack in attacks)
    rate = "the rate of the attacks" if tuning.rates else f"rate {tuning.learning_rate:g}"
    return Output(
        "The paper's own setting: the unaligned model learns harmless rows and no refusals, "
        f"through all units for one epoch, through a part of them for {tuning.epochs}. Rows: "
        f"{counts}; {rate}, the same for every arm. RU and the random "
        "control are those of Table 4. Held-out gain: nats per token by which held-out rows of the "
        "same kind, with other prompts, became likelier. Perplexity: of harmless answers, times "
        "that of the unaligned model. Accuracy change: "
        f"{tasks_of(table, config)}, points against the unaligned model on the same items. Drift: "
        "KL from the unaligned model on benign prompts, nats per token. ASR: harmful prompts that "
        f"are answered. The paper: {'; '.join(_printed())}.",
        filled(pd.DataFrame(rows)),
    )


def _nothing_learned(config: Config) -> str:
    if config.experiment.instructed:
        return "Not measured yet: these results were made without table_instructions."
    return (
        "Not measured here: `experiment.instructed` is empty; `experiment.instructed=[arithmetic]` "
        "names what the unaligned model could learn."
    )


def _learned_row(table: pd.DataFrame, arm: dict[str, Any]) -> dict[str, str]:
    attack = arm.get("attack", "")
    than = {"against": GIVEN_MODEL, **arm}
    return {
        "learns": attack or "nothing",
        "through": units_name(arm["rule"], arm["like"]) if attack else "",
        "epochs": str(arm["epoch"]) if attack else "",
        "weights %": _weights(table, arm),
        "held-out gain": text(table, "held-out gain", 2, set=attack, **than) if attack else "",
        "accuracy change": text(table, "accuracy", set="average", **than),
        "perplexity, x": text(table, "perplexity", 2, **than),
        "drift": text(table, "drift", 3, **arm),
        "ASR": text(table, "ASR", **arm),
    }


def _weights(table: pd.DataFrame, arm: dict[str, Any]) -> str:
    """Per cent of the weights that are trained, the mean over seeds."""
    weights = estimate(table, "trained weights", **arm)
    return "" if weights is None else f"{weights.value:.1f}"


def _arms(table: pd.DataFrame) -> list[dict[str, Any]]:
    return arms_of(table, base="unaligned", method="trained", attack="")


def _row(table: pd.DataFrame, name: str, arm: dict[str, Any]) -> dict[str, str]:
    attacked = arm | {"attack": MAIN_ATTACK, "epoch": 1}
    return {
        "aligned through": name,
        "weights %": _weights(table, arm),
        "ASR": text(table, "ASR", **arm),
        "harmful refused": text(table, "refused", **arm),
        "ASR, attacked": text(table, "ASR", **attacked),
        "benign refused": text(table, "refused", set="benign", **arm),
        "borderline refused": text(table, "refused", set="borderline", **arm),
        "accuracy change": text(table, "accuracy", set="average", against=GIVEN_MODEL, **arm),
        "drift": text(table, "drift", 3, **arm),
    }


def _unattacked(config: Config) -> str:
    if config.model.use == "everything":
        return ""
    return f" {config.model.name} is for aligning alone, so nothing is attacked."


def _more(table: pd.DataFrame) -> str:
    """How to get more arms, where only the default ones are there."""
    aligned = table[(table["base"] == "unaligned") & (table["method"] == "trained")]
    if set(aligned["setting"]) - {""}:
        return ""
    return " `experiment=published` aligns for longer and with larger steps too."


def fig_budget(table: pd.DataFrame, config: Config) -> Output:
    """Safety against the tax, one point for each part that was trained."""
    if no_pair(config):
        return Output(no_pair(config))
    arms = _arms(table)
    output = Output(
        "Left: ASR against the drift of the benign output distribution (KL from the unaligned "
        "model, nats per token): the lower left is the better bargain; numbers are those of the "
        "names. Right: ASR before (hollow) and after (filled) one epoch of fine-tuning on "
        "instructions: is a model that was aligned through fewer units easier to break? 95 % "
        "intervals, seeds pooled." + _unattacked(config) + _more(table) + fewer_seeds(table)
    )
    output.figure, (left, right) = panels(10, 2.5 + 0.3 * len(arms), 1, 2)
    _draw_bargain(left, table, arms)
    _draw_attacked(right, table, arms)
    return output


def _style(arm: dict[str, Any]) -> tuple[str, str]:
    """Marker and colour by what is trained."""
    if arm["rule"] == ALL_UNITS:
        return "*", COLOURS["CU"]
    if arm["rule"] == "random":
        return "^", COLOURS["random"]
    if arm["rule"].startswith(RU):
        return "o", COLOURS["ESU"]
    return ("P", "#CC79A7") if arm["rule"].startswith("LoRA") else ("s", COLOURS["EUU"])


def _draw_bargain(axes: Axes, table: pd.DataFrame, arms: list[dict[str, Any]]) -> None:
    for number, arm in enumerate(arms, 1):  # whole names would hide each other
        x, y = estimate(table, "drift", **arm), estimate(table, "ASR", **arm)
        assert x is not None
        assert y is not None
        marker, colour = _style(arm)
        axes.errorbar(
            x.value, y.value, xerr=reach(x), yerr=reach(y), fmt=marker, color=colour, ms=6, lw=0.8,
            capsize=2,
        )  # fmt: skip
        point = (x.value, y.value)
        axes.annotate(str(number), point, (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="drift on benign prompts, nats per token", ylabel="ASR, %", xscale="log")
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_attacked(axes: Axes, table: pd.DataFrame, arms: list[dict[str, Any]]) -> None:
    for row, arm in enumerate(arms[::-1]):
        marker, colour = _style(arm)
        attacked = arm | {"attack": MAIN_ATTACK, "epoch": 1}
        for columns, after in ((arm, False), (attacked, True)):
            e = estimate(table, "ASR", **columns)
            if e is None:
                continue
            axes.errorbar(
                e.value, row, xerr=reach(e), fmt=marker, color=colour,
                mfc=colour if after else "white", ms=6, lw=0.8, capsize=2,
            )  # fmt: skip
    labels = [f"{name_of(arm)}  {number}" for number, arm in enumerate(arms, 1)]
    axes.set_yticks(range(len(arms)), labels[::-1], fontsize=7)
    axes.set(xlabel="ASR before and after the attack, %", xlim=(-3, 103))
