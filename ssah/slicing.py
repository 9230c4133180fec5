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
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from .units import UnitKind, UnitLayout, UnitMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SharedRows = Literal["frozen", "trained"]


class _SlicedProduct(torch.autograd.Function):
    """A linear layer with gradients of its input and of some rows or columns of its weight.

    ``part`` and ``bias_part`` only receive gradients; ``weight`` and ``bias`` hold their values.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        part: Tensor,
        bias_part: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        dim: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, index)
        ctx.dim = dim
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        (gradient,) = gradients
        x, weight, index = ctx.saved_tensors
        to_x = gradient @ weight if ctx.needs_input_grad[0] else None
        if ctx.dim == 0:
            out, into = gradient[..., index], x
        else:
            out, into = gradient, x[..., index]
        out, into = out.reshape(-1, out.shape[-1]), into.reshape(-1, into.shape[-1])
        to_bias = out.sum(0) if ctx.needs_input_grad[2] else None
        return to_x, out.T @ into, to_bias, None, None, None, None


class SlicedLinear(nn.Module):
    """A linear layer of which only some rows (``dim=0``) or columns (``dim=1``) train.

    Takes the place of ``linear`` and shares its storage; :meth:`merge` writes the trained part and
    gives the layer back. Its state dict is that of the plain layer, so a checkpoint saved in the
    middle of training is an ordinary one. ``index`` holds the trained positions, sorted. A bias
    that requires gradients trains at the same positions with ``dim=0``, whole with ``dim=1``.
    """

    index: Tensor

    def __init__(self, linear: nn.Linear, index: Tensor, dim: int):
        super().__init__()
        self.dim = dim
        self._linear = [linear]  # in a list, so that it is no submodule
        weight, bias = linear.weight.detach(), linear.bias
        self.register_buffer("index", index.to(weight.device), persistent=False)
        self.part = nn.Parameter(weight.index_select(dim, self.index))
        self.bias_part: nn.Parameter | None = None
        if bias is not None and bias.requires_grad:
            self.bias_part = nn.Parameter(bias.detach()[self.index]) if dim == 0 else bias
        self.train(linear.training)

    @torch.no_grad()
    def _write(self) -> nn.Linear:
        """Put the trained part into the plain layer.

        At every use, not only after a change: a fused optimizer changes a parameter without
        touching its version, so there is no telling. Beside the product it costs next to nothing.
        """
        linear = self._linear[0]
        # Through .data: the same values again must not invalidate what backward saved.
        linear.weight.data.index_copy_(self.dim, self.index, self.part.detach())
        if self.bias_part is not None and self.dim == 0:
            linear.bias.data.index_copy_(0, self.index, self.bias_part.detach())
        return linear

    def forward(self, x: Tensor) -> Tensor:
        linear = self._write()
        bias = None if linear.bias is None else linear.bias.detach()
        tensors = [x, self.part, self.bias_part, linear.weight.detach(), bias]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]
        return _SlicedProduct.apply(*tensors, self.index, self.dim)

    @property
    def weight(self) -> Tensor:
        """The whole weight as it is now, ``[out, in]``; no parameter."""
        return self._write().weight.detach()

    def merge(self) -> nn.Linear:
        """The plain layer, with the trained part in it."""
        return self._write().train(self.training)

    def _apply(self, fn, recurse=True):
        self._linear[0]._apply(fn)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._write()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        linear = self._write()  # the state dict may lack this layer
        linear._load_from_state_dict(state_dict, prefix, *args)
        with torch.no_grad():
            self.part.copy_(linear.weight.index_select(self.dim, self.index))
            if self.bias_part is not None and self.dim == 0:
                self.bias_part.copy_(linear.bias[self.index])


class _Restored:
    """Keeps the bits of some rows or columns of a linear layer's parameter through training."""

    def __init__(self, linear: nn.Linear, parameter: nn.Parameter, frozen: Tensor, dim: int):
        self.parameter, self.frozen, self.dim = parameter, frozen, dim
        self._keep()
        self._hooks = (
            parameter.register_post_accumulate_grad_hook(self._silence),
            # A run that resumes from a checkpoint goes on with the frozen bits of the checkpoint.
            linear.register_load_state_dict_post_hook(self._keep),
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
    def restore(self) -> None:
        self.frozen = self.frozen.to(self.parameter.device)
        self._bits = self._bits.to(self.parameter)
        self.parameter.index_copy_(self.dim, self.frozen, self._bits)

    def release(self) -> None:
        self.restore()
        for hook in self._hooks:
            hook.remove()


@contextmanager
def train_only(
    model: PreTrainedModel,
    mask: UnitMask,
    *,
    unit_kind: UnitKind = "head",
    shared_rows: SharedRows = "frozen",
) -> Iterator[None]:
    """Inside the block only the units of ``mask`` train; every other weight keeps its bits.

    Embeddings, norms and the language-model head are frozen as well (paper, section 5). Create the
    optimizer (or call ``Trainer.train``) inside. Key and value rows that a trained head shares with
    a frozen one are frozen, unless ``shared_rows="trained"``. On exit the model is a plain one
    again. Raises ``ValueError`` where the mask does not fit the model.
    """
    with _partly_trained(model, mask, unit_kind, shared_rows, rest=False, thaw=True):
        yield


@contextmanager
def freeze_units(
    model: PreTrainedModel,
    mask: UnitMask,
    *,
    unit_kind: UnitKind = "head",
    shared_rows: SharedRows = "frozen",
    train_rest: bool = True,
) -> Iterator[None]:
    """Inside the block the units of ``mask`` keep their bits while everything else trains.

    "Everything else" includes embeddings, norms and head, unless ``train_rest=False``; what did not
    require gradients before does not train. Otherwise as :func:`train_only`.
    """
    with _partly_trained(model, ~mask, unit_kind, shared_rows, rest=train_rest, thaw=False):
        yield


@contextmanager
def _partly_trained(
    model: PreTrainedModel,
    trained: UnitMask,
    unit_kind: UnitKind,
    shared_rows: SharedRows,
    *,
    rest: bool,
    thaw: bool,
) -> Iterator[None]:
    """``rest``: what belongs to no unit trains; ``thaw``: so do units that required no gradient."""
    if any(isinstance(module, SlicedLinear) for module in model.modules()):
        raise ValueError("The model is inside another train_only or freeze_units block.")
    layout = UnitLayout.of(model, unit_kind)
    expected = {block.name: block.units for block in layout.blocks}
    if {name: len(part) for name, part in trained.items()} != expected:
        raise ValueError(f"The mask does not fit a {layout.model_type} with unit kind {unit_kind}.")
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    owned = {s.parameter for block in layout.blocks for s in block.slices}
    # An optimizer over all parameters steps those that have a gradient, even a forgotten one.
    model.zero_grad(set_to_none=True)
    with ExitStack() as stack:
        stack.callback(_require_gradients, model, required)
        flags = {n: required[n] and rest for n in required}
        _require_gradients(model, flags | {n: required[n] or thaw for n in owned})
        restored: list[_Restored] = []
        positions = _trained_positions(model, layout, trained, shared_rows, rest)
        for path, (dim, trains) in positions.items():
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
                stack.callback(setattr, owner, child, linear)
                stack.callback(sliced.merge)
            elif len(index) < len(trains):
                frozen = (~trains).nonzero().flatten()
                for parameter in parameters:
                    if parameter.requires_grad:
                        restored.append(_Restored(linear, parameter, frozen, dim))
                        stack.callback(restored[-1].release)
        if restored:

            def restore_all(*_: Any) -> None:
                for part in restored:
                    part.restore()

            stack.callback(register_optimizer_step_post_hook(restore_all).remove)
        yield


def _require_gradients(model: nn.Module, flags: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        if name in flags:
            parameter.requires_grad_(flags[name])


def _trained_positions(
    model: nn.Module,
    layout: UnitLayout,
    trained: UnitMask,
    shared_rows: SharedRows,
    rest: bool,
) -> dict[str, tuple[int, Tensor]]:
    """For each linear layer of the layout: dim, and which positions along it train (bool).

    A layer may hold several slices (a fused projection) and rows of no unit, which train with the
    ``rest``.
    """
    positions: dict[str, tuple[int, Tensor]] = {}
    rule: Literal["all", "any"] = "all" if shared_rows == "frozen" else "any"
    for block in layout.blocks:
        for part in block.slices:
            path, _, kind = part.parameter.rpartition(".")
            if kind != "weight":
                continue  # a bias goes with the rows of its weight
            if path not in positions:
                weight = cast(nn.Linear, model.get_submodule(path)).weight
                positions[path] = (part.dim, torch.full((weight.shape[part.dim],), rest))
            trains = positions[path][1]
            trains[part.index.flatten()] = False
            trains[part.selected(trained[block.name], rule)] = True
    return positions
