"""Masked fine-tuning: some units train and all others keep their bits.

A frozen weight is exactly what it was, whatever weight decay, momentum or clipping do. Two ways
lead there, chosen for each linear layer by how much of it trains:

* *sliced*, where at most half of it trains: :class:`SlicedLinear` makes a parameter of the trained
  rows or columns only, so that the rest is never written. The backward pass skips the gradient of
  the rest, and the optimizer has state for what trains.
* *restored*, where more than half trains: the whole weight is a parameter; the gradient of the
  frozen part is set to zero as it arrives, and its bits are put back after every optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..core.valid import require_word
from ..units.layout import UnitLayout, owned
from ..units.mask import UnitMask
from .optimizer_state import StateCheck, forget, hand_back, hand_over, release, unmark
from .sliced_linear import SlicedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SharedRows = Literal["frozen", "trained"]


class _Restored:
    """Keeps the bits of some rows or columns of a linear layer's parameter through training."""

    def __init__(self, linear: nn.Linear, parameter: nn.Parameter, frozen: Tensor, dim: int):
        self.parameter, self.frozen, self.dim = parameter, frozen, dim
        self._keep()
        self._hooks = (
            parameter.register_post_accumulate_grad_hook(self._silence),
            # A run that resumes from a checkpoint goes on with the frozen bits of the checkpoint.
            linear.register_load_state_dict_post_hook(self._keep),
            register_optimizer_step_post_hook(self._restore),
        )

    def _keep(self, *_: Any) -> None:
        self.frozen = self.frozen.to(self.parameter.device)
        self._bits = self.parameter.detach().index_select(self.dim, self.frozen)

    def _silence(self, parameter: Tensor) -> None:
        # Before clipping, so that the frozen part does not count in the gradient's norm.
        assert parameter.grad is not None
        self.frozen = self.frozen.to(parameter.device)  # the model may have moved meanwhile
        parameter.grad.index_fill_(self.dim, self.frozen, 0)

    @torch.no_grad()
    def _restore(self, *_: Any) -> None:
        self.frozen = self.frozen.to(self.parameter.device)
        self._bits = self._bits.to(self.parameter)
        self.parameter.index_copy_(self.dim, self.frozen, self._bits)

    def release(self) -> None:
        self._restore()
        for hook in self._hooks:
            hook.remove()


def train_only(
    model: PreTrainedModel,
    mask: UnitMask,
    *,
    shared_rows: SharedRows = "frozen",
    optimizer: Optimizer | None = None,
) -> AbstractContextManager[None]:
    """Inside the block only the units of ``mask`` train; every other weight keeps its bits.

    Embeddings, norms and the language-model head are frozen as well (paper, section 5). Create the
    optimizer (or call ``Trainer.train``) inside. Key and value rows that a trained head shares with
    a frozen one are frozen, unless ``shared_rows="trained"``. On exit the model is a plain one
    again. Raises ``ValueError`` where the mask does not fit the model, and at the first step of an
    optimizer that was made elsewhere, or whose state (in a checkpoint that a Trainer resumes, say)
    was made under another mask.

    A mask that changes in mid-run is one block after another. To keep momentum from block to block,
    pass the ``optimizer`` (made before them, outside): what trains keeps its state, what is frozen
    loses it.
    """
    return _partly_trained(model, mask, shared_rows, optimizer, rest=False, thaw=True)


def freeze_units(
    model: PreTrainedModel,
    mask: UnitMask,
    *,
    shared_rows: SharedRows = "frozen",
    train_rest: bool = True,
    optimizer: Optimizer | None = None,
) -> AbstractContextManager[None]:
    """Inside the block the units of ``mask`` keep their bits while everything else trains.

    "Everything else" includes embeddings, norms and head, unless ``train_rest=False``; what did not
    require gradients before does not train. Otherwise as :func:`train_only`.
    """
    return _partly_trained(model, ~mask, shared_rows, optimizer, rest=train_rest, thaw=False)


