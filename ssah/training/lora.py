"""LoRA adapters of peft, everywhere or only on some units, merged into the weights at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..units.layout import UnitLayout, owned
from ..units.mask import UnitMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def linear_layers(layout: UnitLayout) -> dict[str, int]:
    """Every linear layer of the units: path and the sum of its two widths."""
    found: dict[str, int] = {}
    for block in layout.blocks:
        for part in block.slices:
            path, _, kind = part.parameter.rpartition(".")
            if kind == "weight":
                found[path] = part.length + part.width
    return found


def rank_for(layout: UnitLayout, parameters: int) -> int:
    """The rank at which adapters of all these layers have about as many parameters."""
    return max(round(parameters / sum(linear_layers(layout).values())), 1)


@contextmanager
def adapters(model: PreTrainedModel, rank: int, inside: UnitMask | None = None) -> Iterator[None]:
    """Inside the block only LoRA adapters train (scale 2, no dropout); then they are merged.

    With ``inside`` an adapter can only change rows and columns of these units, as
    :func:`ssah.training.slicing.train_only` would: "safety-aware LoRA", which the paper leaves
    to future work. All other weights keep their bits.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layout = UnitLayout.of(model, inside.unit_kind if inside is not None else "head")
    positions = None
    if inside is not None:
        positions = {
            path: (part.dim, part.chosen.nonzero().flatten())
            for path, part in owned(layout, inside).items()
            if part.chosen.any()
        }
    paths = list(linear_layers(layout) if positions is None else positions)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    plain = {path: model.get_submodule(path) for path in paths}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=paths)
        inject_adapter_in_model(config, model)
        for path, (dim, index) in (positions or {}).items():
            layer = cast(Any, model.get_submodule(path))
            factor = layer.lora_B if dim == 0 else layer.lora_A
            _confine(factor["default"].weight, index, dim)
        yield
    finally:
        for path, linear in plain.items():
            layer = cast(Any, model.get_submodule(path))
            if layer is not linear:
                _merge(layer, None if positions is None else positions[path])
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, linear)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
        if hasattr(model, "peft_config"):
            del model.peft_config


def save_adapters(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Inside :func:`adapters`: write them as ``PeftModel.from_pretrained`` reads them, for the
    model ``base``."""
    from peft import get_peft_model_state_dict

    config = cast(Any, model).peft_config["default"]
    config.task_type, config.base_model_name_or_path = "CAUSAL_LM", base
    weights = get_peft_model_state_dict(cast(Any, model))
    config.save_pretrained(str(folder))
    named = {f"base_model.model.{n}": t.detach().cpu().contiguous() for n, t in weights.items()}
    save_file(named, folder / "adapter_model.safetensors")


def _merge(layer: Any, changed: tuple[int, Tensor] | None) -> None:
    """Add an adapter to its layer; with ``changed`` positions along a dimension, only there.

    Adding zero elsewhere would turn -0.0 into 0.0.
    """
    weight = layer.get_base_layer().weight
    before = weight.detach().clone()
    layer.merge()
    if changed is not None:
        dim, index = changed
        index = index.to(weight.device)
        weight.data = before.index_copy(dim, index, weight.detach().index_select(dim, index))


def _confine(weight: nn.Parameter, index: Tensor, dim: int) -> None:
    """Keep a factor of an adapter at zero except at some positions."""
    outside = torch.ones(weight.shape[dim], dtype=torch.bool)
    outside[index] = False
    closed = outside.nonzero().flatten().to(weight.device)
    with torch.no_grad():
        weight.index_fill_(dim, closed, 0)

    def silence(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.index_fill_(dim, closed, 0)

    weight.register_post_accumulate_grad_hook(silence)
