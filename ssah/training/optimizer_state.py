"""An optimizer that goes on while what trains changes: what trains keeps its state."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def hand_over(
    optimizer: Optimizer, whole: nn.Parameter, part: nn.Parameter, index: Tensor, dim: int
) -> None:
    """Let ``part``, the positions ``index`` of ``whole`` along ``dim``, take its place."""
    state = _replace(optimizer, whole, part)
    if state is not None:
        optimizer.state[part] = {
            name: value.index_select(dim, index) if _is_like(value, whole) else value
            for name, value in state.items()
        }


def hand_back(
    optimizer: Optimizer, whole: nn.Parameter, part: nn.Parameter, index: Tensor, dim: int
) -> None:
    """Undo :func:`hand_over`; positions that did not train start without momentum."""
    state = _replace(optimizer, part, whole)
    if state is not None:
        optimizer.state[whole] = {
            name: torch.zeros_like(whole, dtype=value.dtype).index_copy_(dim, index, value)
            if _is_like(value, part)
            else value
            for name, value in state.items()
        }


def forget(optimizer: Optimizer, parameter: nn.Parameter, frozen: Tensor, dim: int) -> None:
    """Set the state of the ``frozen`` positions to zero."""
    for value in optimizer.state.get(parameter, {}).values():
        if _is_like(value, parameter):
            value.index_fill_(dim, frozen, 0)


def _is_like(value: object, parameter: nn.Parameter) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _replace(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter) -> dict | None:
    """Put ``new`` where ``old`` was in the parameter groups; the state of ``old``, taken out."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    return optimizer.state.pop(old, None)
