"""LoRA adapters: what they change, what keeps its bits, and a plain model afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers import frozen_entries, weights
from ssah.training.lora import adapters, linear_layers, rank_for
from ssah.units.layout import UnitLayout
from ssah.units.mask import UnitMask

#: Shared key and value rows; fused layers; biases.
FAMILIES = ("llama", "phi3", "qwen2")
RANK = 3

each_family = pytest.mark.parametrize("model_type", FAMILIES)


def some_units(layout: UnitLayout) -> UnitMask:
    """One whole KV group, one head of another group, some neurons, nothing in the last MLP."""
    mask = layout.none()
    mask["layers.0.attn"][[0, 1, 3]] = True
    mask["layers.0.mlp"][[2, 7, 23]] = True
    mask["layers.1.attn"][2] = True
    return mask


def tokens(step: int) -> Tensor:
    return torch.randint(3, 40, (4, 8), generator=torch.Generator().manual_seed(step))


def train(model, steps: int = 6) -> None:
    """AdamW with a weight decay that would reach any weight that it is given."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        for ids in tokens(step).split(2):  # gradients of two batches add up
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model) -> Tensor:
    with torch.inference_mode():
        return model(tokens(99), use_cache=False).logits


def allowed_entries(model, layout: UnitLayout, mask: UnitMask) -> dict[str, Tensor]:
    """By hand: rows and columns of chosen units that no other unit uses; adapters leave biases."""
    own = frozen_entries(model, layout, mask, embeddings=True)
    others = frozen_entries(model, layout, ~mask, embeddings=True)
    found = {name: own[name] & ~others[name] for name in own}
    for part in found.values():
        if part.ndim == 1:
            part[:] = False
    return found


def moved(before: dict[str, Tensor], model) -> dict[str, Tensor]:
    """Which entries have other bits than before, of everything that a checkpoint holds."""
    after = model.state_dict()
    assert list(after) == list(before)
    return {n: before[n].view(torch.int32) != after[n].view(torch.int32) for n in before}


