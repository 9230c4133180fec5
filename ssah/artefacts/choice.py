"""Notebook 01: the model's own choice, and what can be read before it says a word."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from ..lab import catalogue
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from . import Output
from .draw import COLOURS, new_figure, styled
from .draw.mirrored import pair
from .pick import estimate, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Borderline prompts look dangerous and are not.
QUERIES = ("harmful", "borderline", "benign")
_COLOURS = {"harmful": COLOURS["ESU"], "borderline": "#CC79A7", "benign": COLOURS["EUU"]}
_LINES = ("-", "--")  #: of the aligned model, and of what it is held against


# --- the model's own choice ------------------------------------------------------------------


def ask_fig_margin(lab: Lab) -> list[Measure]:
    """Margins on each kind of query, and how well they tell harmful ones from the others."""
    asked = []
    for arm in catalogue.pair(lab):
        asked += [Measure(arm, "margin", name) for name in QUERIES]
        asked += [Measure(arm, "separation", name) for name in QUERIES[1:]]
    return asked


def fig_margin(table: pd.DataFrame, config: Config) -> Output:
    """Does the model prefer refusals, where should it, and do distances say the same?"""
    output = Output(
        "Left: log of the probability that the model gives the refusal openings over that of "
        "the answer openings, by how many of their tokens are counted; mean and 95 % interval over "
        "queries. What matters is the difference between harmful and harmless queries: openings of "
        "one kind may be the likelier text for any query. Middle: how well harmful and benign "
        "queries are told apart (AUROC; 0.5 is chance) by the lean of the hidden state at the "
        "model's own words, by block; horizontal, before any word: by the margin, and by the "
        "probability of the refusal openings alone. Right: the two measures query by query, "
        "aligned model, first seed."
    )
    with styled():
        output.figure = new_figure(11, 3.6)
        left, middle, right = output.figure.subplots(1, 3)
        for (name, model), line in zip(pair(table, "margin").items(), _LINES, strict=False):
            for what, colour in _COLOURS.items():
                rows = rows_of(table, "margin", set=what, at=None, **model)
                _draw_line(left, rows, "at", colour, line, f"{name}, {what}")
            rows = rows_of(table, "AUROC by lean", set="benign", **model)
            _draw_line(middle, rows, "block", "#000000", line, f"{name}, lean")
            for what, colour in (("margin", COLOURS["ESU"]), ("refusals", COLOURS["CU"])):
                before = estimate(table, f"AUROC by {what}", set="benign", **model)
                assert before is not None
                middle.axhline(before.value, ls=line, color=colour, lw=1.2, label=f"{name}, {what}")
        left.axhline(0, color="black", lw=0.8)
        left.set(xlabel="tokens of the opening", ylabel="margin, nats", title="Refuse or answer?")
        left.legend(fontsize=7)
        middle.set(xlabel="block", ylabel="AUROC", ylim=(0, 1.02), title="Harmful against benign")
        middle.legend(fontsize=7)
        _draw_scatter(right, table)
    return output


def _draw_line(
    axes: Axes, rows: pd.DataFrame, column: str, colour: str, line: str, label: str
) -> None:
    """A line with its band over the numbers in a column; rows without one are of something else."""
    number = pd.to_numeric(rows[column], errors="coerce").dropna().astype(int)
    means = rows.loc[number.index].groupby(number)[["value", "low", "high"]].mean()
    axes.plot(means.index, means["value"], line, color=colour, label=label, lw=1.4)
    axes.fill_between(means.index, means["low"], means["high"], color=colour, alpha=0.15, lw=0)


def _draw_scatter(axes: Axes, table: pd.DataFrame) -> None:
    table = table[table["seed"] == table["seed"].min()]
    for marker, what in zip("osx", QUERIES, strict=True):
        choice, state = (
            rows_of(table, f"{name} of a query", set=what, at=None).set_index("at")["value"]
            for name in ("margin", "lean")
        )
        correlation = estimate(table, "rank correlation", set=what)
        label = what if correlation is None else f"{what}, rank correlation {correlation.value:.2f}"
        axes.scatter(
            choice, state.reindex(choice.index), s=12, alpha=0.7, marker=marker,
            color=_COLOURS[what], label=label,
        )  # fmt: skip
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xlabel="margin, nats", ylabel="lean, last block", title="Choice and state")
    axes.margins(y=0.25)  # room for the legend
    axes.legend(fontsize=7, loc="lower left")


# --- read-out --------------------------------------------------------------------------------


def ask_fig_readout(lab: Lab) -> list[Measure]:
    """Linear read-outs by block."""
    return [Measure(arm, "read-out") for arm in catalogue.pair(lab)]


def fig_readout(table: pd.DataFrame, config: Config) -> Output:
    """Can harm be read off the query's last token, in a category that the read-out never saw?"""
    output = Output(
        "Logistic regression on the state at the query's last token, before any word is said: "
        "trained on harmful queries of one category and half of the benign ones, tested on the "
        "other categories and the other half; mean over the three largest categories. Borderline: "
        "against harmless prompts that look dangerous, never trained on. Shuffled: trained on "
        "labels that are random within either kind, mean over five draws. Bands: 95 % intervals "
        "over queries of both kinds."
    )
    with styled():
        output.figure = new_figure(6.5, 3.6)
        axes = output.figure.subplots()
        models = pair(table, "AUROC, benign")
        for (name, model), line in zip(models.items(), _LINES, strict=False):
            for what in ("benign", "borderline", "shuffled"):
                rows = rows_of(table, f"AUROC, {what}", **model)
                colour = _COLOURS.get(what, "#999999")
                _draw_line(axes, rows, "block", colour, line, f"{name}, {what}")
        axes.set(xlabel="block", ylabel="AUROC, harmful against ...", ylim=(0, 1.02))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return output
