"""Content-addressed run store: each stage's outputs under a key of everything that shaped them.

A run is a folder ``<stage>-<label>-<hash10>``. It is built beside its place, gets ``run.json``
last and is then renamed, so a folder with a run.json is complete. A hit needs a parsable run.json
and outputs whose sha256 still match; anything else is built again, and one line says why.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from .runtime import peak_memory_mib, provenance

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its key and the seconds that it took, its inputs' excluded."""

    folder: Path
    key: str
    seconds: float

    def path(self, name: str) -> Path:
        return self.folder / name

    def json(self, name: str) -> Any:
        return json.loads(self.path(name).read_text())


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal content gives equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """Runs under one root folder; safe for several processes at once."""

    def __init__(self, root: Path):
        self.root = root
        self.touched: dict[str, Run] = {}  # runs used since the caller last cleared this
        self._intact: dict[tuple[str, bool], Run] = {}  # verified once in this process
        self.built_seconds = 0.0  # spent on building, in this process

    def place(self, stage: str, label: str, key: Mapping[str, Any]) -> tuple[Path, str]:
        """Folder and key of a run, whether it exists or not."""
        sha = digest({"stage": stage, **key})
        return self.root / f"{stage}-{label}-{sha[:10]}", sha

    def get(
        self,
        stage: str,
        label: str,
        key: Mapping[str, Any],
        build: Callable[[Path], None],
        *,
        resumable: bool = False,
        whole: bool = True,
    ) -> Run:
        """The run for ``key``, built by ``build(folder)`` unless it is there and intact.

        ``key`` holds the stage's version, config slice, seed and the keys of its inputs. A
        ``resumable`` build finds what an interrupted one left in ``folder``; it must remove what
        is not an output. With ``whole=False`` a run will do whose large outputs were dropped.
        """
        folder, sha = self.place(stage, label, key)
        if (sha, whole) in self._intact:
            return self.touched.setdefault(sha, self._intact[sha, whole])
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            fault = self._fault(folder, whole)
            if fault:
                if fault != "missing":
                    print(f"{folder.name}: {fault}; computing it again.", file=sys.stderr)
                shutil.rmtree(folder, ignore_errors=True)
                self._build(folder, stage, key, sha, build, resumable)
            record = json.loads((folder / "run.json").read_text())
        run = self.touched[sha] = Run(folder, sha, record["seconds"])
        self._intact[sha, False] = run
        if not record.get("dropped"):
            self._intact[sha, True] = run
        return run

    def drop(self, run: Run, pattern: str) -> None:
        """Delete a run's outputs that match, to make room; the rest stays a run, though not whole.

        They are computed again when somebody asks for the whole run.
        """
        with FileLock(run.folder.with_name(run.folder.name + ".lock")):
            record = run.json("run.json")
            dropped = fnmatch.filter(record["outputs"], pattern)
            if not dropped:
                return
            record["dropped"] = sorted({*record.get("dropped", ()), *dropped})
            record["outputs"] = {n: s for n, s in record["outputs"].items() if n not in dropped}
            partial = run.path(".run.json")
            partial.write_text(json.dumps(record, indent=1))
            partial.replace(run.path("run.json"))
            for name in dropped:
                run.path(name).unlink(missing_ok=True)
            for folder in {run.path(name).parent for name in dropped} - {run.folder}:
                folder.rmdir()
        self._intact.pop((run.key, True), None)

    def _fault(self, folder: Path, whole: bool) -> str | None:
        """Why the folder is no usable run, or None."""
        if not folder.exists():
            return "missing"
        try:
            record = json.loads((folder / "run.json").read_text())
            _ = record["seconds"]
            if whole and record.get("dropped"):
                return f"{record['dropped'][0]} and the like were dropped"
            for name, sha in record["outputs"].items():
                if file_digest(folder / name) != sha:
                    return f"{name} is not what was written"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"it is damaged ({type(error).__name__})"
        return None

    def _build(self, folder, stage, key, sha, build, resumable) -> None:
        partial = folder.with_name(folder.name + ".partial")
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        logger.info("Building %s", folder.name)
        before, start = self.built_seconds, time.monotonic()
        build(partial)
        nested = self.built_seconds - before  # spent on inputs that this build asked for
        seconds = time.monotonic() - start - nested
        self.built_seconds += seconds
        files = sorted(p for p in partial.rglob("*") if p.is_file() and p.name != "run.json")
        record = {
            "stage": stage,
            "key": sha,
            "config": key,
            "outputs": {p.relative_to(partial).as_posix(): file_digest(p) for p in files},
            "seconds": round(seconds, 3),
            "peak_memory_mib": peak_memory_mib(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **provenance(),
        }
        (partial / "run.json").write_text(json.dumps(record, indent=1))
        partial.replace(folder)
