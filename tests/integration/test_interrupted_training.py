"""A fine-tuning that is killed goes on from its last checkpoint, to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers import copy_project, environment

EPOCHS = 20

#: Trains one arm, a tenth of the units frozen, and prints where its models are.
PROGRAM = f"""
from ssah import Study
from ssah.lab.units_of import group, matched
from ssah.training.part import Part

lab = Study("smoke", ["finetune.epochs={EPOCHS}"]).labs[0]
mask = matched(lab, "random", group(lab, "ESU + 6 % CU"))
print(lab.training(lab.aligned.trained("dialogues", Part(freeze=mask))).path(""))
"""


def start(project: Path, home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=project,
        env=environment(project, home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> Path:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return Path(out.splitlines()[-1])


def checkpoints(home: Path) -> list[int]:
    """Steps of the checkpoints that lie there now."""
    found = home.glob("runs/train_dialogues-*.partial/checkpoints/checkpoint-*")
    return sorted(int(path.name.rpartition("-")[2]) for path in found)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return copy_project(tmp_path_factory.mktemp("interrupted") / "project")


def test_a_kill_costs_at_most_one_checkpoint_interval(project, tmp_path):
    whole = finished(start(project, tmp_path / "whole"))
    home = tmp_path / "killed"
    process = start(project, home)
    steps_an_epoch, deadline = 2, time.monotonic() + 200
    while not [step for step in checkpoints(home) if step >= 5 * steps_an_epoch]:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    reached = max(checkpoints(home)) // steps_an_epoch
    assert reached < EPOCHS, "the kill came too late to say anything"
    partial = next(home.glob("runs/train_dialogues-*.partial"))
    kept = {n: (partial / f"epoch-{n}/model.safetensors").stat().st_mtime_ns for n in (1, 2, 3, 4)}

    resumed = finished(start(project, home))
    for epoch, written in kept.items():
        path = resumed / f"epoch-{epoch}" / "model.safetensors"
        assert path.stat().st_mtime_ns == written, f"epoch {epoch} was trained again"
    for epoch in (reached, EPOCHS):
        first, second = (
            load_file(folder / f"epoch-{epoch}" / "model.safetensors")
            for folder in (whole, resumed)
        )
        assert all(first[name].equal(second[name]) for name in first), epoch
    assert not (resumed / "checkpoints").exists()
