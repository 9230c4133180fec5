"""Notebook 01: is the model on its way to a refusal or to an answer? Table 11, Figs 2, 3, 4 and 7;
then the model's own choice, and what can be read before it says a word."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..lab import catalogue
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.metrics.behaviour import has_prompts
from ..lab.metrics.direction import EVERY, SAME_WORDS, SUBTRACTED
from ..lab.stages.probes import QUERIES, opening_texts
from ..lab.units_of import ESU
from . import Output
from .draw import COLOURS, panels
from .pick import estimate, filled, paper_rows, pooled, rows_of, tasks_of, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# --- the two models --------------------------------------------------------------------------

#: Column -> metric, on what, digits.
_HELPFULNESS = {
    "perplexity": ("perplexity", "", 2),
    "trivia %": ("accuracy", "trivia", 1),
    "arithmetic %": ("accuracy", "arithmetic", 1),
    "benign answered %": ("ASR", "benign", 1),
    "borderline refused %": ("refused", "borderline", 1),
    "ASR AdvBench %": ("ASR", "", 1),
    "no refusal phrase, AdvBench %": ("no refusal phrase", "", 1),
    "ASR HarmBench %": ("ASR", "HarmBench", 1),
    "ASR HEx-PHI %": ("ASR", "HEx-PHI", 1),
}


def ask_table11(lab: Lab) -> list[Measure]:
    """Helpfulness, and attack success on the prompts that there are."""
    asked = [("perplexity", ""), ("accuracy", ""), ("ASR", ""), ("no refusal phrase", "")]
    asked += [("ASR", "benign"), ("refused", "borderline")]
    asked += [("ASR", name) for name in ("HarmBench", "HEx-PHI") if has_prompts(lab, name)]
    arms = (catalogue.whole(lab), *catalogue.unaligned(lab))
    return [Measure(arm, *question) for arm in arms for question in asked]


def table11(table: pd.DataFrame, config: Config) -> Output:
    """Helpfulness and attack success before and after alignment (Table 11)."""
    made = (
        f"*unaligned* is {config.model.name} as shipped (tuned to follow instructions; its "
        "pretrained base is not embedded), *aligned* what `conf/align/refusals.yaml` makes of it"
        if config.align.enabled
        else f"{config.model.name} as shipped, aligned by its makers"
    )
    rows = []
    for base in ("aligned", "unaligned"):
        row = {"model": config.model.name, "stage": base}
        for column, (metric, on, digits) in _HELPFULNESS.items():
            row[column] = text(table, metric, digits, set=on, base=base)
        if row["perplexity"]:
            rows.append(row)
    # Pretrained, tuned on LIMA (unaligned), on ALERT as well (aligned).
    columns = {
        ("mt_bench", "avg"): "paper: MT-bench",
        ("advbench", "asr_keyword"): "no refusal phrase, AdvBench %",
        ("advbench", "asr_llama_guard3"): "ASR AdvBench %",
        ("hexphi", "asr_llama_guard3"): "ASR HEx-PHI %",
    }
    return Output(
        f"Here, {made}. For the paper's MT-bench stand perplexity of held-out answers, accuracy in "
        f"{tasks_of(table, config)}, and the share of benign prompts that are answered. ASR: "
        "harmful prompts that are answered, held-out ones of AdvBench and HarmBench; the paper's "
        "are "
        "judged by Llama Guard 3, on AdvBench and HEx-PHI.",
        filled(pd.DataFrame(rows + paper_rows("table11", columns, "stage"))),
    )


# --- direction -------------------------------------------------------------------------------

HARMFUL = "harmful"

#: Other authors' harmful prompts, as far as the data source has them.
ELSEWHERE = ("HEx-PHI", "HarmBench", "Do-Not-Answer")

_MEANING = (
    "Cosine distance between the hidden state of the clean run and of a run that was made to begin "
    "with a refusal or with an answer ({count} openings of each kind), at the same words, those "
    "that the model says by itself. The nearer one is where the model is heading: {models}. Bars "
    "and bands: 95 % intervals that resample queries and openings, several seeds pooled."
)

#: Whatever is drawn of :func:`ssah.lab.catalogue.pair`: name -> columns in the table, and where.
_MODELS: dict[str, tuple[dict[str, str], str]] = {
    "aligned": ({}, "aligned above the axis"),
    "unaligned": ({"base": "unaligned"}, "unaligned below"),
    "ESU removed": ({"method": "removed", "rule": ESU}, "the same model without its ESU below"),
}


def pair(table: pd.DataFrame, metric: str) -> dict[str, dict[str, str]]:
    """Name -> columns of the models that a metric was measured of, the aligned one first."""
    return {
        name: columns
        for name, (columns, _) in _MODELS.items()
        if not rows_of(table, metric, set=None, at=None, **columns).empty
    }


def _note(table: pd.DataFrame, more: str = "") -> str:
    places = ", ".join(_MODELS[name][1] for name in pair(table, "to refusal"))
    return _MEANING.format(count=len(opening_texts()["refusal"]), models=places) + more


def _ask(lab: Lab, metric: str, on: str = "") -> list[Measure]:
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


#: Distance to which run, colour, hatch, line: dark and light differ in grey as well.
_KINDS = (("to refusal", "#0072B2", "", "-"), ("to answer", "#F0A830", "////", "--"))


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


def _draw_tokens(axes: Axes, table: pd.DataFrame, title: str, **columns: Any) -> None:
    """Bars by generated token, last block: of rows with these columns."""
    models = pair(table, "to refusal")
    found = rows_of(table, "to refusal", at=None, **columns)
    last = found["block"].max()
    positions = [at for at in dict.fromkeys(found["at"]) if at != EVERY]
    for model, sign in zip(models.values(), (1, -1), strict=False):
        for shift, (kind, colour, hatch, _) in zip((-0.2, 0.2), _KINDS, strict=True):
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


def _draw_blocks(
    axes: Axes, table: pd.DataFrame, title: str, place: str = EVERY, **columns: Any
) -> None:
    """Lines by block."""
    models = pair(table, "to refusal")
    for model, sign in zip(models.values(), (1, -1), strict=False):
        for kind, colour, _, line in _KINDS:
            rows = rows_of(table, kind, at=place, **model, **columns)
            label = f"{kind[3:]} begun" if sign > 0 else None
            if len(rows):
                _draw_line(axes, rows, colour, line, label, sign=sign, lw=1.6, alpha=0.25)
        begin = rows_of(table, "onset", at=place, **model, **columns)["value"]
        if len(begin):
            axes.plot(begin.median(), 0, marker="^" if sign > 0 else "v", color="black", ms=6)
    axes.set(xlabel="block", title=title)
    _mirrored(axes, models)


def _draw_line(
    axes: Axes,
    rows: pd.DataFrame,
    colour: str,
    line: str,
    label: str | None,
    by: str = "block",
    sign: int = 1,
    lw: float = 1.4,
    alpha: float = 0.15,
) -> None:
    """A line with its band over the numbers in a column; rows without one are of something else."""
    number = pd.to_numeric(rows[by], errors="coerce").dropna().astype(int)
    means = sign * rows.loc[number.index].groupby(number)[["value", "low", "high"]].mean()
    axes.plot(means.index, means["value"], line, color=colour, label=label, lw=lw)
    axes.fill_between(means.index, means["low"], means["high"], color=colour, alpha=alpha, lw=0)


def fig2(table: pd.DataFrame, config: Config) -> Output:
    """Distance to either kind of run by generated token, last block (Fig. 2)."""
    output = Output(_note(table, " Last block, as the language-model head reads it."))
    output.figure, axes = panels(6, 3.6)
    _draw_tokens(axes, table, "Harmful queries, last block", set=HARMFUL)
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
    output.figure, grid = panels(11, 3.4, 1, len(positions), sharey=True, squeeze=False)
    for axes, position in zip(grid[0], positions, strict=True):
        _draw_blocks(axes, table, f"{position} tokens", str(position), set=HARMFUL)
    grid[0, 0].set_ylabel("cosine distance to a run with")
    grid[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
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
    output.figure, (left, middle, right) = panels(11, 3.6, 1, 3)
    _draw_tokens(left, table, "Content subtracted, last block", set=HARMFUL + SUBTRACTED)
    _draw_blocks(middle, table, "Content subtracted, by block", set=HARMFUL + SUBTRACTED)
    middle.legend(loc="center left")
    _draw_leans(right, table)
    return output


def _draw_leans(axes: Axes, table: pd.DataFrame) -> None:
    styles = (("-", "#000000"), ("--", "#777777"))
    for (name, model), (line, colour) in zip(pair(table, "lean").items(), styles, strict=False):
        rows = rows_of(table, "lean", set=HARMFUL + SAME_WORDS, at=EVERY, **model)
        _draw_line(axes, rows, colour, line, name, lw=1.5, alpha=0.2)
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xlabel="block", ylabel="lean to refusing", title="Both models at the same words")
    axes.legend()


def fig7(table: pd.DataFrame, config: Config) -> Output:
    """Other authors' harmful prompts (Fig. 7, where the paper uses HEx-PHI)."""
    found = [name for name in ELSEWHERE if not rows_of(table, "lean", set=name, at=None).empty]
    if not found:
        return Output(
            f"This data source has none of the sets {', '.join(ELSEWHERE)} (docs/data.md)."
        )
    output = Output(
        _note(
            table,
            f" {config.probes.queries} prompts of each set, spread over it; the paper's HEx-PHI is "
            "not free to embed (`data.files.hexphi`).",
        )
    )
    output.figure, grid = panels(8, 3.2 * len(found), len(found), 2, squeeze=False)
    for (left, right), name in zip(grid, found, strict=True):
        _draw_tokens(left, table, f"{name}, last block", set=name)
        _draw_blocks(right, table, f"{name}, by block", set=name)
    grid[0, 1].legend(loc="lower left", bbox_to_anchor=(0, 0.08))
    return output


