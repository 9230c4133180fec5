"""Notebook 01: the model's own choice, and what can be read before it says a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor

from ..data.rows import Row
from ..evaluate.probes import Probe, lean, margin, read_out
from ..evaluate.stats import Estimate, auroc, crossed_mean, pool, rank_correlation
from ..lab.stages import Stages
from . import Output
from .mirrored import models
from .reasoning import EVALUATION
from .render import COLOURS, STYLE, ShownFigure
from .summary import pooled

if TYPE_CHECKING:
    from ..app.study import Study

#: Set -> what it is here. Borderline prompts look dangerous and are not.
QUERIES = {EVALUATION: "harmful", "borderline": "borderline", "benign_evaluation": "benign"}
_COLOURS = {"harmful": COLOURS["ESU"], "borderline": "#CC79A7", "benign": COLOURS["EUU"]}
_LINES = {"aligned": "-", "unaligned": "--"}

#: Harm categories on each of which a read-out is trained: the largest.
CATEGORIES = 3

#: Read-outs with shuffled labels, for each category: one alone may point anywhere.
SHUFFLES = 5


# --- the model's own choice ------------------------------------------------------------------


def fig_margin(study: Study) -> Output:
    """Does the model prefer refusals, where should it, and do distances say the same?"""
    output = Output(
        note="Left: log of the probability that the model gives the refusal openings over that of "
        "the answer openings, by how many of their tokens are counted; mean and 95 % interval over "
        "queries. What matters is the difference between harmful and harmless queries: openings of "
        "one kind may be the likelier text for any query. Middle: how well harmful and benign "
        "queries are told apart (AUROC; 0.5 is chance) by the lean of the hidden state at the "
        "model's own words, by block; horizontal, before any word: by the margin, and by the "
        "probability of the refusal openings alone. Right: the two "
        "measures query by query, aligned model, first seed."
    )
    for stages in study.all_stages:
        for model in models(stages):
            found = {name: stages.probe(model, name) for name in QUERIES}
            for name, probe in found.items():
                _add_margins(output, f"{model}: {QUERIES[name]}", stages.seed, probe)
            for other in ("benign_evaluation", "borderline"):
                arm = f"{model}: harmful against {QUERIES[other]}"
                _add_separation(output, arm, stages.seed, found[EVALUATION], found[other])
    output.figure = _draw_margin(output.frame(study, "fig_margin"), study)
    return output


def _add_margins(output: Output, arm: str, seed: int, probe: Probe) -> None:
    by_token = margin(probe.log_likelihood).numpy()
    for column, values in enumerate(by_token.T, 1):
        output.add(arm, f"margin, {column} tokens", seed, crossed_mean(values[:, None]))
    output.add(arm, "margin", seed, crossed_mean(by_token[:, -1:]))
    leans = _leans(probe.distance)
    known = ~np.isnan(leans).any(1)
    if not known.any():  # no answer is long enough
        return
    output.add(arm, "lean", seed, crossed_mean(lean(probe.distance.nanmean(1)[known, -1]).numpy()))
    output.add(
        arm, "rank_correlation", seed, rank_correlation(by_token[known, -1], leans[known, -1])
    )


def _leans(distances: Tensor) -> np.ndarray:
    """A query's mean lean over openings and tokens, ``[queries, B]``."""
    return lean(distances.nanmean(1)).mean(-1).numpy()


def _add_separation(output: Output, arm: str, seed: int, harmful: Probe, other: Probe) -> None:
    """AUROC by the margin, by the refusal openings alone, and by the lean in each block."""
    margins = [margin(probe.log_likelihood)[:, -1].numpy() for probe in (harmful, other)]
    output.add(arm, "auroc_margin", seed, auroc(*margins))
    refusals = [p.log_likelihood[:, -1, 0].logsumexp(-1).numpy() for p in (harmful, other)]
    output.add(arm, "auroc_refusal", seed, auroc(*refusals))
    for what, pair in (
        ("lean", (harmful.distance, other.distance)),
        ("residual", (harmful.residual, other.residual)),
    ):
        leans = [_leans(distances) for distances in pair]
        for block in range(leans[0].shape[1]):
            scores = [values[:, block][~np.isnan(values[:, block])] for values in leans]
            estimate = auroc(*scores)
            output.add(arm, f"auroc_{what}, block {block + 1}", seed, estimate)
        output.add(arm, f"auroc_{what}", seed, estimate)  # of the last block


def _draw_margin(frame: pd.DataFrame, study: Study) -> ShownFigure:
    stages = study.all_stages[0]
    with plt.style.context(STYLE):
        figure = ShownFigure(figsize=(11, 3.6))
        left, middle, right = figure.subplots(1, 3)
        for model in models(stages):
            for what, colour in _COLOURS.items():
                rows = frame[frame["arm"] == f"{model}: {what}"]
                _draw_by(left, rows, "margin", "tokens", colour, model, f"{model}, {what}")
            rows = frame[frame["arm"] == f"{model}: harmful against benign"]
            _draw_by(middle, rows, "auroc_lean", "block", "#000000", model, f"{model}, lean")
            for what, colour in (("margin", COLOURS["ESU"]), ("refusal", COLOURS["CU"])):
                before = pooled(rows, f"auroc_{what}")
                assert before is not None
                middle.axhline(
                    before.value, ls=_LINES[str(model)], color=colour, lw=1.2,
                    label=f"{model}, {what}",
                )  # fmt: skip
        left.axhline(0, color="black", lw=0.8)
        left.set(xlabel="tokens of the opening", ylabel="margin, nats", title="Refuse or answer?")
        left.legend(fontsize=7)
        middle.set(xlabel="block", ylabel="AUROC", ylim=(0, 1.02), title="Harmful against benign")
        middle.legend(fontsize=7)
        _draw_scatter(right, frame, stages)
    return figure


