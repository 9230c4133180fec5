"""Content-addressed run store: outputs under a key of everything that shaped them.

A run is a folder ``<stage>-<label>-<hash10>``. It is built beside its place, gets ``run.json``
last and is then renamed, so a folder with a run.json is complete. A hit needs a parsable run.json
and outputs whose sha256 still match; anything else is built again, and one line says why.

What is asked for is a :class:`Handle`: its key is known at once, and it is built when one of its
outputs is read. So a plan can be made of what there is to build without building any of it.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import SsahError
from .runtime import peak_memory_mib, provenance

logger = logging.getLogger(__name__)


#: What a run.json holds.
RECORDED = {
    "stage", "key", "config", "inputs", "outputs", "dropped", "seconds", "peak_memory_mib",
    "finished", "command", "commit", "python", "machine", "versions", "sha256",
}  # fmt: skip

#: How long a lock is waited for before that is said.
SILENT_SECONDS = 2


class NotBuilt(LookupError):
    """An output was read that is not there, where nothing may be built."""


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal content gives equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Handle:
    """A run by its key, built when one of its outputs is read."""

    store: Store
    stage: str
    label: str
    config: Mapping[str, Any]  #: what the key is made of
    build: Callable[[Path], None] = field(repr=False)
    inputs: tuple[str, ...] = ()  #: keys of the runs that it is made from
    resumable: bool = False

    @functools.cached_property
    def key(self) -> str:
        return digest({"stage": self.stage, **self.config})

    @property
    def folder(self) -> Path:
        """Where it is, once it is built."""
        return self.store.root / f"{self.stage}-{self.label}-{self.key[:10]}"

    def has(self, name: str = "") -> bool:
        """Whether it is built, and an output of that name (all of them if "") was not dropped."""
        record = self.store.record(self.folder)
        return record is not None and not _dropped(record, name)

    def path(self, name: str) -> Path:
        """An output, or a folder of them; built first where it is not there."""
        self.store.require(self, name)
        return self.folder / name

    def json(self, name: str) -> Any:
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def drop(self, pattern: str) -> None:
        """Delete outputs that match, to make room; whoever reads them builds them again."""
        self.store.drop(self.folder, self.key, pattern)


class Store:
    """Runs under one root folder; safe for several processes at once."""

    def __init__(self, root: Path):
        self.root = root
        self.may_build = True
        self.touched: set[str] = set()  #: keys of the runs read since the caller cleared this
        self._intact: set[str] = set()  # keys of runs that were verified in this process
        self._asked: list[set[str]] = []  # inputs of the runs that are being built, innermost last
        self._built_seconds = 0.0

    @contextmanager
    def only_reading(self) -> Iterator[None]:
        """Inside the block what is not built raises :class:`NotBuilt`."""
        before, self.may_build = self.may_build, False
        try:
            yield
        finally:
            self.may_build = before

    def require(self, handle: Handle, name: str = "") -> None:
        """See to it that an output is there and intact (all of them if the name is "")."""
        key = handle.key
        self.touched.add(key)
        if self._asked:
            self._asked[-1].add(key)
        there = handle.has(name)  # another process may have dropped it since it was verified
        if there and key in self._intact:
            return
        if not self.may_build and not there:
            raise NotBuilt(handle.folder.name)
        folder = handle.folder
        with self._locked(folder):
            fault = self._fault(folder, name)
            if fault:
                if not self.may_build:
                    raise NotBuilt(folder.name)
                if fault != "missing":
                    print(f"{folder.name}: {fault}; computing it again.", file=sys.stderr)
                shutil.rmtree(folder, ignore_errors=True)
                self._build(handle)
            self._intact.add(key)

    def record(self, folder: Path) -> dict[str, Any] | None:
        """What ``run.json`` says; None where there is no finished run."""
        path = folder / "run.json"
        try:
            return _read(path, path.stat().st_mtime_ns)
        except (OSError, ValueError):
            return None

    def records(self) -> dict[str, dict[str, Any]]:
        """Of all finished runs, by key."""
        found = (self.record(path.parent) for path in self.root.glob("*/run.json"))
        return {record["key"]: record for record in found if record is not None}

    def drop(self, folder: Path, key: str, pattern: str) -> None:
        """Delete a run's outputs that match; nothing where it is not built."""
        with self._locked(folder):
            record = self.record(folder)
            dropped = fnmatch.filter(record["outputs"], pattern) if record else []
            if record is None or not dropped:
                return
            left = {n: s for n, s in record["outputs"].items() if n not in dropped}
            gone = sorted({*record.get("dropped", ()), *dropped})
            _write_signed({**record, "dropped": gone, "outputs": left}, folder / "run.json")
            for name in dropped:
                (folder / name).unlink(missing_ok=True)
            for parent in {(folder / name).parent for name in dropped} - {folder}:
                shutil.rmtree(parent, ignore_errors=True)

    @contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        """For one process at a time; whoever waits for another says so."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder.with_name(folder.name + ".lock"))
            try:
                lock.acquire(timeout=SILENT_SECONDS)
            except Timeout:
                logger.info("Waiting for another process, which is building %s", folder.name)
                lock.acquire()
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise SsahError(
                f"{self.root} cannot be used ({error}): point SSAH_HOME at a folder of your own, "
                "on a disk that can lock files."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _fault(self, folder: Path, name: str) -> str | None:
        """Why the folder is no usable run, or None."""
        if not folder.exists():
            return "missing"
        try:
            record = json.loads((folder / "run.json").read_text("utf-8"))
            if "sha256" not in record and "stage" in record:  # written before records were signed
                record = _write_signed(record, folder / "run.json")
            if set(record) - RECORDED or record.get("sha256") != _signature(record):
                return "run.json is not what was written"
            if _dropped(record, name):
                return f"{name or record['dropped'][0]} was dropped to make room"
            for output, sha in record["outputs"].items():
                if file_digest(folder / output) != sha:
                    return f"{output} is not what was written"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"it is damaged ({type(error).__name__})"
        return None

    def _build(self, handle: Handle) -> None:
        partial = handle.folder.with_name(handle.folder.name + ".partial")
        if not handle.resumable:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        logger.info("Building %s", handle.folder.name)
        before, start = self._built_seconds, time.monotonic()
        self._asked.append(set(handle.inputs))
        try:
            handle.build(partial)
        finally:
            inputs = self._asked.pop()
        nested = self._built_seconds - before  # spent on inputs that this build asked for
        seconds = time.monotonic() - start - nested
        self._built_seconds += seconds
        files = sorted(p for p in partial.rglob("*") if p.is_file() and p.name != "run.json")
        record = {
            "stage": handle.stage,
            "key": handle.key,
            "config": handle.config,
            "inputs": sorted(inputs),
            "outputs": {p.relative_to(partial).as_posix(): file_digest(p) for p in files},
            "seconds": round(seconds, 3),
            "peak_memory_mib": peak_memory_mib(),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **provenance(),
        }
        _write_signed(record, partial / "run.json")
        partial.replace(handle.folder)


@functools.cache
def _read(path: Path, written: int) -> dict[str, Any]:
    """A record as it was written at that time: thousands are asked for again and again."""
    return json.loads(path.read_text("utf-8"))


def _signature(record: Mapping[str, Any]) -> str:
    """sha256 of all else in a record: the digests in it are only as good as its own bytes."""
    return digest({name: value for name, value in record.items() if name != "sha256"})


def _write_signed(record: dict[str, Any], path: Path) -> dict[str, Any]:
    signed = {**record, "sha256": _signature(record)}
    partial = path.with_name(".run.json")
    partial.write_text(json.dumps(signed, indent=1), encoding="utf-8")
    partial.replace(path)
    return signed


def _dropped(record: Mapping[str, Any], name: str) -> bool:
    """Whether an output, or something in a folder of outputs, was dropped; any of them if ""."""
    dropped = record.get("dropped", ())
    return any(not name or other == name or other.startswith(f"{name}/") for other in dropped)


def behind(records: Mapping[str, Mapping[str, Any]], keys: set[str]) -> set[str]:
    """These runs and everything that they were made from, as far as there are records of them."""
    seen: set[str] = set()
    left = list(keys)
    while left:
        key = left.pop()
        if key not in seen and key in records:
            seen.add(key)
            left += records[key].get("inputs", ())
    return seen
