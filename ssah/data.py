"""Prompt and text sets: rows of one shape, how they are divided, and composed refusals.

A study asks for named sets (:data:`SETS`); :mod:`ssah.sources` builds them.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import DataConfig
from .errors import SsahError
from .paths import RESOURCES
from .store import Run

#: Set name -> what it is for. No prompt of an evaluation set is used for anything else.
SETS = {
    "harmful_align": "prompts that the aligned model is taught to refuse",
    "harmful_attribution": "prompts of the safety set, answered by the model itself",
    "harmful_search": "prompts that choose the shares (ablation search, sweep)",
    "harmful_evaluation": "held-out prompts that ASR is reported on",
    "harmbench": "held-out harm of another author",
    "do_not_answer": "held-out harm of another author",
    "benign_align": "instructions mixed into alignment",
    "benign_attribution": "instructions of the utility set",
    "benign_evaluation": "instructions that over-refusal is measured on",
    "borderline": "harmless prompts that look dangerous",
    "dialogues": "benign dialogues for fine-tuning",
    "heldout_text": "benign answers that perplexity is measured on",
    "trivia": "multiple-choice questions",
    "arithmetic": "word problems with a number as answer",
    "refusal_labels": "answers labelled as refusal or compliance by people",
}

#: Sets that only the user's own source may have; others make do without.
OPTIONAL_SETS = {
    "instructions": "benign instructions with answers for fine-tuning",
    "hexphi": "held-out harm of another author (HEx-PHI, which its authors give out on request)",
}


@dataclass(frozen=True)
class Row:
    """One item of a set."""

    id: str
    prompt: str
    source: str
    licence: str
    category: str = ""
    response: str | None = None
    choices: tuple[str, ...] = ()


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Dataclass instances or dictionaries, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            record = row if isinstance(row, dict) else dataclasses.asdict(row)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_set(sets: Run, name: str) -> list[Row]:
    """The rows of one set; :class:`SsahError` where this source does not have it."""
    path = sets.path(f"{name}.jsonl")
    if name not in SETS | OPTIONAL_SETS or not path.exists():
        have = ", ".join(sorted(p.stem for p in sets.folder.glob("*.jsonl")))
        raise SsahError(f"This data source has no set '{name}' (it has {have}).")
    return [Row(**{**record, "choices": tuple(record["choices"])}) for record in read_jsonl(path)]


# --- near-duplicates and parts ---------------------------------------------------------------

_FUNCTION_WORDS = frozenset(
    "a an the to of and in on for with that how or by from is as at it be their other into who "
    "such using".split()
)


def content_words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z']+", text.lower())) - _FUNCTION_WORDS


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard similarity of two token sets."""
    return len(a & b) / max(len(a | b), 1)


def cluster(texts: Sequence[str], threshold: float) -> list[list[int]]:
    """Group texts that are linked by pairs at least ``threshold`` similar (single linkage)."""
    words = [content_words(t) for t in texts]
    parent = list(range(len(texts)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i in range(len(texts)):
        for j in range(i):
            if similarity(words[i], words[j]) >= threshold:
                parent[find(i)] = find(j)
    groups: dict[int, list[int]] = {}
    for i in range(len(texts)):
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())


def divide_harmful(rows: list[Row], config: DataConfig) -> dict[str, list[Row]]:
    """Evaluation, search, align and (the rest) attribution, near-duplicates kept together.

    Parts are filled cluster by cluster to exactly their size; what does not fit into a part goes
    on to the next one, whole.
    """
    sizes = {"evaluation": config.evaluation, "search": config.search, "align": config.align}
    if sum(sizes.values()) >= len(rows):
        raise SsahError(
            f"data.evaluation + data.search + data.align = {sum(sizes.values())} leaves none of "
            f"the {len(rows)} harmful prompts for attribution: make them smaller."
        )
    clusters = cluster([row.prompt for row in rows], config.near_duplicate)
    random.Random(config.split_seed).shuffle(clusters)
    parts: dict[str, list[Row]] = {}
    for name, size in sizes.items():
        part: list[Row] = []
        left = []
        for group in clusters:
            if len(part) + len(group) <= size:
                part += [rows[i] for i in group]
            else:
                left.append(group)
        if len(part) < size:
            raise SsahError(
                f"Only {len(part)} of data.{name}={size} prompts can be set aside without tearing "
                "near-duplicates apart: ask for fewer or raise data.near_duplicate."
            )
        parts[f"harmful_{name}"], clusters = part, left
    parts["harmful_attribution"] = [rows[i] for group in clusters for i in group]
    return parts


def divide_benign(rows: list[Row]) -> dict[str, list[Row]]:
    """A quarter for evaluation, the rest in turns to alignment and attribution."""
    return {
        "benign_evaluation": rows[::4],
        "benign_align": [r for i, r in enumerate(rows) if i % 8 in (1, 3, 6)],
        "benign_attribution": [r for i, r in enumerate(rows) if i % 8 in (2, 5, 7)],
    }


# --- refusals --------------------------------------------------------------------------------


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
