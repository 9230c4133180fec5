"""Figures in the paper's form: the aligned model above the axis, the unaligned one below."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from ..lab.arms import Which
from ..lab.stages import Stages
from .summary import pooled

#: Dark and light, so that they differ in grey as well; the light one is hatched.
TO_REFUSAL, TO_ANSWER = "#0072B2", "#F0A830"

EVERY = "all tokens"


def models(stages: Stages) -> tuple[Which, ...]:
    """The pair; a model that comes aligned has no unaligned twin here."""
    return ("aligned", "unaligned") if stages.config.align.enabled else ("aligned",)


def _mirrored(axes: Axes, stages: Stages) -> None:
    """Labels of a panel with the aligned model above the axis and the unaligned one below."""
    axes.axhline(0, color="black", lw=0.8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
    span = max(abs(bound) for bound in axes.get_ylim())
    axes.set_ylim(-span if len(models(stages)) > 1 else 0, span)
    for name, height in zip(models(stages), (0.97, 0.03), strict=False):
        side = "top" if height > 0.5 else "bottom"
        axes.text(
            0.02, height, str(name), transform=axes.transAxes, va=side, fontsize=8, style="italic"
        )


def draw_tokens(
    axes: Axes,
    frame: pd.DataFrame,
    stages: Stages,
    what: str,
    title: str,
) -> None:
    """Bars by generated token, last block: ``frame`` holds arms ``<model>: <what>``."""
    positions = stages.config.probes.positions
    for model, sign in zip(models(stages), (1, -1), strict=False):
        rows = frame[frame["arm"] == f"{model}: {what}"]
        for shift, kind, colour, hatch in (
            (-0.2, "to refusal", TO_REFUSAL, ""),
            (0.2, "to answer", TO_ANSWER, "////"),
        ):
            for x, position in enumerate(positions):
                e = pooled(rows, f"{kind}, last block, {position} tokens")
                if e is None:
                    continue
                axes.bar(
                    x + shift, sign * e.value, 0.38, color=colour, hatch=hatch, edgecolor="white",
                    lw=0, label=f"{kind[3:]} begun" if x == 0 and sign > 0 else None,
                )  # fmt: skip
                axes.vlines(x + shift, sign * e.low, sign * e.high, color="black", lw=1)
    axes.set_xticks(range(len(positions)), [str(p) for p in positions])
    axes.set(xlabel="generated tokens", ylabel="cosine distance to a run with", title=title)
    _mirrored(axes, stages)


def draw_blocks(
    axes: Axes, frame: pd.DataFrame, stages: Stages, what: str, title: str, place: str = EVERY
) -> None:
    """Lines by block."""
    for model, sign in zip(models(stages), (1, -1), strict=False):
        rows = frame[frame["arm"] == f"{model}: {what}"]
        for kind, colour, line in (
            ("to refusal", TO_REFUSAL, "-"),
            ("to answer", TO_ANSWER, "--"),
        ):
            found = by_block(rows, kind, place)
            if found.empty:
                continue
            index = found.index
            axes.plot(
                index, sign * found["value"], line, color=colour, lw=1.6,
                label=f"{kind[3:]} begun" if sign > 0 else None,
            )  # fmt: skip
            low, high = sign * found["low"], sign * found["high"]
            axes.fill_between(index, low, high, color=colour, alpha=0.25, lw=0)
        begin = rows[rows["metric"] == f"onset, {place}"]["value"]
        if len(begin):
            axes.plot(begin.median(), 0, marker="^" if sign > 0 else "v", color="black", ms=6)
    axes.set(xlabel="block", title=title)
    _mirrored(axes, stages)


def by_block(rows: pd.DataFrame, kind: str, place: str) -> pd.DataFrame:
    """Pooled value, low and high, indexed by block."""
    parts = rows["metric"].str.extract(r"^(.+), block (\d+), (.+)$")
    chosen = rows[(parts[0] == kind) & (parts[2] == place)]
    blocks = parts.loc[chosen.index, 1].astype(int)
    return chosen.groupby(blocks)[["value", "low", "high"]].mean()
