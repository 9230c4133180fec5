"""Notebook 06: aligning through the redundant units. Table 4, and the tax against safety."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from ..lab.budget_arms import RANDOM, RU, WHOLE
from . import Output
from .budget_measures import START, measured_arms
from .render import COLOURS, STYLE, ShownFigure
from .summary import arm_rows, paper_rows, pooled

if TYPE_CHECKING:
    from ..app.study import Study

#: Column of the table -> (metric, digits)
_COLUMNS: dict[str, tuple[str, int]] = {
    "weights %": ("trained_weights", 1),
    "training loss": ("training_loss", 2),
    "held-out gain": ("heldout_gain", 2),
    "ASR": ("asr", 1),
    "no refusal phrase": ("not_refused", 1),
    "ASR HarmBench": ("asr_harmbench", 1),
    "ASR Do-Not-Answer": ("asr_do_not_answer", 1),
    "ASR, prefix": ("asr_prefix", 1),
    "ASR, attacked": ("asr_attacked", 1),
    "benign refused": ("refused_benign_evaluation", 1),
    "borderline refused": ("refused_borderline", 1),
    "perplexity": ("perplexity", 2),
    "accuracy change": ("accuracy_change", 1),
    "drift": ("drift", 3),
    "optimizer MiB": ("optimizer_mib", 0),
}


def no_pair(study: Study) -> str:
    """Why nothing is measured here, where the model came aligned; empty where it did not."""
    if study.config.align.enabled:
        return ""
    return (
        f"Not measured here: {study.config.model.name} came aligned, and this needs an unaligned "
        "model, such as a pretrained one, with `align=refusals`."
    )


def table4(study: Study) -> Output:
    """Aligning through RU, through everything, and through other parts (Table 4)."""
    if no_pair(study):
        return Output(note=no_pair(study), table=_paper_rows())
    config = study.config
    output = Output(
        note=f"The unaligned model is aligned through a part of its units: RU are the "
        f"{100 * config.budget.share:g} % of units with the lowest I_U in the unaligned model, "
        "random ones as many. Everything else keeps its bits, which is checked after each "
        "training. Same rows, rate and epochs as the whole model, unless 'twice the epochs' (the "
        "paper's rule) or '3 x the rate'. ASR: harmful prompts that are answered; no refusal "
        "phrase: the paper's measure; prefix: with the request to start with an answer; attacked: "
        "after one epoch of harmless fine-tuning, on instructions. Accuracy "
        "change: trivia and arithmetic, points against the unaligned model on the same items. "
        "Drift: KL from the unaligned model on benign prompts, nats per token. Optimizer: AdamW's "
        "two moments in float32; `make bench` has seconds and memory. The paper aligns with "
        "instructions and reports no safety: rows that begin with the name of a set, such as "
        "arithmetic, are the unaligned model after learning from those harmless rows by the "
        "paper's rule for epochs, and the held-out gain is what it learned (nats per token)."
    )
    places = measured_arms(study, output, instructions=True)
    frame = _in_order(output.frame(study, "table4"), places)
    output.note += _which_seeds(frame)
    own = arm_rows(frame, config.model.name, "aligned through", _COLUMNS)
    output.table = pd.concat([own, _paper_rows()], ignore_index=True).fillna("")
    return output


def _in_order(frame: pd.DataFrame, places: dict[str, int]) -> pd.DataFrame:
    """Arms of a run that is added to stand where they would have been measured, or last."""
    found = frame["arm"].map(places).fillna(len(places))
    return frame.loc[found.sort_values(kind="stable").index].reset_index(drop=True)


def _which_seeds(frame: pd.DataFrame) -> str:
    """Which arms were not measured for every seed."""
    arms: dict[str, list[str]] = {}
    for arm, rows in frame.groupby("arm", sort=False):
        arms.setdefault(", ".join(sorted(set(rows["seed"].astype(str)))), []).append(str(arm))
    every = ", ".join(sorted(set(frame["seed"].astype(str))))
    note = "".join(
        f" Seed {seeds} only: {'; '.join(names)}."
        for seeds, names in arms.items()
        if seeds != every
    )
    if set(frame["arm"]) <= {START, WHOLE, RU, RANDOM}:
        note += " `budget=wide` aligns for longer and with larger steps as well."
    return note


def _paper_rows() -> pd.DataFrame:
    """Every task of the paper's Table 4 in a column of its own."""
    tasks = (
        "arc_challenge arc_easy hellaswag winogrande boolq piqa gsm8k_5shot mmlu mt_bench_turn1"
    ).split()
    columns = {(t, "accuracy"): t for t in tasks[:-1]}
    columns[tasks[-1], "mt_bench_score"] = "MT-bench, turn 1"
    return paper_rows("table4", columns, "aligned through")


