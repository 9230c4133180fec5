"""Notebooks 03 and 06: which units change their role when the model is fine-tuned (Figs 5, 11, 12
and 13) or aligned (Figs 6, 9 and 10)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..lab import catalogue
from ..lab.arms import Arm
from ..lab.catalogue import ALL_UNITS, NOTHING, by_the_papers_rule
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.metrics.units import OF_ESU, OTHER_PROMPTS
from ..lab.stages.lessons import MAIN_ATTACK
from ..lab.units_of import ALL_CU, CU6, RU
from ..units.roles import GROUPS
from . import Output
from .alignment import no_pair
from .draw import COLOURS, heat_map, panels
from .pick import LLAMA, paper_matrix, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.path import Path

NOISE = "no fine-tuning, other prompts"
PAPER = f"paper: {LLAMA}, Dolly"

#: What a reader has to know of every figure of a fine-tuning, and of an alignment.
_HOW_TUNED = (
    "Fine-tuning on instructions: one epoch where nothing is frozen, else the last. Units are "
    "scored before and after on the same texts, and classified after by the scores that "
    "bounded the groups before (thresholds; the same shares again, 'quantiles', are in "
    "measurements.csv). The first arm is the noise floor: the same model, scored on other prompts "
    "of the same kind. "
)
_HOW_ALIGNED = (
    "Left or in rows the groups of the unaligned model, by I_U alone, with the number of RU that "
    "the aligned model's ablation search kept; right or in columns the groups after alignment of "
    "all units, or of RU alone (at the same shares). Per cent of the units, means over seeds. "
)

_FROZEN = {"method": "frozen", "attack": MAIN_ATTACK, "at": "thresholds"}
_TRAINED = {"base": "unaligned", "method": "trained", "at": "quantiles"}


def _tuned(config: Config) -> dict[str, dict[str, Any]]:
    """Panel -> columns of its rows: one epoch with nothing frozen, else the last."""
    last = _FROZEN | {"epoch": config.finetune.epochs}
    return {
        NOISE: {"setting": OTHER_PROMPTS, "at": "thresholds"},
        f"frozen: {NOTHING}": _FROZEN | {"rule": NOTHING, "epoch": 1},
        f"frozen: random, as {CU6}": last | {"rule": "random", "like": CU6},
        f"frozen: {CU6}": last | {"rule": CU6},
        f"frozen: {ALL_CU}": last | {"rule": ALL_CU},
    }


_ALIGNED = {
    "all units aligned": _TRAINED | {"rule": ALL_UNITS},
    "RU alone aligned": _TRAINED | {"rule": RU},
}

#: Groups of an unaligned model: what it uses, and what it does not.
BEFORE = ("UU", "RU")

#: Our name of some units -> the paper's.
_ALL, _KINDS = {"all units": "global"}, {"heads": "attention", "neurons": "mlp"}

#: Of which units there is a heat map in each figure.
_SCOPES = {"fig11": _ALL, "fig12": _KINDS, "fig9": _ALL, "fig10": _KINDS}


# --- what is asked ---------------------------------------------------------------------------


def _arms(lab: Lab) -> list[Arm]:
    """Noise floor, nothing frozen, random units frozen, and the paper's two selections."""
    fine_tuned = [
        catalogue.unfrozen(lab, MAIN_ATTACK),
        catalogue.with_frozen_control(lab, MAIN_ATTACK, "random", CU6, 0),
        catalogue.with_frozen(lab, MAIN_ATTACK, CU6),
        catalogue.with_frozen(lab, MAIN_ATTACK, ALL_CU),
    ]
    noise = Arm(lambda: lab.aligned, setting=OTHER_PROMPTS)
    return [noise, *map(by_the_papers_rule, fine_tuned)]


def ask_fig5(lab: Lab) -> list[Measure]:
    """Who went from which group to which; and whether more ESU left than by noise."""
    noise, full, *frozen = _arms(lab)
    asked = [Measure(noise, "transfer", OTHER_PROMPTS)]
    for arm in (full, *frozen):
        asked.append(Measure(arm, "transfer"))
        asked.append(Measure(arm, "transfer", "", full, "nothing frozen"))
    return asked


