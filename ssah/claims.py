"""The claims table: the paper's number, the published run, this run, and a verdict for each."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from .artefacts.render import format_estimate, write_atomically
from .evaluate.stats import Estimate, pool
from .paths import reference_csv, results_root
from .statements import CLAIMS, Claim


def measured(claim: Claim, results: Path) -> Estimate | None:
    """The estimate behind a claim from a results folder's metrics, seeds pooled; None if absent."""
    path = results / "metrics.csv"
    if not path.exists():
        return None
    frame = pd.read_csv(path)
    chosen = (frame["artefact"] == claim.artefact) & (frame["arm"] == claim.arm)
    found = frame[chosen & (frame["metric"] == claim.metric)]
    if found.empty:
        return None
    return pool([Estimate(*row) for row in found[["value", "low", "high", "n"]].to_numpy()])


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
                "published": format_estimate(published, 2),
                "this run": format_estimate(own, 2),
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
