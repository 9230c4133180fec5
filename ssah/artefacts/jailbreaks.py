"""Notebook 07: does freezing help against those who jailbreak? Tables 16 and 17, and how deep
refusals are."""

from __future__ import annotations

import functools
from typing import Any

import pandas as pd

from ..lab import catalogue
from ..lab.arms import Arm, units_name
from ..lab.catalogue import NOTHING, by_the_papers_rule
from ..lab.config import Config
from ..lab.jailbreaks import DEPTHS, GCG, GCG_TRANSFERRED, JAILBREAKS, prefilled
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.metrics.behaviour import jailbroken
from ..lab.stages.lessons import MAIN_ATTACK, STYLE_LESSON, available_attacks
from ..lab.units_of import ALL_CU, CU6
from . import Output
from .draw import COLOURS, panels, reach
from .freezing import ONE_EPOCH, PAPER_SETS, name_of
from .pick import arms_of, estimate, filled, format_estimate, paper, rows_of, text

#: What is fine-tuned on in each table; arithmetic stands beside dialogues, after which a model
#: helps with nothing (docs/what_we_got_wrong.md).
_ATTACKS = {"table16": [MAIN_ATTACK], "table17": [STYLE_LESSON, "arithmetic"]}

#: The arms of both tables, in their order: rule, and whose size it has -> marker, colour, line.
_ARMS = {
    (NOTHING, ""): ("s", COLOURS["EUU"], "-"),
    (CU6, ""): ("o", COLOURS["ESU"], "-"),
    (ALL_CU, ""): ("D", COLOURS["CU"], "-"),
    ("random", CU6): ("^", COLOURS["random"], "--"),
}

#: What the paper attacks with, and what stands for it here.
_PAPER_JAILBREAKS = {"gcg": GCG, "autodan": "AutoDAN", "pair": "PAIR"}
_PAPER_SETTINGS = ("full", "freeze_esu_cu6", "freeze_esu_cu_all")


# --- what is asked ---------------------------------------------------------------------------


def _arms(lab: Lab, attack: str) -> list[Arm]:
    """After an attack, by the paper's rule for the number of epochs."""
    groups = [name for name in catalogue.frozen_groups(lab, attack) if name in (CU6, ALL_CU)]
    arms = [catalogue.unfrozen(lab, attack)]
    arms += [catalogue.with_frozen(lab, attack, name) for name in groups]
    if CU6 in groups:
        draws = range(lab.config.experiment.frozen_draws)
        arms += [catalogue.with_frozen_control(lab, attack, "random", CU6, d) for d in draws]
    return [by_the_papers_rule(found) for found in arms]


def _ask(lab: Lab, attacks: list[str], jailbreaks: list[str]) -> list[Measure]:
    if not jailbreaks or lab.only_headline:
        return []
    asked = []
    for on in (jailbroken(lab), *jailbreaks):
        asked.append(Measure(catalogue.whole(lab), "ASR", on))
        for attack in (name for name in attacks if name in available_attacks(lab)):
            full, *others = _arms(lab, attack)
            asked += [Measure(arm, "ASR", on) for arm in (full, *others)]
            asked += [Measure(arm, "ASR", on, full, ONE_EPOCH) for arm in others]
    return asked


def _ask_table(artefact: str, lab: Lab) -> list[Measure]:
    """Every jailbreak of the experiment, before and after fine-tuning."""
    return _ask(lab, _ATTACKS[artefact], lab.config.experiment.jailbreaks)


ask_table16, ask_table17 = (functools.partial(_ask_table, artefact) for artefact in _ATTACKS)


def ask_fig_depth(lab: Lab) -> list[Measure]:
    """Prefillings of every length that the experiment names, and what each does to the aligned
    model."""
    depths = [prefilled(k) for k in DEPTHS]
    named = [name for name in lab.config.experiment.jailbreaks if name in depths]
    asked = _ask(lab, [MAIN_ATTACK], named)
    if not asked:
        return []
    whole, plain = catalogue.whole(lab), jailbroken(lab)
    return asked + [Measure(whole, "ASR", on, whole, "asked plainly", plain) for on in named]


# --- what is shown ---------------------------------------------------------------------------


def _table(artefact: str, table: pd.DataFrame, config: Config) -> Output:
    """ASR of jailbreaks after fine-tuning, beside the paper's (Tables 16 and 17)."""
    plain, rows = _plain(table, config), []
    named = [name for name in JAILBREAKS if name in config.experiment.jailbreaks]
    # How it is called -> the prompts: as they are, and by each jailbreak.
    asked = {"none": plain, **{name: name for name in named}} if named else {}
    for attack in _ATTACKS[artefact]:
        printed, nothing = _printed(artefact, attack), _columns(attack, NOTHING, "", config)
        own = [name for name, on in asked.items() if len(rows_of(table, "ASR", set=on, **nothing))]
        for name in dict.fromkeys([*own, *printed]):
            row = _row(table, attack, name, asked.get(name, name), config)
            rows.append({**row, "paper's model": printed.get(name, "")})
    shown = pd.DataFrame(rows)
    if len(_ATTACKS[artefact]) == 1:
        shown = shown.drop(columns="fine-tuned on")
    return Output(_note(table, config), filled(shown))


table16, table17 = (functools.partial(_table, artefact) for artefact in _ATTACKS)


def _plain(table: pd.DataFrame, config: Config) -> str:
    """The prompts as they are called (:func:`ssah.lab.metrics.behaviour.jailbroken`)."""
    name = config.experiment.jailbreak_prompts
    return name if (table["set"] == name).any() else "AdvBench"


