"""Claims: which measurement decides each, what the paper's number is, and when it holds."""

from __future__ import annotations

import pandas as pd
import pytest

from ssah.app.report import CLAIMING, claim_blocks
from ssah.artefacts import ARTEFACTS
from ssah.claims import table as claims_module
from ssah.claims.table import (
    behind,
    claims,
    claims_table,
    published_by_model,
    update_claims,
    verdict,
)
from ssah.core.errors import SsahError
from ssah.core.paths import project_root
from ssah.evaluate.stats import Estimate
from ssah.lab.table import typed, write_table


def claim(**changes) -> dict:
    plain = {
        "id": "one", "headline": "", "artefact": "table1", "sentence": "Something is above ten.",
        "unit": "points", "direction": "above", "limit": 10.0, "margin": float("nan"),
        "metric": "ASR", "base": "aligned", "method": "", "rule": "", "like": "", "attack": "",
        "epoch": 0, "setting": "", "set": "", "block": "", "at": "", "against": "", "paper": "",
        "paper_minus": "", "paper_over": "", "paper_model": "Llama-2-7B-Chat",
    }  # fmt: skip
    return plain | changes


def row(value: float, low: float, high: float, seed: int = 0, **columns) -> dict:
    subject = {"model": "m", "base": "aligned", "metric": "ASR", "epoch": 0}
    return subject | {"seed": seed, "value": value, "low": low, "high": high, "n": 9} | columns


def table(*rows: dict) -> pd.DataFrame:
    return typed(pd.DataFrame(rows))


def test_claims_are_sentences_about_artefacts_that_exist():
    ids = [c["id"] for c in claims()]
    assert len(set(ids)) == len(ids) > 30
    for own in claims():
        assert own["artefact"] in ARTEFACTS, own["id"]
        assert own["direction"] in ("above", "below"), own["id"]
        assert own["sentence"][0].isupper(), own["id"]
        assert own["sentence"].endswith("."), own["id"]


def test_the_front_page_has_few_claims():
    assert 10 < sum(own["headline"] == "yes" for own in claims()) <= 20


def test_every_claim_finds_its_numbers(lively_table):
    """A claim whose arm is misspelt would stay "not run" for ever."""
    assert {own["id"] for own in claims() if behind(own, lively_table).empty} == set()


@pytest.mark.parametrize("own", [c for c in claims() if c["paper"]], ids=lambda c: c["id"])
def test_the_papers_numbers_are_found(own):
    assert claims_module._paper_number(own) is not None


def test_the_papers_numbers_are_worked_out():
    number = claims_module._paper_number
    esu = {"paper": "ESU/asr_keyword_nosys", "paper_minus": "dense/asr_keyword_nosys"}
    assert number(claim(**esu)) == pytest.approx(84 - 18)
    ratio = {"paper": "ESU/wikitext2_ppl", "paper_over": "dense/wikitext2_ppl"}
    assert number(claim(**ratio)) == pytest.approx(6.76 / 6.49)
    assert number(claim()) is None


@pytest.mark.parametrize(
    ("direction", "low", "high", "wanted"),
    [
        ("above", 10.1, 20, "holds"),
        ("above", 10, 20, "undecided"),
        ("above", 5, 10, "does not hold"),
        ("above", 5, 10.1, "undecided"),
        ("below", 5, 9.9, "holds"),
        ("below", 5, 10, "undecided"),
        ("below", 10, 20, "does not hold"),
        ("below", 9.9, 20, "undecided"),
    ],
)
def test_a_claim_holds_where_the_whole_interval_is_on_its_side(direction, low, high, wanted):
    estimate = Estimate((low + high) / 2, low, high, 9)
    assert verdict(claim(direction=direction), estimate) == wanted