def unit_linears(model) -> dict[str, nn.Linear]:
    """Linear layers of attention and MLP: all but the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


# --- what changes ----------------------------------------------------------------------------


@each_family
def test_only_the_chosen_units_change(families, model_type):
    """Of key and value rows those whose heads are all chosen. Zeros of either sign keep it."""
    model = families(model_type).train()
    layout = UnitLayout.of(model)
    with torch.no_grad():
        for linear in unit_linears(model).values():
            linear.weight[::3, ::2] = -0.0
    mask, before = some_units(layout), weights(model)
    allowed = allowed_entries(model, layout, mask)
    with adapters(model, RANK, mask):
        train(model)
    for name, changed in moved(before, model).items():
        inside = allowed.get(name, torch.zeros_like(changed))
        assert not changed[~inside].any(), name
        assert changed.sum() >= 0.95 * inside.sum(), name
    touched = {name.removesuffix(".weight") for name, part in allowed.items() if part.any()}
    fused = model_type == "phi3"
    # Of the one head that has no company in its group only queries and output train.
    assert len(touched) == (6 if fused else 9)
    shared = "qkv_proj" if fused else "k_proj"
    rows = allowed[f"model.layers.0.self_attn.{shared}.weight"].any(1)
    assert rows.sum() == ((12 + 4 + 4) if fused else 4)


@each_family
def test_without_chosen_units_every_layer_of_the_units_changes(families, model_type):
    model = families(model_type).train()
    layout, before = UnitLayout.of(model), weights(model)
    linears = {f"{path}.weight" for path in unit_linears(model)}
    assert {f"{path}.weight" for path in linear_layers(layout)} == linears
    with adapters(model, RANK):
        train(model)
    after = weights(model)
    for name, changed in moved(before, model).items():
        if name in linears:
            assert changed.sum() >= 0.95 * changed.numel(), name
            sizes = torch.linalg.svdvals((after[name] - before[name]).double())
            assert sizes[RANK - 1] > 1e-3 * sizes[0], name
            assert sizes[RANK] < 1e-4 * sizes[0], name
        else:
            assert not changed.any(), name


@each_family
def test_nothing_but_adapters_trains_inside(families, model_type):
    """And what they have closed begins and stays at zero, in spite of a weight decay."""
    model = families(model_type).train()
    layout = UnitLayout.of(model)
    mask = some_units(layout)
    allowed = allowed_entries(model, layout, mask)
    with adapters(model, RANK, mask):
        for steps in (0, 3):
            train(model, steps)
            found = dict(model.named_parameters())
            assert {n for n, p in found.items() if p.requires_grad} == {
                n for n in found if ".lora_" in n
            }
            for path, layer in model.named_modules():
                if not hasattr(layer, "lora_A"):
                    continue
                rows, columns = (allowed[f"{path}.weight"].any(1 - dim) for dim in (0, 1))
                up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
                assert not up[~rows].any()
                assert not down[:, ~columns].any()
                assert down[:, columns].all()
                assert bool(up[rows].all()) == (steps > 0)


# --- afterwards ------------------------------------------------------------------------------


@pytest.mark.parametrize("confined", [False, True], ids=["everywhere", "inside"])
@each_family
def test_the_merged_model_is_plain_and_computes_the_same(families, model_type, confined, tmp_path):
    model = families(model_type)
    layout = UnitLayout.of(model)
    mask = some_units(layout) if confined else None
    modules, start = dict(model.named_modules()), logits(model)
    with adapters(model, RANK, mask):
        torch.testing.assert_close(logits(model), start)  # adapters begin as nothing
        train(model)
        expected = logits(model)
    assert not torch.allclose(expected, start, atol=1e-2)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert all(type(linear) is nn.Linear for linear in unit_linears(model).values())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    saved = weights(again)
    assert list(saved) == list(model.state_dict())
    for name, tensor in weights(model).items():
        assert torch.equal(saved[name].view(torch.int32), tensor.view(torch.int32)), name
    torch.testing.assert_close(logits(again), logits(model))


def test_a_second_block_begins_where_the_first_ended(tiny_model):
    layout = UnitLayout.of(tiny_model)
    mask = some_units(layout)
    with adapters(tiny_model, RANK):
        train(tiny_model)
    between, start = weights(tiny_model), logits(tiny_model)
    allowed = allowed_entries(tiny_model, layout, mask)
    with adapters(tiny_model, 2, mask):
        torch.testing.assert_close(logits(tiny_model), start)
        train(tiny_model)
    for name, changed in moved(between, tiny_model).items():
        inside = allowed.get(name, torch.zeros_like(changed))
        assert not changed[~inside].any(), name
        assert changed.sum() >= 0.95 * inside.sum(), name


@pytest.mark.parametrize("confined", [False, True], ids=["everywhere", "inside"])
def test_an_error_leaves_plain_layers(tiny_model, confined):
    layout, names = UnitLayout.of(tiny_model), list(tiny_model.state_dict())

    def fail() -> None:
        with adapters(tiny_model, RANK, some_units(layout) if confined else None):
            train(tiny_model, 1)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert all(type(linear) is nn.Linear for linear in unit_linears(tiny_model).values())
    assert list(tiny_model.state_dict()) == names
    assert logits(tiny_model).isfinite().all()


# --- rank ------------------------------------------------------------------------------------


@each_family
def test_rank_for_comes_as_near_as_ranks_can(families, model_type):
    model = families(model_type)
    layout = UnitLayout.of(model)
    step = sum(m.in_features + m.out_features for m in unit_linears(model).values())
    ranks = set()
    for wanted in (step // 2 + 1, step, 2 * step + 50, 3 * step - 50, 7 * step):
        rank = rank_for(layout, wanted)
        with adapters(model, rank):
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count == rank * step
        assert abs(count - wanted) <= step / 2
        ranks.add(rank)
    assert ranks == {1, 2, 3, 7}
    assert rank_for(layout, 1) == 1  # there is no rank 0
