"""What several test files need: a copy of the project, its command line, and wheels to fetch."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

from ssah.paths import project_root

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
