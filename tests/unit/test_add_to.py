"""Runs that add to others: seeds and arms measured apart make one run, and one published run."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from ssah.app import report
from ssah.app.study import produce
from ssah.artefacts import Output, find
from ssah.core.errors import SsahError
from ssah.evaluate.stats import Estimate

NAMES = ("table1", "fig_roles_map", "table2")
NUMBERS = ["artefact", "arm", "metric", "seed", "value", "low", "high", "n"]


@pytest.fixture(scope="module")
def results(tmp_path_factory, smoke_study) -> Path:
    """Two seeds together, one after the other, and the second alone."""
    root = tmp_path_factory.mktemp("results")
    runs = {
        "together": ["n_seeds=2"],
        "first": [],
        "apart": ["seed=1", "add_to=first"],
        "second": ["seed=1"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssah.app.study.results_root", lambda: root)
        for folder, overrides in runs.items():
            study = smoke_study(*overrides)
            study.results = root / folder
            for name in NAMES:
                produce(study, find(name))
    return root


def metrics(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "metrics.csv", dtype={"seed": str})


def numbers(folder: Path) -> pd.DataFrame:
    return metrics(folder)[NUMBERS].sort_values(NUMBERS[:4]).reset_index(drop=True)


def test_seeds_measured_apart_give_the_numbers_of_one_run(results):
    pd.testing.assert_frame_equal(numbers(results / "apart"), numbers(results / "together"))
    assert set(numbers(results / "second")["seed"].str[0]) == {"1"}


@pytest.mark.parametrize("name", ["table1", "table2"])
def test_and_its_tables(results, name):
    """But for the last digit: earlier numbers are read from a file with six of them."""

    def cells(folder: str) -> list[str]:
        text = (results / folder / "tables" / f"{name}.md").read_text().split("\n\n")[0]
        return re.findall(r"\d+\.\d+|[^\s\d|:-]+", text)

    def same(a: str, b: str) -> bool:
        return a == b or float(a) == pytest.approx(float(b), abs=0.11)

    together, apart, alone = map(cells, ("together", "apart", "second"))
    assert len(apart) == len(together)
    assert all(map(same, apart, together))
    assert sum(a != b for a, b in zip(apart, together, strict=True)) < 0.02 * len(together)
    assert sum(a != b for a, b in zip(apart, alone, strict=False)) > 50


def test_every_number_keeps_its_origin(results):
    frame = metrics(results / "apart")
    own = frame["seed"].str[0] == "1"
    assert set(frame["overrides"][own]) == {"seed=1 add_to=first"}
    assert frame["overrides"][~own].isna().all()
    assert set(frame["seeds"][own].astype(str)) == {"1"}
    assert set(frame["seeds"][~own].astype(str)) == {"0"}
    line = "earlier runs, each named in metrics.csv"
    for folder, says in (("apart", True), ("second", False)):
        assert (line in (results / folder / "tables" / "table1.md").read_text()) == says


def test_what_is_measured_again_replaces_what_was_there(results, smoke_study, monkeypatch):
    """Both seeds in the earlier run, one of them wrong."""
    monkeypatch.setattr("ssah.app.study.results_root", lambda: results)
    frame = metrics(results / "together")
    frame.loc[frame["seed"].str[0] == "1", ["value", "low", "high"]] = 1e6
    (results / "wrong").mkdir()
    frame.to_csv(results / "wrong" / "metrics.csv", index=False)
    study = smoke_study("seed=1", "add_to=wrong")
    study.results = results / "mended"
    for name in NAMES:
        produce(study, find(name))
    pd.testing.assert_frame_equal(numbers(results / "mended"), numbers(results / "together"))


@pytest.mark.parametrize("what", ["profile", "model"])
def test_other_models_and_profiles_are_not_added_to(results, smoke_study, monkeypatch, what):
    monkeypatch.setattr("ssah.app.study.results_root", lambda: results)
    (results / what).mkdir()
    metrics(results / "first").assign(**{what: "another"}).to_csv(
        results / what / "metrics.csv", index=False
    )
    study = smoke_study(f"add_to={what}")
    study.results = results / "refused"
    with pytest.raises(SsahError, match=f"fig_roles_map of {what} another"):
        produce(study, find("fig_roles_map"))


def test_draws_of_a_seed_are_replaced_together(smoke_study, tmp_path, monkeypatch):
    """Seed 0 was measured with five draws and now with two; seed 1 stays as it was."""
    monkeypatch.setattr("ssah.app.study.results_root", lambda: tmp_path)
    study = smoke_study("add_to=before")
    rows = [("random", "asr", f"{seed}.{draw}") for seed in (0, 1) for draw in range(5)]
    rows.append(("random", "perplexity", "0"))  # not measured now
    before = pd.DataFrame(rows, columns=["arm", "metric", "seed"])
    before = before.assign(artefact="table1", value=1, low=0, high=2, n=9, **study.stamp)
    (tmp_path / "before").mkdir()
    before.to_csv(tmp_path / "before" / "metrics.csv", index=False)
    output = Output("")
    for draw in range(2):
        output.add("random", "asr", f"0.{draw}", Estimate(7, 6, 8, 9))
    frame = output.frame(study, "table1")
    found = list(zip(frame["metric"], frame["seed"], frame["value"], strict=True))
    assert found == [
        ("asr", "0.0", 7), ("asr", "0.1", 7), *(("asr", f"1.{draw}", 1) for draw in range(5)),
        ("perplexity", "0", 1),
    ]  # fmt: skip


def test_a_run_that_is_not_there_cannot_be_added_to(smoke_study):
    study = smoke_study("add_to=nowhere")
    with pytest.raises(SsahError, match=r"add_to=nowhere: there is no .*metrics.csv"):
        _ = study.earlier


# --- publishing a part -----------------------------------------------------------------------


def fill(folder: Path, artefacts: list[str], notebook: str, text: str) -> None:
    """A results folder with a number, a table and a notebook."""
    rows = [
        {"artefact": a, "arm": "x", "metric": "asr", "seed": "0", "value": 1.0, "low": 0.0,
         "high": 2.0, "n": 9, "commit": text}
        for a in artefacts
    ]  # fmt: skip
    (folder / "tables").mkdir(parents=True)
    (folder / "notebooks").mkdir()
    pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)
    for name in artefacts:
        (folder / "tables" / f"{name}.md").write_text(text)
    (folder / "notebooks" / f"{notebook}.ipynb").write_text(text)
    (folder / "timings.csv").write_text(text)


def test_publishing_a_notebook_leaves_the_others_as_they_were(tmp_path, monkeypatch):
    refreshed = []
    for name in ("ssah.app.report.results_root", "ssah.claims.table.results_root"):
        monkeypatch.setattr(name, lambda: tmp_path)
    monkeypatch.setattr(report, "refresh_texts", lambda: refreshed.append(True))
    published, part = tmp_path / "published", tmp_path / "part"
    fill(published, ["table1", "table4"], "02_unit_roles", "old")
    fill(part, ["table1", "table4", "fig6"], "06_alignment_budget", "new")
    report.publish_part(part, ["table4", "fig6"], ["06_alignment_budget"])
    texts = {
        p.relative_to(published).as_posix(): p.read_text()
        for p in published.rglob("*")
        if p.suffix in (".md", ".ipynb") or p.name == "timings.csv"
    }
    assert texts == {
        "tables/table1.md": "old",
        "tables/table4.md": "new",
        "tables/fig6.md": "new",
        "notebooks/02_unit_roles.ipynb": "old",
        "notebooks/06_alignment_budget.ipynb": "new",
        "timings.csv": "old",
    }
    origins = metrics(published).set_index("artefact")["commit"]
    assert origins.to_dict() == {"table1": "old", "table4": "new", "fig6": "new"}
    assert refreshed
    assert (published / "claims.csv").exists()
    assert "table4" in (published / "index.html").read_text()
