"""Notebook 01: is the model on its way to a refusal or to an answer? Figs 2, 3, 4 and 7."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from ..lab import catalogue
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.metrics.direction import EVERY, SAME_WORDS, SUBTRACTED
from ..lab.stages.probes import QUERIES, opening_texts
from . import Output
from .draw import new_figure, styled, written_figure
from .draw.mirrored import by_block, draw_blocks, draw_tokens, pair
from .pick import rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HARMFUL = "harmful"

#: Other authors' harmful prompts, as far as the data source has them.
ELSEWHERE = ("HEx-PHI", "HarmBench", "Do-Not-Answer")

_MEANING = (
    "Cosine distance between the hidden state of the clean run and of a run that was made to begin "
    "with a refusal or with an answer ({count} openings of each kind), at the same words, those "
    "that the model says by itself. The nearer one is where the model is heading: {models}. Bars "
    "and bands: 95 % intervals that resample queries and openings, several seeds pooled."
)


#: What stands where, by the names of the models.
_PLACES = {
    "aligned": "aligned above the axis",
    "unaligned": "unaligned below",
    "ESU removed": "the same model without its ESU below",
}


def _note(table: pd.DataFrame, more: str = "") -> str:
    places = ", ".join(_PLACES[name] for name in pair(table, "to refusal"))
    return _MEANING.format(count=len(opening_texts()["refusal"]), models=places) + more


def _ask(lab: Lab, metric: str, on: str) -> list[Measure]:
    """Of the aligned model and of what it is held against."""
    return [Measure(arm, metric, on) for arm in catalogue.pair(lab)]


def ask_fig2(lab: Lab) -> list[Measure]:
    """Distances on harmful queries."""
    return _ask(lab, "direction", HARMFUL)


ask_fig3 = ask_fig2


def ask_fig4(lab: Lab) -> list[Measure]:
    """The same with content subtracted, and at words that both models read."""
    asked = []
    whole, other = catalogue.pair(lab)
    for variant in (SUBTRACTED, SAME_WORDS):
        asked += _ask(lab, f"direction{variant}", HARMFUL)
        asked.append(Measure(whole, f"direction{variant}", HARMFUL, other, other.name))
    return asked


def ask_fig7(lab: Lab) -> list[Measure]:
    """Distances on other authors' prompts."""
    known = [name for name in ELSEWHERE if lab.has(QUERIES[name])]
    return [measure for name in known for measure in _ask(lab, "direction", name)]


def fig2(table: pd.DataFrame, config: Config) -> Output:
    """Distance to either kind of run by generated token, last block (Fig. 2)."""
    output = Output(_note(table, " Last block, as the language-model head reads it."))
    with styled():
        output.figure = new_figure(6, 3.6)
        axes = output.figure.subplots()
        draw_tokens(axes, table, "Harmful queries, last block", set=HARMFUL)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return output


def fig3(table: pd.DataFrame, config: Config) -> Output:
    """The same by block, one panel for each generated token (Fig. 3)."""
    output = Output(
        _note(
            table,
            " Triangles: the block from which on the state is nearer to the run that refuses, in "
            "that and every later one (interval above zero; median over the seeds that have such a "
            "block).",
        )
    )
    positions = config.probes.positions
    with styled():
        output.figure = new_figure(11, 3.4)
        panels = output.figure.subplots(1, len(positions), sharey=True, squeeze=False)[0]
        for axes, position in zip(panels, positions, strict=True):
            draw_blocks(axes, table, f"{position} tokens", str(position), set=HARMFUL)
        panels[0].set_ylabel("cosine distance to a run with")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return output


def fig4(table: pd.DataFrame, config: Config) -> Output:
    """Content subtracted, and both models at the same words: beyond what words say (Fig. 4)."""
    output = Output(
        _note(
            table,
            " Left and middle: the mean state of runs with neutral openings is subtracted from "
            "both before they are compared, so that neither the query's content nor the words "
            "count. Right: the same for a neutral text that both models read "
            f"({config.probes.queries} queries), as distance to the answering run less distance to "
            "the refusing one: above zero is nearer to refusing.",
        )
    )
    subtracted: dict[str, Any] = {"set": HARMFUL + SUBTRACTED}
    with styled():
        output.figure = new_figure(11, 3.6)
        left, middle, right = output.figure.subplots(1, 3)
        draw_tokens(left, table, "Content subtracted, last block", **subtracted)
        draw_blocks(middle, table, "Content subtracted, by block", **subtracted)
        middle.legend(loc="center left")
        _draw_leans(right, table)
    return output


def _draw_leans(axes: Axes, table: pd.DataFrame) -> None:
    styles = (("-", "#000000"), ("--", "#777777"))
    for (name, model), (line, colour) in zip(pair(table, "lean").items(), styles, strict=False):
        found = by_block(rows_of(table, "lean", set=HARMFUL + SAME_WORDS, at=EVERY, **model))
        axes.plot(found.index, found["value"], line, color=colour, label=name)
        axes.fill_between(found.index, found["low"], found["high"], color=colour, alpha=0.2, lw=0)
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xlabel="block", ylabel="lean to refusing", title="Both models at the same words")
    axes.legend()


def fig7(table: pd.DataFrame, config: Config) -> Output:
    """Other authors' harmful prompts (Fig. 7, where the paper uses HEx-PHI)."""
    found = [name for name in ELSEWHERE if not rows_of(table, "lean", set=name, at=None).empty]
    if not found:
        note = f"This data source has none of the sets {', '.join(ELSEWHERE)} (docs/data.md)."
        return Output(note, figure=written_figure(note))
    output = Output(
        _note(
            table,
            f" {config.probes.queries} prompts of each set, spread over it; the paper's HEx-PHI is "
            "not free to embed (`data.files.hexphi`).",
        )
    )
    with styled():
        output.figure = new_figure(8, 3.2 * len(found))
        grid = output.figure.subplots(len(found), 2, squeeze=False)
        for (left, right), name in zip(grid, found, strict=True):
            draw_tokens(left, table, f"{name}, last block", set=name)
            draw_blocks(right, table, f"{name}, by block", set=name)
        grid[0, 1].legend(loc="lower left", bbox_to_anchor=(0, 0.08))
    return output
