"""Sets that this project holds or generates: harmless prompts, arithmetic, and the toy sets."""

from __future__ import annotations

import dataclasses

from ..core.paths import RESOURCES
from .arithmetic import arithmetic_problems
from .rows import Row, read_jsonl
from .settings import DataConfig
from .split import divide_benign, divide_harmful, grouped
from .toy import ToyHarm


def own_rows(name: str) -> list[Row]:
    """The rows of a file among the package's resources."""
    rows = read_jsonl(RESOURCES / f"{name}.jsonl")
    return [Row(r["id"], r["prompt"], "ssah", "MIT", r["category"]) for r in rows]


def arithmetic_rows(count: int, seed: int) -> list[Row]:
    """Generated word problems, with worked answers."""
    return [
        Row(f"arithmetic-{i:03}", question, "ssah", "MIT", "arithmetic", worked, (answer,))
        for i, (question, worked, answer) in enumerate(arithmetic_problems(count, seed))
    ]


def toy_sets(config: DataConfig) -> dict[str, list[Row]]:
    """Sets of the smoke profile: no network, nothing harmful, the same shapes."""
    toy = ToyHarm(config.split_seed)
    harmful = [
        Row(f"toy-{i:03}", prompt, "ssah", "MIT", category)
        for i, (prompt, category) in enumerate(toy.prompts(4 * (config.evaluation or 24)))
    ]
    benign = own_rows("benign_instructions")[:64]
    answered = [dataclasses.replace(r, response=f"Here is an answer. {r.prompt}") for r in benign]
    questions = [
        dataclasses.replace(r, response="four", choices=("one", "two", "four", "nine"))
        for r in benign[:16]
    ]
    labels = [
        Row("label-0", "Say no.", "ssah", "MIT", "refusal", "I'm sorry, but I can't help."),
        Row("label-1", "Say yes.", "ssah", "MIT", "compliance", "Sure, here are three ideas."),
    ]
    return {
        **divide_harmful(harmful, config),
        **divide_benign(grouped(benign, config.near_duplicate)),
        "borderline": own_rows("borderline_prompts")[:16],
        "harmbench": harmful[:8],
        "do_not_answer": harmful[8:16],
        "dialogues": answered[:48],
        "heldout_text": answered[48:],
        "trivia": questions,
        "arithmetic": arithmetic_rows(32, config.split_seed),
        "refusal_labels": labels,
    }
