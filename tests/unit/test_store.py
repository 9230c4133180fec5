"""The run store: hits, misses, damage, interruptions, and processes side by side."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from ssah.core.errors import SsahError
from ssah.core.store import Handle, NotBuilt, Store, behind, canonical, digest

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


def lazy(store: Store, build: Callable[[Path], None], key: dict | None = None, **more) -> Handle:
    return Handle(store, more.pop("stage", "stage"), "label", key or {"version": 1}, build, **more)


def fresh(root: Path, build: Callable[[Path], None], key: dict | None = None, **more) -> Handle:
    """Built, or found by a store that has verified nothing yet, as by a new process."""
    handle = lazy(Store(root), build, key, **more)
    handle.path("")
    return handle


def test_nothing_is_built_before_an_output_is_read(root):
    build, store = Counter(), Store(root)
    handle = lazy(store, build)
    assert handle.folder.name == f"stage-label-{handle.key[:10]}"
    assert not handle.has()
    assert build.calls == 0
    assert handle.path("deep/output.txt").read_text() == "content"
    assert handle.has()
    assert build.calls == 1


def test_where_nothing_may_be_built_what_is_missing_is_named(root):
    build, store = Counter(), Store(root)
    handle = lazy(store, build)
    with store.only_reading(), pytest.raises(NotBuilt, match=handle.folder.name):
        handle.path("deep/output.txt")
    assert build.calls == 0
    assert not root.exists()
    handle.path("deep/output.txt")
    with Store(root).only_reading():
        assert lazy(store, build).path("deep/output.txt").exists()


def test_a_second_process_reads_what_the_first_one_built(root):
    build = Counter()
    first, second = fresh(root, build), fresh(root, build)
    assert build.calls == 1
    assert first.key == second.key
    assert second.path("deep/output.txt").read_text() == "content"


def test_one_store_verifies_a_run_once(root):
    build, store = Counter(), Store(root)
    path = lazy(store, build).path("deep/output.txt")
    path.write_text("changed behind its back")
    assert lazy(store, build).path("deep/output.txt").read_text() == "changed behind its back"
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
    build = Counter()
    one, two = (fresh(root, build, {"a": 1}, stage=stage) for stage in ("one", "two"))
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
        (_replace_record("{}"), "run.json is not what was written"),
        (_replace_record('{"outputs": {}, "seconds": 1}'), "run.json is not what was written"),
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


def test_every_flipped_bit_is_found(root, capsys):
    """In any byte of a run, its record included."""
    rng = random.Random(0)
    for _ in range(50):
        run = fresh(root, build := Counter())
        assert build.calls <= 1
        path = rng.choice([run.folder / "run.json", run.folder / "deep" / "output.txt"])
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        capsys.readouterr()
        fresh(root, build := Counter())
        assert build.calls == 1, (path.name, bytes(content))
        assert "computing it again" in capsys.readouterr().err


def test_a_record_from_before_records_were_signed_is_signed(root):
    run = fresh(root, build := Counter())
    record = json.loads((run.folder / "run.json").read_text())
    del record["sha256"]
    (run.folder / "run.json").write_text(json.dumps(record))
    with Store(root).only_reading():
        fresh(root, build)
    assert build.calls == 1
    assert "sha256" in json.loads((run.folder / "run.json").read_text())


def test_damage_is_no_reason_to_build_where_nothing_may_be_built(root):
    run = fresh(root, build := Counter())
    (run.folder / "deep" / "output.txt").write_text("other!!")
    store = Store(root)
    with store.only_reading(), pytest.raises(NotBuilt):
        lazy(store, build).path("")
    assert (run.folder / "run.json").exists()


def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(SsahError, match=r"cannot be used .*: point SSAH_HOME at a folder"):
        fresh(blocked / "runs", Counter())


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()]
)
def test_a_disk_without_locks_is_one_sentence(root, monkeypatch, error):
    def acquire(*_, **__):
        raise error

    monkeypatch.setattr("ssah.core.store.FileLock.acquire", acquire)
    with pytest.raises(SsahError, match="on a disk that can lock files"):
        fresh(root, Counter())


def test_whoever_waits_says_for_what(root, monkeypatch, caplog):
    monkeypatch.setattr("ssah.core.store.SILENT_SECONDS", 0.05)
    handle = fresh(root, Counter())
    held = threading.Event()

    def hold() -> None:
        with FileLock(handle.folder.with_name(handle.folder.name + ".lock")):
            held.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with caplog.at_level("INFO", "ssah"):
        fresh(root, Counter())
    thread.join()
    assert f"Waiting for another process, which is building {handle.folder.name}" in caplog.text


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


def test_inputs_are_what_was_named_and_what_was_read_while_building(root):
    store = Store(root)
    named, read = (lazy(store, Counter(), {"number": n}) for n in (1, 2))
    whole = lazy(store, lambda _: read.path(""), {"number": 3}, inputs=(named.key,))
    whole.path("")
    assert set(whole.json("run.json")["inputs"]) == {named.key, read.key}
    assert store.touched == {read.key, whole.key}, "what is only named is not read"


def test_seconds_are_counted_once_and_without_those_of_inputs(root):
    store = Store(root)
    inner = lazy(store, lambda _: time.sleep(0.4), {"number": 1})

    def build(_: Path) -> None:
        inner.path("")
        time.sleep(0.1)

    outer = [lazy(store, build, {"number": n}) for n in (2, 3)]
    for handle in outer:
        handle.path("")
    records = store.records()
    seconds = {handle.key: records[handle.key]["seconds"] for handle in (inner, *outer)}
    assert seconds[inner.key] >= 0.4
    assert all(0.1 <= seconds[handle.key] < 0.4 for handle in outer)
    assert behind(records, {handle.key for handle in outer}) == set(seconds)


# --- outputs that are dropped ----------------------------------------------------------------

LARGE = {"epoch-1/weights.bin", "epoch-1/config.json", "epoch-2/weights.bin"}
SMALL = {"record.json", "logs/epoch-1.txt"}


class Training:
    """A build with large outputs and small ones that counts how often it ran."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        for name in LARGE | SMALL:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"content of {name}")


