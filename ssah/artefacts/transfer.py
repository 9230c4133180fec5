"""Notebook 03: which units change their role when the model is fine-tuned. Figs 5, 11, 12, 13."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..core.paths import reference
from ..lab import catalogue
from ..lab.arms import Arm
from ..lab.catalogue import NOTHING, by_the_papers_rule
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.metrics.units import OF_ESU, OTHER_PROMPTS
from ..lab.stages.lessons import MAIN_ATTACK
from ..lab.units_of import ALL_CU, CU6
from ..units.roles import GROUPS
from . import Output
from .draw import COLOURS, new_figure, styled
from .draw.flows import draw_flow, draw_matrix
from .pick import paper_matrix, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOISE = "no fine-tuning, other prompts"
PAPER = "paper: Llama-2-7B-Chat, Dolly"

#: What a reader has to know of every figure here.
_HOW = (
    "Fine-tuning on instructions: one epoch where nothing is frozen, else the last. Units are "
    "scored before and after on the same texts, and classified after by the scores that "
    "bounded the groups before (thresholds; the same shares again, 'quantiles', are in "
    "measurements.csv). The first arm is the noise floor: the same model, scored on other prompts "
    "of the same kind. "
)


def _arms(lab: Lab) -> dict[str, Arm]:
    """Noise floor, nothing frozen, random units frozen, and the paper's two selections."""
    fine_tuned = [
        catalogue.unfrozen(lab, MAIN_ATTACK),
        catalogue.with_frozen_control(lab, MAIN_ATTACK, "random", CU6, 0),
        catalogue.with_frozen(lab, MAIN_ATTACK, CU6),
        catalogue.with_frozen(lab, MAIN_ATTACK, ALL_CU),
    ]
    noise = Arm(lambda: lab.aligned, setting=OTHER_PROMPTS)
    return {NOISE: noise} | {
        _title(arm.columns()): arm for arm in map(by_the_papers_rule, fine_tuned)
    }


def _title(arm: dict[str, Any]) -> str:
    return f"frozen: {arm['rule']}" + (f", as {arm['like']}" if arm["like"] else "")


def ask_fig5(lab: Lab) -> list[Measure]:
    """Who went from which group to which; and whether more ESU left than by noise."""
    asked, arms = [], _arms(lab)
    full = arms[f"frozen: {NOTHING}"]
    for name, arm in arms.items():
        on = OTHER_PROMPTS if name == NOISE else ""
        asked.append(Measure(arm, "transfer", on))
        if name != NOISE:
            asked.append(Measure(arm, "transfer", "", full, "nothing frozen"))
    return asked


ask_fig11 = ask_fig12 = ask_fig5


def ask_fig13(lab: Lab) -> list[Measure]:
    """The same, and each arm against the noise floor."""
    arms = _arms(lab)
    noise = arms.pop(NOISE)
    return ask_fig5(lab) + [
        Measure(arm, "transfer", "", noise, OTHER_PROMPTS, OTHER_PROMPTS) for arm in arms.values()
    ]


#: Panel -> columns of its rows.
_COLUMNS: dict[str, dict[str, Any]] = {
    NOISE: {"setting": OTHER_PROMPTS},
    f"frozen: {NOTHING}": {"rule": NOTHING, "epoch": 1},
    f"frozen: random, as {CU6}": {"rule": "random", "like": CU6, "epoch": 2},
    f"frozen: {CU6}": {"rule": CU6, "epoch": 2},
    f"frozen: {ALL_CU}": {"rule": ALL_CU, "epoch": 2},
}


def _rows(table: pd.DataFrame, metric: str, panel: str, scope: str) -> pd.DataFrame:
    columns = dict(_COLUMNS[panel])
    if panel != NOISE:
        columns |= {"method": "frozen", "attack": MAIN_ATTACK}
    return rows_of(table, metric, set=scope, at="thresholds", **columns)