def ask_fig13(lab: Lab) -> list[Measure]:
    """The same, and each arm against the noise floor."""
    noise, *arms = _arms(lab)
    return ask_fig5(lab) + [
        Measure(arm, "transfer", "", noise, OTHER_PROMPTS, OTHER_PROMPTS) for arm in arms
    ]


def ask_fig6(lab: Lab) -> list[Measure]:
    """Groups before and after aligning all units, and RU alone; nothing where the model came
    aligned."""
    if not lab.config.align.enabled:
        return []
    arms = [a for a in catalogue.budget_arms(lab) if a.rule in (ALL_UNITS, RU) and not a.setting]
    return [Measure(arm, "transfer of alignment") for arm in arms]


ask_fig11 = ask_fig12 = ask_fig5
ask_fig9 = ask_fig10 = ask_fig6


# --- what is shown ---------------------------------------------------------------------------


def _matrices(
    table: pd.DataFrame,
    arms: Mapping[str, dict[str, Any]],
    scope: str,
    before: Sequence[str] = GROUPS,
) -> dict[str, np.ndarray]:
    """Panel -> ``[before, groups]`` per cent of some units, mean over seeds."""

    def mean(metric: str, columns: dict[str, Any]) -> float:
        return rows_of(table, metric, set=scope, **columns)["value"].mean()

    return {
        name: np.array([[mean(f"{a}->{b}", columns) for b in GROUPS] for a in before])
        for name, columns in arms.items()
    }


def fig5(table: pd.DataFrame, config: Config) -> Output:
    """Flow of units between the groups (Fig. 5)."""
    output = Output(
        _HOW_TUNED + "Left of each panel the groups before, right those after; the width of a flow "
        "is the square root of its share of all units, so that one per cent can be seen; numbers "
        "are per cent of all units, means over seeds."
    )
    matrices = _matrices(table, _tuned(config), "all units") | {
        PAPER: paper_matrix("fig11", "global")
    }
    output.figure, grid = panels(10, 5.4, 2, 3)
    for axes, (name, matrix) in zip(grid.flat, matrices.items(), strict=True):
        _draw_flow(axes, matrix, name)
    return output


def _after_tuning(artefact: str, table: pd.DataFrame, config: Config) -> Output:
    """Transfer matrices of all units (Fig. 11), of heads and of neurons (Fig. 12)."""
    arms = {name: columns for name, columns in _tuned(config).items() if "random" not in name}
    note = (
        "Rows: group before; columns: group after; per cent of the scope's units, means over seeds."
    )
    found = {
        ours: _matrices(table, arms, ours) | {PAPER: paper_matrix(artefact, theirs)}
        for ours, theirs in _SCOPES[artefact].items()
    }
    return _heat_maps(_HOW_TUNED + note, found, 12, 2.9)


fig11, fig12 = (functools.partial(_after_tuning, artefact) for artefact in ("fig11", "fig12"))


def fig13(table: pd.DataFrame, config: Config) -> Output:
    """What becomes of the ESU (Fig. 13), with the noise floor and frozen arms."""
    output = Output(
        _HOW_TUNED + "Each bar: the ESU before, by their group after, per cent of the ESU; means "
        "over seeds."
    )
    bars = _matrices(table, _tuned(config), OF_ESU, ["ESU"])
    bars[PAPER] = paper_matrix("fig13", "global", ["ESU"])
    shares = np.concatenate(list(bars.values()))
    output.figure, axes = panels(7, 2.8)
    left = np.zeros(len(bars))
    hatches = {"RU": "..", "ESU": "", "EUU": "//", "CU": "xx"}
    for group, values in zip(GROUPS, shares.T, strict=True):
        axes.barh(
            list(bars), values, left=left, color=COLOURS[group], label=f"to {group}",
            hatch=hatches[group], edgecolor="white",
        )  # fmt: skip
        left += values
    axes.invert_yaxis()
    axes.set(xlabel="ESU before, % of them", xlim=(0, 100))
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    return output


def _aligned(
    artefact: str, table: pd.DataFrame, config: Config
) -> dict[str, dict[str, np.ndarray]]:
    """Scope -> panels; the paper's last, and alone where the model came aligned."""
    arms = {} if no_pair(config) else _ALIGNED
    return {
        ours: _matrices(table, arms, ours, BEFORE)
        | {f"paper: {LLAMA}": paper_matrix(artefact, theirs, BEFORE)}
        for ours, theirs in _SCOPES[artefact].items()
    }


