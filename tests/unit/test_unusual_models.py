"""Models whose layers are not plain: adapters, packed or sharded weights, numbers that overflow."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from ssah.core.errors import UnsupportedModelError
from ssah.scoring.attribution import collect_statistics
from ssah.scoring.conflict import gradient_conflict
from ssah.text.batches import dialogue_batches
from ssah.training.sliced_linear import SlicedLinear
from ssah.training.slicing import train_only
from ssah.units.layout import UnitLayout

PAIRS = [([3, 4, 5], [6, 7, 8, 9]), ([10, 11], [12, 13])]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj"], ["down_proj", "up_proj"]])
def test_an_adapter_must_be_merged_first(tiny_model, targets):
    units = UnitLayout.of(tiny_model).units
    wrapped = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=targets))
    with pytest.raises(
        UnsupportedModelError, match=r"is a peft\..*Linear.*merge the adapter first"
    ):
        UnitLayout.of(wrapped)
    assert UnitLayout.of(wrapped.merge_and_unload()).units == units


class Packed(nn.Parameter):
    """Stands for the 4-bit weights of bitsandbytes."""


def test_packed_weights_are_refused_by_their_kind(tiny_model):
    linear = tiny_model.model.layers[1].mlp.up_proj
    packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
    linear.weight = Packed(packed, requires_grad=False)
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj is a .*Packed.*unquan"
    ):
        UnitLayout.of(tiny_model)


def test_sharded_weights_are_refused_by_their_kind(tiny_model):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        mesh = init_device_mesh("cpu", (1,))
        linear = tiny_model.model.layers[0].self_attn.o_proj
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh))
        with pytest.raises(UnsupportedModelError, match=r"o_proj is a .*DTensor.*unsharded"):
            UnitLayout.of(tiny_model)
    finally:
        torch.distributed.destroy_process_group()


def test_a_part_of_a_model_is_refused(tiny_model):
    del tiny_model.model.layers[1]
    with pytest.raises(UnsupportedModelError, match="2 of the 4 attention and MLP blocks"):
        UnitLayout.of(tiny_model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_activations_that_overflow_are_refused_by_block(tiny_model, dtype):
    model = tiny_model.to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= torch.finfo(dtype).max
    with pytest.raises(ValueError, match=r"layers\.1\.mlp has numbers that are not finite"):
        collect_statistics(model, UnitLayout.of(model), dialogue_batches(PAIRS, 2))


def test_gradients_that_are_not_finite_are_refused_by_name(tiny_model):
    layout = UnitLayout.of(tiny_model)
    with torch.no_grad():
        tiny_model.lm_head.weight[7] = torch.inf
    batches = [list(dialogue_batches(PAIRS, 2)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"The gradient of model\..* has numbers that are not"):
        gradient_conflict(tiny_model, layout, *batches)


def test_conflict_has_no_dropout_in_it(families):
    model = families("llama", attention_dropout=0.5)
    layout = UnitLayout.of(model)
    batches = [list(dialogue_batches([pair], 1)) for pair in PAIRS]
    wanted = gradient_conflict(model.eval(), layout, *batches)
    found = gradient_conflict(model.train(), layout, *batches)
    assert model.training
    for name, part in wanted.items():
        assert torch.equal(found[name], part), name


def test_of_the_input_only_what_meets_a_trained_column_is_kept(tiny_model):
    """The rest of a block's activations can be freed before the backward pass."""
    kept = []
    linear = nn.Linear(64, 8, bias=False)
    sliced = SlicedLinear(linear, torch.tensor([3, 40]), dim=1)
    x = torch.randn(5, 7, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        (sliced(x) ** 2).sum().backward()
    assert (5, 7, 2) in kept
    assert (5, 7, 64) not in kept
    layout = UnitLayout.of(tiny_model)
    with train_only(tiny_model, layout.mask(torch.arange(layout.units) % 5 == 0)):
        assert any(isinstance(module, SlicedLinear) for module in tiny_model.modules())
