"""Where things live: the project's folders, and the cache outside of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import platformdirs

from .errors import SsahError

PACKAGE = Path(__file__).resolve().parents[1]
RESOURCES = PACKAGE / "resources"


def project_root() -> Path:
    """The clone that the package is installed from, or the current folder for a wheel."""
    return PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").exists() else Path.cwd()


def conf_dir() -> Path:
    """The Hydra configuration: ``conf/`` of the clone, or the copy inside a wheel."""
    packaged = PACKAGE / "conf"
    return packaged if packaged.exists() else PACKAGE.parent / "conf"


def reference(name: str) -> Path:
    """``paper.csv``, every number that the paper prints, or ``labels.csv``, verdicts by a rater on
    completions, by hash."""
    packaged = RESOURCES / name
    return packaged if packaged.exists() else results_root() / "reference" / name


def results_root() -> Path:
    return project_root() / "results"


def home() -> Path:
    """Cache of models, data and runs: ``SSAH_HOME``, or ``ssah`` in the user's cache folder."""
    folder = os.environ.get("SSAH_HOME")
    found = Path(folder).expanduser() if folder else platformdirs.user_cache_path("ssah")
    return found.absolute()  # notebooks run in a folder of their own


def require_space(gigabytes: float, folder: Path) -> None:
    """Raise :class:`SsahError` unless ``folder``'s disk has that much room."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free / 1e9
    if free < gigabytes:
        raise SsahError(
            f"{existing} has {free:.1f} GB free and this needs {gigabytes:.1f} GB: free some space "
            "or point SSAH_HOME at another disk."
        )
