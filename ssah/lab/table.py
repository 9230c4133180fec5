"""The table of measurements: one row for each number, with what made it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..core.errors import SsahError
from ..core.files import write_atomically

#: What a number is about; two rows that agree in these are the same measurement.
SUBJECT = [
    "model", "seed", "base", "method", "rule", "like", "attack", "epoch", "setting", "draw",
    "metric", "set", "block", "at", "against",
]  # fmt: skip

COLUMNS = [*SUBJECT, "value", "low", "high", "n", "p", "runs", "commits"]

_WHOLE, _REAL = ["seed", "epoch", "draw", "block", "n"], ["value", "low", "high", "p"]
_TEXT = [name for name in COLUMNS if name not in (*_WHOLE, *_REAL)]


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """All columns, in their order and with their types; texts that are missing are empty."""
    table = table.reindex(columns=COLUMNS)
    for name in _WHOLE:
        table[name] = table[name].astype("Int64")
    for name in _TEXT:
        table[name] = table[name].fillna("").astype(str)
    for name in _REAL:
        table[name] = table[name].astype(float)
    return table


def read_shown(path: Path) -> pd.DataFrame:
    """The measurements behind one artefact, as they were written beside it. A text that looks like
    a number, such as the strength "1", stays a text."""
    return typed(pd.read_csv(path, dtype=dict.fromkeys(_TEXT, str)))


def merged(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Rows of all tables; where several measured the same, the first one's.

    Raises :class:`SsahError` where the same was measured and another number was found: then the
    runs were not of one configuration.
    """
    whole = pd.concat([typed(table) for table in tables], ignore_index=True)
    keys = _subjects(whole)
    again = whole[keys.duplicated(keep=False)]
    spread = again.groupby(keys)["value"].agg(lambda v: v.max() - v.min())
    scale = again.groupby(keys)["value"].agg(lambda v: v.abs().max()).clip(lower=1)
    apart = spread[spread > 1e-6 * scale]
    if len(apart):
        what = dict(zip(SUBJECT, apart.index[0], strict=True))
        shown = ", ".join(f"{name} {value}" for name, value in what.items() if value != "")
        raise SsahError(
            f"{len(apart)} measurements are in several tables with different values, such as "
            f"{shown}: only runs of one configuration can be merged."
        )
    return whole[~keys.duplicated()].sort_values("seed", kind="stable", ignore_index=True)


def updated(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """The old table with new measurements in the place of those that they repeat."""
    old, new = typed(old), typed(new)
    again = _subjects(old).isin(set(_subjects(new)))
    return pd.concat([old[~again], new], ignore_index=True)


def same_subjects(table: pd.DataFrame, like: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table that measure what some row of another one measures."""
    return table[_subjects(table).isin(set(_subjects(like)))].reset_index(drop=True)


def matching(table: pd.DataFrame, **columns: Any) -> pd.DataFrame:
    """The rows that have these values in these columns."""
    first, *others = columns
    chosen = table[table[first] == columns[first]]  # few are left for the other columns
    kept = np.ones(len(chosen), bool)
    for name in others:
        kept &= (chosen[name] == columns[name]).to_numpy(bool, na_value=False)
    return chosen[kept]


def _subjects(table: pd.DataFrame) -> pd.Series:
    """What each row is about, as a tuple; what is missing is empty."""
    columns = (table[name].astype(object).where(table[name].notna(), "") for name in SUBJECT)
    return pd.Series(list(zip(*columns, strict=True)), index=table.index, dtype=object)


def write_table(table: pd.DataFrame, folder: Path) -> None:
    """``measurements.parquet``."""
    table = typed(table)
    write_atomically(
        folder / "measurements.parquet", lambda path: table.to_parquet(path, index=False)
    )


def read_table(folder: Path) -> pd.DataFrame:
    """What :func:`write_table` wrote; no rows where there is nothing yet."""
    path = folder / "measurements.parquet"
    if not path.exists():
        return typed(pd.DataFrame(columns=COLUMNS))
    return typed(pd.read_parquet(path))
