"""Units of a transformer: which weights belong to which attention head or MLP neuron.

A depth-2 module computes ``B . sigma(A . X)``. Its units are the inner channels: input channel j
of ``B`` together with the output neurons of ``A`` that feed it (paper, section 3.1). In the MLP,
``B`` is ``down_proj`` and a unit is one of the ``d_ff`` neurons. In attention, ``B`` is
``o_proj`` and a unit is by default a whole head: the shares that the paper prints for attention
(0.39 / 3.32 / 96.29 %) are exactly 4, 34 and 986 of Llama-2's 1,024 heads.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..core.errors import InvalidValueError, UnsupportedModelError
from ..core.valid import require_word
from .families import BlockKind, Family, UnitKind, family_of
from .mask import UnitMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: Whose a position is that several units share: theirs where all of them are chosen, or any.
Shared = Literal["all", "any"]


@dataclass(frozen=True)
class Slices:
    """Rows (``dim=0``) or columns (``dim=1``) of one parameter, by unit.

    ``index[u]`` lists the positions along ``dim`` that unit ``u`` uses, shape ``[units, k]``. A
    position that several units list is shared by them (the key and value rows of a KV group).
    """

    parameter: str
    dim: int
    index: Tensor
    width: int  #: weights at each position
    length: int  #: positions along ``dim``, those of no unit included

    def weights_per_unit(self) -> float:
        """Weights of one unit; a shared position is divided evenly among the units that use it."""
        return self.index.unique().numel() * self.width / self.index.shape[0]

    def selected(self, units: Tensor, shared: Shared = "all") -> Tensor:
        """Positions that belong to the chosen units, as a sorted index.

        ``units`` is bool ``[units]``. A shared position counts as chosen when *all* of its units
        are (``"all"``) or when *any* is.
        """
        owners = torch.bincount(self.index.flatten(), minlength=self.length)
        chosen = torch.bincount(self.index[units].flatten(), minlength=self.length)
        hit = (chosen == owners) & (owners > 0) if shared == "all" else chosen > 0
        return hit.nonzero().flatten()


@dataclass(frozen=True)
class Block:
    """The units of one depth-2 module."""

    name: str  #: e.g. ``"layers.3.mlp"``
    layer: int
    kind: BlockKind
    output: str  #: path of ``B`` (``o_proj`` or ``down_proj``) in the model
    channels: Tensor  #: input channels of ``B`` by unit, ``[units, channels per unit]``
    slices: tuple[Slices, ...]  #: every weight of the units, ``B``'s columns included

    def projection(self, model: nn.Module) -> nn.Linear:
        """``B`` itself, in a model that has this layout."""
        return cast(nn.Linear, model.get_submodule(self.output))

    @property
    def units(self) -> int:
        return self.channels.shape[0]

    @property
    def weights_per_unit(self) -> float:
        return sum(s.weights_per_unit() for s in self.slices)


@dataclass(frozen=True)
class UnitLayout:
    """All units of a model, block by block, in forward order."""

    model_type: str
    unit_kind: UnitKind
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, unit_kind: UnitKind = "head") -> UnitLayout:
        """Read the layout off a Hugging Face causal language model.

        Only shapes are read, so linear layers without weights will do. Raises
        :class:`UnsupportedModelError` naming the model type where the architecture (a mixture of
        experts, say) is not one of :data:`ssah.units.families.FAMILIES`.
        """
        require_word("unit_kind", unit_kind, get_args(UnitKind))
        config = model.config.get_text_config()
        family = family_of(config.model_type)
        attention = rf"{family.attention}\.{family.attention_output}"
        mlp = rf"{family.mlp}\.{family.mlp_output}"
        pattern = re.compile(rf"layers\.(\d+)\.(?:({attention})|{mlp})$")
        blocks = []
        for path, _ in model.named_modules():
            if found := pattern.search(path):
                parent, layer = path.rpartition(".")[0], int(found[1])
                if found[2]:
                    blocks.append(_attention_block(model, config, family, parent, layer, unit_kind))
                else:
                    blocks.append(_mlp_block(model, family, parent, layer))
        expected = 2 * config.num_hidden_layers
        if len(blocks) != expected:
            raise UnsupportedModelError(
                f"{len(blocks)} of the {expected} attention and MLP blocks of this "
                f"{config.model_type} were found: it may be incomplete, or a mixture of experts, "
                "which has no unit layout here."
            )
        return cls(config.model_type, unit_kind, tuple(blocks))

    def __getitem__(self, name: str) -> Block:
        return next(b for b in self.blocks if b.name == name)

    @property
    def units(self) -> int:
        return sum(b.units for b in self.blocks)

    @property
    def parameters(self) -> float:
        """Weights that belong to any unit (embeddings and norms belong to none)."""
        return sum(b.units * b.weights_per_unit for b in self.blocks)

    @property
    def parameter_names(self) -> set[str]:
        """Names of the parameters that hold units' weights."""
        return {part.parameter for block in self.blocks for part in block.slices}

    def of_kinds(self, kinds: Collection[str]) -> Tensor:
        """Which units are in blocks of these kinds, bool ``[units]``."""
        return torch.cat([torch.full((b.units,), b.kind in kinds) for b in self.blocks])

    def none(self) -> UnitMask:
        """The empty selection."""
        return self.mask(torch.zeros(self.units, dtype=torch.bool))

    def mask(self, chosen: Tensor) -> UnitMask:
        """A selection from a flat bool ``[units]``."""
        return UnitMask(self.split(chosen), self.unit_kind)

    def require(self, mask: UnitMask) -> None:
        """Raise ``ValueError`` where a mask is not one of this layout."""
        if mask.unit_kind != self.unit_kind or mask.sizes() != {
            b.name: b.units for b in self.blocks
        }:
            raise InvalidValueError(
                f"The mask ({mask.unit_kind}, {len(mask)} blocks) does not fit a "
                f"{self.model_type} with {self.unit_kind} units in {len(self.blocks)} blocks."
            )

    def weights(self, mask: UnitMask) -> float:
        """Number of weights that the chosen units hold."""
        return sum(int(mask[b.name].sum()) * b.weights_per_unit for b in self.blocks)

    def totals(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum of a number for each weight over every unit's weights, by block ``[units]``.

        ``values`` has a tensor of the parameter's shape for each parameter of the layout. Rows that
        units share count for each of them.
        """
        found = {}
        for block in self.blocks:
            total = torch.zeros(block.units)
            for part in block.slices:
                value = values[part.parameter]
                lines = value.sum(1 - part.dim) if value.ndim > 1 else value
                total += lines[part.index].sum(1)
            found[block.name] = total
        return found

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut a flat ``[units]`` tensor into one tensor for each block."""
        parts = flat.split([b.units for b in self.blocks])
        return {b.name: part for b, part in zip(self.blocks, parts, strict=True)}

    def flatten(self, by_block: Mapping[str, Tensor]) -> Tensor:
        """Concatenate per-block tensors in the layout's order into ``[units]``."""
        return torch.cat([by_block[b.name] for b in self.blocks])


@dataclass(frozen=True)
class Positions:
    """Rows (``dim=0``, with their biases) or columns (``dim=1``) of one linear layer.

    Both tensors are bool ``[positions along dim]``.
    """

    dim: int
    of_units: Tensor  #: belongs to any unit; a fused projection may have rows that do not
    chosen: Tensor  #: belongs to the selection


def owned(layout: UnitLayout, mask: UnitMask, shared: Shared = "all") -> dict[str, Positions]:
    """Which weights a selection owns, by path of each linear layer of the layout.

    A position that several units share (a key row of a group of heads) is the selection's where
    *all* of these units are chosen, or with ``shared="any"`` where one is.
    Raises ``ValueError`` where the mask is not of this layout.
    """
    layout.require(mask)
    found: dict[str, Positions] = {}
    for block in layout.blocks:
        for part in block.slices:
            path, _, kind = part.parameter.rpartition(".")
            if kind != "weight":
                continue  # a bias goes with the rows of its weight
            none = torch.zeros(part.length, dtype=torch.bool)
            own = found.setdefault(path, Positions(part.dim, none, none.clone()))
            own.of_units[part.index.flatten()] = True
            own.chosen[part.selected(mask[block.name], shared)] = True
    return found


def _plain_linear(model: nn.Module, path: str) -> nn.Linear:
    """The linear layer there; :class:`UnsupportedModelError` for whatever else stands in its place,
    which may keep its weights elsewhere, or packed."""
    module = model.get_submodule(path)
    if not isinstance(module, nn.Linear):
        remedy = (
            "merge the adapter first (merge_and_unload)"
            if hasattr(module, "base_layer")
            else "load the model without a wrapper around its layers"
        )
    elif type(module.weight) is not nn.Parameter or not module.weight.is_floating_point():
        remedy = "load the model unquantised and unsharded"
    else:
        return module
    found = type(module.weight if isinstance(module, nn.Linear) else module)
    kind = f"{found.__module__}.{found.__qualname__}"
    raise UnsupportedModelError(f"{path} is a {kind}, not a plain linear layer: {remedy}.")


def _slices(model: nn.Module, path: str, dim: int, index: Tensor) -> list[Slices]:
    """The weight (and, for rows, the bias) of a linear layer cut by unit."""
    linear = _plain_linear(model, path)
    length, width = linear.weight.shape[dim], linear.weight.shape[1 - dim]
    cut = [Slices(f"{path}.weight", dim, index, width, length)]
    if dim == 0 and linear.bias is not None:
        cut.append(Slices(f"{path}.bias", 0, index, 1, length))
    return cut


def _input_slices(
    model: nn.Module, parent: str, inputs: Sequence[str], rows: Sequence[tuple[Tensor | None, int]]
) -> list[Slices]:
    """Rows of input projections: for each its index by unit (None: of no unit) and its height.

    What lies in one matrix is joined, and begins below what comes before it there.
    """
    by_layer: dict[str, list[Tensor]] = {name: [] for name in inputs}
    below = dict.fromkeys(inputs, 0)
    for name, (index, height) in zip(inputs, rows, strict=True):
        if index is not None:
            by_layer[name].append(index + below[name])
        below[name] += height
    joined = {name: torch.cat(parts, 1) for name, parts in by_layer.items() if parts}
    return [cut for n, index in joined.items() for cut in _slices(model, f"{parent}.{n}", 0, index)]


def _mlp_block(model: nn.Module, family: Family, parent: str, layer: int) -> Block:
    output = f"{parent}.{family.mlp_output}"
    width = _plain_linear(model, output).in_features
    neurons = torch.arange(width)[:, None]
    rows = [(neurons, width) for _ in family.mlp_inputs]
    slices = _input_slices(model, parent, family.mlp_inputs, rows)
    slices += _slices(model, output, 1, neurons)
    return Block(f"layers.{layer}.mlp", layer, "mlp", output, neurons, tuple(slices))


def _attention_block(
    model: nn.Module, config: Any, family: Family, parent: str, layer: int, unit_kind: UnitKind
) -> Block:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    output = f"{parent}.{family.attention_output}"
    head_dim = _plain_linear(model, output).in_features // heads
    channels = torch.arange(heads * head_dim).view(heads, head_dim)
    queries: Tensor | None = channels
    kv_rows = torch.arange(kv_heads * head_dim).view(kv_heads, head_dim)
    kv_rows = kv_rows.repeat_interleave(heads // kv_heads, dim=0)  # those that each head uses
    keys: Tensor | None = kv_rows
    values = kv_rows
    if unit_kind == "kv_group":
        channels = queries = channels.view(kv_heads, -1)
        keys = values = kv_rows[:: heads // kv_heads]
    elif unit_kind == "channel":
        # A single channel has a value row of its own; query and key rows serve the whole head.
        channels, values = channels.view(-1, 1), values.reshape(-1, 1)
        queries = keys = None
    kv = kv_heads * head_dim
    rows = [(queries, heads * head_dim), (keys, kv), (values, kv)]
    slices = _input_slices(model, parent, family.attention_inputs, rows)
    slices += _slices(model, output, 1, channels)
    return Block(f"layers.{layer}.attn", layer, "attn", output, channels, tuple(slices))
