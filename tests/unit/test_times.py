"""What artefacts took: runs that several of them share, the published times, generated blocks."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from ssah.app import report
from ssah.app.report import Time
from ssah.app.study import Study, produce
from ssah.artefacts import find
from ssah.artefacts.render import write_times


@pytest.fixture
def study(smoke_study, tmp_path) -> Study:
    """With a results folder of its own."""
    study = smoke_study()
    study.results = tmp_path
    return study


def times(study: Study) -> dict[str, tuple[float, float, float]]:
    frame = pd.read_csv(study.results / "timings.csv").set_index("artefact")
    assert frame.index.is_unique
    columns = ["seconds", "added_seconds", "warm_seconds"]
    return {name: tuple(row) for name, row in frame[columns].iterrows()}


def write(study: Study, name: str, runs: dict[str, float], warm: float = 0.0) -> None:
    write_times(study, find(name), runs, warm)


def test_a_shared_run_is_added_by_the_first_artefact_only(study):
    write(study, "table1", {"model": 10.0, "search": 20.0}, warm=1.26)
    write(study, "table2", {"model": 10.0, "tuning": 5.4, "answers": 3.2}, warm=0.5)
    write(study, "table3", {"tuning": 5.4, "model": 10.0, "tasks": 7.0})
    assert times(study) == {
        "table1": (30, 30, 1.3),
        "table2": (19, 9, 0.5),
        "table3": (22, 7, 0.0),
    }


def test_artefacts_that_come_later_take_nothing_away(study):
    """Their order counts, not that of writing: table 1 comes before table 2."""
    write(study, "table2", {"model": 10.0, "tuning": 5.0})
    write(study, "table1", {"model": 10.0, "search": 20.0})
    assert times(study)["table1"] == (30, 30, 0)


def test_a_later_artefact_written_first_gives_its_shared_runs_back(study):
    write(study, "table2", {"model": 10.0, "tuning": 5.0})
    write(study, "table1", {"model": 10.0, "search": 20.0})
    assert times(study)["table2"] == (15, 5, 0)


def test_writing_again_replaces_an_artefacts_row(study):
    write(study, "table1", {"model": 10.0})
    write(study, "table2", {"model": 10.0, "tuning": 5.0})
    write(study, "table1", {"search": 20.0}, warm=2.0)
    assert times(study)["table1"] == (20, 20, 2)
    write(study, "table2", {"model": 10.0, "tuning": 5.0})  # which nobody before it uses now
    assert times(study)["table2"] == (15, 15, 0)
    columns = pd.read_csv(study.results / "timings.csv", dtype=str).iloc[0]
    assert (columns["profile"], columns["model"], columns["seeds"]) == ("smoke", "tiny", "0")


def test_what_is_cached_counts_with_the_seconds_that_it_took(smoke_study, study, tmp_path):
    """A process that finds everything still reports what its runs took when they were built."""
    produce(study, find("fig_roles_map"))
    found = []
    for folder in ("first", "second"):
        later = smoke_study()
        later.results = tmp_path / folder
        produce(later, find("fig_roles_map"))
        runs = later.store.touched.values()
        assert len(runs) >= 5  # sets, model, alignment, statistics, roles
        recorded = round(sum(run.json("run.json")["seconds"] for run in runs))
        assert later.store.built_seconds == 0
        assert times(later)["fig_roles_map"][:2] == (recorded, recorded)
        found.append(set(later.store.touched))
    assert found[0] == found[1]


# --- published times -------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(report, "results_root", lambda: tmp_path)
    folder = tmp_path / "published"
    folder.mkdir()
    return folder / "timings.csv"


def test_times_are_for_one_seed_and_in_the_order_of_artefacts(published):
    published.write_text(
        "artefact,seconds,added_seconds,warm_seconds,seeds\n"
        "table2,90,30,3.0,0 1 2\n"
        "gone,1,1,1.0,0\n"
        "table1,60,60,6.0,0 1\n"
        "fig13,5,4,0.5,7\n"
    )
    found = report.timings()
    assert found == {"table1": Time(30, 30, 3), "fig13": Time(5, 4, 0.5), "table2": Time(30, 10, 1)}
    assert list(found) == ["table1", "fig13", "table2"]


def test_one_seed_is_read_as_a_list_of_seeds(published):
    published.write_text("artefact,seconds,added_seconds,warm_seconds,seeds\ntable1,60,50,6.0,0\n")
    assert report.timings() == {"table1": Time(60, 50, 6)}


def test_nothing_published_means_no_times(published):
    assert report.timings() == {}


def test_minutes_are_written_from_one_minute_on():
    assert [report._minutes(s) for s in (0.4, 59, 60, 90)] == ["0 s", "59 s", "1.0 min", "1.5 min"]


# --- generated blocks ------------------------------------------------------------------------

TEXT = """# Title

Before | with a pipe.
<!-- claims:begin -->
old
<!-- claims:end -->
Between, and a word: claims:begin.
<!-- times:begin -->
<!-- times:end -->

The end, without a line break"""


def test_a_block_is_replaced_and_the_text_around_it_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "project_root", lambda: tmp_path)
    path = tmp_path / "page.md"
    path.write_text(TEXT, encoding="utf-8")
    table = pd.DataFrame({"artefact": ["table1"], "é": ["1.0 min"]})
    expected = f"<!-- claims:begin -->\n{table.to_markdown(index=False)}\n<!-- claims:end -->"
    for _ in range(2):  # the second time changes nothing
        report._fill("page.md", "claims", table)
        old = "<!-- claims:begin -->\nold\n<!-- claims:end -->"
        assert path.read_text("utf-8") == TEXT.replace(old, expected)
    report._fill("page.md", "times", table)
    assert path.read_text("utf-8").count(table.to_markdown(index=False)) == 2
    assert path.read_text("utf-8").endswith("<!-- times:end -->\n\nThe end, without a line break")
    assert [p.name for p in tmp_path.iterdir()] == ["page.md"], "no partial file stays"


@pytest.mark.parametrize(
    ("name", "block"), [("README.md", "claims"), ("docs/reproduction.md", "times")]
)
def test_the_projects_pages_have_their_blocks(name, block):
    text = (report.project_root() / name).read_text("utf-8")
    assert text.count(f"<!-- {block}:begin -->") == text.count(f"<!-- {block}:end -->") == 1
