"""Notebook 03: which units change their role when the model is fine-tuned. Figs 5, 11, 12, 13."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..core.paths import reference_csv
from ..evaluate.stats import paired_difference, proportion
from ..lab.selections import ALL, CU6, FULL, headline, random_controls
from ..lab.stages import Stages, paper_rule
from ..lab.tuning import MAIN_ATTACK
from ..units.families import BlockKind
from ..units.roles import GROUPS, Roles, transfer
from . import Output
from .flows import draw_flow, draw_matrix
from .render import COLOURS, STYLE, ShownFigure

if TYPE_CHECKING:
    from ..app.study import Study

RESAMPLED, RANDOM = "no fine-tuning, other prompts", f"random, as {CU6}"
ARMS = (RESAMPLED, FULL, RANDOM, CU6, ALL)
SCOPES: dict[str, BlockKind | None] = {"global": None, "attention": "attn", "mlp": "mlp"}
RULES: tuple[Literal["thresholds", "quantiles"], ...] = ("thresholds", "quantiles")

#: What a reader has to know of every figure here.
_HOW = (
    "Fine-tuning on instructions: one epoch where nothing is frozen, else the last. Units are "
    "scored before and after on the same texts, and classified after by the scores at which the "
    "groups ended before (thresholds; the same shares again, 'quantiles', are in the metrics). The "
    "first arm is the noise floor: the same model, scored on other prompts of the same kind. "
)


def roles_by_arm(stages: Stages, rule: Literal["thresholds", "quantiles"]) -> dict[str, Roles]:
    """Roles after each arm's fine-tuning."""
    tunings = headline(stages, MAIN_ATTACK)
    tunings[RANDOM] = next(iter(random_controls(stages, CU6, 1).values()))
    found = {RESAMPLED: stages.roles_after("aligned", rule, resample=1)}
    for name in ARMS[1:]:
        arm = paper_rule(stages.measured(tunings[name], thorough=True))
        found[name] = stages.roles_after(arm.which, rule)
    return found


def _matrices(study: Study, output: Output, scopes: tuple[str, ...]) -> None:
    """Every cell as a share of the scope's units, rows before, columns after."""
    for stages in study.all_stages:
        for rule in RULES:
            for name, after in roles_by_arm(stages, rule).items():
                for scope in scopes:
                    counts = transfer(stages.roles, after, SCOPES[scope])
                    total = int(counts.sum())
                    for i, source in enumerate(GROUPS):
                        for j, target in enumerate(GROUPS):
                            k = int(counts[i, j])
                            share = proportion([True] * k + [False] * (total - k)).scaled(100)
                            metric = f"{source}->{target}"
                            output.add(f"{name}, {scope}, {rule}", metric, stages.seed, share)


def _mean_matrix(frame: pd.DataFrame, name: str, scope: str) -> np.ndarray:
    """``[4, 4]`` per cent, mean over seeds, by thresholds."""
    frame = frame[frame["arm"] == f"{name}, {scope}, thresholds"]
    means = frame.groupby("metric")["value"].mean()
    return np.array([[means[f"{a}->{b}"] for b in GROUPS] for a in GROUPS])


def _paper_matrix(artefact: str, scope: str) -> np.ndarray:
    paper = pd.read_csv(reference_csv())
    paper = paper[(paper["artefact"] == artefact) & (paper["benchmark"] == scope)]
    values = paper.set_index("setting")["value"]
    return np.array([[values[f"{a}->{b}"] for b in GROUPS] for a in GROUPS])


# --- figures ---------------------------------------------------------------------------------