def _draw_by(
    axes: Axes, rows: pd.DataFrame, metric: str, unit: str, colour: str, model: object, label: str
) -> None:
    """A line with its band over the numbers in ``<metric>, block 3`` or ``<metric>, 3 tokens``."""
    pattern = rf"^{metric}, (?:{unit} )?(\d+)(?: {unit})?$"
    number = rows["metric"].str.extract(pattern)[0].dropna().astype(int)
    means = rows.loc[number.index].groupby(number)[["value", "low", "high"]].mean()
    axes.plot(means.index, means["value"], _LINES[str(model)], color=colour, label=label, lw=1.4)
    axes.fill_between(means.index, means["low"], means["high"], color=colour, alpha=0.15, lw=0)


def _draw_scatter(axes: Axes, frame: pd.DataFrame, stages: Stages) -> None:
    for marker, (name, what) in zip("osx", QUERIES.items(), strict=True):
        probe = stages.probe("aligned", name)
        correlation = pooled(frame[frame["arm"] == f"aligned: {what}"], "rank_correlation")
        assert correlation is not None
        axes.scatter(
            margin(probe.log_likelihood)[:, -1], _leans(probe.distance)[:, -1], s=12, alpha=0.7,
            marker=marker, color=_COLOURS[what],
            label=f"{what}, rank correlation {correlation.value:.2f}",
        )  # fmt: skip
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xlabel="margin, nats", ylabel="lean, last block", title="Choice and state")
    axes.margins(y=0.25)  # room for the legend
    axes.legend(fontsize=7, loc="lower left")


# --- read-out --------------------------------------------------------------------------------


def fig_readout(study: Study) -> Output:
    """Can harm be read off the query's last token, in a category that the read-out never saw?"""
    output = Output(
        note="Logistic regression on the state at the query's last token, before any word is said: "
        "trained on harmful queries of one category and half of the benign ones, tested on the "
        "other categories and the other half; mean over the three largest categories. Borderline: "
        "against harmless prompts that look dangerous, never trained on. Shuffled: trained on "
        "labels that are random within either kind, mean over five draws. Bands: 95 % intervals "
        "over queries of both kinds."
    )
    for stages in study.all_stages:
        parts = _parts(stages.probed_rows(EVALUATION))
        for model in models(stages):
            harmful, borderline, benign = (stages.probe(model, name).query for name in QUERIES)
            for block in range(harmful.shape[1]):
                states = harmful[:, block], benign[:, block], borderline[:, block]
                for metric, estimates in _read_outs(*states, parts).items():
                    output.add(
                        str(model), f"{metric}, block {block + 1}", stages.seed, pool(estimates)
                    )
                    if block == harmful.shape[1] // 2:
                        output.add(str(model), f"{metric}, middle", stages.seed, pool(estimates))
    frame, stages = output.frame(study, "fig_readout"), study.all_stages[0]
    with plt.style.context(STYLE):
        output.figure = ShownFigure(figsize=(6.5, 3.6))
        axes = output.figure.subplots()
        for model in models(stages):
            rows = frame[frame["arm"] == str(model)]
            for metric, what in (("auroc", "benign"), ("auroc_borderline", "borderline")):
                _draw_by(axes, rows, metric, "block", _COLOURS[what], model, f"{model}, {what}")
            _draw_by(axes, rows, "auroc_shuffled", "block", "#999999", model, f"{model}, shuffled")
        axes.set(xlabel="block", ylabel="AUROC, harmful against ...", ylim=(0, 1.02))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return output


def _parts(rows: Sequence[Row]) -> list[np.ndarray]:
    """Which queries each read-out is trained on: the largest categories, or two halves if there
    are no categories."""
    names = pd.Series([row.category for row in rows])
    if names.nunique() < 2:
        return [np.arange(len(rows)) % 2 == half for half in (0, 1)]
    return [np.array(names == name) for name in names.value_counts().index[:CATEGORIES]]


def _read_outs(
    harmful: Tensor, benign: Tensor, borderline: Tensor, parts: Sequence[np.ndarray]
) -> dict[str, list[Estimate]]:
    """AUROC of one block's read-outs, each trained on one part."""
    found: dict[str, list[Estimate]] = {"auroc": [], "auroc_borderline": [], "auroc_shuffled": []}
    for number, part in enumerate(parts):
        chosen = torch.from_numpy(part.copy())
        train = torch.cat([harmful[chosen], benign[::2]])
        labels = np.arange(len(train)) < int(part.sum())
        test = torch.cat([harmful[~chosen], benign[1::2], borderline])
        ends = np.cumsum([int((~part).sum()), len(benign[1::2])])
        scores, unseen, looks = np.split(read_out(train, labels, test), ends)
        found["auroc"].append(auroc(scores, unseen))
        found["auroc_borderline"].append(auroc(scores, looks))
        for draw in range(SHUFFLES):
            shuffled = _shuffle(labels, seed=SHUFFLES * number + draw)
            scores, unseen, _ = np.split(read_out(train, shuffled, test), ends)
            found["auroc_shuffled"].append(auroc(scores, unseen))
    return found


def _shuffle(labels: np.ndarray, seed: int) -> np.ndarray:
    """Random labels, as many true in either kind: across the kinds a few follow them by chance."""
    rng, shuffled = np.random.default_rng(seed), np.empty_like(labels)
    for kind in (False, True):
        count = int((labels == kind).sum())
        shuffled[labels == kind] = rng.permutation(np.arange(count) % 2 == 0)
    return shuffled
