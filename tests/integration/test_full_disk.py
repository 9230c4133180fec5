"""A disk that fills up at any moment: one sentence, and nothing that was finished is lost."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from helpers import CommandLine, built, copy_project


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, whose size a test may change."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(kibibytes: int, how: str = "remount,") -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={kibibytes}k", "none", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    resize(400, how="")
    yield resize
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kibibytes", [400, 900, 1400])
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(small_disk, tmp_path, kibibytes):
    ssah = CommandLine(copy_project(tmp_path / "project"), small_disk(kibibytes))
    full = ssah("table1", "profile=smoke")
    assert full.returncode == 1
    said = [line for line in full.stderr.splitlines() if not line.startswith("[")]
    assert said[-1].startswith("ssah: no disk space is left"), full.stderr
    assert "Traceback" not in full.stderr
    finished = ssah.finished_runs()
    small_disk(60_000)
    done = ssah("table1", "profile=smoke")
    assert done.returncode == 0, done.stderr
    assert not set(built(done.stderr)) & set(finished)
    assert not list(ssah.runs.glob("*.partial"))
