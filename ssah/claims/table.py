"""The claims table: the paper's number, the published run, this run, and a verdict for each."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..artefacts.render import format_estimate
from ..core.files import write_atomically
from ..core.paths import reference_csv, results_root
from ..evaluate.stats import Estimate, pool
from . import CLAIMS, Claim


def measured(claim: Claim, results: Path) -> Estimate | None:
    """The estimate behind a claim from a results folder's metrics, seeds pooled; None if absent.

    A number that is counted has no interval: it gets the range over seeds.
    """
    found = _rows_behind(claim, _metrics(results))
    if found.empty:
        return None
    estimates = [Estimate(*row) for row in found[["value", "low", "high", "n"]].to_numpy()]
    values = [e.value for e in estimates]
    if all(e.low == e.high for e in estimates):
        return Estimate(sum(values) / len(values), min(values), max(values), estimates[0].n)
    return pool(estimates)


@dataclass(frozen=True)
class _Metrics:
    """All numbers of a results folder: rows by artefact, and the seeds."""

    rows: dict[str, pd.DataFrame]
    seeds: list[str]


def _metrics(results: Path) -> _Metrics:
    path = results / "metrics.csv"
    return _read(path, path.stat().st_mtime_ns) if path.exists() else _Metrics({}, [])


@functools.lru_cache(maxsize=2)
def _read(path: Path, _modified: int) -> _Metrics:
    """Read once for all claims, until the file changes."""
    frame = pd.read_csv(path, dtype={"seed": str})
    return _Metrics(dict(list(frame.groupby("artefact"))), _seeds(frame))


def _rows_behind(claim: Claim, metrics: _Metrics) -> pd.DataFrame:
    if claim.artefact not in metrics.rows:
        return pd.DataFrame()
    frame = metrics.rows[claim.artefact]
    return frame[(frame["arm"] == claim.arm) & (frame["metric"] == claim.metric)]


def _number(claim: Claim, results: Path) -> str:
    """The estimate as text, with its seeds where the results have more than it has."""
    estimate, metrics = measured(claim, results), _metrics(results)
    if estimate is None:
        return ""
    own = _seeds(_rows_behind(claim, metrics))
    return format_estimate(estimate, 2) + (
        f" (seed {', '.join(own)})" if own != metrics.seeds else ""
    )


def _seeds(frame: pd.DataFrame) -> list[str]:
    """Seeds of some rows; ``1.0`` is a draw of seed 1."""
    return sorted(set(frame["seed"].str.split(".").str[0]))


def _paper_number(claim: Claim, reference: pd.DataFrame) -> float | None:
    if claim.paper is None:
        return None
    # Attribute transfer names its models "Llama-2-7B-Chat -> dolly".
    model = reference["model"].str.split(" -> ").str[0] == claim.paper_model
    rows = reference[(reference["artefact"] == claim.artefact) & model]

    def value(setting: str, metric: str) -> float:
        match = rows[(rows["setting"] == setting) & (rows["metric"] == metric)]
        return float(match["value"].mean())

    return claim.paper(value)


def claims_table(results: Path) -> pd.DataFrame:
    """All claims with numbers as text; ``verdict`` is on this run (else on the published one)."""
    reference = pd.read_csv(reference_csv())
    published_folder = results_root() / "published"
    rows = []
    for claim in CLAIMS:
        paper = _paper_number(claim, reference)
        published = measured(claim, published_folder)
        own = measured(claim, results) if results != published_folder else None
        decisive = own or published
        agrees = ""
        if own and published:
            overlap = own.low <= published.high and published.low <= own.high
            agrees = "yes" if overlap else "no"
        rows.append(
            {
                "claim": claim.id,
                "artefact": claim.artefact,
                "text": claim.text,
                "unit": claim.unit,
                "paper": "not measured" if paper is None else f"{paper:.2f}",
                "published": _number(claim, published_folder),
                "this run": _number(claim, results) if own else "",
                "agrees": agrees,
                "verdict": claim.verdict(decisive) if decisive else "not run",
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
