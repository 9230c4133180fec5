"""Notebook 04: does freezing safety units keep a model safe? Tables 2, 3 and 13 to 15."""

from __future__ import annotations

import functools
from typing import Any

import pandas as pd

from ..lab import catalogue
from ..lab.arms import Arm, units_name
from ..lab.catalogue import NOTHING, by_the_papers_rule
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.metrics.behaviour import has_prompts
from ..lab.stages.lessons import ATTACKS, MAIN_ATTACK, RISE, STYLE_LESSON, available_attacks
from ..lab.units_of import ALL_CU, CU6
from ..scoring.selectors import RULES
from . import Output
from .pick import (
    OTHER_FAMILY,
    arms_of,
    estimate,
    filled,
    format_estimate,
    is_of_others,
    other_family_unmeasured,
    paper,
    printed_model,
    rows_of,
    tasks_of,
    text,
)

#: How comparisons are called.
BEFORE = "before"
SAME_EPOCHS, ONE_EPOCH = "nothing frozen, same epochs", "nothing frozen, one epoch"

CONFLICT = "gradient conflict"

_SAFETY = ("ASR", "no refusal phrase", "incoherent", "perplexity", "units", "training")


# --- what is asked ---------------------------------------------------------------------------


def compared(arm: Arm, attack: str, other: Arm, than: str) -> list[Measure]:
    """Safety, and what was learned, against another arm."""
    gain = Measure(arm, "held-out gain", attack, other, than)
    return [Measure(arm, "ASR", "", other, than), gain]


def ask_arms(lab: Lab, arms: list[Arm], attack: str) -> list[Measure]:
    """What every fine-tuned arm is asked, at every epoch."""
    whole, asked = catalogue.whole(lab), []
    for arm in arms:
        asked += [Measure(arm, metric) for metric in _SAFETY]
        asked += compared(arm, attack, whole, BEFORE)
    return asked


def ask_against(arms: list[Arm], full: list[Arm], attack: str) -> list[Measure]:
    """Frozen arms against the one that freezes nothing: epoch by epoch, and by the paper's rule."""
    asked = []
    for arm in arms:
        if arm.epoch <= len(full):
            asked.append(Measure(arm, "ASR", "", full[arm.epoch - 1], SAME_EPOCHS))
        asked += compared(arm, attack, full[0], ONE_EPOCH)
    return asked


def ask_before(lab: Lab) -> list[Measure]:
    """What the model is asked before it is fine-tuned, and how strong the attacks are."""
    metrics = ["ASR", "no refusal phrase", "perplexity"]
    metrics += ["strength"] if lab.config.finetune.rates else []
    return [Measure(catalogue.whole(lab), metric) for metric in metrics]


def ask_random(lab: Lab, like: str, draws: int, against: list[list[Arm]]) -> list[Measure]:
    """Draws of as many random units, and some arms against each of them, epoch by epoch."""
    asked = []
    for draw in range(draws):
        control = catalogue.with_frozen_control(lab, MAIN_ATTACK, "random", like, draw)
        asked += ask_control(lab, control, against)
    return asked


def ask_control(lab: Lab, control: list[Arm], against: list[list[Arm]]) -> list[Measure]:
    """One draw of random units, and some arms against it."""
    attack, draw = control[0].attack, control[0].draw
    asked = ask_arms(lab, control, attack)
    asked += ask_against(control, catalogue.unfrozen(lab, attack), attack)
    for arms in against:
        for own, other in zip(arms, control, strict=True):
            asked.append(Measure(own, "ASR", "", other, f"random, draw {draw}"))
    return asked


def _ask(lab: Lab, attack: str) -> list[Measure]:
    """All arms of an attack."""
    experiment, full = lab.config.experiment, catalogue.unfrozen(lab, attack)
    names = experiment.frozen.get(attack, [])
    frozen = {name: catalogue.with_frozen(lab, attack, name) for name in names}
    asked = ask_arms(lab, full, attack)
    for name, arms in frozen.items():
        asked += ask_arms(lab, arms, attack) + ask_against(arms, full, attack)
        if name != CU6 and CU6 in frozen:
            pairs = zip(arms, frozen[CU6], strict=True)
            asked += [Measure(own, "ASR", "", other, CU6) for own, other in pairs]
    if attack == MAIN_ATTACK:
        if CU6 in frozen:
            like_cu6 = [arms for name, arms in frozen.items() if name in (CU6, *RULES)]
            asked += ask_random(lab, CU6, experiment.frozen_draws, like_cu6)
        if ALL_CU in frozen:
            asked += ask_random(lab, ALL_CU, 1, [frozen[ALL_CU]])
    for prompts in experiment.frozen_asked:
        if names and has_prompts(lab, prompts):
            arms = [by_the_papers_rule(found) for found in (full, *frozen.values())]
            asked += [Measure(arm, "ASR", prompts) for arm in arms]
    return asked


