"""What tables are made of: pooled estimates, counted numbers, and the paper's rows."""

from __future__ import annotations

import pandas as pd

from ..evaluate.stats import Estimate, pool
from ..paths import reference_csv


def same(value: float, n: int) -> Estimate:
    """A number that is counted, not estimated."""
    return Estimate(value, value, value, n)


def pooled(frame: pd.DataFrame, metric: str) -> Estimate | None:
    """The mean over seeds and draws of one metric of one arm."""
    found = frame[frame["metric"] == metric]
    if found.empty:
        return None
    return pool([Estimate(*row) for row in found[["value", "low", "high", "n"]].to_numpy()])


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
