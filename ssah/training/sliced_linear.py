"""A linear layer of which only some rows or columns train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
        # Of the input only what meets a trained column: the rest can be freed.
        ctx.save_for_backward(x if dim == 0 else x[..., index], weight, index)
        ctx.dim = dim
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        (gradient,) = gradients
        x, weight, index = ctx.saved_tensors
        to_x = gradient @ weight if ctx.needs_input_grad[0] else None
        out, into = gradient[..., index] if ctx.dim == 0 else gradient, x
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
