"""What tables are made of: pooled estimates, counted numbers, and the paper's rows."""

from __future__ import annotations

import pandas as pd

from ..core.paths import reference_csv
from ..evaluate.stats import Estimate, pool
from .render import format_estimate


def same(value: float, n: int) -> Estimate:
    """A number that is counted, not estimated."""
    return Estimate(value, value, value, n)


def pooled(frame: pd.DataFrame, metric: str) -> Estimate | None:
    """The mean over seeds and draws of one metric of one arm."""
    found = frame[frame["metric"] == metric]
    if found.empty:
        return None
    return pool([Estimate(*row) for row in found[["value", "low", "high", "n"]].to_numpy()])


def arm_rows(
    frame: pd.DataFrame, model: str, setting: str, columns: dict[str, tuple[str, int]]
) -> pd.DataFrame:
    """One row for each arm, seeds and draws pooled: ``columns`` are name -> (metric, digits)."""
    rows = []
    for arm, group in frame.groupby("arm", sort=False):
        row = {"model": model, setting: str(arm)}
        for column, (metric, digits) in columns.items():
            estimate = pooled(group, metric)
            if estimate is not None:
                counted = estimate.low == estimate.high
                number = f"{estimate.value:.{digits}f}"
                row[column] = number if counted else format_estimate(estimate, digits)
        rows.append(row)
    return pd.DataFrame(rows)


def paper_rows(
    artefact: str, columns: dict[tuple[str, str], str], setting: str, digits: int = 1
) -> pd.DataFrame:
    """The paper's rows of a table: one for each model and setting.

    ``columns`` say where the value of a benchmark and metric goes; ``setting`` names the column of
    the paper's setting.
    """
    paper = pd.read_csv(reference_csv())
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for record in paper[paper["artefact"] == artefact].to_dict("records"):
        column = columns.get((record["benchmark"], record["metric"]))
        if column:
            row = rows.setdefault((record["model"], record["setting"]), {})
            row[column] = f"{record['value']:.{digits}f}"
    return pd.DataFrame(
        [{"model": f"paper: {model}", setting: name, **row} for (model, name), row in rows.items()]
    )
