"""The update projected onto what the alignment moved (Hsu et al. 2024, arXiv 2405.16833)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ...core.valid import Within
from ..sliced_linear import SlicedLinear
from .base import Defence


class SafeLoRA(Defence):
    """At the end the update ``D`` of some linear layers becomes ``V V' D / |V|``, where ``V`` is
    what the alignment moved there and ``|V|`` its Frobenius norm.

    These are the layers whose update is least like its projection (cosine); ``strength`` is their
    share of all.
    """

    name = "SafeLoRA"
    looks_at = ("reference", "unaligned")
    valid = Within(above=0, high=1)

    @classmethod
    def text(cls, strength: float) -> str:
        return f"{100 * strength:g} %"

    @torch.no_grad()
    def outcome(self, model: nn.Module) -> Mapping[str, Tensor]:
        cosines = {
            path: float(torch.cosine_similarity(new.flatten(), moved.flatten(), dim=0))
            for path, moved, new in self._projections(model, self._layers())
        }
        count = max(round(self.strength * len(cosines)), 1)
        chosen = sorted(cosines, key=cosines.__getitem__)[:count]
        found = {}
        for path, moved, new in self._projections(model, chosen):
            layer, before = model.get_submodule(path), self._weight(self.reference, path)
            # What did not move is frozen, and rows must not be mixed into it.
            weight = torch.where(moved == 0, before, before + new)
            if isinstance(layer, SlicedLinear):
                found[f"{path}.part"] = weight.index_select(layer.dim, layer.index)
            else:
                found[f"{path}.weight"] = weight
        return found

    def _layers(self) -> list[str]:
        assert self.reference is not None
        head = self.reference.get_output_embeddings()
        named = self.reference.named_modules()
        return [n for n, layer in named if isinstance(layer, nn.Linear) and layer is not head]

    def _projections(
        self, model: nn.Module, paths: list[str]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of each layer that the alignment and the fine-tuning moved: its update, and that
        projected."""
        for path in paths:
            before = self._weight(self.reference, path)
            moved = self._weight(model, path) - before
            aligned = before - self._weight(self.unaligned, path)
            size = aligned.norm()
            if size > 0 and moved.any():
                yield path, moved, aligned @ (aligned.T @ moved) / size

    @staticmethod
    def _weight(model: nn.Module | None, path: str) -> Tensor:
        assert model is not None
        weight = model.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        return weight.detach().float()