@pytest.mark.parametrize(
    ("low", "high", "p_value", "wanted"),
    [
        (-9.9, 9, 1, "no difference as large as 10 points"),
        (-10, 2, 1, "too few data: a difference of 10 points is possible"),
        (-3, 14.2, 1, "too few data: a difference of 14 points is possible"),
        (1, 9, 0.01, "holds"),
        (1, 9, 0.051, "no difference as large as 10 points"),
        (1, 12, 0.051, "undecided"),
        (-30, -1, 0.01, "does not hold"),
    ],
)
def test_what_is_not_told_from_zero_is_small_or_unknown(low, high, p_value, wanted):
    own = claim(limit=0.0, margin=10.0)
    assert verdict(own, Estimate((low + high) / 2, low, high, 9), p_value) == wanted


def test_of_many_claims_some_would_hold_by_chance(tmp_path, monkeypatch):
    """One of forty just beyond its limit does not count, and alone it does."""
    monkeypatch.setattr(claims_module, "results_root", lambda: tmp_path)
    weak = row(12, 10.1, 13.9, rule="ESU")
    none = [row(10, 5, 15, rule=str(number)) for number in range(40)]
    write_table(table(weak, *none), tmp_path / "published")
    for others, wanted in ((0, "holds"), (40, "undecided")):
        several = (claim(rule="ESU"), *(claim(rule=str(n)) for n in range(others)))
        monkeypatch.setattr(claims_module, "claims", lambda several=several: several)
        assert claims_table(tmp_path / "published")["verdict"][0] == wanted


def test_an_alignment_has_to_have_something_to_take_away(tmp_path, monkeypatch):
    """A pretrained model that only repeats requests has an ASR of 0 before and after."""
    monkeypatch.setattr(claims_module, "results_root", lambda: tmp_path)
    safe = claim(base="unaligned", method="trained", rule="RU", direction="below", limit=20.0)
    learned = safe | {"id": "two", "metric": "accuracy", "direction": "above", "limit": 0.0}
    monkeypatch.setattr(claims_module, "claims", lambda: (safe, learned))
    for before, wanted in (
        (19.0, "says nothing, since it answers 19 % unaligned"),
        (20.0, "holds"),
    ):
        given = row(before, before - 5, before + 5, base="unaligned")
        aligned = [
            row(1, 0, 3, base="unaligned", method="trained", rule="RU", metric=metric)
            for metric in ("ASR", "accuracy")
        ]
        write_table(table(given, *aligned), tmp_path / "own")
        found = claims_table(tmp_path / "own")
        assert found["verdict"].tolist()[0] == wanted
        assert found["this run"].tolist()[0] == "1.00 [0.00, 3.00]", "the number is shown"
        assert (found["adjusted p"].tolist()[0] == "") == (before < 20)
        assert found["verdict"].tolist()[1] != wanted
    attacked = row(60, 50, 70, base="unaligned", method="trained", rule="RU", attack="instructions")
    given = row(0, 0, 4, base="unaligned")
    assert claims_module.moot(safe, table(given, attacked)) != ""
    assert claims_module.moot(safe | {"attack": "instructions"}, table(given, attacked)) == ""


def test_models_stand_side_by_side_and_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_module, "results_root", lambda: tmp_path)
    monkeypatch.setattr(
        claims_module, "claims", lambda: (claim(), claim(id="two", rule="ESU", headline="yes"))
    )
    rows = row(20, 15, 25), row(5, 4, 6, model="other"), row(30, 29, 31, model="other", rule="ESU")
    write_table(table(*rows), tmp_path / "published")
    found = published_by_model(headline=False)
    assert found["m"].tolist() == ["20.00 [15.00, 25.00]: holds", "not run"]
    assert found["other"].tolist() == [
        "5.00 [4.00, 6.00]: does not hold",
        "30.00 [29.00, 31.00]: holds",
    ]
    assert published_by_model(headline=True)["other"].tolist() == found["other"].tolist()[1:]
    write_table(table(row(5, 4, 6, model="other")), tmp_path / "own")
    assert claims_table(tmp_path / "own")["agrees"][0] == "yes", "with the same model's"