def _matrix(table: pd.DataFrame, panel: str, scope: str) -> np.ndarray:
    """``[4, 4]`` per cent, mean over seeds, by thresholds."""
    return np.array(
        [[_rows(table, f"{a}->{b}", panel, scope)["value"].mean() for b in GROUPS] for a in GROUPS]
    )


# --- figures ---------------------------------------------------------------------------------


def fig5(table: pd.DataFrame, config: Config) -> Output:
    """Flow of units between the groups (Fig. 5)."""
    output = Output(
        _HOW + "Left of each panel the groups before, right those after; the width of a flow "
        "is the square root of its share of all units, so that one per cent can be seen; numbers "
        "are per cent of all units, means over seeds."
    )
    panels = {name: _matrix(table, name, "all units") for name in _COLUMNS}
    panels[PAPER] = paper_matrix("fig11", "global")
    with styled():
        output.figure = new_figure(10, 5.4)
        grid = output.figure.subplots(2, 3).flat
        for axes, (name, matrix) in zip(grid, panels.items(), strict=True):
            draw_flow(axes, matrix, name)
    return output


def fig11(table: pd.DataFrame, config: Config) -> Output:
    """Transfer matrices of all units (Fig. 11)."""
    return _heat_maps(table, "fig11", {"all units": "global"})


def fig12(table: pd.DataFrame, config: Config) -> Output:
    """Transfer matrices of attention heads and of MLP neurons (Fig. 12)."""
    return _heat_maps(table, "fig12", {"heads": "attention", "neurons": "mlp"})


def _heat_maps(table: pd.DataFrame, artefact: str, scopes: dict[str, str]) -> Output:
    """``scopes``: our name of some units -> the paper's."""
    output = Output(
        _HOW + "Rows: group before; columns: group after; per cent of the scope's units, means "
        "over seeds."
    )
    shown = (NOISE, f"frozen: {NOTHING}", f"frozen: {CU6}", f"frozen: {ALL_CU}")
    with styled():
        output.figure = new_figure(12, 2.9 * len(scopes))
        grid = output.figure.subplots(len(scopes), len(shown) + 1, squeeze=False)
        for row, (scope, printed) in zip(grid, scopes.items(), strict=True):
            for axes, name in zip(row, shown, strict=False):
                draw_matrix(axes, _matrix(table, name, scope), f"{name}\n{scope}")
            draw_matrix(row[-1], paper_matrix(artefact, printed), f"{PAPER}\n{scope}")
    return output


def fig13(table: pd.DataFrame, config: Config) -> Output:
    """What becomes of the ESU (Fig. 13), with the noise floor and frozen arms."""
    output = Output(
        _HOW + "Each bar: the ESU before, by their group after, per cent of the ESU; means over "
        "seeds."
    )
    bars = {
        name: [_rows(table, f"ESU->{group}", name, OF_ESU)["value"].mean() for group in GROUPS]
        for name in _COLUMNS
    }
    paper = pd.read_csv(reference("paper.csv"))
    printed = paper[paper["artefact"] == "fig13"].set_index("setting")["value"]
    bars[PAPER] = [printed[f"ESU->{group}"] for group in GROUPS]
    with styled():
        output.figure = new_figure(7, 2.8)
        _draw_fates(output.figure.subplots(), bars)
    return output


def _draw_fates(axes: Axes, bars: dict[str, list[float]]) -> None:
    left = np.zeros(len(bars))
    hatches = {"RU": "..", "ESU": "", "EUU": "//", "CU": "xx"}
    for k, group in enumerate(GROUPS):
        values = np.array([shares[k] for shares in bars.values()])
        axes.barh(
            list(bars), values, left=left, color=COLOURS[group], label=f"to {group}",
            hatch=hatches[group], edgecolor="white",
        )  # fmt: skip
        left += values
    axes.invert_yaxis()
    axes.set(xlabel="ESU before, % of them", xlim=(0, 100))
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0))