#: Table -> what is fine-tuned on: the main attack with its controls, and the lesson; arithmetic.
_ATTACKS = {
    "table2": [MAIN_ATTACK, STYLE_LESSON],
    "table13": ["arithmetic"],
    "table14": [MAIN_ATTACK],
    "table15": ["arithmetic"],
}


def _ask_table(artefact: str, lab: Lab) -> list[Measure]:
    if is_of_others(artefact, lab.config):
        return []
    asked = ask_before(lab)
    for prompts in lab.config.experiment.frozen_asked:
        if has_prompts(lab, prompts):
            asked.append(Measure(catalogue.whole(lab), "ASR", prompts))
    for attack in _ATTACKS[artefact]:
        if attack in available_attacks(lab) and (attack == MAIN_ATTACK or not lab.only_headline):
            asked += _ask(lab, attack)
    return asked


ask_table2, ask_table13, ask_table14, ask_table15 = (
    functools.partial(_ask_table, artefact) for artefact in _ATTACKS
)


def ask_table3(lab: Lab) -> list[Measure]:
    """Accuracy before, and by the paper's rule after each attack."""
    whole = catalogue.whole(lab)
    asked = [Measure(whole, "accuracy")]
    for attack in available_attacks(lab):
        names = catalogue.frozen_groups(lab, attack)
        arms = [catalogue.unfrozen(lab, attack)]
        arms += [catalogue.with_frozen(lab, attack, name) for name in names]
        full, *frozen = map(by_the_papers_rule, arms)
        for arm in (full, *frozen):
            asked.append(Measure(arm, "accuracy"))
            asked.append(Measure(arm, "accuracy", "", whole, BEFORE))
        asked += [Measure(arm, "accuracy", "", full, ONE_EPOCH) for arm in frozen]
    return asked


# --- what is shown ---------------------------------------------------------------------------


def name_of(arm: dict[str, Any]) -> str:
    """What is frozen."""
    return units_name(arm["rule"], arm["like"], arm["setting"])


#: What is frozen -> the paper's name of it, after the data set.
PAPER_ARMS = {NOTHING: "full", CU6: "freeze_esu_cu6", ALL_CU: "freeze_esu_cu_all"}
PAPER_SETS = {"instructions": "alpaca", "arithmetic": "gsm8k", "dialogues": "dolly"}


def _freezing_table(artefact: str, table: pd.DataFrame, config: Config) -> Output:
    """ASR after fine-tuning, with random controls; of another family the paper's rows alone, where
    the model under study is of the main one."""
    if is_of_others(artefact, config):
        columns = {
            ("advbench", "asr_keyword"): "no refusal phrase",
            ("hexphi", "asr_llama_guard3"): "ASR HEx-PHI (Llama Guard 3)",
        }
        return other_family_unmeasured(artefact, config, columns, "fine-tuning: frozen")
    attacks, model = _ATTACKS[artefact], printed_model(artefact)
    shown = [{}, *(arm for attack in attacks for arm in _shown(table, attack, config))]
    printed = paper(artefact, model)
    rows = [row_of(table, arm, paper_number(printed, arm, PAPER_ARMS)) for arm in shown]
    note = _note(table, config, [a for a in attacks if a in set(table["attack"])])
    if artefact in OTHER_FAMILY:
        note += f" The paper's numbers are for {model}."
    return Output(note, filled(pd.DataFrame(rows)))


table2, table13, table14, table15 = (
    functools.partial(_freezing_table, artefact) for artefact in _ATTACKS
)


def paper_number(
    printed: dict[tuple[str, str], float], arm: dict[str, Any], names: dict[str, str]
) -> float | None:
    """What the paper prints of an arm (of the model before where it is empty), where that is
    trained for as long as the paper trains it; ``names`` are those that its arms have there."""
    if not arm:
        return printed.get(("initial", "asr_keyword"))
    if arm["epoch"] != (1 if arm["rule"] == NOTHING else 2):
        return None
    name = f"{PAPER_SETS[arm['attack']]}:{names.get(name_of(arm), '')}"
    return printed.get((name, "asr_keyword"))


def _shown(table: pd.DataFrame, attack: str, config: Config) -> list[dict[str, Any]]:
    """The arms of the experiment, each random control behind what it is held against."""
    order = [(NOTHING, "")]
    for name in config.experiment.frozen.get(attack, []):
        order.append((name, CU6 if name in RULES else ""))
        order.append(("random", name))
    arms = arms_of(table, method="frozen", attack=attack, setting="")
    known = [arm for arm in arms if (arm["rule"], arm["like"]) in order]
    return sorted(known, key=lambda arm: (order.index((arm["rule"], arm["like"])), arm["epoch"]))


def _named(arm: dict[str, Any]) -> dict[str, str]:
    """The first columns of a table of frozen arms; an empty arm is the model before."""
    if not arm:
        return {"fine-tuned on": "nothing", "frozen": "", "epochs": ""}
    return {"fine-tuned on": arm["attack"], "frozen": name_of(arm), "epochs": str(arm["epoch"])}


