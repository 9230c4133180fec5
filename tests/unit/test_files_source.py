"""Fine-tuning on the user's own files: which sets they may bring, and what is said without them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from ssah.app.cli import main
from ssah.core.errors import SsahError
from ssah.core.store import Store
from ssah.data.arithmetic import arithmetic_problems
from ssah.data.rows import SETS, read_set
from ssah.data.sets import build_sets
from ssah.lab.config import compose
from ssah.lab.lab import Lab
from ssah.lab.stages.lessons import heldout, lesson

SIZES = ["data.evaluation=8", "data.search=4", "data.align=6", "align.harmful=6"]


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """The datasets library keeps its cache apart and asks no server."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def word(number: int) -> str:
    """A different word for each number; words hold letters only."""
    return "".join(chr(ord("a") + int(digit)) for digit in f"{number:03}") + "ing"


def given(folder: Path, name: str, records: list[dict[str, str]]) -> str:
    """An override that names a file with these records."""
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    columns = ", ".join(f"{column}: {column}" for column in records[0])
    return f"data.files.{name}={{path: {path}, {columns}}}"


def answered(what: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{what} {word(i)}", "response": f"done {word(i)}"} for i in range(count)]


@pytest.fixture
def two_files(tmp_path) -> list[str]:
    """The data source with no more than it needs."""
    harmful = [{"prompt": f"{word(i)} zorp"} for i in range(30)]
    files = [given(tmp_path, "harmful", harmful), given(tmp_path, "benign", answered("do", 460))]
    return ["data=files", *files, *SIZES]


def lab_of(tmp_path: Path, overrides: list[str]) -> Lab:
    return Lab(compose("smoke", overrides), Store(tmp_path / "runs"), 0)


def test_files_are_named_on_the_command_line():
    """Listed entries are null and dictionaries take their place; any other set is added by +."""
    named = "{path: a.csv, prompt: x, response: y}"
    files = [f"data.files.harmful={named}", f"+data.files.do_not_answer={named}"]
    config = compose("laptop", ["data=files", *files]).data
    assert config.source == "files"
    expected = {"path": "a.csv", "prompt": "x", "response": "y"}
    given_ones = {name: spec for name, spec in config.files.items() if spec}
    assert given_ones == {"harmful": expected, "do_not_answer": expected}
    assert config.files["dialogues"] is None


def test_sets_that_are_not_given_are_left_out(tmp_path, two_files):
    """A null entry is none, and it changes nothing where a set is ours to give."""
    found = lab_of(tmp_path, [*two_files, "data.files.arithmetic=null"])
    parts = {name for name in SETS if name.startswith(("harmful_", "benign_"))}
    assert {name for name in SETS if found.has(name)} == parts | {
        "heldout_text",
        "borderline",
        "arithmetic",
    }
    assert not found.has("harmbench")
    with pytest.raises(SsahError, match="no set 'harmbench'"):
        found.rows("harmbench")


def test_a_further_set_is_taken_as_it_is(tmp_path, two_files):
    records = answered("tell", 30)
    found = lab_of(tmp_path, [*two_files, given(tmp_path, "dialogues", records)])
    rows = found.rows("dialogues")
    assert [{"prompt": row.prompt, "response": row.response} for row in rows] == records
    assert len({row.id for row in rows}) == 30
    trained, rest = lesson(found, "dialogues").rows, heldout(found, "dialogues").rows
    assert {row.id for row in trained + rest} <= {row.id for row in rows}
    assert (len(trained), len(rest)) == (16, 8)


def test_ours_are_there_and_the_users_replace_them(tmp_path, two_files):
    ours = lab_of(tmp_path, two_files).rows("arithmetic")
    problems = arithmetic_problems(400, 0)
    assert [(r.prompt, r.response, r.choices) for r in ours] == [
        (question, worked, (answer,)) for question, worked, answer in problems
    ]
    assert {r.source for r in lab_of(tmp_path, two_files).rows("borderline")} == {"ssah"}
    records = [{"prompt": f"1 + {i}?", "response": f"The answer is {i + 1}."} for i in range(40)]
    theirs = lab_of(tmp_path, [*two_files, given(tmp_path, "arithmetic", records)])
    assert [row.prompt for row in theirs.rows("arithmetic")] == [r["prompt"] for r in records]


def test_a_name_that_is_no_set_is_not_kept(tmp_path, two_files):
    config = compose(
        "smoke", [*two_files, "+" + given(tmp_path, "poems", answered("sing", 3))]
    ).data
    run = build_sets(Store(tmp_path / "runs"), config)
    assert not run.path("poems.jsonl").exists()
    with pytest.raises(SsahError, match="no set 'poems'"):
        read_set(run, "poems")


# --- through the command line ----------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """Caches and results of commands go here, never to the user's."""
    monkeypatch.setenv("SSAH_HOME", str(tmp_path / "home"))
    for module in ("app.study", "claims.table", "app.report", "app.commands"):
        monkeypatch.setattr(f"ssah.{module}.results_root", lambda: tmp_path / "results")
    return tmp_path / "results"


def test_without_dialogues_table_2_has_no_row_of_them(tmp_path, results, two_files):
    assert main(["table2", "profile=smoke", *two_files]) == 0
    (path,) = results.rglob("tables/table2.csv")
    assert set(pd.read_csv(path, keep_default_na=False)["attack"]) == {"", "instructions"}


def test_table_2_of_the_users_files(tmp_path, results, two_files):
    """With their dialogues, on their prompts; and without HarmBench, which they do not have."""
    dialogues = given(tmp_path, "dialogues", answered("tell", 40))
    assert main(["table2", "profile=smoke", *two_files, dialogues]) == 0
    (path,) = results.rglob("tables/table2.csv")
    found = pd.read_csv(path, keep_default_na=False)
    assert set(found["attack"]) == {"", "instructions", "dialogues"}
    assert "HarmBench" not in set(found["set"])
    assert set(found[found["metric"] == "ASR"]["n"]) == {8}
