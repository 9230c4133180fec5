"""What several test files need: a copy of the project, its command line, small trainings."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
)

from ssah.core.paths import project_root
from ssah.training.settings import AlignConfig
from ssah.training.supervised import ResponseTrainer
from ssah.units.layout import UnitLayout
from ssah.units.mask import UnitMask

Dialogues = list[tuple[list[int], list[int]]]

COPIED = ("conf", "notebooks", "ssah", "results/reference", "pyproject.toml")


def copy_project(folder: Path) -> Path:
    """A copy of the code without results, so that a test's results never meet the user's."""
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in COPIED:
        source, target = project_root() / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return folder


def environment(project: Path, home: Path) -> dict[str, str]:
    """Variables under which a child process uses that copy and that cache, and no network."""
    return {
        **os.environ,
        "PYTHONPATH": str(project),
        "SSAH_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Two processes side by side on two cores would otherwise fight over them.
        "OMP_NUM_THREADS": "1",
    }


class CommandLine:
    """``python -m ssah`` in a copy of the project, with its own cache."""

    def __init__(self, project: Path, home: Path):
        self.project, self.home = project, home
        self.runs, self.results = home / "runs", project / "results"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "ssah", *arguments],
            cwd=self.project,
            env=environment(self.project, self.home),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return finish(self.start(*arguments), timeout)

    def finished_runs(self) -> dict[str, int]:
        """Name and time of writing of every complete run."""
        records = self.runs.glob("*/run.json")
        return {
            p.parent.name: p.stat().st_mtime_ns for p in records if p.parent.suffix != ".partial"
        }


def finish(process: subprocess.Popen[str], timeout: float = 300) -> subprocess.CompletedProcess:
    """Wait for a process and collect what it printed; kill it where it hangs."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"No end after {timeout} s:\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def built(stderr: str) -> list[str]:
    """Names of the runs that a command said it was building, in order."""
    return re.findall(r"Building (\S+)", stderr)


# --- small trainings -------------------------------------------------------------------------


def dialogues(count: int, seed: int = 0) -> Dialogues:
    """Of different lengths, so that a mean of means is not the mean over tokens."""
    rng = random.Random(seed)

    def draw(shortest: int, longest: int) -> list[int]:
        return [rng.randint(3, 39) for _ in range(rng.randint(shortest, longest))]

    return [(draw(1, 6), draw(1, 12)) for _ in range(count)]


def small_training(**changes) -> AlignConfig:
    """Four steps an epoch on sixteen dialogues, with accumulation over two micro-batches."""
    settings = {"epochs": 2, "learning_rate": 1e-2, "batch_size": 4, "micro_batch_size": 2}
    return AlignConfig(**(settings | {"warmup_steps": 1} | changes))


class Interruption(Exception):
    """Stands for a power cut."""


class AtNextEpoch(TrainerCallback):
    """Interrupts such a training right after the first epoch's checkpoint."""

    def on_epoch_begin(self, args, state, control, **rest):
        if state.global_step == 4:
            raise Interruption


class Interrupted(ResponseTrainer):
    """A trainer that is interrupted there."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(AtNextEpoch())


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def frozen_entries(
    model: PreTrainedModel, layout: UnitLayout, mask: UnitMask, *, embeddings: bool = False
) -> dict[str, Tensor]:
    """By hand: which entries of each parameter do not train, as bool tensors.

    They are what the units of ``mask`` use, rows that they share with others too, and the
    embeddings unless those train.
    """
    entries = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for block in layout.blocks:
        for part in block.slices:
            used = part.index[mask[block.name]].flatten()
            entries[part.parameter].movedim(part.dim, 0)[used] = True
    for name, part in entries.items():
        if "embed_tokens" in name or "lm_head" in name:
            part[:] = not embeddings
    return entries


def assert_frozen(
    model: PreTrainedModel, before: dict[str, Tensor], entries: dict[str, Tensor]
) -> None:
    """Frozen entries have the bits of ``before``; of the others nearly all have moved."""
    assert set(entries) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        moved = parameter.detach().view(torch.int32) != before[name].view(torch.int32)
        assert not moved[entries[name]].any(), name
        assert moved.sum() >= 0.8 * (~entries[name]).sum(), name


# --- wheels ----------------------------------------------------------------------------------


def make_wheel(folder: Path, package: str, files: dict[str, str]) -> tuple[Path, str]:
    """A small pure-Python wheel, version 1.0, with some files; its path and sha256."""
    stem = package.replace("-", "_")
    about = f"{stem}-1.0.dist-info"
    texts = {
        **files,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    records = "".join(f"{name},,\n" for name in [*texts, f"{about}/RECORD"])
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**texts, f"{about}/RECORD": records}.items():
            archive.writestr(name, text)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def save_livelier(tiny_folder: Path, folder: Path, seed: int) -> None:
    """The tiny model with larger random weights: as built, nothing that training does shows."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
