"""Settings of the sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class DataConfig:
    """Which sets, and how AdvBench is divided. ``source``: ``embedded``, ``toy`` or ``files``.

    Near-duplicates (token-set Jaccard >= ``near_duplicate``) always fall into one part.
    """

    source: str = MISSING
    split_seed: int = 0
    near_duplicate: float = 0.5
    align: int = MISSING
    evaluation: int = MISSING
    search: int = MISSING
    files: dict[str, Any] = field(default_factory=dict)  #: set name -> path or hub source
