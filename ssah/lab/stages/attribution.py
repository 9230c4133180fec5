"""Attribution: what units say on a model's own answers, and the scores that come of it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from safetensors.torch import load_file, save_file
from torch import Tensor

from ...core.store import Handle
from ...data.rows import Row
from ...scoring.attribution import (
    ActivationStatistics,
    collect_statistics,
    sample_activations,
    unit_scores,
)
from ...scoring.settings import VarianceOver
from ...text.batches import Batch, dialogue_batches
from ...text.chat import encode_dialogue
from ...text.settings import Tokens
from ...training.ablation import fitted_constants
from ...units.families import UnitKind
from ...units.mask import UnitMask
from ..config import AttributionConfig
from ..lab import Lab
from ..specs import Model
from ..stage import stage
from .answers import answers_to

Purpose = Literal["safety", "utility"]
Scores = dict[str, Tensor]

#: Parts of the sampled sets that units can be scored on: half as many prompts, or harmful ones of
#: the largest category alone.
HALF, CATEGORY = PARTS = "half the samples", "one harm category"

_SOURCES = {"safety": "harmful_attribution", "utility": "benign_attribution"}


@stage("statistics", version=2)
def _statistics(
    lab: Lab,
    folder: Path,
    model: Model,
    rows: tuple[Row, ...],
    answers: Handle,
    config: AttributionConfig,
    label: str,
) -> None:
    """``statistics.safetensors``: activation statistics on some prompts and answers to them."""
    batches = _batches(lab, rows, answers, config)
    layout = lab.layout_of(cast(UnitKind, config.unit_kind))
    with lab.use(model) as loaded:
        over = cast(VarianceOver, config.variance_over)
        found = collect_statistics(loaded, layout, batches, over)
    found.save(folder / "statistics.safetensors")


@stage("activations", version=1)
def _activations(
    lab: Lab,
    folder: Path,
    model: Model,
    rows: tuple[Row, ...],
    answers: Handle,
    config: AttributionConfig,
    count: int,
) -> None:
    """``activations.safetensors``: of all units, at random tokens of a model's answers."""
    batches = list(_batches(lab, rows, answers, config))
    with lab.use(model) as loaded:
        found = sample_activations(loaded, lab.layout, batches, count, lab.seed)
    save_file(found, folder / "activations.safetensors")


#: Tokens that units are resampled from.
RESAMPLED = 512


def activations(lab: Lab) -> Handle:
    """What the aligned model's units say at random tokens of its answers to harmless prompts."""
    rows, said = own_answers(lab, "utility", lab.aligned)
    config = lab.config.attribution
    return _activations(lab, lab.aligned, rows, said, config, RESAMPLED)


@stage("fitted", version=1)
def _fitted(
    lab: Lab,
    folder: Path,
    model: Model,
    mask: UnitMask,
    statistics: Handle,
    rows: tuple[Row, ...],
    answers: Handle,
    config: AttributionConfig,
) -> None:
    """``constants.safetensors``: what some units say at every token where that does least harm."""
    batches = list(_batches(lab, rows, answers, config))
    found = ActivationStatistics.load(statistics.path("statistics.safetensors"))
    with lab.use(model) as loaded:
        layout = lab.layout_of(mask.unit_kind)
        constants = fitted_constants(loaded, layout, mask, batches, found.mean, found.variance)
    save_file(constants, folder / "constants.safetensors")


def fitted(lab: Lab, mask: UnitMask) -> Handle:
    """The constants in the place of some units with which the aligned model's own answers to
    harmless prompts are likeliest."""
    rows, said = own_answers(lab, "utility", lab.aligned)
    config = lab.config.attribution
    return _fitted(lab, lab.aligned, mask, statistics(lab, "utility"), rows, said, config)


@stage("scores", version=2)
def _scores(
    lab: Lab, folder: Path, model: Model, statistics: Sequence[Handle], unit_kind: UnitKind
) -> None:
    """``0.safetensors`` and so on: eq. 1 for every unit, on each of some statistics."""
    with lab.use(model) as loaded:
        for number, handle in enumerate(statistics):
            found = ActivationStatistics.load(handle.path("statistics.safetensors"))
            scores = unit_scores(loaded, lab.layout_of(unit_kind), found)
            save_file(scores, folder / f"{number}.safetensors")


def own_answers(
    lab: Lab, purpose: Purpose, author: Model, resample: int = 0, part: str = ""
) -> tuple[tuple[Row, ...], Handle]:
    """Prompts of a sampled set and what a model says to them; ``resample`` draws others, and
    ``part`` fewer (:data:`PARTS`)."""
    config, source = lab.config.attribution, _SOURCES[purpose]
    drawn = f"{source}#{resample}" if resample else source
    pool, count = lab.rows(source), config.samples
    if part == HALF:
        count //= 2
    elif part == CATEGORY and purpose == "safety":
        (largest, _), *_ = Counter(row.category for row in pool).most_common(1)
        pool = tuple(row for row in pool if row.category == largest)
    rows = lab.draw(drawn, pool, min(count, len(pool)) if part else count)
    return rows, answers_to(lab, author, rows, config.max_response_tokens)


def encoded(
    lab: Lab, rows: Sequence[Row], answers: Handle, config: AttributionConfig
) -> list[tuple[list[int], list[int]]]:
    """Prompt and response ids of what a model answers."""
    limit = config.max_response_tokens - 1
    return [
        encode_dialogue(lab.tokenizer, row.prompt, text, max_response_tokens=limit)
        for row, text in zip(rows, answers.json("answers.json"), strict=True)
    ]


def _batches(
    lab: Lab, rows: Sequence[Row], answers: Handle, config: AttributionConfig
) -> Iterator[Batch]:
    """Prompts and answers as they are read for attribution, with the tokens that count."""
    return dialogue_batches(
        encoded(lab, rows, answers, config),
        config.batch_size,
        tokens=cast(Tokens, config.tokens),
        drop_first=config.drop_first,
    )


def statistics(
    lab: Lab,
    purpose: Purpose,
    model: Model | None = None,
    author: Model | None = None,
    resample: int = 0,
    part: str = "",
    **changes: Any,
) -> Handle:
    """Activation statistics of a model (the aligned one) on an author's answers to a sampled set:
    the aligned model's, which for the safety set are its refusals. ``changes`` replace settings
    of ``attribution``."""
    model, author = model or lab.aligned, author or lab.aligned
    rows, said = own_answers(lab, purpose, author, resample, part)
    config = dataclasses.replace(lab.config.attribution, **changes)
    return _statistics(lab, model, rows, said, config, label=purpose)


def scores(
    lab: Lab, model: Model | None = None, resample: int = 0, part: str = "", **changes: Any
) -> tuple[Scores, Scores]:
    """I_S and I_U of a model's units by block, ``[units]``, on the aligned model's answers."""
    kind = changes.get("unit_kind", lab.config.attribution.unit_kind)
    found = [
        statistics(lab, purpose, model, None, resample, part, **changes)
        for purpose in ("safety", "utility")
    ]
    run = _scores(lab, model or lab.aligned, found, kind)
    return load_file(run.path("0.safetensors")), load_file(run.path("1.safetensors"))


def utility_scores(lab: Lab, model: Model) -> Scores:
    """I_U of a model's units on its own answers, as an unaligned model has it."""
    found = statistics(lab, "utility", model, model)
    run = _scores(lab, model, [found], cast(UnitKind, lab.config.attribution.unit_kind))
    return load_file(run.path("0.safetensors"))
