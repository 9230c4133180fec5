"""Who went from which group to which, drawn: flows and heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...units.roles import GROUPS
from . import COLOURS, shares_norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.path import Path


def draw_flow(
    axes: Axes,
    matrix: np.ndarray,
    title: str,
    before: Sequence[str] = GROUPS,
    after: Sequence[str] = GROUPS,
) -> None:
    """Groups as bars at both sides, flows as bands between them: ``[before, after]`` per cent."""
    from matplotlib.patches import PathPatch

    width = np.sqrt(matrix)
    gap = 0.6
    starts = [_stack(width.sum(axis), gap) for axis in (1, 0)]
    used = [starts[0].copy(), starts[1].copy()]
    for i, source in enumerate(before):
        for j in range(len(after)):
            if matrix[i, j] > 0:
                band = _band(used[0][i], used[1][j], width[i, j])
                axes.add_patch(PathPatch(band, facecolor=COLOURS[source], alpha=0.45, lw=0))
                used[0][i] += width[i, j]
                used[1][j] += width[i, j]
    for side, (x, align) in enumerate(((0.0, "right"), (1.0, "left"))):
        for k, group in enumerate((before, after)[side]):
            height = width.sum(1 - side)[k]
            axes.bar(x, height, 0.05, starts[side][k], color=COLOURS[group])
            text = f"{group} {matrix.sum(1 - side)[k]:.1f}"
            offset = -0.05 if side == 0 else 0.05
            middle = starts[side][k] + height / 2
            axes.text(x + offset, middle, text, ha=align, va="center", fontsize=8)
    top = max(s[-1] for s in starts) + max(width.sum(0)[-1], width.sum(1)[-1])
    axes.set(xlim=(-0.45, 1.45), ylim=(top + gap, -gap), title=title)
    axes.axis("off")


def _stack(heights: np.ndarray, gap: float) -> np.ndarray:
    """Where each bar begins when they are stacked with a gap."""
    return np.concatenate([[0], np.cumsum(heights + gap)[:-1]])


def _band(left: float, right: float, width: float) -> Path:
    """A band of constant width from ``left`` at x=0 to ``right`` at x=1."""
    from matplotlib.path import Path

    upper = [(0, left), (0.5, left), (0.5, right), (1, right)]
    lower = [(1, right + width), (0.5, right + width), (0.5, left + width), (0, left + width)]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    return Path([*upper, *lower, (0, left)], codes)


def draw_matrix(
    axes: Axes,
    matrix: np.ndarray,
    title: str,
    before: Sequence[str] = GROUPS,
    after: Sequence[str] = GROUPS,
) -> None:
    """A heat map with its numbers: ``[before, after]`` per cent."""
    import seaborn  # takes a second

    seaborn.heatmap(
        matrix, ax=axes, norm=shares_norm(), cmap="cividis", square=True, cbar=False,
        annot=True, fmt=".2f", annot_kws={"fontsize": 7}, xticklabels=after, yticklabels=before,
    )  # fmt: skip
    axes.grid(False)
    axes.tick_params(left=False, bottom=False, labelrotation=0)
    axes.set_title(title, fontsize=8)
