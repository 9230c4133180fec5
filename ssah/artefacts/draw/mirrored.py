"""Figures in the paper's form: the aligned model above the axis, the unaligned one below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from ...lab.metrics.direction import EVERY
from ..pick import pooled, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Dark and light, so that they differ in grey as well; the light one is hatched.
TO_REFUSAL, TO_ANSWER = "#0072B2", "#F0A830"


def bases(table: pd.DataFrame, metric: str) -> list[str]:
    """The pair; a model that comes aligned has no unaligned twin."""
    found = set(table[table["metric"] == metric]["base"])
    return [base for base in ("aligned", "unaligned") if base in found]


def _mirrored(axes: Axes, models: Sequence[str]) -> None:
    """Labels of a panel with the aligned model above the axis and the unaligned one below."""
    from matplotlib.ticker import FuncFormatter

    axes.axhline(0, color="black", lw=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
    span = max(abs(bound) for bound in axes.get_ylim())
    axes.set_ylim(-span if len(models) > 1 else 0, span)
    for name, height in zip(models, (0.97, 0.03), strict=False):
        side = "top" if height > 0.5 else "bottom"
        axes.text(0.02, height, name, transform=axes.transAxes, va=side, fontsize=8, style="italic")


def draw_tokens(axes: Axes, table: pd.DataFrame, title: str, **columns: Any) -> None:
    """Bars by generated token, last block: of rows with these columns."""
    models = bases(table, "to refusal")
    found = rows_of(table, "to refusal", base=models[0], at=None, **columns)
    last = found["block"].max()
    positions = [at for at in dict.fromkeys(found["at"]) if at != EVERY]
    for model, sign in zip(models, (1, -1), strict=False):
        for shift, kind, colour, hatch in (
            (-0.2, "to refusal", TO_REFUSAL, ""),
            (0.2, "to answer", TO_ANSWER, "////"),
        ):
            for x, position in enumerate(positions):
                e = pooled(rows_of(table, kind, base=model, block=last, at=position, **columns))
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
    models = bases(table, "to refusal")
    for model, sign in zip(models, (1, -1), strict=False):
        for kind, colour, line in (
            ("to refusal", TO_REFUSAL, "-"),
            ("to answer", TO_ANSWER, "--"),
        ):
            found = by_block(rows_of(table, kind, base=model, at=place, **columns))
            if found.empty:
                continue
            axes.plot(
                found.index, sign * found["value"], line, color=colour, lw=1.6,
                label=f"{kind[3:]} begun" if sign > 0 else None,
            )  # fmt: skip
            low, high = sign * found["low"], sign * found["high"]
            axes.fill_between(found.index, low, high, color=colour, alpha=0.25, lw=0)
        begin = rows_of(table, "onset", base=model, at=place, **columns)["value"]
        if len(begin):
            axes.plot(begin.median(), 0, marker="^" if sign > 0 else "v", color="black", ms=6)
    axes.set(xlabel="block", title=title)
    _mirrored(axes, models)


def by_block(rows: pd.DataFrame) -> pd.DataFrame:
    """Pooled value, low and high, indexed by block."""
    means = rows.groupby("block")[["value", "low", "high"]].mean()
    return means.set_index(means.index.astype(int))
