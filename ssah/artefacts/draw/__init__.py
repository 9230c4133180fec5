"""What figures share: style and colours. Nothing of matplotlib is imported before something is
drawn: a plan needs these modules as well."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure, SubFigure

STYLE = str(Path(__file__).with_name("style.mplstyle"))


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


def written_figure(text: str) -> Figure:
    """What stands where there is nothing to draw, so that nobody takes it for a fault."""
    figure = new_figure(6, 1)
    figure.text(0.5, 0.5, textwrap.fill(text, 90), ha="center", va="center", fontsize=8)
    return figure


def stacked(parts: Mapping[str, Callable[[], Figure]]) -> Figure:
    """One figure of several below each other, with their names. They are drawn twice, the first
    time for their sizes."""
    sizes = [draw().get_size_inches() for draw in parts.values()]
    title = 0.3  # inches
    heights = [height + title for _, height in sizes]
    with styled():
        whole = new_figure(max(width for width, _ in sizes), sum(heights))
        rows = whole.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
        for (name, draw), host in zip(parts.items(), rows, strict=True):
            token = _HOST.set(host)
            try:
                draw()
            finally:
                _HOST.reset(token)
            host.suptitle(name, fontweight="bold")
    return whole


#: Okabe-Ito colours: told apart by colour-blind readers; markers and line styles differ as well.
COLOURS = {
    "ESU": "#D55E00",
    "EUU": "#0072B2",
    "CU": "#009E73",
    "UU": "#56B4E9",
    "RU": "#999999",
    "random": "#000000",
}


def shares_norm() -> PowerNorm:
    """Of the colours of percentages: a square-root scale keeps about one per cent visible beside a
    hundred."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=100)
