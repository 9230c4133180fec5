"""Utility: perplexity, what was learned, accuracy, and how far a model has drifted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...core.store import Handle
from ...data.rows import Row
from ...evaluate.likelihood import continuation_losses, divergences
from ...evaluate.stats import Estimate, perplexity
from ...evaluate.tasks import exact_match, lm_eval_outcomes, multiple_choice, text_losses
from ...text.chat import encode_dialogue
from ..lab import Lab
from ..specs import GIVEN, Model
from ..stage import stage
from .answers import answers_to
from .lessons import Lesson, heldout

#: Token counts and summed losses of some texts.
Losses = tuple[list[int], list[float]]


@stage("perplexity", version=2)
def _text_losses(
    lab: Lab, folder: Path, model: Model, rows: tuple[Row, ...], batch_size: int
) -> None:
    """``losses.json``: of held-out answers given their prompts."""
    with lab.use(model) as loaded:
        found = text_losses(loaded, lab.tokenizer, rows, batch_size)
    (folder / "losses.json").write_text(json.dumps(found))


def held_out_texts(lab: Lab, model: Model) -> Losses:
    """Losses of a model on held-out answers."""
    config = lab.config.evaluate
    rows = lab.first("heldout_text", config.perplexity_rows)
    return tuple(_text_losses(lab, model, rows, config.batch_size).json("losses.json"))


def perplexity_ratio(lab: Lab, model: Model, base: Model) -> Estimate:
    """Perplexity relative to another model's, text by text."""
    counts, losses = held_out_texts(lab, model)
    _, whole = held_out_texts(lab, base)
    return perplexity(counts, [a - b for a, b in zip(losses, whole, strict=True)])


@stage("heldout", version=2)
def _lesson_losses(
    lab: Lab, folder: Path, model: Model, rows: Lesson, batch_size: int, label: str
) -> None:
    """``losses.json``: of held-out rows of an attack's kind."""
    pairs = rows.taught(lab)
    with lab.use(model) as loaded:
        losses = continuation_losses(loaded, pairs, batch_size)
    (folder / "losses.json").write_text(json.dumps([[len(r) for _, r in pairs], losses]))


def attack_losses(lab: Lab, model: Model, attack: str) -> Losses:
    """Losses of a model on the held-out rows of an attack."""
    batch_size = lab.config.evaluate.batch_size
    run = _lesson_losses(lab, model, heldout(lab, attack), batch_size, label=attack)
    return tuple(run.json("losses.json"))


# --- tasks -----------------------------------------------------------------------------------


@stage("trivia", version=2)
def _trivia(lab: Lab, folder: Path, model: Model, rows: tuple[Row, ...], batch_size: int) -> None:
    """``right.json``: which multiple-choice questions are answered rightly."""
    with lab.use(model) as loaded:
        right = multiple_choice(loaded, lab.tokenizer, rows, batch_size)
    (folder / "right.json").write_text(json.dumps(right))


@stage("arithmetic", version=3)
def _arithmetic(
    lab: Lab, folder: Path, model: Model, rows: tuple[Row, ...], batch_size: int
) -> None:
    """``right.json``: which word problems are."""
    with lab.use(model) as loaded:
        right = exact_match(loaded, lab.tokenizer, rows, batch_size)
    (folder / "right.json").write_text(json.dumps(right))


@stage("lm_eval", version=2)
def _lm_eval(
    lab: Lab, folder: Path, model: Model, tasks: Sequence[str], limit: int | None, batch_size: int
) -> None:
    """``right.json``: by task of lm-evaluation-harness."""
    with lab.use(model) as loaded:
        right = lm_eval_outcomes(loaded, lab.tokenizer, tasks, limit, batch_size)
    (folder / "right.json").write_text(json.dumps(right))


def task_outcomes(lab: Lab, model: Model) -> dict[str, list[bool]]:
    """Right or wrong by item, by task."""
    config = lab.config.evaluate
    if config.utility == "lm_eval":
        run = _lm_eval(lab, model, config.lm_eval_tasks, config.lm_eval_limit, config.batch_size)
        return run.json("right.json")
    runs: dict[str, Handle] = {}
    if lab.has("trivia"):  # the user's own files have no multiple choice
        rows = lab.first("trivia", config.trivia_items)
        runs["trivia"] = _trivia(lab, model, rows, config.batch_size)
    sums = lab.first("arithmetic", config.arithmetic_items)
    runs["arithmetic"] = _arithmetic(lab, model, sums, config.batch_size)
    return {task: run.json("right.json") for task, run in runs.items()}


# --- drift -----------------------------------------------------------------------------------


@stage("drift", version=2)
def _drift(
    lab: Lab,
    folder: Path,
    model: Model,
    base: Model,
    rows: tuple[Row, ...],
    said: Handle,
    batch_size: int,
) -> None:
    """``drift.json``: KL(base || model) in nats per token, by prompt."""
    pairs = [
        encode_dialogue(lab.tokenizer, row.prompt, text, end=False)
        for row, text in zip(rows, said.json("answers.json"), strict=True)
    ]
    with lab.use(base) as reference, lab.use(model) as loaded:
        found = divergences(reference, loaded, pairs, batch_size)
    (folder / "drift.json").write_text(json.dumps(found))


def drift(lab: Lab, model: Model) -> list[float]:
    """Nats per token by which a model's distribution left the given model's, by prompt:
    KL(given || model) over the given model's own answers to benign prompts."""
    rows, config = lab.rows("benign_evaluation"), lab.config.evaluate
    if model == GIVEN:  # from itself
        return [0.0] * len(rows)
    said = answers_to(lab, GIVEN, rows, config.max_new_tokens)
    return _drift(lab, model, GIVEN, rows, said, config.batch_size).json("drift.json")