# --- the model's own choice ------------------------------------------------------------------

#: Borderline prompts look dangerous and are not.
_PROMPTS = ("harmful", "borderline", "benign")
_COLOURS = {"harmful": COLOURS["ESU"], "borderline": "#CC79A7", "benign": COLOURS["EUU"]}
_LINES = ("-", "--")  #: of the aligned model, and of what it is held against


def ask_fig_margin(lab: Lab) -> list[Measure]:
    """Margins on each kind of query, and how well they tell harmful ones from the others."""
    asked = []
    for arm in catalogue.pair(lab):
        asked += [Measure(arm, "margin", name) for name in _PROMPTS]
        asked += [Measure(arm, "separation", name) for name in _PROMPTS[1:]]
    return asked


#: Lines fill these panels, so their legends stand below them.
_BELOW = {"fontsize": 7, "loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}


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
    output.figure, (left, middle, right) = panels(11, 3.6, 1, 3)
    for (name, model), line in zip(pair(table, "margin").items(), _LINES, strict=False):
        for what, colour in _COLOURS.items():
            rows = rows_of(table, "margin", set=what, at=None, **model)
            _draw_line(left, rows, colour, line, f"{name}, {what}", by="at")
        rows = rows_of(table, "AUROC by lean", set="benign", **model)
        _draw_line(middle, rows, "#000000", line, f"{name}, lean")
        for what, colour in (("margin", COLOURS["ESU"]), ("refusals", COLOURS["CU"])):
            before = estimate(table, f"AUROC by {what}", set="benign", **model)
            assert before is not None
            middle.axhline(before.value, ls=line, color=colour, lw=1.2, label=f"{name}, {what}")
    left.axhline(0, color="black", lw=0.8)
    left.set(xlabel="tokens of the opening", ylabel="margin, nats", title="Refuse or answer?")
    left.legend(**_BELOW)
    middle.set(xlabel="block", ylabel="AUROC", ylim=(0, 1.02), title="Harmful against benign")
    middle.legend(**_BELOW)
    _draw_scatter(right, table)
    return output


def _draw_scatter(axes: Axes, table: pd.DataFrame) -> None:
    table = table[table["seed"] == table["seed"].min()]
    for marker, what in zip("osx", _PROMPTS, strict=True):
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
    axes.legend(**_BELOW | {"ncols": 1})


# --- read-out --------------------------------------------------------------------------------


def ask_fig_readout(lab: Lab) -> list[Measure]:
    """Linear read-outs by block."""
    return _ask(lab, "read-out")


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
    output.figure, axes = panels(6.5, 3.6)
    models = pair(table, "AUROC, benign")
    for (name, model), line in zip(models.items(), _LINES, strict=False):
        for what in ("benign", "borderline", "shuffled"):
            rows = rows_of(table, f"AUROC, {what}", **model)
            colour = _COLOURS.get(what, "#999999")
            _draw_line(axes, rows, colour, line, f"{name}, {what}")
    axes.set(xlabel="block", ylabel="AUROC, harmful against ...", ylim=(0, 1.02))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return output