@contextmanager
def _partly_trained(
    model: PreTrainedModel,
    trained: UnitMask,
    shared_rows: SharedRows,
    optimizer: Optimizer | None,
    *,
    rest: bool,
    thaw: bool,
) -> Iterator[None]:
    """``rest``: what belongs to no unit trains; ``thaw``: so do units that required no gradient."""
    require_word("shared_rows", shared_rows, get_args(SharedRows))
    if any(isinstance(module, SlicedLinear) for module in model.modules()):
        raise ValueError("The model is inside another train_only or freeze_units block.")
    layout = UnitLayout.of(model, trained.unit_kind)
    positions = owned(layout, trained, "all" if shared_rows == "frozen" else "any")
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    ours = {s.parameter for block in layout.blocks for s in block.slices}
    # An optimizer over all parameters steps those that have a gradient, even a forgotten one.
    model.zero_grad(set_to_none=True)
    with ExitStack() as stack:
        stack.callback(_require_gradients, model, required)
        flags = {n: required[n] and rest for n in required}
        _require_gradients(model, flags | {n: required[n] or thaw for n in ours})
        parts: dict[nn.Parameter, nn.Parameter] = {}
        for path, found in positions.items():
            dim, trains = found.dim, found.chosen | (~found.of_units & rest)
            linear = cast(nn.Linear, model.get_submodule(path))
            parameters = [cast(nn.Parameter, linear.weight)]
            if dim == 0 and linear.bias is not None:
                parameters.append(linear.bias)
            index = trains.nonzero().flatten()
            if len(index) == 0:
                for parameter in parameters:
                    parameter.requires_grad_(False)
            elif linear.weight.requires_grad and len(index) <= len(trains) / 2:
                parent, _, child = path.rpartition(".")
                owner = model.get_submodule(parent)
                sliced = SlicedLinear(linear, index, dim)
                setattr(owner, child, sliced)
                parts |= _parts_of(linear, sliced)
                stack.callback(setattr, owner, child, linear)
                stack.callback(release, sliced.part)
                stack.callback(sliced.merge)
                if optimizer is not None:
                    _hand_over(optimizer, linear, sliced, stack)
            elif len(index) < len(trains):
                frozen = (~trains).nonzero().flatten()
                for parameter in parameters:
                    if parameter.requires_grad:
                        stack.callback(_Restored(linear, parameter, frozen, dim).release)
                        if optimizer is not None:
                            forget(optimizer, parameter, frozen, dim)
        size = f"{trained.count():,} of {layout.units:,} units train"
        beside = "everything else" if rest else "nothing else"
        what = f"{size} and {beside} (mask {trained.digest()[:10]}, shared rows {shared_rows})"
        check = StateCheck(what, parts, model.parameters())
        stack.callback(register_optimizer_step_pre_hook(check).remove)
        if optimizer is not None:
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    optimizer.state.pop(parameter, None)
            check.mark(optimizer)
            stack.callback(unmark, optimizer)
        yield


def _parts_of(linear: nn.Linear, sliced: SlicedLinear) -> dict[nn.Parameter, nn.Parameter]:
    """What trains of the layer's whole parameters."""
    parts = {cast(nn.Parameter, linear.weight): sliced.part}
    if sliced.bias_part is not None and sliced.dim == 0:
        parts[linear.bias] = sliced.bias_part
    return parts


def _hand_over(
    optimizer: Optimizer, linear: nn.Linear, sliced: SlicedLinear, stack: ExitStack
) -> None:
    """Give the optimizer the sliced parameters in place of the whole ones until ``stack`` ends."""
    for whole, part in _parts_of(linear, sliced).items():
        hand_over(optimizer, whole, part, sliced.index, sliced.dim)
        stack.callback(hand_back, optimizer, whole, part, sliced.index, sliced.dim)


def _require_gradients(model: nn.Module, flags: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        if name in flags:
            parameter.requires_grad_(flags[name])
