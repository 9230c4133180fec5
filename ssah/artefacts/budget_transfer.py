"""Notebook 06: what becomes of the unaligned model's groups. Figs 6, 9 and 10."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..lab import catalogue
from ..lab.catalogue import ALL_UNITS
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.units_of import RU
from ..units.roles import GROUPS
from . import Output
from .alignment import no_pair
from .draw import new_figure, styled
from .draw.flows import draw_flow, draw_matrix
from .pick import paper_matrix, rows_of

#: Groups of an unaligned model: what it uses, and what it does not.
BEFORE = ("UU", "RU")

#: What is trained -> title of its panel.
_PANELS = {ALL_UNITS: "all units aligned", RU: "RU alone aligned"}

_HOW = (
    "Left or in rows the groups of the unaligned model, by I_U alone, with the number of RU that "
    "the aligned model's ablation search kept; right or in columns the groups after alignment of "
    "all units, or of RU alone (at the same shares). Per cent of the units, means over seeds. "
)


def ask_fig6(lab: Lab) -> list[Measure]:
    """Groups before and after aligning all units, and RU alone; nothing where the model came
    aligned."""
    if not lab.config.align.enabled:
        return []
    arms = [arm for arm in catalogue.budget_arms(lab) if arm.rule in _PANELS and not arm.setting]
    return [Measure(arm, "transfer of alignment") for arm in arms]


ask_fig9 = ask_fig10 = ask_fig6


def _panels(table: pd.DataFrame, config: Config, scope: str, printed: str) -> dict[str, np.ndarray]:
    """Title -> ``[2, 4]`` per cent, mean over seeds; the paper's last."""
    found = {}
    for rule, title in _PANELS.items() if not no_pair(config) else ():
        columns = {"base": "unaligned", "method": "trained", "rule": rule, "set": scope}

        def mean(a: str, b: str, columns: dict[str, str] = columns) -> float:
            return rows_of(table, f"{a}->{b}", at="quantiles", **columns)["value"].mean()

        found[title] = np.array([[mean(a, b) for b in GROUPS] for a in BEFORE])
    artefact = "fig9" if printed == "global" else "fig10"
    return found | {"paper: Llama-2-7B-Chat": paper_matrix(artefact, printed, BEFORE)}


def fig6(table: pd.DataFrame, config: Config) -> Output:
    """Flow from the unaligned model's groups to those after alignment (Fig. 6)."""
    width = "The width of a flow is the square root of its share."
    output = Output(no_pair(config) or _HOW + width)
    panels = _panels(table, config, "all units", "global")
    with styled():
        output.figure = new_figure(3.4 * len(panels), 3.2)
        row = output.figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, matrix) in zip(row, panels.items(), strict=True):
            draw_flow(axes, matrix, title, BEFORE, GROUPS)
    return output


def fig9(table: pd.DataFrame, config: Config) -> Output:
    """The same as a matrix (Fig. 9)."""
    return _heat_maps(table, config, {"all units": "global"})


def fig10(table: pd.DataFrame, config: Config) -> Output:
    """The same for attention heads and MLP neurons (Fig. 10)."""
    return _heat_maps(table, config, {"heads": "attention", "neurons": "mlp"})


def _heat_maps(table: pd.DataFrame, config: Config, scopes: dict[str, str]) -> Output:
    """``scopes``: our name of some units -> the paper's."""
    output = Output(no_pair(config) or _HOW)
    panels = {scope: _panels(table, config, scope, name) for scope, name in scopes.items()}
    columns = len(next(iter(panels.values())))
    with styled():
        output.figure = new_figure(3.4 * columns, 1.9 * len(scopes))
        grid = output.figure.subplots(len(scopes), columns, squeeze=False)
        for row, (scope, found) in zip(grid, panels.items(), strict=True):
            for axes, (title, matrix) in zip(row, found.items(), strict=True):
                draw_matrix(axes, matrix, f"{title}\n{scope}", BEFORE, GROUPS)
    return output
