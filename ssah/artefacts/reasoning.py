"""Notebook 01: is the model on its way to a refusal or to an answer? Figs 2, 3, 4 and 7."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from torch import Tensor

from ..evaluate.probes import lean, onset
from ..evaluate.stats import Estimate, crossed_mean
from ..lab.stages import Stages
from . import Output
from .mirrored import EVERY, by_block, draw_blocks, draw_tokens, models
from .render import STYLE, ShownFigure
from .summary import same

if TYPE_CHECKING:
    from ..app.study import Study

EVALUATION = "harmful_evaluation"

#: Other authors' harmful prompts, as far as the data source has them.
ELSEWHERE = {
    "hexphi": "HEx-PHI",
    "harmbench": "HarmBench",
    "do_not_answer": "Do-Not-Answer",
}


def places(distances: Tensor, positions: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """After each number of tokens, and the mean of a query's: name and ``[queries, B, 2, O]``."""
    for column, position in enumerate(positions):
        yield f"{position} tokens", distances[:, column]
    yield EVERY, distances.nanmean(1)


def add_distances(
    output: Output, arm: str, seed: int, distances: Tensor, positions: Sequence[int], *, last: bool
) -> None:
    """Distance to either kind of run, and the lean: in the last block, or in all of them.

    After each number of tokens and on average over these; without ``positions`` the latter alone.
    Queries whose answer ended before do not count.
    """
    blocks = distances.shape[2]
    for place, values in places(distances, positions):
        known = values[~values.isnan().flatten(1).any(1)]
        if not len(known):
            continue
        leans = []
        for block in range(blocks - 1, blocks) if last else range(blocks):
            where = "last block" if last else f"block {block + 1}"
            here = known[:, block]
            leans.append(crossed_mean(lean(here).numpy()))
            output.add(arm, f"to refusal, {where}, {place}", seed, crossed_mean(here[:, 0].numpy()))
            output.add(arm, f"to answer, {where}, {place}", seed, crossed_mean(here[:, 1].numpy()))
            output.add(arm, f"lean, {where}, {place}", seed, leans[-1])
        first = None if last else onset(leans)
        if first is not None:
            output.add(arm, f"onset, {place}", seed, same(first + 1, len(known)))


def _add_extremes(output: Output, arm: str, seed: int) -> None:
    """The token at which the lean's interval reaches lowest, and that where it reaches highest."""
    found = [
        Estimate(row["value"], row["low"], row["high"], row["n"])
        for row in output.metrics
        if (row["arm"], row["seed"]) == (arm, seed)
        and row["metric"].startswith("lean")
        and not row["metric"].endswith(EVERY)
    ]
    if not found:  # no answer is long enough
        return
    output.add(arm, "least lean", seed, min(found, key=lambda e: e.low))
    output.add(arm, "most lean", seed, max(found, key=lambda e: e.high))


_MEANING = (
    "Cosine distance between the hidden state of the clean run and of a run that was made to begin "
    "with a refusal or with an answer ({count} openings of each kind), at the same words, those "
    "that the model says by itself. The nearer one is where the model is heading: aligned above "
    "the axis, unaligned below. Bars and bands: 95 % intervals that resample queries and openings, "
    "several seeds pooled."
)


def _output(study: Study, more: str = "") -> Output:
    count = len(study.all_stages[0].opening_texts["refusal"])
    return Output(note=_MEANING.format(count=count) + more)


def fig2(study: Study) -> Output:
    """Distance to either kind of run by generated token, last block (Fig. 2)."""
    output = _output(study, " Last block, as the language-model head reads it.")
    positions = study.config.probes.positions
    for stages in study.all_stages:
        for model in models(stages):
            arm, found = f"{model}: harmful", stages.probe(model, EVALUATION)
            add_distances(output, arm, stages.seed, found.distance, positions, last=True)
            _add_extremes(output, arm, stages.seed)
    frame, stages = output.frame(study, "fig2"), study.all_stages[0]
    with plt.style.context(STYLE):
        output.figure = ShownFigure(figsize=(6, 3.6))
        axes = output.figure.subplots()
        draw_tokens(axes, frame, stages, "harmful", "Harmful queries, last block")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return output