def test_the_measurement_behind_a_claim():
    found = table(
        row(1, 0, 2),
        row(2, 0, 3, rule="ESU"),
        row(3, 0, 4, against="random, draw 0"),
        row(4, 0, 5, against="random, draw 1"),
        row(5, 0, 6, block=1),
        row(6, 0, 7, block=2),
        row(7, 0, 8, at="all tokens"),
    )
    values = {
        name: behind(claim(**columns), found)["value"].tolist()
        for name, columns in {
            "plain": {"block": "none"},
            "rule": {"rule": "ESU"},
            "draws": {"against": "random, draw *"},
            "last": {"block": "last"},
            "at": {"at": "all tokens"},
        }.items()
    }
    assert values == {"plain": [1], "rule": [2], "draws": [3, 4], "last": [6], "at": [7]}


def test_three_columns_and_a_verdict_on_this_run(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_module, "results_root", lambda: tmp_path)
    rare = claim(id="two", rule="ESU")
    monkeypatch.setattr(claims_module, "claims", lambda: (claim(), rare))
    published, own = tmp_path / "published", tmp_path / "own"
    write_table(table(*(row(20 + s, 15, 25, seed=s) for s in (0, 1))), published)
    write_table(table(row(5, 4, 6), row(30, 20, 40, rule="ESU")), own)
    found = claims_table(own).set_index("claim")
    one, two = found.loc["one"], found.loc["two"]
    assert one["published"] == "20.50 [12.10, 28.29]", "wider than a seed's, since they differ"
    assert one["this run"] == "5.00 [4.00, 6.00]"
    assert (one["agrees"], one["verdict"]) == ("no", "does not hold")
    assert (two["published"], two["agrees"], two["verdict"]) == ("", "", "holds")
    first = claims_table(published).set_index("claim").loc["one"]
    assert (first["this run"], first["verdict"]) == ("", "holds")
    assert claims_table(published).set_index("claim").loc["two", "verdict"] == "not run"
    update_claims(own)
    assert pd.read_csv(own / "claims.csv")["claim"].tolist() == ["one", "two"]


def test_claims_are_written_for_each_model(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_module, "results_root", lambda: tmp_path)
    monkeypatch.setattr(claims_module, "claims", lambda: (claim(),))
    rows = [row(5, 4, 6), row(60, 50, 70) | {"model": "another"}]
    write_table(table(*rows), tmp_path / "own")
    written = update_claims(tmp_path / "own").set_index("model")["verdict"].to_dict()
    assert sorted(written.values()) == ["does not hold", "holds"]
    assert written["another"] == "holds"


def test_seeds_are_named_where_others_have_more(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_module, "results_root", lambda: tmp_path)
    monkeypatch.setattr(claims_module, "claims", lambda: (claim(), claim(id="two", rule="ESU")))
    rows = [row(20, 15, 25, seed=s) for s in (0, 1)] + [row(30, 20, 40, rule="ESU")]
    write_table(table(*rows), tmp_path / "published")
    found = claims_table(tmp_path / "published").set_index("claim")["published"]
    assert found["one"] == "20.00 [15.00, 25.00]"
    assert found["two"] == "30.00 [20.00, 40.00] (seed 0)"


# --- pages that name claims ------------------------------------------------------------------


@pytest.mark.parametrize("page", CLAIMING)
def test_pages_show_claims_that_there_are(page):
    blocks = claim_blocks(page)
    assert blocks
    shown = published_by_model(headline=False)
    text = (project_root() / page).read_text("utf-8")
    for block, names in blocks:
        assert shown.loc[names].to_markdown(index=False) in text, block


def test_a_page_that_names_a_claim_that_there_is_not(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("<!-- claims esu_are_fewer:begin -->")
    monkeypatch.setattr("ssah.app.report.project_root", lambda: tmp_path)
    with pytest.raises(SsahError, match=r"page\.md.*'esu_are_fewer': did you mean 'esu_are_few'"):
        claim_blocks("page.md")
