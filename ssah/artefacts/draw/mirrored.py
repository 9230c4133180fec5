"""Figures in the paper's form: the aligned model above the axis, what it is held against below."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd

from ...lab.metrics.direction import EVERY
from ...lab.units_of import ESU
from ..pick import pooled, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Dark and light, so that they differ in grey as well; the light one is hatched.
TO_REFUSAL, TO_ANSWER = "#0072B2", "#F0A830"


#: Whatever is drawn of :func:`ssah.lab.catalogue.pair`: name -> columns in the table.
_MODELS = {
    "aligned": {},
    "unaligned": {"base": "unaligned"},
    "ESU removed": {"method": "removed", "rule": ESU},
}


def pair(table: pd.DataFrame, metric: str) -> dict[str, dict[str, str]]:
    """Name -> columns of the models that a metric was measured of, the aligned one first."""
    return {
        name: columns
        for name, columns in _MODELS.items()
        if not rows_of(table, metric, set=None, at=None, **columns).empty
    }


def _mirrored(axes: Axes, models: Iterable[str]) -> None:
    """Labels of a panel with one model above the axis and the other, if there is one, below."""
    from matplotlib.ticker import FuncFormatter

    axes.axhline(0, color="black", lw=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
    span = max(abs(bound) for bound in axes.get_ylim())
    names = list(models)
    axes.set_ylim(-span if len(names) > 1 else 0, span)
    for name, height in zip(names, (0.97, 0.03), strict=False):
        side = "top" if height > 0.5 else "bottom"
        axes.text(0.02, height, name, transform=axes.transAxes, va=side, fontsize=8, style="italic")


def draw_tokens(axes: Axes, table: pd.DataFrame, title: str, **columns: Any) -> None:
    """Bars by generated token, last block: of rows with these columns."""
    models = pair(table, "to refusal")
    found = rows_of(table, "to refusal", at=None, **columns)
    last = found["block"].max()
    positions = [at for at in dict.fromkeys(found["at"]) if at != EVERY]
    for model, sign in zip(models.values(), (1, -1), strict=False):
        for shift, kind, colour, hatch in (
            (-0.2, "to refusal", TO_REFUSAL, ""),
            (0.2, "to answer", TO_ANSWER, "////"),
        ):
            for x, position in enumerate(positions):
                e = pooled(rows_of(table, kind, block=last, at=position, **model, **columns))
                if e is None:
                    continue
                axes.bar(
                    x + shift, sign * e.value, 0.38, color=colour, hatch=hatch, edgecolor="white",
                    lw=0, label=f"{kind[3:]} begun" if x == 0 and sign > 0 else None,
                )  # fmt: skip
                axes.vlines(x + shift, sign * e.low, sign * e.high, color="black", lw=1)
    axes.set_xticks(range(len(positions)), positions)
    axes.set(xlabel="generated tokens", ylabel="cosine distance to a run with", title=title)
    _mirrored(axes, models)


def draw_blocks(
    axes: Axes, table: pd.DataFrame, title: str, place: str = EVERY, **columns: Any
) -> None:
    """Lines by block."""
    models = pair(table, "to refusal")
    for model, sign in zip(models.values(), (1, -1), strict=False):
        for kind, colour, line in (
            ("to refusal", TO_REFUSAL, "-"),
            ("to answer", TO_ANSWER, "--"),
        ):
            found = by_block(rows_of(table, kind, at=place, **model, **columns))
            if found.empty:
                continue
            axes.plot(
                found.index, sign * found["value"], line, color=colour, lw=1.6,
                label=f"{kind[3:]} begun" if sign > 0 else None,
            )  # fmt: skip
            low, high = sign * found["low"], sign * found["high"]
            axes.fill_between(found.index, low, high, color=colour, alpha=0.25, lw=0)
        begin = rows_of(table, "onset", at=place, **model, **columns)["value"]
        if len(begin):
            axes.plot(begin.median(), 0, marker="^" if sign > 0 else "v", color="black", ms=6)
    axes.set(xlabel="block", title=title)
    _mirrored(axes, models)


def by_block(rows: pd.DataFrame) -> pd.DataFrame:
    """Pooled value, low and high, indexed by block."""
    means = rows.groupby("block")[["value", "low", "high"]].mean()
    return means.set_index(means.index.astype(int))