def fig_budget(study: Study) -> Output:
    """Safety against the tax, one point for each part that was trained."""
    if no_pair(study):
        return Output(note=no_pair(study), figure=ShownFigure(figsize=(4, 1)))
    output = Output(
        note="Left: ASR against the drift of the benign output distribution (KL from the unaligned "
        "model, nats per token): the lower left is the better bargain; numbers are those "
        "of the names. Right: ASR before (hollow) and after (filled) one epoch of fine-tuning on "
        "instructions: is a model that was aligned through fewer units easier to break? 95 % "
        "intervals, seeds pooled."
    )
    places = measured_arms(study, output, instructions=False)
    frame = _in_order(output.frame(study, "fig_budget"), places)
    names = list(frame[frame["metric"] == "asr_attacked"]["arm"].unique())
    output.note += _which_seeds(frame[frame["arm"].isin(names)])
    with plt.style.context(STYLE):
        output.figure = ShownFigure(figsize=(10, 2.5 + 0.3 * len(names)))
        left, right = output.figure.subplots(1, 2)
        _draw_bargain(left, frame, names)
        _draw_attacked(right, frame, names)
    return output


def _style(name: str) -> tuple[str, str]:
    """Marker and colour by what is trained."""
    if name == WHOLE:
        return "*", COLOURS["CU"]
    if name.startswith(RANDOM):
        return "^", COLOURS["random"]
    if name.startswith(RU):
        return "o", COLOURS["ESU"]
    return ("P", "#CC79A7") if name.startswith("LoRA") else ("s", COLOURS["EUU"])


def _draw_bargain(axes: Axes, frame: pd.DataFrame, names: Sequence[str]) -> None:
    for number, name in enumerate(names, 1):  # whole names would hide each other
        rows = frame[frame["arm"] == name]
        x, y = pooled(rows, "drift"), pooled(rows, "asr")
        assert x is not None
        assert y is not None
        marker, colour = _style(name)
        axes.errorbar(
            x.value, y.value, fmt=marker, color=colour, ms=6, lw=0.8, capsize=2,
            xerr=[[x.value - x.low], [x.high - x.value]],
            yerr=[[y.value - y.low], [y.high - y.value]],
        )  # fmt: skip
        point = (x.value, y.value)
        axes.annotate(str(number), point, (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="drift on benign prompts, nats per token", ylabel="ASR, %", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_attacked(axes: Axes, frame: pd.DataFrame, names: list[str]) -> None:
    for row, name in enumerate(names[::-1]):
        marker, colour = _style(name)
        for metric, filled in (("asr", False), ("asr_attacked", True)):
            e = pooled(frame[frame["arm"] == name], metric)
            assert e is not None
            axes.errorbar(
                e.value, row, xerr=[[e.value - e.low], [e.high - e.value]], fmt=marker,
                color=colour, mfc=colour if filled else "white", ms=6, lw=0.8, capsize=2,
            )  # fmt: skip
    labels = [f"{name}  {number}" for number, name in enumerate(names, 1)]
    axes.set_yticks(range(len(names)), labels[::-1], fontsize=7)
    axes.set(xlabel="ASR before and after the attack, %", xlim=(-3, 103))