def fig6(table: pd.DataFrame, config: Config) -> Output:
    """Flow from the unaligned model's groups to those after alignment (Fig. 6)."""
    width = "The width of a flow is the square root of its share."
    output = Output(no_pair(config) or _HOW_ALIGNED + width)
    (matrices,) = _aligned("fig9", table, config).values()
    output.figure, grid = panels(3.4 * len(matrices), 3.2, 1, len(matrices), squeeze=False)
    for axes, (title, matrix) in zip(grid.flat, matrices.items(), strict=True):
        _draw_flow(axes, matrix, title, BEFORE)
    return output


def _after_aligning(artefact: str, table: pd.DataFrame, config: Config) -> Output:
    """The same as a matrix (Fig. 9), and for attention heads and MLP neurons (Fig. 10)."""
    found = _aligned(artefact, table, config)
    columns = len(next(iter(found.values())))
    return _heat_maps(no_pair(config) or _HOW_ALIGNED.strip(), found, 3.4 * columns, 1.9, BEFORE)


fig9, fig10 = (functools.partial(_after_aligning, artefact) for artefact in ("fig9", "fig10"))


# --- drawing ---------------------------------------------------------------------------------


def _heat_maps(
    note: str,
    found: Mapping[str, Mapping[str, np.ndarray]],
    width: float,
    height: float,
    before: Sequence[str] = GROUPS,
) -> Output:
    """Scope -> panel -> per cent: a row of heat maps with their numbers for each scope."""
    figure, grid = panels(
        width, height * len(found), len(found), len(next(iter(found.values()))), squeeze=False
    )
    for row, (scope, matrices) in zip(grid, found.items(), strict=True):
        for axes, (title, matrix) in zip(row, matrices.items(), strict=True):
            heat_map(
                axes, matrix, square=True, annot=True, fmt=".2f", annot_kws={"fontsize": 7},
                xticklabels=GROUPS, yticklabels=before,
            )  # fmt: skip
            axes.set_title(f"{title}\n{scope}", fontsize=8)
    return Output(note, figure=figure)


def _draw_flow(axes: Axes, matrix: np.ndarray, title: str, before: Sequence[str] = GROUPS) -> None:
    """Groups as bars at both sides, flows as bands between them: ``[before, groups]`` per cent."""
    from matplotlib.patches import PathPatch

    width, gap = np.sqrt(matrix), 0.6
    # Where each bar begins when they are stacked with a gap.
    starts = [np.append(0, np.cumsum(width.sum(axis) + gap)[:-1]) for axis in (1, 0)]
    used = [starts[0].copy(), starts[1].copy()]
    for i, source in enumerate(before):
        for j in range(len(GROUPS)):
            if matrix[i, j] > 0:
                band = _band(used[0][i], used[1][j], width[i, j])
                axes.add_patch(PathPatch(band, facecolor=COLOURS[source], alpha=0.45, lw=0))
                used[0][i] += width[i, j]
                used[1][j] += width[i, j]
    for side, (x, offset, align) in enumerate(((0.0, -0.05, "right"), (1.0, 0.05, "left"))):
        heights, sums = width.sum(1 - side), matrix.sum(1 - side)
        for k, group in enumerate((before, GROUPS)[side]):
            axes.bar(x, heights[k], 0.05, starts[side][k], color=COLOURS[group])
            middle = starts[side][k] + heights[k] / 2
            text = f"{group} {sums[k]:.1f}"
            axes.text(x + offset, middle, text, ha=align, va="center", fontsize=8)
    top = max(s[-1] for s in starts) + max(width.sum(0)[-1], width.sum(1)[-1])
    axes.set(xlim=(-0.45, 1.45), ylim=(top + gap, -gap), title=title)
    axes.axis("off")


def _band(left: float, right: float, width: float) -> Path:
    """A band of constant width from ``left`` at x=0 to ``right`` at x=1."""
    from matplotlib.path import Path

    upper = [(0, left), (0.5, left), (0.5, right), (1, right)]
    lower = [(1, right + width), (0.5, right + width), (0.5, left + width), (0, left + width)]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    return Path([*upper, *lower, (0, left)], codes)