def fig5(study: Study) -> Output:
    """Flow of units between the groups (Fig. 5)."""
    output = Output(
        note=_HOW + "Left of each panel the groups before, right those after; the width of a flow "
        "is the square root of its share of all units, so that one per cent can be seen; numbers "
        "are per cent of all units, means over seeds."
    )
    _matrices(study, output, ("global",))
    frame = output.frame(study, "fig5")
    panels = {name: _mean_matrix(frame, name, "global") for name in ARMS}
    panels["paper: Llama-2-7B-Chat, Dolly"] = _paper_matrix("fig11", "global")
    with plt.style.context(STYLE):
        figure = ShownFigure(figsize=(10, 5.4))
        axes = figure.subplots(2, 3).flat
        for place, (name, matrix) in zip(axes, panels.items(), strict=True):
            draw_flow(place, matrix, _title(name))
    output.figure = figure
    return output


def _title(name: str) -> str:
    return f"frozen: {name}" if name in (FULL, CU6, ALL, RANDOM) else name


def fig11(study: Study) -> Output:
    """Transfer matrices of all units (Fig. 11)."""
    return _heat_maps(study, "fig11", ("global",))


def fig12(study: Study) -> Output:
    """Transfer matrices of attention heads and of MLP neurons (Fig. 12)."""
    return _heat_maps(study, "fig12", ("attention", "mlp"))


def _heat_maps(study: Study, artefact: str, scopes: tuple[str, ...]) -> Output:
    output = Output(
        note=_HOW + "Rows: group before; columns: group after; per cent of the scope's units, "
        "means over seeds."
    )
    _matrices(study, output, scopes)
    frame = output.frame(study, artefact)
    shown = (RESAMPLED, FULL, CU6, ALL)
    with plt.style.context(STYLE):
        figure = ShownFigure(figsize=(12, 2.9 * len(scopes)))
        grid = figure.subplots(len(scopes), len(shown) + 1, squeeze=False)
        for row, scope in zip(grid, scopes, strict=True):
            for axes, name in zip(row, shown, strict=False):
                draw_matrix(axes, _mean_matrix(frame, name, scope), f"{_title(name)}\n{scope}")
            title = f"paper: Llama-2-7B-Chat, Dolly\n{scope}"
            draw_matrix(row[-1], _paper_matrix(artefact, scope), title)
    output.figure = figure
    return output


def fig13(study: Study) -> Output:
    """What becomes of the ESU (Fig. 13), with the noise floor and frozen arms."""
    output = Output(
        note=_HOW + "Each bar: the ESU before, by their group after, per cent of the ESU; means "
        "over seeds."
    )
    for stages in study.all_stages:
        _fates(stages, output)
    frame = output.frame(study, "fig13")
    bars = {}
    for name in ARMS:
        means = frame[frame["arm"] == f"{name}, thresholds"].groupby("metric")["value"].mean()
        bars[_title(name)] = [means[f"ESU->{group}"] for group in GROUPS]
    paper = pd.read_csv(reference_csv())
    paper = paper[paper["artefact"] == "fig13"].set_index("setting")["value"]
    bars["paper: Llama-2-7B-Chat, Dolly"] = [paper[f"ESU->{group}"] for group in GROUPS]
    with plt.style.context(STYLE):
        figure = ShownFigure(figsize=(7, 2.8))
        axes = figure.subplots()
        _draw_fates(axes, bars)
    output.figure = figure
    return output


def _fates(stages: Stages, output: Output) -> None:
    esu = stages.layout.flatten(stages.roles.mask("ESU"))
    for rule in RULES:
        kept = {}
        for name, after in roles_by_arm(stages, rule).items():
            for group in GROUPS:
                inside = stages.layout.flatten(after.mask(group))[esu].tolist()
                if group == "ESU":
                    kept[name] = inside
                share = proportion(inside).scaled(100)
                output.add(f"{name}, {rule}", f"ESU->{group}", stages.seed, share)
        for name, inside in kept.items():
            for base, metric in ((RESAMPLED, "kept_over_noise"), (FULL, "kept_over_full")):
                if name != base:
                    change = paired_difference(inside, kept[base]).scaled(100)
                    output.add(f"{name}, {rule}", metric, stages.seed, change)


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
