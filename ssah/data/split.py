"""Near-duplicates, and how prompts are divided into parts."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from ..core.errors import SsahError
from .rows import Row
from .settings import DataConfig

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
