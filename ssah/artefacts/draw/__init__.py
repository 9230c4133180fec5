"""What figures share: style and colours. Nothing of matplotlib is imported before something is
drawn: a plan needs these modules as well."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ...evaluate.stats import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

STYLE = str(Path(__file__).with_name("style.mplstyle"))

#: Okabe-Ito colours: told apart by colour-blind readers; markers and line styles differ as well.
COLOURS = {
    "ESU": "#D55E00",
    "EUU": "#0072B2",
    "CU": "#009E73",
    "UU": "#56B4E9",
    "RU": "#999999",
    "random": "#000000",
}

#: Where a figure is drawn that is part of another one.
_HOST: ContextVar[SubFigure | None] = ContextVar("host", default=None)


def styled() -> AbstractContextManager[None]:
    """A block in which figures have the style of this project."""
    import matplotlib.style

    return matplotlib.style.context(STYLE)


def new_figure(width: float, height: float) -> Figure:
    """A figure of that size in inches, or the part of one that :func:`stacked` gives, which takes
    all that these views do with a figure."""
    from .figure import ShownFigure

    host = _HOST.get()
    return ShownFigure(figsize=(width, height)) if host is None else cast("Figure", host)


def panels(width: float, height: float, *shape: int, **how: Any) -> tuple[Figure, Any]:
    """A new figure, and its axes as ``Figure.subplots`` makes them."""
    figure = new_figure(width, height)
    return figure, figure.subplots(*shape, **how)


def written_figure(text: str) -> Figure:
    """What stands where there is nothing to draw, so that nobody takes it for a fault."""
    figure = new_figure(6, 1)
    figure.text(0.5, 0.5, textwrap.fill(text, 90), ha="center", va="center", fontsize=8)
    return figure


def stacked(sizes: Mapping[str, np.ndarray], draw: Callable[[str], Any]) -> Figure:
    """One figure of several below each other, with their names: name -> width and height. What
    ``draw`` makes of a name with :func:`new_figure` goes into its part."""
    heights = [height + 0.3 for _, height in sizes.values()]  # 0.3 inches for the name
    with styled():
        whole = new_figure(max(width for width, _ in sizes.values()), sum(heights))
        rows = whole.subfigures(len(sizes), 1, height_ratios=heights, squeeze=False)[:, 0]
        for name, host in zip(sizes, rows, strict=True):
            token = _HOST.set(host)
            try:
                draw(name)
            finally:
                _HOST.reset(token)
            host.suptitle(name, fontweight="bold")
    return whole


def heat_map(axes: Axes, values: Any, **how: Any) -> None:
    """Per cent as colours; a square-root scale keeps about one per cent visible beside a
    hundred."""
    import seaborn  # takes a second
    from matplotlib.colors import PowerNorm

    norm = PowerNorm(0.5, vmin=0, vmax=100)
    seaborn.heatmap(values, ax=axes, norm=norm, cmap="cividis", cbar=False, **how)
    axes.grid(False)
    axes.tick_params(left=False, bottom=False, labelrotation=0)


def reach(*estimates: Estimate) -> np.ndarray:
    """How far the bounds are from the values, ``[2, estimates]``, as error bars take it."""
    return np.array([(e.value - e.low, e.high - e.value) for e in estimates]).T
