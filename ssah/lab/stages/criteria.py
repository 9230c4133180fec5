"""What rules look at beside attribution: gradients, weights, and the criteria of other papers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors.torch import load_file, save_file

from ...core.store import Handle
from ...data.rows import Row
from ...scoring.conflict import gradient_conflict
from ...scoring.contributions import contributions
from ...scoring.contributions import places as places_by
from ...scoring.safety_layers import angular_gap, last_states, where_it_grows
from ...scoring.selectors import magnitude, moved
from ...scoring.sensitivity import expected_impact, fisher_information
from ...text.batches import Batch, dialogue_batches
from ...text.chat import encode_dialogue
from ...units.families import UnitKind
from ..config import AttributionConfig
from ..lab import Lab
from ..specs import GIVEN, Model
from ..stage import stage
from .attribution import Purpose, Scores, encoded, own_answers
from .lessons import Lesson

# --- gradient conflict -----------------------------------------------------------------------


@stage("conflict", version=2)
def _conflict(
    lab: Lab,
    folder: Path,
    model: Model,
    learned: Lesson,
    rows: tuple[Row, ...],
    refusals: Handle,
    config: AttributionConfig,
    batch_size: int,
) -> None:
    """``conflict.safetensors``: what a first step on a lesson does to the loss of refusals."""
    layout = lab.layout_of(cast(UnitKind, config.unit_kind))
    pairs = learned.taught(lab), encoded(lab, rows, refusals, config)
    training, safety = (dialogue_batches(part, batch_size) for part in pairs)
    with lab.use(model) as loaded:
        found = gradient_conflict(loaded, layout, training, safety)
    save_file(found, folder / "conflict.safetensors")


def conflict(lab: Lab, learned: Lesson) -> Scores:
    """How much a first step on a lesson would hurt the aligned model's refusals, by unit."""
    rows, refusals = own_answers(lab, "safety", lab.aligned)
    config = lab.config.attribution
    size = lab.config.finetune.micro_batch_size
    run = _conflict(lab, lab.aligned, learned, rows, refusals, config, size)
    return load_file(run.path("conflict.safetensors"))


# --- weights ---------------------------------------------------------------------------------


@stage("weights", version=1)
def _weights(
    lab: Lab, folder: Path, before: Model, after: Model, unit_kind: UnitKind, measure: str
) -> None:
    """``weights.safetensors``: a number for each unit, of the weights alone."""
    layout = lab.layout_of(unit_kind)
    with lab.use(before) as old, lab.use(after) as new:
        given, aligned = dict(old.named_parameters()), dict(new.named_parameters())
        found = moved(layout, given, aligned) if measure == "moved" else magnitude(layout, aligned)
    save_file(found, folder / "weights.safetensors")


def weights_of_units(lab: Lab, measure: Literal["magnitude", "moved"]) -> Scores:
    """The magnitude of the aligned model's units, or how far the alignment moved them."""
    run = _weights(lab, GIVEN, lab.aligned, lab.layout.unit_kind, measure)
    return load_file(run.path("weights.safetensors"))


# --- what other papers' rules look at --------------------------------------------------------

#: Share of the blocks that are safety layers: 9 of 32 in Llama-2 (the paper's Tables 9 and 10).
LAYERS_SHARE = 9 / 32


def _prompts(lab: Lab, rows: Sequence[Row], batch_size: int, side: str) -> Iterator[Batch]:
    """Prompts without answers. Counted are all tokens but the first: it takes the attention that
    nothing else does, and what units add there is of another size."""
    pairs = [encode_dialogue(lab.tokenizer, row.prompt, "", end=False) for row in rows]
    return dialogue_batches(pairs, batch_size, tokens="all", drop_first=True, side=side)


@stage("places", version=1)
def _places(
    lab: Lab,
    folder: Path,
    model: Model,
    rows: tuple[Row, ...],
    unit_kind: UnitKind,
    batch_size: int,
    label: str,
) -> None:
    """``places.safetensors``: by what each unit adds to its block's output on some prompts."""
    batches = _prompts(lab, rows, batch_size, "right")
    with lab.use(model) as loaded:
        found = contributions(loaded, lab.layout_of(unit_kind), batches)
    save_file(places_by(found), folder / "places.safetensors")


def places(lab: Lab, purpose: Purpose) -> Scores:
    """Places of the aligned model's units on the prompts that attribution uses."""
    rows, _ = own_answers(lab, purpose, lab.aligned)
    size = lab.config.attribution.batch_size
    run = _places(lab, lab.aligned, rows, lab.layout.unit_kind, size, label=purpose)
    return load_file(run.path("places.safetensors"))


_SENSITIVITY = {"ESI": expected_impact, "Fisher": fisher_information}


@stage("sensitivity", version=1)
def _sensitivity(
    lab: Lab,
    folder: Path,
    model: Model,
    rows: tuple[Row, ...],
    refusals: Handle,
    config: AttributionConfig,
    batch_size: int,
    measure: str,
) -> None:
    """``sensitivity.safetensors``: how the loss of refusals depends on each unit's weights."""
    layout = lab.layout_of(cast(UnitKind, config.unit_kind))
    batches = dialogue_batches(encoded(lab, rows, refusals, config), batch_size)
    with lab.use(model) as loaded:
        found = _SENSITIVITY[measure](loaded, layout, batches)
    save_file(found, folder / "sensitivity.safetensors")


def _of_refusals(lab: Lab, measure: str, batch_size: int) -> Scores:
    rows, refusals = own_answers(lab, "safety", lab.aligned)
    config = lab.config.attribution
    run = _sensitivity(lab, lab.aligned, rows, refusals, config, batch_size, measure)
    return load_file(run.path("sensitivity.safetensors"))


def impact(lab: Lab) -> Scores:
    """Expected safety impact of the aligned model's units, on its refusals."""
    return _of_refusals(lab, "ESI", lab.config.finetune.micro_batch_size)


def fisher(lab: Lab) -> Scores:
    """Fisher information of the aligned model's refusals, by unit."""
    return _of_refusals(lab, "Fisher", 1)


@stage("angles", version=1)
def _angles(
    lab: Lab,
    folder: Path,
    model: Model,
    harmless: tuple[Row, ...],
    harmful: tuple[Row, ...],
    batch_size: int,
) -> None:
    """``gap.json``: degrees between harmless and harmful prompts beyond those among harmless ones,
    by block."""
    with lab.use(model) as loaded:
        states = [
            last_states(loaded, _prompts(lab, rows, batch_size, "left"))
            for rows in (harmless, harmful)
        ]
    (folder / "gap.json").write_text(json.dumps(angular_gap(*states).tolist()))


def safety_layers(lab: Lab) -> tuple[list[float], range]:
    """The aligned model's angular gap in each block, and the blocks, from 0, in which it grows
    most: the paper's share of all of them."""
    harmless, _ = own_answers(lab, "utility", lab.aligned)
    harmful, _ = own_answers(lab, "safety", lab.aligned)
    run = _angles(lab, lab.aligned, harmless, harmful, lab.config.attribution.batch_size)
    gap = run.json("gap.json")
    width = max(1, round(LAYERS_SHARE * len(gap)))
    return gap, where_it_grows(torch.tensor(gap), width)
