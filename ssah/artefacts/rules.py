"""Notebook 05: units that other papers' rules select, against the paper's. Tables 7 to 10."""

from __future__ import annotations

from collections.abc import Sequence

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
from .pick import arms_of, estimate, filled, format_estimate, paper, paper_rows, rows_of

NEURONS = [name for name in RULED if name != SAFETY_LAYERS]
LAYERS = [SAFETY_LAYERS]

#: ESU and CU, as many units as the safety layers have.
WIDE = f"ESU + CU, as {SAFETY_LAYERS}"

#: What is frozen -> the paper's name of it, after the data set.
_PAPER_ARMS = PAPER_ARMS | {
    "SN-Tune, 0.4 %": "sn_tune_0.4pct",
    "SN-Tune, 6.3 %": "sn_tune_6.3pct",
    WIDE: "freeze_esu_cu26.8",
    SAFETY_LAYERS: "safety_layers_6_14",
}


# --- what is asked ---------------------------------------------------------------------------


def ask_table7(lab: Lab) -> list[Measure]:
    """Safety neurons, after instructions."""
    return _ask(lab, "instructions", NEURONS)


def ask_table8(lab: Lab) -> list[Measure]:
    """Safety neurons, after arithmetic."""
    return _ask(lab, "arithmetic", NEURONS)


def ask_table9(lab: Lab) -> list[Measure]:
    """Safety layers, after instructions."""
    return _ask(lab, "instructions", LAYERS)


def ask_table10(lab: Lab) -> list[Measure]:
    """Safety layers, after arithmetic."""
    return _ask(lab, "arithmetic", LAYERS)


def _ask(lab: Lab, attack: str, names: Sequence[str]) -> list[Measure]:
    """The rules of a table that the experiment names, the paper's units, and random controls."""
    wanted = _wanted(lab.config, attack, names)
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


def _wanted(config: Config, attack: str, names: Sequence[str]) -> list[str]:
    return [name for name in config.experiment.ruled.get(attack, []) if name in names]


# --- what is shown ---------------------------------------------------------------------------


def table7(table: pd.DataFrame, config: Config) -> Output:
    """Freezing safety neurons in place of safety units, instructions (Table 7)."""
    return _neurons("table7", table, config, "instructions")


def table8(table: pd.DataFrame, config: Config) -> Output:
    """The same for arithmetic (Table 8)."""
    return _neurons("table8", table, config, "arithmetic")


def table9(table: pd.DataFrame, config: Config) -> Output:
    """Freezing safety layers in place of as many safety units, instructions (Table 9)."""
    return _layers("table9", table, config, "instructions")


def table10(table: pd.DataFrame, config: Config) -> Output:
    """The same for arithmetic (Table 10)."""
    return _layers("table10", table, config, "arithmetic")


def _neurons(artefact: str, table: pd.DataFrame, config: Config, attack: str) -> Output:
    if not _measured(table, config, attack, NEURONS):
        return _printed(artefact, config)
    note = (
        "SN-Tune (Zhao et al., 2025): heads and neurons whose removal changes their block's output "
        "most on every harmful prompt; RSN-Tune: without those that are found in the same way on "
        "harmless prompts. The sizes are shares of the heads and of the neurons alike. "
        "docs/rivals.md says what is done otherwise than there."
    )
    return _shown(artefact, table, config, attack, NEURONS, CU6, note)


def _layers(artefact: str, table: pd.DataFrame, config: Config, attack: str) -> Output:
    if not _measured(table, config, attack, LAYERS):
        return _printed(artefact, config)
    first, last = (rows_of(table, name)["value"] for name in (FIRST_LAYER, LAST_LAYER))
    blocks = int(rows_of(table, "angular gap", block=None)["n"].iloc[0])
    chosen = sorted({f"{a:.0f} to {b:.0f}" for a, b in zip(first, last, strict=True)})
    note = (
        f"Safety layers (Li et al., 2024): all units of blocks {' or '.join(chosen)} of {blocks}, "
        "counted from 1, in which the angle between harmless and harmful prompts grows most beyond "
        f"that between harmless ones. {WIDE}: ESU, and CU from the top of the ranking by I_S - I_U "
        "until there are as many units, of whichever kind. docs/rivals.md says what is done "
        "otherwise than there."
    )
    return _shown(artefact, table, config, attack, LAYERS, WIDE, note)


def _measured(table: pd.DataFrame, config: Config, attack: str, names: Sequence[str]) -> bool:
    """Whether any of these rules was: results that were merged may lack what a run asked."""
    arms = arms_of(table, method="frozen", attack=attack)
    return not {name_of(arm) for arm in arms}.isdisjoint(_wanted(config, attack, names))


def _shown(
    artefact: str,
    table: pd.DataFrame,
    config: Config,
    attack: str,
    names: Sequence[str],
    ours: str,
    note: str,
) -> Output:
    """Nothing frozen, the paper's units, then each rule with the random control of its size."""
    order = [NOTHING, ours]
    for name in _wanted(config, attack, names):
        order += [name, units_name(*catalogue.control_name(name))]
    found = [a for a in arms_of(table, method="frozen", attack=attack) if name_of(a) in order]
    arms = sorted(found, key=lambda arm: (order.index(name_of(arm)), arm["epoch"]))
    printed, rows = paper(artefact), []
    for arm in ({}, *arms):
        row = row_of(table, arm, paper_number(printed, arm, _PAPER_ARMS))
        if arm:
            row["% of weights"] = format_estimate(estimate(table, "weights", **arm), 2)
            row[f"ASR against {ours}"] = format_estimate(
                estimate(table, "ASR", against=ours, **arm)
            )
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
