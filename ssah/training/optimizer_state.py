"""An optimizer that goes on while what trains changes: what trains keeps its state, and whether
its state fits what trains is checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.errors import InvalidValueError

#: In each parameter group, and so in every checkpoint of the optimizer: what trains.
MARK = "ssah_trains"


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
            value.index_fill_(dim, frozen.to(value.device), 0)


def _is_like(value: object, parameter: nn.Parameter) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _replace(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter) -> dict | None:
    """Put ``new`` where ``old`` was in the parameter groups; the state of ``old``, taken out."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    return optimizer.state.pop(old, None)


class StateCheck:
    """Called before each step of any optimizer while some units of a model are frozen.

    Raises :class:`InvalidValueError` where the optimizer would not train what is to train: a fused
    one does not compare the shape of a parameter with its state's, and reads what lies behind.
    """

    def __init__(
        self, trains: str, parts: Mapping[nn.Parameter, nn.Parameter], own: Iterable[nn.Parameter]
    ):
        """``parts`` are what trains of whole weights; ``own`` all parameters of the model."""
        self.trains = trains
        self._parts = {id(whole): id(part) for whole, part in parts.items()}
        self._own = {id(parameter) for parameter in own}

    def mark(self, optimizer: Optimizer) -> None:
        """Say that the optimizer's state fits: it was just handed over."""
        for group in optimizer.param_groups:
            group[MARK] = self.trains

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        stale = any(whole in held and part not in held for whole, part in self._parts.items())
        released = any(getattr(p, "released", False) for p in held.values())
        if stale or (released and not held.keys() & self._own):
            raise InvalidValueError(
                "The optimizer was made outside of this train_only or freeze_units block, so that "
                "it would not move what is to train: make it inside, or pass it to the block as "
                "optimizer=."
            )
        for group in optimizer.param_groups:
            if not any(id(p) in self._own for p in group["params"]):
                continue  # of another model
            made = group.get(MARK)
            if made is None and any(optimizer.state.get(p) for p in group["params"]):
                made = "all units train"
            if made not in (None, self.trains):
                raise InvalidValueError(
                    f"The optimizer's state was made while {made}, and now {self.trains}: resume "
                    "a checkpoint inside a block with the mask that it was written with, or start "
                    "from its weights; pass an optimizer that goes on as optimizer=."
                )
            group[MARK] = self.trains


def release(parameter: nn.Parameter) -> None:
    """The block that made a parameter is left: whoever steps it again trains nothing."""
    parameter.released = True  # type: ignore[attr-defined]


def unmark(optimizer: Optimizer) -> None:
    """The optimizer has state for all weights again."""
    for group in optimizer.param_groups:
        group.pop(MARK, None)
