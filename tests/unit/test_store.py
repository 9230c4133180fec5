"""The run store: hits, misses, damage, interruptions, and processes side by side."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ssah.core.store import Run, Store, canonical, digest

SPAWN = multiprocessing.get_context("spawn")


class Counter:
    """A build that writes one file and counts how often it ran."""

    def __init__(self, text: str = "content"):
        self.text, self.calls = text, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "deep").mkdir()
        (folder / "deep" / "output.txt").write_text(self.text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def fresh(root: Path, build: Callable[[Path], None], key: dict | None = None, **options) -> Run:
    """Ask a store that has verified nothing yet, as a new process would."""
    return Store(root).get("stage", "label", key or {"version": 1}, build, **options)


def test_a_second_process_reads_what_the_first_one_built(root):
    build = Counter()
    first, second = fresh(root, build), fresh(root, build)
    assert build.calls == 1
    assert first == second
    assert second.path("deep/output.txt").read_text() == "content"


def test_one_store_verifies_a_run_once(root):
    build, store = Counter(), Store(root)
    first = store.get("stage", "label", {"a": 1}, build)
    assert store.get("stage", "label", {"a": 1}, build) is first
    assert build.calls == 1


@pytest.mark.parametrize(
    "other",
    [{"version": 2, "seed": 0}, {"version": 1, "seed": 1}, {"version": 1, "seed": 0, "x": None}],
)
def test_anything_in_the_key_makes_another_run(root, other):
    build = Counter()
    fresh(root, build, {"version": 1, "seed": 0})
    fresh(root, build, other)
    assert build.calls == 2


def test_stages_with_equal_keys_are_apart(root):
    store, build = Store(root), Counter()
    one = store.get("one", "label", {"a": 1}, build)
    two = store.get("two", "label", {"a": 1}, build)
    assert build.calls == 2
    assert one.key != two.key


def test_keys_do_not_depend_on_the_order_of_entries(root):
    build = Counter()
    fresh(root, build, {"a": 1, "b": {"c": [1, 2], "d": "é"}})
    fresh(root, build, {"b": {"d": "é", "c": (1, 2)}, "a": 1})
    assert build.calls == 1


def test_canonical_text_is_sorted_plain_and_exact():
    assert canonical({"b": [1, 2.5], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.5]}'
    assert digest({"a": 1}) != digest({"a": "1"})
    assert digest([1, 2]) != digest([2, 1])


def test_run_json_records_what_shaped_the_run_and_what_came_out(root):
    run = fresh(root, Counter(), {"version": 3, "seed": 7})
    record = run.json("run.json")
    assert record["config"] == {"version": 3, "seed": 7}
    assert record["key"] == run.key
    assert list(record["outputs"]) == ["deep/output.txt"]
    assert record["seconds"] >= 0
    assert {"command", "versions", "python", "peak_memory_mib"} <= set(record)
    assert run.folder.name == f"stage-label-{run.key[:10]}"


def _change(folder: Path) -> None:
    (folder / "deep" / "output.txt").write_text("other!!")


def _remove(folder: Path) -> None:
    (folder / "deep" / "output.txt").unlink()


def _truncate_record(folder: Path) -> None:
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text[: len(text) // 2])


def _remove_record(folder: Path) -> None:
    (folder / "run.json").unlink()


def _replace_record(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "run.json").write_text(text)

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_change, "deep/output.txt is not what was written"),
        (_remove, "damaged (FileNotFoundError)"),
        (_truncate_record, "damaged (JSONDecodeError)"),
        (_remove_record, "damaged (FileNotFoundError)"),
        (_replace_record(""), "damaged (JSONDecodeError)"),
        (_replace_record("null"), "damaged (TypeError)"),
        (_replace_record("{}"), "damaged (KeyError)"),
        (_replace_record('{"outputs": [], "seconds": 1}'), "damaged (AttributeError)"),
        (_replace_record('{"outputs": {}}'), "damaged (KeyError)"),
    ],
)
def test_damage_is_noticed_explained_in_a_line_and_repaired(root, capsys, damage, reason):
    build = Counter()
    run = fresh(root, build)
    damage(run.folder)
    capsys.readouterr()

    repaired = fresh(root, build)

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert run.folder.name in lines[0]
    assert reason in lines[0]
    assert lines[0].endswith("computing it again.")
    assert build.calls == 2
    assert repaired.path("deep/output.txt").read_text() == "content"
    assert fresh(root, build).key == run.key
    assert build.calls == 2, "a repaired run is a hit again"


def test_a_first_build_says_nothing_about_damage(root, capsys):
    fresh(root, Counter())
    assert capsys.readouterr().err == ""


def test_a_failing_build_leaves_no_run(root):
    def fail(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fresh(root, fail)
    assert not list(root.glob("*/run.json"))

    build = Counter()
    run = fresh(root, build)
    assert build.calls == 1
    assert not run.path("half.txt").exists(), "what the failure left must not become an output"


def test_a_resumable_build_finds_what_the_interrupted_one_left(root):
    def interrupted(folder: Path) -> None:
        (folder / "checkpoint").write_text("step 5")
        raise KeyboardInterrupt

    def resumed(folder: Path) -> None:
        (folder / "output.txt").write_text((folder / "checkpoint").read_text() + ", step 6")
        (folder / "checkpoint").unlink()

    with pytest.raises(KeyboardInterrupt):
        fresh(root, interrupted, resumable=True)
    run = fresh(root, resumed, resumable=True)
    assert run.path("output.txt").read_text() == "step 5, step 6"
    assert list(run.json("run.json")["outputs"]) == ["output.txt"]


def test_seconds_leave_out_the_inputs(root):
    store = Store(root)

    def inner(folder: Path) -> None:
        time.sleep(0.4)

    def outer(folder: Path) -> None:
        store.get("input", "x", {}, inner)
        time.sleep(0.1)

    whole = store.get("whole", "x", {}, outer)
    part = store.touched[store.place("input", "x", {})[1]]
    assert part.seconds >= 0.4
    assert 0.1 <= whole.seconds < 0.4
    assert set(store.touched) == {whole.key, part.key}


def test_a_hit_reports_the_seconds_of_its_build(root):
    def slow(folder: Path) -> None:
        time.sleep(0.2)

    fresh(root, slow)
    assert fresh(root, slow).seconds >= 0.2


# --- several processes -----------------------------------------------------------------------


def _build_slowly(root: Path, barrier, log: Path) -> None:
    def build(folder: Path) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        (folder / "output.txt").write_text("content")

    barrier.wait(60)
    assert fresh(root, build).path("output.txt").read_text() == "content"


def test_processes_side_by_side_build_once(root, tmp_path):
    barrier, log = SPAWN.Barrier(2), tmp_path / "log"
    processes = [
        SPAWN.Process(target=_build_slowly, args=(root, barrier, log), daemon=True)
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(log.read_text().splitlines()) == 1


def _build_forever(root: Path, started: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        started.touch()
        time.sleep(600)

    fresh(root, build)


def test_a_kill_leaves_no_run_and_no_lock(root, tmp_path):
    started = tmp_path / "started"
    process = SPAWN.Process(target=_build_forever, args=(root, started), daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join(30)
    assert started.exists()
    assert not list(root.glob("*/run.json"))

    build = Counter()
    run = fresh(root, build)
    assert build.calls == 1
    assert not run.path("half.txt").exists()
    assert json.loads(run.path("run.json").read_text())["outputs"].keys() == {"deep/output.txt"}
