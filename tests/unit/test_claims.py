"""Verdicts, agreement with the published run, and the numbers that the paper prints."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from ssah.artefacts import ARTEFACTS
from ssah.claims import table as claims
from ssah.claims.table import CLAIMS, Claim, claims_table, measured, styled, update_claims
from ssah.core.paths import reference_csv
from ssah.evaluate.stats import Estimate


def claim(limit: float, *, above: bool, **other) -> Claim:
    values = {"artefact": "table1", "text": "text", "arm": "ESU", "metric": "asr_rise"}
    return Claim(
        id="a_claim", limit=limit, above=above, unit="points", paper=None, **{**values, **other}
    )


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [
        (11, 20, "holds", "does not hold"),
        (0, 9, "does not hold", "holds"),
        (5, 15, "undecided", "undecided"),
        # An interval that touches the limit is not beyond it.
        (10, 20, "undecided", "does not hold"),
        (0, 10, "does not hold", "undecided"),
        (-30, -20, "does not hold", "holds"),
    ],
)
def test_verdicts(low, high, above, below):
    estimate = Estimate((low + high) / 2, low, high, 100)
    assert claim(10, above=True).verdict(estimate) == above
    assert claim(10, above=False).verdict(estimate) == below


def test_claims_are_unique_and_rest_on_artefacts():
    assert len({c.id for c in CLAIMS}) == len(CLAIMS)
    assert {c.artefact for c in CLAIMS} <= set(ARTEFACTS)
    assert all(c.text and c.unit for c in CLAIMS)


@pytest.mark.parametrize("checked", [c for c in CLAIMS if c.paper], ids=lambda c: c.id)
def test_the_papers_numbers_are_found(checked):
    number = claims._paper_number(checked, pd.read_csv(reference_csv()))
    assert number is not None
    assert math.isfinite(number)


def test_the_papers_numbers_for_table_1():
    reference = pd.read_csv(reference_csv())
    by_id = {c.id: c for c in CLAIMS}
    own = reference[(reference["artefact"] == "table1") & (reference["model"] == "Llama-2-7B-Chat")]

    def printed(setting: str, metric: str) -> float:
        found = own[(own["setting"] == setting) & (own["metric"] == metric)]["value"]
        assert len(found) == 1
        return found.item()

    asr = "asr_keyword_nosys"
    rise = printed("ESU", asr) - printed("dense", asr)
    assert claims._paper_number(by_id["esu_carry_refusals"], reference) == pytest.approx(rise)
    ratio = printed("EUU", "wikitext2_ppl") / printed("dense", "wikitext2_ppl")
    assert claims._paper_number(by_id["euu_carry_utility"], reference) == pytest.approx(ratio)


# --- results folders made by hand ------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(claims, "results_root", lambda: tmp_path)
    return tmp_path


def write_metrics(folder: Path, rows: list[tuple]) -> Path:
    folder.mkdir(parents=True)
    columns = ["artefact", "arm", "metric", "seed", "value", "low", "high", "n"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "metrics.csv", index=False)
    return folder


def rise(low: float, high: float, seed: int | str = 0, arm: str = "ESU") -> tuple:
    return ("table1", arm, "asr_rise", seed, (low + high) / 2, low, high, 100)


def row_of(table: pd.DataFrame, claim_id: str) -> pd.Series:
    return table.set_index("claim").loc[claim_id]


def test_seeds_are_pooled(root):
    folder = write_metrics(root / "laptop", [rise(20, 40), rise(40, 60, seed=1)])
    assert measured(claim(10, above=True), folder) == Estimate(40, 30, 50, 100)


def test_a_counted_number_gets_the_range_over_seeds(root):
    shares = [("table1", "ESU", "asr_rise", n, v, v, v, 9) for n, v in enumerate((1.3, 2.0, 1.5))]
    folder = write_metrics(root / "laptop", shares)
    assert measured(claim(10, above=True), folder) == Estimate(pytest.approx(1.6), 1.3, 2.0, 9)


def test_a_number_of_fewer_seeds_says_so(root, monkeypatch):
    """Beside it a number of all seeds, of which some rows are draws, says nothing."""
    rare, common = claim(10, above=True, arm="rare"), claim(10, above=True, arm="common")
    rows = [
        rise(20, 40, arm="rare"),
        rise(20, 40, arm="common", seed="0.0"),
        rise(20, 40, arm="common", seed="1.0"),
    ]
    folder = write_metrics(root / "laptop", rows)
    monkeypatch.setattr("ssah.claims.table.CLAIMS", (rare, common))
    shown = claims_table(folder)["this run"]
    assert list(shown) == ["30.00 [20.00, 40.00] (seed 0)", "30.00 [20.00, 40.00]"]


def test_other_arms_artefacts_and_metrics_are_left_out(root):
    folder = write_metrics(root / "laptop", [rise(20, 40, arm="RU"), ("x", *rise(1, 2)[1:])])
    assert measured(claim(10, above=True), folder) is None
    assert measured(claim(10, above=True, arm="RU"), folder) == Estimate(30, 20, 40, 100)
    assert measured(claim(10, above=True, arm="RU", metric="other"), folder) is None


def test_no_results_means_not_run(root):
    table = claims_table(root / "laptop")
    assert list(table["claim"]) == [c.id for c in CLAIMS]
    assert set(table["verdict"]) == {"not run"}
    assert set(table["this run"]) == {""}
    assert set(table["agrees"]) == {""}
    assert measured(CLAIMS[0], root / "laptop") is None


def test_the_verdict_is_on_this_run(root):
    write_metrics(root / "published", [rise(50, 70)])
    folder = write_metrics(root / "laptop", [rise(0, 5)])
    row = row_of(claims_table(folder), "esu_carry_refusals")
    assert row["published"] == "60.00 [50.00, 70.00]"
    assert row["this run"] == "2.50 [0.00, 5.00]"
    assert row["verdict"] == "does not hold"
    assert row["agrees"] == "no"


def test_without_this_run_the_verdict_is_on_the_published_one(root):
    write_metrics(root / "published", [rise(50, 70)])
    row = row_of(claims_table(root / "laptop"), "esu_carry_refusals")
    assert (row["verdict"], row["this run"], row["agrees"]) == ("holds", "", "")


@pytest.mark.parametrize(
    ("low", "high", "agrees"), [(60, 80, "yes"), (70, 90, "yes"), (71, 90, "no"), (10, 49, "no")]
)
def test_agreement_is_overlap(root, low, high, agrees):
    write_metrics(root / "published", [rise(50, 70)])
    folder = write_metrics(root / "laptop", [rise(low, high)])
    assert row_of(claims_table(folder), "esu_carry_refusals")["agrees"] == agrees


def test_the_published_run_is_not_compared_with_itself(root):
    folder = write_metrics(root / "published", [rise(50, 70)])
    row = row_of(claims_table(folder), "esu_carry_refusals")
    assert (row["this run"], row["agrees"], row["verdict"]) == ("", "", "holds")


def test_updating_writes_the_table(root):
    folder = write_metrics(root / "laptop", [rise(50, 70)])
    table = update_claims(folder)
    read = pd.read_csv(folder / "claims.csv", keep_default_na=False)
    assert list(read["verdict"]) == list(table["verdict"])
    assert not list(folder.glob(".*claims*")), "no partial file stays"
    assert "text" in styled(table).columns
    assert "claim" not in styled(table).columns
