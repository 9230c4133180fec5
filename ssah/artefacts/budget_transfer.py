"""Notebook 06: what becomes of the unaligned model's groups. Figs 6, 9 and 10."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ..core.paths import reference_csv
from ..evaluate.stats import proportion
from ..lab.budget_arms import RU, WHOLE, budget_arms
from ..units.roles import GROUPS, transfer
from . import Output
from .alignment import no_pair
from .flows import draw_flow, draw_matrix
from .render import STYLE, ShownFigure
from .transfer import SCOPES

if TYPE_CHECKING:
    from ..app.study import Study

#: Groups of an unaligned model: what it uses, and what it does not.
BEFORE = ("UU", "RU")

#: Arm -> title of its panel.
_PANELS = {WHOLE: "all units aligned", RU: "RU alone aligned"}

_HOW = (
    "Left or in rows the groups of the unaligned model, by I_U alone, with as many RU as the "
    "aligned model's ablation search kept; right or in columns the groups after alignment of all "
    "units, or of RU alone (at the same shares). Per cent of the units, means over seeds. "
)


def _measure(study: Study, scopes: tuple[str, ...]) -> Output:
    """Every cell as a share of the scope's units; nothing where the model came aligned."""
    output = Output(note=no_pair(study) or _HOW)
    for stages in study.all_stages if study.config.align.enabled else ():
        before = stages.utility_roles(stages.shares.ru)
        arms = budget_arms(stages)
        for name in _PANELS:
            how = arms[name]
            with stages.aligned(how):
                after = stages.roles if how is None else stages.roles_after(how, "quantiles")
            for scope in scopes:
                counts = transfer(before, after, SCOPES[scope])
                total = int(counts.sum())
                for source, row in (("UU", GROUPS.index("CU")), ("RU", GROUPS.index("RU"))):
                    for column, target in enumerate(GROUPS):
                        k = int(counts[row, column])
                        share = proportion([True] * k + [False] * (total - k)).scaled(100)
                        output.add(f"{name}, {scope}", f"{source}->{target}", stages.seed, share)
    return output


def _panels(frame: pd.DataFrame, scope: str) -> dict[str, np.ndarray]:
    """Title -> ``[2, 4]`` per cent, mean over seeds; the paper's last."""
    found = {}
    if not frame.empty:
        for name, title in _PANELS.items():
            rows = frame[frame["arm"] == f"{name}, {scope}"]
            means = rows.groupby("metric")["value"].mean()
            found[title] = np.array([[means[f"{a}->{b}"] for b in GROUPS] for a in BEFORE])
    return found | {"paper: Llama-2-7B-Chat": _paper_matrix(scope)}


def _paper_matrix(scope: str) -> np.ndarray:
    paper = pd.read_csv(reference_csv())
    artefact = "fig9" if scope == "global" else "fig10"
    paper = paper[(paper["artefact"] == artefact) & (paper["benchmark"] == scope)]
    values = paper.set_index("setting")["value"]
    return np.array([[values[f"{a}->{b}"] for b in GROUPS] for a in BEFORE])


def fig6(study: Study) -> Output:
    """Flow from the unaligned model's groups to those after alignment (Fig. 6)."""
    output = _measure(study, ("global",))
    if output.metrics:
        output.note += "The width of a flow is the square root of its share."
    panels = _panels(output.frame(study, "fig6"), "global")
    with plt.style.context(STYLE):
        output.figure = ShownFigure(figsize=(3.4 * len(panels), 3.2))
        row = output.figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, matrix) in zip(row, panels.items(), strict=True):
            draw_flow(axes, matrix, title, BEFORE, GROUPS)
    return output


def fig9(study: Study) -> Output:
    """The same as a matrix (Fig. 9)."""
    return _heat_maps(study, "fig9", ("global",))


def fig10(study: Study) -> Output:
    """The same for attention heads and MLP neurons (Fig. 10)."""
    return _heat_maps(study, "fig10", ("attention", "mlp"))


def _heat_maps(study: Study, artefact: str, scopes: tuple[str, ...]) -> Output:
    output = _measure(study, scopes)
    frame = output.frame(study, artefact)
    panels = {scope: _panels(frame, scope) for scope in scopes}
    columns = len(panels[scopes[0]])
    with plt.style.context(STYLE):
        output.figure = ShownFigure(figsize=(3.4 * columns, 1.9 * len(scopes)))
        grid = output.figure.subplots(len(scopes), columns, squeeze=False)
        for row, scope in zip(grid, scopes, strict=True):
            for axes, (title, matrix) in zip(row, panels[scope].items(), strict=True):
                draw_matrix(axes, matrix, f"{title}\n{scope}", BEFORE, GROUPS)
    return output
