"""Units of a transformer: which weights belong to which attention head or MLP neuron.

A depth-2 module computes ``B . sigma(A . X)``. Its units are the inner channels: input channel j
of ``B`` together with the output neurons of ``A`` that feed it (paper, section 3.1). In the MLP,
``B`` is ``down_proj`` and a unit is one of the ``d_ff`` neurons. In attention, ``B`` is
``o_proj`` and a unit is by default a whole head: the shares that the paper prints for attention
(0.39 / 3.32 / 96.29 %) are exactly 4, 34 and 986 of Llama-2's 1,024 heads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UnitKind = Literal["head", "channel", "kv_group"]
BlockKind = Literal["attn", "mlp"]

#: Model types whose attention and MLP follow the layouts that this module reads.
SUPPORTED_MODEL_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo",
    "olmo2",
)


def require_supported(model_type: str) -> None:
    """Raise :class:`UnsupportedModelError` for an architecture without a unit layout here."""
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"Model type '{model_type}' has no unit layout; supported are "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}."
        )


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

    def weights_per_unit(self) -> float:
        """Weights of one unit; a shared position is divided evenly among the units that use it."""
        return self.index.unique().numel() * self.width / self.index.shape[0]

    def selected(self, units: Tensor, shared: Literal["all", "any"] = "all") -> Tensor:
        """Positions that belong to the chosen units, as a sorted index.

        ``units`` is bool ``[units]``. A shared position counts as chosen when *all* of its units
        are (``"all"``) or when *any* is.
        """
        size = int(self.index.max()) + 1
        owners = torch.bincount(self.index.flatten(), minlength=size)
        chosen = torch.bincount(self.index[units].flatten(), minlength=size)
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

        Raises :class:`UnsupportedModelError` naming the model type where the architecture (a
        mixture of experts, say) is not one of :data:`SUPPORTED_MODEL_TYPES`.
        """
        config = model.config.get_text_config()
        require_supported(config.model_type)
        blocks = []
        for path, module in model.named_modules():
            found = re.search(r"layers\.(\d+)\.(self_attn\.o_proj|mlp\.down_proj)$", path)
            if found and isinstance(module, nn.Linear):
                parent = path.rsplit(".", 1)[0]
                build = _attention_block if "o_proj" in path else _mlp_block
                blocks.append(build(model, config, parent, int(found[1]), unit_kind))
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

    def none(self) -> UnitMask:
        """The empty selection."""
        return UnitMask({b.name: torch.zeros(b.units, dtype=torch.bool) for b in self.blocks})

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


def _slices(model: nn.Module, path: str, dim: int, index: Tensor) -> list[Slices]:
    """The weight (and, for rows, the bias) of a linear layer cut by unit."""
    linear = cast(nn.Linear, model.get_submodule(path))
    cut = [Slices(f"{path}.weight", dim, index, linear.weight.shape[1 - dim])]
    if dim == 0 and linear.bias is not None:
        cut.append(Slices(f"{path}.bias", 0, index, 1))
    return cut


def _mlp_block(model, config, parent: str, layer: int, unit_kind: UnitKind) -> Block:
    neurons = torch.arange(model.get_submodule(f"{parent}.down_proj").in_features)[:, None]
    if config.model_type == "phi3":  # one matrix holds the gate's rows, then the up-projection's
        fused = torch.cat([neurons, neurons + len(neurons)], dim=1)
        slices = _slices(model, f"{parent}.gate_up_proj", 0, fused)
    else:
        slices = _slices(model, f"{parent}.gate_proj", 0, neurons)
        slices += _slices(model, f"{parent}.up_proj", 0, neurons)
    output = f"{parent}.down_proj"
    slices += _slices(model, output, 1, neurons)
    return Block(f"layers.{layer}.mlp", layer, "mlp", output, neurons, tuple(slices))


def _attention_block(model, config, parent: str, layer: int, unit_kind: UnitKind) -> Block:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    output = f"{parent}.o_proj"
    head_dim = model.get_submodule(output).in_features // heads
    channels = torch.arange(heads * head_dim).view(heads, head_dim)
    queries = channels
    keys = torch.arange(kv_heads * head_dim).view(kv_heads, head_dim)
    keys = keys.repeat_interleave(heads // kv_heads, dim=0)  # the KV rows of each head
    values = keys
    if unit_kind == "kv_group":
        channels = queries = channels.view(kv_heads, -1)
        keys = values = keys[:: heads // kv_heads]
    elif unit_kind == "channel":
        # A single channel has a value row of its own; query and key rows serve the whole head.
        channels, values = channels.view(-1, 1), values.reshape(-1, 1)

    if config.model_type == "phi3":  # one matrix holds the rows of q, then k, then v
        first_key, first_value = heads * head_dim, (heads + kv_heads) * head_dim
        rows = [values + first_value]
        if unit_kind != "channel":
            rows = [queries, keys + first_key, *rows]
        slices = [cut for part in rows for cut in _slices(model, f"{parent}.qkv_proj", 0, part)]
    else:
        slices = _slices(model, f"{parent}.v_proj", 0, values)
        if unit_kind != "channel":
            slices += _slices(model, f"{parent}.q_proj", 0, queries)
            slices += _slices(model, f"{parent}.k_proj", 0, keys)
    slices += _slices(model, output, 1, channels)
    return Block(f"layers.{layer}.attn", layer, "attn", output, channels, tuple(slices))


class UnitMask(Mapping[str, Tensor]):
    """A selection of units: one bool tensor ``[units]`` for each block name.

    Supports ``&``, ``|``, ``-``, ``~`` and ``==`` between masks of one layout.
    """

    def __init__(self, chosen: Mapping[str, Tensor]):
        self._chosen = {name: part.bool() for name, part in chosen.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._chosen[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._chosen)

    def __len__(self) -> int:
        return len(self._chosen)

    def _combine(self, other: UnitMask, operation: Callable[[Tensor, Tensor], Tensor]) -> UnitMask:
        if set(self) != set(other):
            raise ValueError("The two masks belong to different layouts: their block names differ.")
        return UnitMask({name: operation(self[name], other[name]) for name in self})

    def __and__(self, other: UnitMask) -> UnitMask:
        return self._combine(other, torch.logical_and)

    def __or__(self, other: UnitMask) -> UnitMask:
        return self._combine(other, torch.logical_or)

    def __sub__(self, other: UnitMask) -> UnitMask:
        return self._combine(other, lambda a, b: a & ~b)

    def __invert__(self) -> UnitMask:
        return UnitMask({name: ~part for name, part in self.items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UnitMask) or set(self) != set(other):
            return False
        return all(torch.equal(self[name], other[name]) for name in self)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"UnitMask({self.count():,} of {sum(len(m) for m in self.values()):,} units)"

    def count(self, kind: BlockKind | None = None) -> int:
        """Number of chosen units, in all blocks or in those of one kind."""
        return sum(int(m.sum()) for n, m in self.items() if kind is None or n.endswith(kind))

    def share(self) -> float:
        """Chosen units as a fraction of all units: unweighted counts, as the paper prints them."""
        return self.count() / sum(len(part) for part in self.values())

    def save(self, path: Path, **metadata: str) -> None:
        """Write to safetensors, with string metadata in the header."""
        save_file(dict(self._chosen), path, metadata={"metadata": json.dumps(metadata)})

    @classmethod
    def load(cls, path: Path) -> UnitMask:
        with safe_open(path, framework="pt") as file:
            return cls({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