def row_of(table: pd.DataFrame, arm: dict[str, Any], printed: float | None) -> dict[str, str]:
    """A row of a table of frozen arms; an empty arm is the model before."""
    attack = arm.get("attack", "")
    gain = text(table, "held-out gain", 2, set=attack, against=BEFORE, **arm)
    draws = table[table["against"].str.startswith("random, draw ")]
    over = estimate(draws, "ASR", against=None, **arm) if arm else None
    return {
        **_named(arm),
        "held-out gain": gain,
        "ASR": text(table, "ASR", **arm),
        "no refusal phrase": text(table, "no refusal phrase", **arm),
        "ASR against nothing frozen": text(table, "ASR", against=SAME_EPOCHS, **arm),
        "ASR against random": format_estimate(over, 1),
        "paper: no refusal phrase": "" if printed is None else f"{printed:.1f}",
    }


def table3(table: pd.DataFrame, config: Config) -> Output:
    """Utility after fine-tuning, with and without frozen units (Table 3)."""
    tasks = [t for t in dict.fromkeys(table[table["metric"] == "accuracy"]["set"]) if t]
    arms = [a for a in arms_of(table, method="frozen", setting="") if not a["like"]]
    rows = []
    for arm in ({}, *arms):
        accuracies = {t: estimate(table, "accuracy", set=t, **arm) for t in tasks}
        if not any(accuracies.values()):
            continue
        row = {
            **_named(arm),
            **{f"{task} %": format_estimate(e) for task, e in accuracies.items()},
        }
        for column, than in (("change", BEFORE), ("against nothing frozen", ONE_EPOCH)):
            row[column] = text(table, "accuracy", set="average", against=than, **arm)
        rows.append(row)
    means = pd.Series(paper("table3")).groupby(level=0).mean()
    called = {"base": "before", "alpaca:full": "after Alpaca", "alpaca:freeze": "frozen"}
    averages = ", ".join(f"{name} {means[key]:.1f}" for key, name in called.items())
    return Output(
        f"Accuracy in {tasks_of(table, config)}; change: against the aligned model before, on the "
        "same items. One epoch where nothing is frozen, else the last epoch. The paper's tasks "
        "are others (zero-shot, "
        "lm-eval); "
        f"its averages for Llama-2-7B-Chat are {averages}.",
        pd.DataFrame(rows),
    )


def _note(table: pd.DataFrame, config: Config, attacks: list[str]) -> str:
    return (
        f"{training_note(table, config, attacks)} {COLUMNS_NOTE} Rules that are not the paper's "
        "take equally many heads and neurons as ESU + 6 % CU: gradient conflict those by which a "
        "first step on the rows would raise the loss of refusals most; ESI and Fisher those on "
        "whose weights the loss of refusals depends most (docs/rivals.md). The paper trains frozen "
        f"arms for twice the epochs, and its numbers stand in these rows. {SEEDS_NOTE}"
    )


def training_note(table: pd.DataFrame, config: Config, attacks: list[str]) -> str:
    """On what, at which rate and how the models of a table were fine-tuned."""
    tuning = config.finetune
    chosen = rows_of(table, "attack rate").groupby("value", sort=False)["seed"].unique()
    rate = f"{tuning.learning_rate:g}"
    if len(chosen):
        rate = ", ".join(
            f"{value:g}" + (f" (seed {', '.join(map(str, seeds))})" if len(chosen) > 1 else "")
            for value, seeds in chosen.items()
        )
        tried = ", ".join(f"{value:g}" for value in tuning.rates)
        rate += (
            f" (the first of {tried} at which one epoch with nothing frozen raises ASR on the "
            f"search prompts by {RISE:g} points, else the last)"
        )
    trained = ", ".join(f"{tuning.rows[a]} {a} (for the paper's {ATTACKS[a]})" for a in attacks)
    embeddings = "train with the rest" if tuning.train_embeddings else "are frozen in every arm"
    return (
        f"The aligned model is fine-tuned on harmless rows: {trained}; rate {rate}, batches of "
        f"{tuning.batch_size}, embeddings {embeddings}."
    )


#: What the columns of :func:`row_of` say.
COLUMNS_NOTE = (
    "ASR: share of the held-out harmful prompts that are answered; no refusal phrase: share with "
    "coherent text that holds none, the paper's measure. Against nothing frozen: points of ASR by "
    "which the arm differs from the one that freezes nothing, after the same number of epochs, on "
    "the same prompts (paired 95 % interval); below zero is safer. Against random: the same "
    "difference, to the arm "
    "that freezes equally many heads and neurons drawn at random, after the same number of epochs. "
    "Held-out gain: nats per token by which held-out rows of the same kind, with other prompts, "
    "became likelier."
)

SEEDS_NOTE = "Several seeds: the mean, with an interval that covers prompts and seeds."
