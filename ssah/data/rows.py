"""Prompt and text sets: rows of one shape, how they are divided, and composed refusals.

A study asks for named sets (:data:`SETS`); :mod:`ssah.data.sets` builds them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import SsahError
from ..core.store import Handle

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


def read_set(sets: Handle, name: str) -> list[Row]:
    """The rows of one set; :class:`SsahError` where this source does not have it."""
    path = sets.path(f"{name}.jsonl")
    if name not in SETS | OPTIONAL_SETS or not path.exists():
        have = ", ".join(sorted(p.stem for p in sets.folder.glob("*.jsonl")))
        raise SsahError(f"This data source has no set '{name}' (it has {have}).")
    return [Row(**{**record, "choices": tuple(record["choices"])}) for record in read_jsonl(path)]
