"""What this project holds or generates: harmless prompts, refusals, arithmetic, the toy sets."""

from __future__ import annotations

import dataclasses
import json
import random

from ..core.paths import RESOURCES
from .rows import Row, read_jsonl
from .settings import DataConfig
from .split import divide_benign, divide_harmful, grouped
from .toy import toy_prompts


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
    prompts = toy_prompts(4 * (config.evaluation or 24), config.split_seed)
    harmful = [
        Row(f"toy-{i:03}", prompt, "ssah", "MIT", category)
        for i, (prompt, category) in enumerate(prompts)
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


def compose_refusal(category: str, rng: random.Random, safe_alternative: float) -> str:
    """A natural refusal: an opening, a reason that fits the harm category, sometimes an offer."""
    material = json.loads((RESOURCES / "refusals.json").read_text())
    fitting = material["categories"].get(category) or rng.choice(
        [material["categories"][name] for name in sorted(material["categories"])]
    )
    parts = [rng.choice(material["openings"]), rng.choice(fitting["reasons"])]
    if rng.random() < safe_alternative:
        parts.append(rng.choice(fitting["alternatives"]))
    return " ".join(parts)


# --- arithmetic ------------------------------------------------------------------------------

_NAMES = "Ada Ben Cleo Dan Eva Finn Gita Hugo Iris Jon Kemi Leo Mona Nils Olga Pete".split()
_THINGS = "apples stamps books marbles shells pencils tickets coins buttons cookies".split()


def _gain(rng: random.Random, name: str, things: str) -> tuple[str, str, int]:
    a, b = rng.randint(2, 30), rng.randint(2, 20)
    question = f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?"
    return question, f"{a} + {b} = {a + b}.", a + b


def _loss(rng: random.Random, name: str, things: str) -> tuple[str, str, int]:
    a = rng.randint(8, 40)
    b = rng.randint(2, a - 2)
    question = f"{name} had {a} {things} and gave away {b}. How many {things} are left?"
    return question, f"{a} - {b} = {a - b}.", a - b


def _groups(rng: random.Random, name: str, things: str) -> tuple[str, str, int]:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    question = f"{name} fills {a} boxes with {b} {things} each. How many {things} is that in all?"
    return question, f"{a} * {b} = {a * b}.", a * b


def _share(rng: random.Random, name: str, things: str) -> tuple[str, str, int]:
    a, b = rng.randint(2, 6), rng.randint(2, 9)
    question = f"{name} shares {a * b} {things} equally among {a} friends. How many does each get?"
    return question, f"{a * b} / {a} = {b}.", b


def _two_steps(rng: random.Random, name: str, things: str) -> tuple[str, str, int]:
    a, b, c = rng.randint(3, 20), rng.randint(2, 10), rng.randint(1, 5)
    question = (
        f"{name} has {a} {things}, buys {b} more and then loses {c}. "
        f"How many {things} does {name} have at the end?"
    )
    return question, f"{a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}.", a + b - c


def arithmetic_problems(count: int, seed: int) -> list[tuple[str, str, str]]:
    """``count`` different problems as (question, worked answer, final number)."""
    rng = random.Random(seed)
    makers = (_gain, _loss, _groups, _share, _two_steps)
    problems: dict[str, tuple[str, str, str]] = {}
    while len(problems) < count:
        make = makers[len(problems) % len(makers)]
        question, steps, answer = make(rng, rng.choice(_NAMES), rng.choice(_THINGS))
        problems[question] = (question, f"{steps} The answer is {answer}.", str(answer))
    return list(problems.values())
