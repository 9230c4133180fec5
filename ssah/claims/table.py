"""The claims table: the paper's number, the published run, this run, and a verdict."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pandas as pd

from ..artefacts.pick import format_estimate, paper, pooled
from ..core.files import write_atomically
from ..core.paths import results_root
from ..evaluate.stats import Estimate
from ..lab.table import matching, read_table

#: Columns of a claim that say which measurement decides it. ``block`` may be ``last`` or ``none``;
#: a text that ends in ``*`` stands for all that begin so.
_SUBJECT = [
    "metric", "base", "method", "rule", "like", "attack", "epoch", "setting", "set", "at",
    "against",
]  # fmt: skip


@functools.cache
def claims() -> tuple[dict[str, Any], ...]:
    """All claims, in the order of the table.

    A claim holds where the whole 95 % interval lies on the side of ``limit`` that ``direction``
    names (above or below), does not hold where it lies on the other, and is undecided otherwise.
    """
    frame = pd.read_csv(Path(__file__).with_name("claims.csv"), keep_default_na=False)
    frame["epoch"] = pd.to_numeric(frame["epoch"]).fillna(0).astype(int)
    frame["limit"] = frame["limit"].astype(float)
    return tuple(frame.to_dict("records"))


def behind(claim: dict[str, Any], table: pd.DataFrame) -> pd.DataFrame:
    """The measurements that decide a claim."""
    begun = {name for name in _SUBJECT if str(claim[name]).endswith("*")}
    chosen = matching(table, **{name: claim[name] for name in _SUBJECT if name not in begun})
    for name in begun:
        chosen = chosen[chosen[name].str.startswith(claim[name][:-1])]
    if claim["block"] == "last" and len(chosen):
        return chosen[chosen["block"] == chosen["block"].max()]
    return chosen[chosen["block"].isna()] if claim["block"] == "none" else chosen


def verdict(claim: dict[str, Any], estimate: Estimate) -> str:
    """Whether a claim holds."""
    limit = claim["limit"]
    if claim["direction"] == "above":
        holds, fails = estimate.low > limit, estimate.high <= limit
    else:
        holds, fails = estimate.high < limit, estimate.low >= limit
    return "holds" if holds else "does not hold" if fails else "undecided"


def _paper_number(claim: dict[str, Any]) -> float | None:
    """What the paper's numbers make of it."""
    if not claim["paper"]:
        return None
    printed = paper(claim["artefact"], claim["paper_model"])

    def number(name: str) -> float:
        setting, _, metric = name.rpartition("/")
        return printed[setting, metric]

    value = number(claim["paper"])
    if claim["paper_minus"]:
        value -= number(claim["paper_minus"])
    return value / number(claim["paper_over"]) if claim["paper_over"] else value


def _number(rows: pd.DataFrame, seeds: set[int]) -> str:
    """The estimate as text, with its seeds where the table has more than it has."""
    estimate, own = pooled(rows), set(rows["seed"])
    if estimate is None:
        return ""
    some = f" (seed {', '.join(map(str, sorted(own)))})" if own != seeds else ""
    return format_estimate(estimate, 2) + some


def claims_table(results: Path) -> pd.DataFrame:
    """All claims with numbers as text; ``verdict`` is on this run (else on the published one)."""
    published = read_table(results_root() / "published")
    own = read_table(results) if results != results_root() / "published" else published.head(0)
    rows = []
    for claim in claims():
        found = {"published": behind(claim, published), "this run": behind(claim, own)}
        theirs, ours = (pooled(part) for part in found.values())
        decisive, agrees = ours or theirs, ""
        if ours and theirs:
            agrees = "yes" if ours.low <= theirs.high and theirs.low <= ours.high else "no"
        printed = _paper_number(claim)
        rows.append(
            {
                "claim": claim["id"],
                "artefact": claim["artefact"],
                "text": claim["sentence"],
                "unit": claim["unit"],
                "paper": "not measured" if printed is None else f"{printed:.2f}",
                "published": _number(found["published"], set(published["seed"])),
                "this run": _number(found["this run"], set(own["seed"])),
                "agrees": agrees,
                "verdict": verdict(claim, decisive) if decisive else "not run",
            }
        )
    return pd.DataFrame(rows)


def update_claims(results: Path) -> pd.DataFrame:
    """Write ``claims.csv`` of a results folder."""
    table = claims_table(results)
    write_atomically(results / "claims.csv", lambda path: table.to_csv(path, index=False))
    return table


def styled(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that a reader wants to see."""
    return table[["text", "unit", "paper", "published", "this run", "agrees", "verdict"]]
