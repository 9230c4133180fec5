"""Settings of the sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from ..core.valid import one_of, within


@dataclass
class DataConfig:
    """Which sets, and how AdvBench is divided. ``source``: ``embedded``, ``toy`` or ``files``.

    Near-duplicates (token-set Jaccard >= ``near_duplicate``) always fall into one part. Sizes that
    are not set are shares of what is given.
    """

    source: str = one_of(MISSING, "embedded", "toy", "files")
    split_seed: int = within(0, 0)
    near_duplicate: float = within(0.5, high=1, above=0)
    align: int | None = within(None, 0)
    evaluation: int | None = within(None, 1)
    search: int | None = within(None, 1)
    files: dict[str, Any] = field(default_factory=dict)  #: set name -> path or hub source
