"""Runs whose large outputs were dropped: what stays, and when they are built again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ssah.core.store import Run, Store

LARGE = {"model-1/weights.bin", "model-1/config.json", "model-2/weights.bin"}
SMALL = {"record.json", "logs/model-1.txt"}


class Training:
    """A build with large outputs and small ones that counts how often it ran."""

    def __init__(self, pause: float = 0.0):
        self.pause, self.calls = pause, 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        time.sleep(self.pause)
        for name in LARGE | SMALL:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"content of {name}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def ask(store: Store, build: Training, **options) -> Run:
    return store.get("train", "label", {"version": 1}, build, **options)


def files(run: Run) -> set[str]:
    """What is there besides the record, hidden files included."""
    found = {p.relative_to(run.folder).as_posix() for p in run.folder.rglob("*") if p.is_file()}
    return found - {"run.json"}


def test_what_matches_is_gone_and_the_rest_stays(root):
    """The pattern is matched against the whole name: a log about a model is not a model."""
    store, build = Store(root), Training()
    run = ask(store, build)
    assert files(run) == LARGE | SMALL
    store.drop(run, "model-*")
    assert files(run) == SMALL
    assert run.path("record.json").read_text() == "content of record.json"
    assert build.calls == 1


def test_the_record_tells_what_was_dropped(root):
    store = Store(root)
    run = ask(store, Training())
    before = run.json("run.json")
    store.drop(run, "model-2/*")
    store.drop(run, "model-1/*")
    after = run.json("run.json")
    assert after.pop("dropped") == sorted(LARGE)
    assert after["outputs"] == {name: before["outputs"][name] for name in SMALL}
    assert "dropped" not in before
    assert after | {"outputs": before["outputs"]} == before


@pytest.mark.parametrize("again", [False, True], ids=["same_store", "new_store"])
def test_what_is_left_will_do_where_nobody_needs_the_rest(root, capsys, again):
    store, build = Store(root), Training()
    run = ask(store, build)
    store.drop(run, "model-*")
    capsys.readouterr()
    asked = Store(root) if again else store
    assert ask(asked, build, whole=False) == run
    assert run.key in asked.touched
    assert build.calls == 1
    assert files(run) == SMALL
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("again", [False, True], ids=["same_store", "new_store"])
@pytest.mark.parametrize("first", [False, True], ids=["whole_at_once", "part_first"])
def test_the_whole_is_built_again_and_a_line_says_why(root, capsys, again, first):
    """Also by a store that has just found the part to be intact."""
    store, build = Store(root), Training()
    run = ask(store, build)
    store.drop(run, "model-*")
    asked = Store(root) if again else store
    if first:
        ask(asked, build, whole=False)
    capsys.readouterr()

    whole = ask(asked, build)

    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"{run.folder.name}: model-1/config.json and the like were dropped; computing it again."
    )
    assert build.calls == 2
    assert (whole.folder, whole.key) == (run.folder, run.key)
    assert files(whole) == LARGE | SMALL
    assert "dropped" not in whole.json("run.json")

    for other in (asked, Store(root)):  # it is whole again for everybody
        ask(other, build)
        ask(other, build, whole=False)
    assert build.calls == 2
    assert capsys.readouterr().err == ""


def test_what_was_built_again_can_be_dropped_again(root):
    store, build = Store(root), Training()
    for calls in (1, 2, 3):
        run = ask(store, build)
        assert build.calls == calls
        store.drop(run, "model-*")
        assert files(run) == SMALL


def test_dropping_twice_or_nothing_is_harmless(root):
    store, build = Store(root), Training()
    run = ask(store, build)
    untouched = run.path("run.json").read_text()
    store.drop(run, "no-such-*")
    assert run.path("run.json").read_text() == untouched
    assert ask(store, build) == run, "nothing was dropped, so the run is still whole"
    store.drop(run, "model-*")
    once = run.path("run.json").read_text()
    store.drop(run, "model-*")
    Store(root).drop(run, "model-*")
    assert run.path("run.json").read_text() == once
    assert files(run) == SMALL
    assert build.calls == 1


def test_a_first_request_for_a_part_builds_the_whole(root, capsys):
    build = Training()
    run = ask(Store(root), build, whole=False)
    assert files(run) == LARGE | SMALL
    assert capsys.readouterr().err == ""
    ask(Store(root), build)
    assert build.calls == 1


def _damage(run: Run) -> None:
    run.path("record.json").write_text("something else")


def _lose(run: Run) -> None:
    run.path("record.json").unlink()


def _cut(run: Run) -> None:
    text = run.path("run.json").read_text()
    run.path("run.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_damage, "record.json is not what was written"),
        (_lose, "damaged (FileNotFoundError)"),
        (_cut, "damaged (JSONDecodeError)"),
    ],
)
def test_damage_to_what_is_left_is_noticed(root, capsys, harm, reason):
    store, build = Store(root), Training()
    run = ask(store, build)
    store.drop(run, "model-*")
    harm(run)
    capsys.readouterr()
    repaired = ask(Store(root), build, whole=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert build.calls == 2
    assert files(repaired) == LARGE | SMALL


def test_a_drop_that_was_cut_short_is_a_drop(root):
    """The record changes first: files that a crash left behind are no longer outputs."""
    store, build = Store(root), Training()
    run = ask(store, build)
    kept = run.path("model-1/weights.bin").read_text()
    store.drop(run, "model-*")
    run.path("model-1").mkdir()
    run.path("model-1/weights.bin").write_text(kept)
    assert ask(Store(root), build, whole=False) == run
    assert build.calls == 1
    ask(Store(root), build)
    assert build.calls == 2


def test_seconds_are_those_of_the_build(root):
    """Claims about cost rest on them, so that dropping must not lose them."""
    store, build = Store(root), Training(pause=0.2)
    run = ask(store, build)
    assert run.seconds >= 0.2
    store.drop(run, "model-*")
    assert ask(store, build, whole=False).seconds == run.seconds
    assert ask(Store(root), build, whole=False).seconds == run.seconds
    assert json.loads(run.path("run.json").read_text())["seconds"] == run.seconds
