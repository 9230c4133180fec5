"""Remove units for a while: zero their contribution or replace it by its mean, then restore it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..core.valid import require_word
from ..units.layout import UnitLayout
from ..units.mask import UnitMask

#: What is put in the place of units that are removed: nothing, or what they say on average.
Mode = Literal["zero", "mean"]


@contextmanager
def ablate(
    model: nn.Module,
    layout: UnitLayout,
    mask: UnitMask,
    mode: Mode = "zero",
    mean: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Context manager under which the chosen units say nothing.

    Their input columns of ``B`` are set to zero (rows of ``A`` alone would not do: with biases on
    q/k/v a "removed" head would still speak). ``mode="mean"`` also adds the constant that the
    units contribute on average: ``W[:, j] @ mean[j]``, with ``mean`` by block, ``[channels]``
    (:attr:`ActivationStatistics.mean`). On exit, also after an error, every weight has its old
    bits again.
    """
    layout.require(mask)
    require_word("mode", mode, get_args(Mode))
    if mode == "mean" and mean is None:
        raise ValueError("Mean ablation needs the activation means of the units.")
    saved: list[tuple[nn.Linear, Tensor, Tensor]] = []
    handles = []
    try:
        for block in layout.blocks:
            chosen = mask[block.name]
            if not chosen.any():
                continue
            linear = block.projection(model)
            columns = block.channels[chosen].flatten().to(linear.weight.device)
            kept = linear.weight.detach()[:, columns].clone()
            if mode == "mean":
                assert mean is not None
                constant = kept @ mean[block.name].to(kept)[columns]
                handles.append(linear.register_forward_hook(_adder(constant)))
            saved.append((linear, columns, kept))
            with torch.no_grad():
                linear.weight[:, columns] = 0
        yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for linear, columns, kept in saved:
                linear.weight[:, columns] = kept


def _adder(constant: Tensor):
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + constant

    return hook
