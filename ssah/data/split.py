"""Near-duplicates, and how prompts are divided into parts."""

from __future__ import annotations

import itertools
import logging
import random
import re
from collections.abc import Mapping, Sequence

from ..core.errors import SsahError
from .rows import Row
from .settings import DataConfig

logger = logging.getLogger(__name__)

_FUNCTION_WORDS = frozenset(
    "a an the to of and in on for with that how or by from is as at it be their other into who "
    "such using".split()
)

#: Scripts that put no space between words: there, pairs of characters stand for words.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"

#: More rows than that are compared for equality only: comparing each with each takes too long.
COMPARED = 5000


def content_words(text: str) -> frozenset[str]:
    """The words of a text that carry its meaning, in any script; numbers are words."""
    found: list[str] = []
    for word in re.findall(r"(?:[^\W\d_]|['\u0300-\u036f\u0900-\u0dff])+|\d+", text.lower()):
        for unspaced, spaced in re.findall(f"([{_UNSPACED}]+)|([^{_UNSPACED}]+)", word):
            pairs = [unspaced[i : i + 2] for i in range(max(len(unspaced) - 1, 1))]
            found += pairs if unspaced else [spaced]
    return frozenset(found) - _FUNCTION_WORDS


def normalised(text: str) -> str:
    """A text without case and runs of spaces: what is equal then is the same prompt."""
    return " ".join(text.casefold().split())


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard similarity of two token sets."""
    return len(a & b) / max(len(a | b), 1)


def cluster(texts: Sequence[str], threshold: float) -> list[list[int]]:
    """Group texts that are linked by pairs at least ``threshold`` similar (single linkage), and
    those that are equal."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(texts)
    first: dict[str, int] = {}
    links = [(i, first.setdefault(normalised(text), i)) for i, text in enumerate(texts)]
    if count <= COMPARED:
        words = enumerate(map(content_words, texts))
        pairs = itertools.combinations(words, 2)
        links += [(i, j) for (i, a), (j, b) in pairs if similarity(a, b) >= threshold]
    else:
        logger.info(
            "%d prompts are too many to compare each with each: only equal ones are kept together",
            count,
        )
    ends = [i for i, _ in links], [j for _, j in links]
    linked = coo_array(([True] * len(links), ends), (count, count))
    groups: dict[int, list[int]] = {}
    for i, group in enumerate(connected_components(linked, directed=False)[1]):
        groups.setdefault(group, []).append(i)
    return list(groups.values())


def grouped(rows: Sequence[Row], near_duplicate: float) -> list[list[Row]]:
    """Rows whose prompts nearly equal each other, together: none of them may go another way."""
    return [[rows[i] for i in group] for group in cluster([r.prompt for r in rows], near_duplicate)]


def divide_harmful(rows: list[Row], config: DataConfig) -> dict[str, list[Row]]:
    """Evaluation, search, align and (the rest) attribution, near-duplicates kept together.

    Parts are filled cluster by cluster to exactly their size (where none is set: a fifth, an eighth
    and three tenths of all); what does not fit into a part goes on to the next one, whole.
    """
    wanted = {"evaluation": config.evaluation, "search": config.search, "align": config.align}
    usual = {"evaluation": 0.2, "search": 0.125, "align": 0.3}
    sizes = {
        name: round(usual[name] * len(rows)) if size is None else size
        for name, size in wanted.items()
    }
    if sum(sizes.values()) >= len(rows):
        raise SsahError(
            f"data.evaluation + data.search + data.align = {sum(sizes.values())} leaves none of "
            f"the {len(rows)} harmful prompts for attribution: make them smaller."
        )
    clusters = grouped(rows, config.near_duplicate)
    random.Random(config.split_seed).shuffle(clusters)
    parts: dict[str, list[Row]] = {}
    for name, size in sizes.items():
        part: list[Row] = []
        left = []
        for group in clusters:
            if len(part) + len(group) <= size:
                part += group
            else:
                left.append(group)
        if len(part) < size:
            raise SsahError(
                f"Only {len(part)} of data.{name}={size} prompts can be set aside without tearing "
                "near-duplicates apart: ask for fewer or raise data.near_duplicate."
            )
        parts[f"harmful_{name}"], clusters = part, left
    parts["harmful_attribution"] = [row for group in clusters for row in group]
    return parts


def divide_benign(groups: list[list[Row]]) -> dict[str, list[Row]]:
    """A quarter for evaluation, the rest in turns to alignment and attribution, by
    :func:`grouped`."""
    parts: dict[str, list[Row]] = {"evaluation": [], "align": [], "attribution": []}
    turns = (
        "evaluation", "align", "attribution", "align",
        "evaluation", "attribution", "align", "attribution",
    )  # fmt: skip
    placed = 0
    for group in groups:
        parts[turns[placed % len(turns)]] += group
        placed += len(group)
    return {f"benign_{name}": part for name, part in parts.items()}


def require_disjoint(sets: Mapping[str, Sequence[Row]]) -> None:
    """Raise :class:`SsahError` where a prompt is in two parts of the harmful or the benign ones."""
    for kind in ("harmful_", "benign_"):
        parts = {n: {normalised(r.prompt) for r in sets[n]} for n in sets if n.startswith(kind)}
        for (one, first), (other, second) in itertools.combinations(parts.items(), 2):
            shared = first & second
            if shared:
                raise SsahError(
                    f"{one} and {other} have {len(shared)} prompts in common, so that numbers "
                    "would be measured on prompts that the model has seen: leave them out of one."
                )
