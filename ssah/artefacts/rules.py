"""Notebook 05: units that other papers' rules select, against the paper's. Tables 7 to 10."""

from __future__ import annotations

import functools

import pandas as pd

from ..lab import catalogue
from ..lab.arms import Arm, units_name
from ..lab.catalogue import NOTHING
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.metrics.units import FIRST_LAYER, LAST_LAYER
from ..lab.units_of import CU6, RULED, SAFETY_LAYERS
from . import Output
from .freezing import (
    COLUMNS_NOTE,
    PAPER_ARMS,
    SEEDS_NOTE,
    ask_against,
    ask_arms,
    ask_before,
    ask_control,
    name_of,
    paper_number,
    row_of,
    training_note,
)
from .pick import arms_of, filled, paper, paper_rows, rows_of, text

#: ESU and CU, as many units as the safety layers have.
WIDE = f"ESU + CU, as {SAFETY_LAYERS}"

#: What is frozen -> the paper's name of it, after the data set.
_PAPER_ARMS = PAPER_ARMS | {
    "SN-Tune, 0.4 %": "sn_tune_0.4pct",
    "SN-Tune, 6.3 %": "sn_tune_6.3pct",
    WIDE: "freeze_esu_cu26.8",
    SAFETY_LAYERS: "safety_layers_6_14",
}

_NEURONS = [name for name in RULED if name != SAFETY_LAYERS]

#: Table -> what is fine-tuned on, the rules, and what the paper sets against them.
_TABLES = {
    "table7": ("instructions", _NEURONS, CU6),
    "table8": ("arithmetic", _NEURONS, CU6),
    "table9": ("instructions", [SAFETY_LAYERS], WIDE),
    "table10": ("arithmetic", [SAFETY_LAYERS], WIDE),
}


def _ask(artefact: str, lab: Lab) -> list[Measure]:
    """The rules of a table that the experiment names, the paper's units, and random controls."""
    attack, wanted = _wanted(artefact, lab.config)
    if not wanted:
        return []
    full = catalogue.unfrozen(lab, attack)
    asked = ask_before(lab) + ask_arms(lab, full, attack)
    if SAFETY_LAYERS in wanted:
        asked.append(Measure(catalogue.whole(lab), SAFETY_LAYERS))

    def ask(arms: list[Arm]) -> list[Measure]:
        return ask_arms(lab, arms, attack) + ask_against(arms, full, attack)

    for name in wanted:
        arms, papers = catalogue.ruled(lab, attack, name), catalogue.ours(lab, attack, name)
        asked += ask(arms) + ask(papers)
        for own, other in zip(arms, papers, strict=True):
            asked.append(Measure(own, "ASR", "", other, other.units))
        for draw in range(lab.config.experiment.frozen_draws):
            control = catalogue.ruled_control(lab, attack, name, draw)
            asked += ask_control(lab, control, [arms])
    return asked


def _wanted(artefact: str, config: Config) -> tuple[str, list[str]]:
    """What is fine-tuned on, and the rules of a table that the experiment names."""
    attack, names, _ = _TABLES[artefact]
    return attack, [name for name in config.experiment.ruled.get(attack, []) if name in names]


ask_table7, ask_table8, ask_table9, ask_table10 = (functools.partial(_ask, t) for t in _TABLES)


_NEURONS_NOTE = (
    "SN-Tune (Zhao et al., 2025): heads and neurons whose removal changes their block's output "
    "most on every harmful prompt; RSN-Tune: without those that are found in the same way on "
    "harmless prompts. The sizes are shares of the heads and of the neurons alike. "
    "docs/rivals.md says what is done otherwise than there."
)


def _layers_note(table: pd.DataFrame) -> str:
    first, last = (rows_of(table, name)["value"] for name in (FIRST_LAYER, LAST_LAYER))
    blocks = int(rows_of(table, "angular gap", block=None)["n"].iloc[0])
    chosen = sorted({f"{a:.0f} to {b:.0f}" for a, b in zip(first, last, strict=True)})
    return (
        f"Safety layers (Li et al., 2024): all units of blocks {' or '.join(chosen)} of {blocks}, "
        "counted from 1, in which the angle between harmless and harmful prompts grows most beyond "
        f"that between harmless ones. {WIDE}: ESU, and CU from the top of the ranking by I_S - I_U "
        "until there are as many units, of whichever kind. docs/rivals.md says what is done "
        "otherwise than there."
    )


def _table(artefact: str, table: pd.DataFrame, config: Config) -> Output:
    """Freezing what another paper's rule selects (Tables 7 to 10): nothing frozen, the paper's
    units, then each rule with the random control of its size."""
    ours = _TABLES[artefact][2]
    attack, wanted = _wanted(artefact, config)
    found = arms_of(table, method="frozen", attack=attack)
    if not {name_of(arm) for arm in found} & {*wanted}:  # a merge may lack what a run asked
        return _printed(artefact, config)
    note = _NEURONS_NOTE if ours == CU6 else _layers_note(table)
    order = [NOTHING, ours]
    for name in wanted:
        order += [name, units_name(*catalogue.control_name(name))]
    arms = [arm for arm in found if name_of(arm) in order]
    arms.sort(key=lambda arm: (order.index(name_of(arm)), arm["epoch"]))
    printed, rows = paper(artefact), []
    for arm in ({}, *arms):
        row = row_of(table, arm, paper_number(printed, arm, _PAPER_ARMS))
        if arm:
            row["% of weights"] = text(table, "weights", 2, **arm)
            row[f"ASR against {ours}"] = text(table, "ASR", against=ours, **arm)
        rows.append(row)
    return Output(
        f"{training_note(table, config, [attack])} {note} {COLUMNS_NOTE} Against {ours}: the same "
        "difference to the arm that freezes these; above zero, the paper's units are safer. "
        f"{SEEDS_NOTE}",
        filled(pd.DataFrame(rows)),
    )


def _printed(artefact: str, config: Config) -> Output:
    """The paper's numbers alone."""
    columns = {
        ("advbench", "asr_keyword"): "no refusal phrase",
        ("advbench", "asr_llama_guard3"): "ASR AdvBench (Llama Guard 3)",
        ("hexphi", "asr_llama_guard3"): "ASR HEx-PHI (Llama Guard 3)",
    }
    return Output(
        f"The paper's numbers. Not measured here with {config.model.name}: `experiment.ruled` "
        f"names no rule for it. `make {artefact} ARGS=experiment=published` measures it.",
        filled(pd.DataFrame(paper_rows(artefact, columns, "fine-tuning: frozen"))),
    )


table7, table8, table9, table10 = (functools.partial(_table, artefact) for artefact in _TABLES)