def fig3(study: Study) -> Output:
    """The same by block, one panel for each generated token (Fig. 3)."""
    output = _output(
        study,
        " Triangles: the block from which on the state is nearer to the run that refuses, in that "
        "and every later one (interval above zero; median over the seeds that have such a "
        "block).",
    )
    positions = study.config.probes.positions
    for stages in study.all_stages:
        for model in models(stages):
            found = stages.probe(model, EVALUATION).distance
            add_distances(output, f"{model}: harmful", stages.seed, found, positions, last=False)
    frame, stages = output.frame(study, "fig3"), study.all_stages[0]
    with plt.style.context(STYLE):
        output.figure = ShownFigure(figsize=(11, 3.4))
        panels = output.figure.subplots(1, len(positions), sharey=True, squeeze=False)[0]
        for axes, position in zip(panels, positions, strict=True):
            place = f"{position} tokens"
            draw_blocks(axes, frame, stages, "harmful", place, place)
        panels[0].set_ylabel("cosine distance to a run with")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return output


def fig4(study: Study) -> Output:
    """Content subtracted, and both models at the same words: beyond what words say (Fig. 4)."""
    few = study.config.probes.queries
    output = _output(
        study,
        " Left and middle: the mean state of runs with neutral openings is subtracted from both "
        "before they are compared, so that neither the query's content nor the words count. Right: "
        f"the same for a neutral text that both models read ({few} queries), as distance to the "
        "answering run less distance to the refusing one: above zero is nearer to refusing.",
    )
    positions = study.config.probes.positions
    for stages in study.all_stages:
        shared, by_own = {}, {}
        for model in models(stages):
            own = by_own[model] = stages.probe(model, EVALUATION).residual
            arm = f"{model}: content subtracted"
            add_distances(output, arm, stages.seed, own, positions, last=True)
            _add_extremes(output, arm, stages.seed)
            add_distances(output, arm, stages.seed, own, (), last=False)
            shared[model] = stages.probe(model, EVALUATION, same_words=True).residual
            arm = f"{model}: same words"
            add_distances(output, arm, stages.seed, shared[model], (), last=False)
        if "unaligned" in shared:
            for what, found in (("content subtracted", by_own), ("same words", shared)):
                a, b = (lean(found[m].nanmean(1)[:, -1]) for m in ("aligned", "unaligned"))
                known = (a - b)[~(a - b).isnan().any(1)]
                if not len(known):
                    continue
                shift = crossed_mean(known.numpy())
                output.add(f"aligned: {what}", "lean over unaligned", stages.seed, shift)
    frame, stages = output.frame(study, "fig4"), study.all_stages[0]
    with plt.style.context(STYLE):
        output.figure = ShownFigure(figsize=(11, 3.6))
        left, middle, right = output.figure.subplots(1, 3)
        draw_tokens(left, frame, stages, "content subtracted", "Content subtracted, last block")
        draw_blocks(middle, frame, stages, "content subtracted", "Content subtracted, by block")
        middle.legend(loc="center left")
        _draw_leans(right, frame, stages)
    return output


def _draw_leans(axes: Axes, frame: pd.DataFrame, stages: Stages) -> None:
    for model, line, colour in zip(
        models(stages), ("-", "--"), ("#000000", "#777777"), strict=False
    ):
        found = by_block(frame[frame["arm"] == f"{model}: same words"], "lean", EVERY)
        axes.plot(found.index, found["value"], line, color=colour, label=str(model))
        axes.fill_between(found.index, found["low"], found["high"], color=colour, alpha=0.2, lw=0)
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xlabel="block", ylabel="lean to refusing", title="Both models at the same words")
    axes.legend()


def fig7(study: Study) -> Output:
    """Other authors' harmful prompts (Fig. 7, where the paper uses HEx-PHI)."""
    found = [name for name in ELSEWHERE if study.all_stages[0].has(name)]
    if not found:
        note = f"This data source has none of the sets {', '.join(ELSEWHERE)} (docs/data.md)."
        return Output(note=note, figure=ShownFigure(figsize=(4, 1)))
    output = _output(
        study,
        f" {study.config.probes.queries} prompts of each set, spread over it; the paper's HEx-PHI "
        "is not free to embed (`data.files.hexphi`).",
    )
    positions = study.config.probes.positions
    for stages in study.all_stages:
        for name in found:
            for model in models(stages):
                distances, arm = stages.probe(model, name).distance, f"{model}: {name}"
                add_distances(output, arm, stages.seed, distances, positions, last=True)
                add_distances(output, arm, stages.seed, distances, (), last=False)
    frame, stages = output.frame(study, "fig7"), study.all_stages[0]
    with plt.style.context(STYLE):
        output.figure = ShownFigure(figsize=(8, 3.2 * len(found)))
        grid = output.figure.subplots(len(found), 2, squeeze=False)
        for (left, right), name in zip(grid, found, strict=True):
            title = ELSEWHERE[name]
            draw_tokens(left, frame, stages, name, f"{title}, last block")
            draw_blocks(right, frame, stages, name, f"{title}, by block")
        grid[0, 1].legend(loc="lower left", bbox_to_anchor=(0, 0.08))
    return output
