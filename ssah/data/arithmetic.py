"""Arithmetic word problems with worked answers, generated from a seed."""

from __future__ import annotations

import random

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