def files(handle: Handle) -> set[str]:
    """What is there besides the record, hidden files included."""
    folder = handle.folder
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return found - {"run.json"}


@pytest.mark.parametrize("again", [False, True], ids=["same_store", "new_store"])
def test_what_was_dropped_is_built_again_when_it_is_read_and_not_before(root, capsys, again):
    """The pattern is matched against the whole name: a log about a model is not a model."""
    store, build = Store(root), Training()
    handle = lazy(store, build)
    handle.path("")
    handle.drop("epoch-*/*")
    assert files(handle) == SMALL
    record = handle.json("run.json")
    assert record["dropped"] == sorted(LARGE)
    assert set(record["outputs"]) == SMALL

    asked = lazy(Store(root) if again else store, build)
    assert asked.path("record.json").read_text() == "content of record.json"
    assert asked.has("record.json")
    assert not asked.has("epoch-1")
    assert not asked.has()
    assert build.calls == 1
    assert capsys.readouterr().err == ""

    assert (asked.path("epoch-1") / "weights.bin").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (f"{handle.folder.name}: epoch-1 was dropped to make room; computing it again.")
    assert build.calls == 2
    assert files(asked) == LARGE | SMALL
    assert "dropped" not in asked.json("run.json")
    asked.drop("epoch-1/*")
    assert asked.has("epoch-2")
    assert files(asked) == SMALL | {"epoch-2/weights.bin"}


def test_dropping_what_is_not_there_changes_nothing(root):
    build = Training()
    handle = lazy(Store(root), build)
    root.mkdir()
    handle.drop("epoch-*/*")
    assert build.calls == 0
    handle.path("")
    before = handle.json("run.json")
    handle.drop("nothing-*")
    assert handle.json("run.json") == before


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