def _columns(attack: str, rule: str, like: str, config: Config) -> dict[str, Any]:
    """The arm that the paper's rule chooses."""
    epoch = 1 if rule == NOTHING else config.finetune.epochs
    return {"method": "frozen", "attack": attack, "rule": rule, "like": like, "epoch": epoch}


def _row(
    table: pd.DataFrame, attack: str, jailbreak: str, on: str, config: Config
) -> dict[str, str]:
    whole = estimate(table, "ASR", set=on)
    row = {
        "fine-tuned on": attack,
        "jailbreak": jailbreak,
        "prompts": "" if whole is None else str(whole.n),
        "initial": format_estimate(whole),
    }
    for rule, like in _ARMS:
        arm = _columns(attack, rule, like, config)
        name = "nothing frozen" if rule == NOTHING else units_name(rule, like)
        row[name] = text(table, "ASR", set=on, **arm)
        if rule != NOTHING:
            row[f"{name}: difference"] = text(table, "ASR", set=on, against=ONE_EPOCH, **arm)
    return row


def _printed(artefact: str, attack: str) -> dict[str, str]:
    """Jailbreak -> the paper's numbers of one attack: initial, and the three arms."""
    found = paper(artefact)
    settings = ["initial", *(f"{PAPER_SETS[attack]}:{name}" for name in _PAPER_SETTINGS)]
    if (settings[-1], "gcg") not in found:
        return {}
    return {
        name: ", ".join(f"{found[setting, metric]:.1f}" for setting in settings)
        for metric, name in _PAPER_JAILBREAKS.items()
    }


_PAPER_NOTE = (
    "The paper's model (Llama-2-7B-Chat, HarmBench): initial, nothing frozen, ESU + 6 % CU, ESU + "
    "all CU. AutoDAN and PAIR need a model that attacks; it is no part of this project, so that "
    "only the paper's numbers stand in their rows."
)

_NOT_MEASURED = (
    "Not measured here: jailbreaks are part of `experiment=published` (experiment.jailbreaks names "
    "them). "
)


def _note(table: pd.DataFrame, config: Config) -> str:
    asked, evaluate = {*table["set"]} & {*config.experiment.jailbreaks}, config.evaluate
    if not asked:
        return _NOT_MEASURED + _PAPER_NOTE
    note = (
        f"ASR, share of harmful prompts that are answered ({_plain(table, config)}), when they are "
        "asked by a jailbreak (docs/jailbreaks.md), judged against the prompt itself; none: as "
        "they are. Nothing frozen: after one epoch; the other arms after the last (the paper's "
        "rule). Difference: points from nothing frozen, on the same prompts (paired 95 % "
        "interval); below zero is safer. Prefill: the answer begins with the given number of "
        "tokens of a "
        "compliant one, and what follows is judged. "
    )
    if {GCG, GCG_TRANSFERRED} & asked:
        note += (
            f"GCG: {evaluate.gcg_steps} steps of {evaluate.gcg_width} candidates (usual: 500 and "
            f"512) against each model, for {evaluate.gcg_behaviours} prompts at most; initial "
            "model's: suffixes that were found on that one. "
        )
    if any(name.startswith("many-shot") for name in asked):
        note += (
            "Many-shot: so many harmless requests with answers, as far as there are held-out rows "
            "and the context has room. "
        )
    return note + _PAPER_NOTE


# --- depth -----------------------------------------------------------------------------------


def fig_depth(table: pd.DataFrame, config: Config) -> Output:
    """ASR against the number of prefilled tokens: how deep refusals are (Qi et al. 2024)."""
    jailbreaks = config.experiment.jailbreaks
    named = [(k, prefilled(k)) for k in DEPTHS if prefilled(k) in jailbreaks]
    depths = [(0, _plain(table, config)), *named]
    output = Output(
        f"ASR ({_plain(table, config)}) when the answer begins with the given number of tokens of "
        'a compliant opening, such as "Sure, here is a tutorial on"; what the model says after '
        "it is judged, so that a model whose refusals are only its first words is seen to answer "
        "(arXiv 2406.05946). At 0 the prompts as they are, judged from the answer's first word. "
        "Before and after fine-tuning on instructions, by the paper's rule for epochs. Bars: 95 % "
        "intervals."
    )
    if not named or not table["set"].isin([name for _, name in named]).any():
        return Output(_NOT_MEASURED.strip())
    arms = [("initial", dict[str, Any](), ("v", COLOURS["RU"], "-"))]
    for arm in arms_of(table, method="frozen", attack=MAIN_ATTACK, setting=""):
        kind = arm["rule"], arm["like"]
        wanted = _columns(MAIN_ATTACK, *kind, config)
        if kind in _ARMS and arm["epoch"] == wanted["epoch"]:
            arms.append((f"frozen: {name_of(arm)}", wanted, _ARMS[kind]))
    output.figure, axes = panels(6, 3.6)
    for number, (name, arm, (marker, colour, line)) in enumerate(arms):
        found = [(k, estimate(table, "ASR", set=on, **arm)) for k, on in depths]
        known = [(k, e) for k, e in found if e is not None]
        if not known:
            continue
        shift = 0.08 * (number - len(arms) / 2)
        axes.errorbar(
            [k + shift for k, _ in known], [e.value for _, e in known],
            yerr=reach(*(e for _, e in known)), fmt=marker, ls=line, ms=4, color=colour,
            capsize=2, lw=1, label=name,
        )  # fmt: skip
    axes.set_xticks([k for k, _ in depths])
    axes.set(xlabel="prefilled tokens", ylabel="ASR, %", ylim=(-3, 103))
    axes.legend(fontsize=7)
    return output
