"""Where sets come from: published wheels, the user's files and hub sets, or a toy generator.

Sets are built once, written to the run store as JSONL, and read from there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.paths import RESOURCES
from ..core.store import Handle, Store, file_digest
from .embedded import embedded_sets
from .own import arithmetic_rows, own_rows, toy_sets
from .rows import SETS, Row, write_jsonl
from .settings import DataConfig
from .split import require_disjoint
from .user_files import file_sources, sets_from_files


def set_names(config: DataConfig) -> set[str]:
    """The sets that a source has; nothing is read or downloaded to know it."""
    if config.source != "files":
        return set(SETS)
    given = set(file_sources(config)) - {"harmful", "benign"}
    parts = {name for name in SETS if name.startswith(("harmful_", "benign_"))}
    return parts | given | {"heldout_text", "borderline", "arithmetic"}


def build_sets(store: Store, config: DataConfig) -> Handle:
    """All sets of a source, as ``<set>.jsonl`` in one run."""
    key: dict[str, Any] = {"version": 2, "config": dataclasses.asdict(config)}
    key["resources"] = {p.name: file_digest(p) for p in sorted(RESOURCES.glob("*.json*"))}
    sources: dict[str, Callable[[], dict[str, list[Row]]]] = {
        "embedded": lambda: embedded_sets(store, config),
        "toy": lambda: toy_sets(config),
        "files": lambda: {  # where the user gives none, what this project holds or generates
            "borderline": own_rows("borderline_prompts"),
            "arithmetic": arithmetic_rows(400, config.split_seed),
            **sets_from_files(config),
        },
    }
    if config.source == "files":
        key["files"] = {
            name: file_digest(source.local)
            for name, source in file_sources(config).items()
            if source.local
        }

    def build(folder: Path) -> None:
        found = sources[config.source]()
        require_disjoint(found)
        for name, rows in found.items():
            write_jsonl(folder / f"{name}.jsonl", rows)

    return Handle(store, "data", config.source, key, build)
