"""Selections of units."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import InvalidValueError
from .families import BlockKind, UnitKind


class UnitMask(Mapping[str, Tensor]):
    """A selection of units of one kind: one bool tensor ``[units]`` for each block name.

    Supports ``&``, ``|``, ``-``, ``~`` and ``==`` between masks of one layout.
    """

    def __init__(self, chosen: Mapping[str, Tensor], unit_kind: UnitKind = "head"):
        self._chosen = {name: part.bool() for name, part in chosen.items()}
        self.unit_kind = unit_kind

    def __getitem__(self, name: str) -> Tensor:
        return self._chosen[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._chosen)

    def __len__(self) -> int:
        return len(self._chosen)

    def _combine(self, other: UnitMask, operation: Callable[[Tensor, Tensor], Tensor]) -> UnitMask:
        if self.sizes() != other.sizes() or self.unit_kind != other.unit_kind:
            raise InvalidValueError(
                "The two masks belong to different layouts: their blocks or kinds of unit differ."
            )
        combined = {name: operation(self[name], other[name]) for name in self}
        return UnitMask(combined, self.unit_kind)

    def __and__(self, other: UnitMask) -> UnitMask:
        return self._combine(other, torch.logical_and)

    def __or__(self, other: UnitMask) -> UnitMask:
        return self._combine(other, torch.logical_or)

    def __sub__(self, other: UnitMask) -> UnitMask:
        return self._combine(other, lambda a, b: a & ~b)

    def __invert__(self) -> UnitMask:
        return UnitMask({name: ~part for name, part in self.items()}, self.unit_kind)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, UnitMask)
            and self.unit_kind == other.unit_kind
            and self.sizes() == other.sizes()
            and all(torch.equal(self[name], other[name]) for name in self)
        )

    __hash__ = None  # type: ignore[assignment]  # its tensors can be written to

    def __repr__(self) -> str:
        return f"UnitMask({self.count():,} of {sum(self.sizes().values()):,} units)"

    def sizes(self) -> dict[str, int]:
        """Number of units by block name."""
        return {name: len(part) for name, part in self.items()}

    def digest(self) -> str:
        """sha256 of the unit kind, the block names and the bits: equal masks, equal digests."""
        found = hashlib.sha256(self.unit_kind.encode())
        for name in sorted(self):
            found.update(name.encode() + self[name].cpu().numpy().tobytes())
        return found.hexdigest()

    def count(self, kind: BlockKind | None = None) -> int:
        """Number of chosen units, in all blocks or in those of one kind."""
        return sum(int(m.sum()) for n, m in self.items() if kind is None or n.endswith(kind))

    def share(self) -> float:
        """Chosen units as a fraction of all units: unweighted counts, as the paper prints them."""
        return self.count() / sum(self.sizes().values())

    def save(self, path: Path, **metadata: str) -> None:
        """Write to safetensors, with string metadata in the header."""
        header = {"unit_kind": self.unit_kind, "metadata": json.dumps(metadata)}
        save_file(self._chosen, path, metadata=header)

    @classmethod
    def load(cls, path: Path) -> UnitMask:
        """What :meth:`save` wrote."""
        with safe_open(path, framework="pt") as file:
            kind = cast(UnitKind, (file.metadata() or {}).get("unit_kind", "head"))
            return cls({name: file.get_tensor(name) for name in file.keys()}, kind)  # noqa: SIM118
