"""The table of measurements: types, merging, writing."""

from __future__ import annotations

import itertools

import pandas as pd
import pytest

from ssah.core.errors import SsahError
from ssah.lab.table import (
    COLUMNS,
    merged,
    read_shown,
    read_table,
    same_subjects,
    typed,
    updated,
    write_table,
)


def row(seed: int, value: float, **columns) -> dict:
    plain = {"model": "m", "base": "aligned", "metric": "ASR", "n": 10, "runs": "r", "commits": "c"}
    return {**plain, "seed": seed, "value": value, "low": value - 1, "high": value + 1, **columns}


def table(*rows: dict) -> pd.DataFrame:
    return typed(pd.DataFrame(rows))


def test_all_columns_are_there_with_their_types():
    found = table(row(0, 1.0, draw=1), row(1, 2.0, block=3, p=0.5))
    assert list(found.columns) == COLUMNS
    assert found["draw"].tolist() == [1, pd.NA] or found["draw"].isna().tolist() == [False, True]
    assert found["block"].dtype == "Int64"
    assert found["rule"].tolist() == ["", ""]
    assert typed(pd.DataFrame()).empty


def test_seeds_measured_apart_equal_seeds_measured_together_in_any_order_and_with_overlap():
    rows = [row(seed, seed + draw / 10, draw=draw) for seed in range(3) for draw in range(2)]
    together = merged([table(*rows)])
    parts = [table(*rows[:4]), table(*rows[2:]), table(rows[0])]
    for order in itertools.permutations(parts):
        found = merged(order).sort_values(["seed", "draw"], ignore_index=True)
        pd.testing.assert_frame_equal(found, together)


def test_runs_of_different_configurations_are_not_merged():
    one, other = table(row(0, 1.0), row(1, 3.0)), table(row(0, 2.0, runs="another"))
    with pytest.raises(SsahError, match=r"1 measurements are in several tables.*metric ASR"):
        merged([one, other])


def test_new_measurements_take_the_place_of_old_ones():
    old = table(row(0, 1.0), row(1, 2.0))
    new = table(row(1, 5.0), row(1, 6.0, rule="ESU"))
    found = updated(old, new)
    assert found["value"].tolist() == [1.0, 5.0, 6.0]
    assert updated(found, new)["value"].tolist() == [1.0, 5.0, 6.0]


def test_a_table_survives_writing(tmp_path):
    found = table(row(0, 1 / 3, draw=1), row(1, 2.0, block=3, p=0.5, against="whole"))
    write_table(found, tmp_path)
    pd.testing.assert_frame_equal(read_table(tmp_path), found)
    assert read_table(tmp_path / "nothing").empty


def test_what_an_artefact_shows_is_found_again_where_a_text_looks_like_a_number(tmp_path):
    found = table(row(0, 1.0, setting="1"), row(1, 2.0, setting="1"))
    found.to_csv(tmp_path / "shown.csv", index=False)
    assert len(same_subjects(found, read_shown(tmp_path / "shown.csv"))) == 2
