"""Masked fine-tuning: frozen bits, the right gradients, and a plain model before and after."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ssah.training.slicing import SlicedLinear, freeze_units, train_only
from ssah.units.layout import UnitLayout
from ssah.units.mask import UnitMask

KINDS = ("head", "kv_group", "channel")
FAMILIES = ("llama", "qwen2", "gemma2", "phi3")
#: Every way in: with few units trained most layers are sliced, with few frozen most are restored.
MODES = ("sliced", "restored")

both_modes = pytest.mark.parametrize("mode", MODES)


def draw(layout: UnitLayout, share: float, seed: int = 0) -> UnitMask:
    """Random units of every block, at least one of each."""
    generator = torch.Generator().manual_seed(seed)
    mask = layout.none()
    for part in mask.values():
        order = torch.randperm(len(part), generator=generator)
        part[order[: max(round(share * len(part)), 1)]] = True
    return mask


def block_of(model, mode: str, unit_kind="head", seed: int = 0):
    """The block to train in, and for each parameter of the model which entries train in it."""
    layout = UnitLayout.of(model, unit_kind)
    if mode == "sliced":
        mask = draw(layout, 0.2, seed)
        block = train_only(model, mask)
        return block, trained_entries(model, layout, mask, rest=False)
    mask = draw(layout, 0.07, seed)
    block = freeze_units(model, mask)
    return block, trained_entries(model, layout, ~mask, rest=True)


def trained_entries(
    model, layout: UnitLayout, trained: UnitMask, rest: bool, shared: str = "frozen"
) -> dict[str, Tensor]:
    """By hand: a bool tensor for each parameter. Who uses a row decides whether it trains."""
    entries = {n: torch.full(p.shape, rest) for n, p in model.named_parameters()}
    for block in layout.blocks:
        chosen = trained[block.name]
        for part in block.slices:
            lines = entries[part.parameter].movedim(part.dim, 0)
            lines[part.index.flatten()] = False
            lines[part.index[chosen].flatten()] = True
            if shared == "frozen":
                lines[part.index[~chosen].flatten()] = False
    return entries


def parameters_of(model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def assert_only_trained(model, before: dict[str, Tensor], entries: dict[str, Tensor]) -> None:
    """Frozen bits are what they were, and of every parameter nearly all that trains has moved."""
    assert set(before) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        moved = bits(parameter) != bits(before[name])
        assert not moved[~entries[name]].any(), name
        assert moved.sum() >= 0.8 * entries[name].sum(), name
    assert any(part.any() for part in entries.values())


def batch_of(step: int) -> Tensor:
    return torch.randint(3, 40, (4, 8), generator=torch.Generator().manual_seed(step))


def loss_of(model, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def adamw(parameters, **changes) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **({"lr": 1e-2, "weight_decay": 0.1} | changes))


def train(
    model, steps: int = 20, *, make=adamw, micro_batch: int = 4, autocast: bool = False
) -> torch.optim.Optimizer:
    """A plain loop, with clipping to a norm so small that it always bites."""
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for step in range(steps):
        for rows in batch_of(step).split(micro_batch):
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                loss = loss_of(model, rows)
            (loss * len(rows) / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def train_by_hand(model, entries: dict[str, Tensor], steps: int = 20) -> None:
    """The same with gradients of everything, masked, and frozen weights put back each step."""
    before = parameters_of(model)
    optimizer = adamw(model.parameters())
    for step in range(steps):
        loss_of(model, batch_of(step)).backward()
        for name, parameter in model.named_parameters():
            parameter.grad *= entries[name]
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.where(entries[name], parameter, before[name]))


def sliced_layers(model) -> dict[str, SlicedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SlicedLinear)}


# --- what trains and what does not -----------------------------------------------------------


@both_modes
@pytest.mark.parametrize("unit_kind", KINDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_frozen_bits_survive_training(families, model_type, unit_kind, mode):
    model = families(model_type).train()
    before = parameters_of(model)
    block, entries = block_of(model, mode, unit_kind)
    with block:
        train(model)
    assert_only_trained(model, before, entries)


@both_modes
@pytest.mark.parametrize("unit_kind", KINDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_training_equals_masking_by_hand(families, model_type, unit_kind, mode):
    """Eight steps in float64: whatever differs beyond rounding is a mistake."""
    model = families(model_type).double()
    reference = copy.deepcopy(model)
    block, entries = block_of(model, mode, unit_kind)
    with block:
        train(model, 8)
    train_by_hand(reference, entries, 8)
    for name, parameter in reference.named_parameters():
        got = model.get_parameter(name)
        torch.testing.assert_close(got, parameter, rtol=1e-7, atol=1e-9, msg=name)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def fused_adamw(parameters):
    return adamw(parameters, fused=True)


class Unversioned(torch.optim.SGD):
    """Writes through ``.data``, as many published optimizers do: autograd does not notice."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.data.mul_(0.9).sub_(parameter.grad, alpha=0.1)


def unversioned(parameters):
    return Unversioned(parameters, lr=0.1)


@both_modes
@pytest.mark.parametrize("make", [sgd, fused_adamw, unversioned])
def test_frozen_bits_under_other_optimizers(tiny_model, make, mode):
    """The fused one is the Trainer's default. Its steps must be seen by the next forward pass."""
    before, plain = parameters_of(tiny_model), copy.deepcopy(tiny_model)
    block, entries = block_of(tiny_model, mode)
    with block:
        train(tiny_model, make=make)
        inside = tiny_model(batch_of(99)).logits
    assert_only_trained(tiny_model, before, entries)
    plain.load_state_dict(tiny_model.state_dict())
    torch.testing.assert_close(inside, plain(batch_of(99)).logits)


@both_modes
@pytest.mark.parametrize("model_type", ["qwen2", "phi3"])
def test_frozen_bits_under_autocast(families, model_type, mode):
    model = families(model_type).train()
    before, plain = parameters_of(model), copy.deepcopy(model)
    block, entries = block_of(model, mode)
    with block:
        with torch.autocast("cpu", torch.bfloat16):
            logits, expected = model(batch_of(0)).logits, plain(batch_of(0)).logits
        assert torch.equal(logits, expected)
        train(model, autocast=True)
    assert_only_trained(model, before, entries)


@both_modes
@pytest.mark.parametrize("model_type", ["qwen2", "phi3"])
def test_frozen_bits_in_a_half_precision_model(families, model_type, mode):
    model = families(model_type).bfloat16()
    before = parameters_of(model)
    block, entries = block_of(model, mode)
    with block:
        train(model, make=lambda parameters: adamw(parameters, lr=0.1))
    for name, parameter in model.named_parameters():
        assert torch.equal(bits(parameter)[~entries[name]], bits(before[name])[~entries[name]])


@both_modes
def test_accumulation_and_checkpointing_change_nothing(families, mode):
    results = []
    for micro_batch, checkpointing in ((4, False), (1, False), (4, True), (2, True)):
        model = families("qwen2").double().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        before = parameters_of(model)
        block, entries = block_of(model, mode)
        with block:
            train(model, 8, micro_batch=micro_batch)
        assert_only_trained(model, before, entries)
        results.append(parameters_of(model))
    for other in results[1:]:
        for name, parameter in results[0].items():
            torch.testing.assert_close(other[name], parameter, rtol=1e-7, atol=1e-9, msg=name)


@both_modes
def test_two_blocks_with_different_masks(tiny_model, mode):
    start = parameters_of(tiny_model)
    everything = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in start.items()}
    for seed in (1, 2):
        before = parameters_of(tiny_model)
        block, entries = block_of(tiny_model, mode, seed=seed)
        with block:
            train(tiny_model)
        assert_only_trained(tiny_model, before, entries)
        everything = {name: entries[name] | part for name, part in everything.items()}
    assert_only_trained(tiny_model, start, everything)


@pytest.mark.parametrize("unit_kind", KINDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_optimizer_holds_only_what_trains(families, model_type, unit_kind):
    model = families(model_type)
    block, entries = block_of(model, "sliced", unit_kind)
    expected = sum(int(part.sum()) for part in entries.values())
    with block:
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
        state = train(model, 1).state.values()
    assert sum(moments["exp_avg"].numel() for moments in state) == expected


@pytest.mark.parametrize("frozen_share", [0.07, 0.6])
def test_frozen_units_by_share(families, frozen_share):
    """Where most units are frozen, freeze_units slices too; embeddings train all the same."""
    model = families("qwen2")
    layout = UnitLayout.of(model)
    mask = draw(layout, frozen_share)
    before = parameters_of(model)
    with freeze_units(model, mask):
        gate = model.get_submodule("model.layers.0.mlp.gate_proj")
        assert isinstance(gate, SlicedLinear) == (frozen_share > 0.5)
        train(model)
    assert_only_trained(model, before, trained_entries(model, layout, ~mask, rest=True))


@pytest.mark.parametrize("shared", ["frozen", "trained"])
@pytest.mark.parametrize("mode", MODES)
def test_key_and_value_rows_shared_with_a_frozen_head(families, mode, shared):
    """Heads 0 and 1 share the first four key and value rows; only head 0 trains."""
    model = families("qwen2")
    layout = UnitLayout.of(model)
    trained = layout.none()
    trained["layers.0.attn"][0] = True
    before = parameters_of(model)
    if mode == "sliced":
        block = train_only(model, trained, shared_rows=shared)
    else:
        block = freeze_units(model, ~trained, shared_rows=shared, train_rest=False)
    with block:
        train(model)
    for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
        name = f"model.layers.0.self_attn.{name}"
        moved = (model.get_parameter(name) != before[name]).flatten(1 - before[name].ndim)
        moved = moved if moved.ndim == 1 else moved.any(1)
        assert moved.nonzero().flatten().tolist() == ([0, 1, 2, 3] if shared == "trained" else [])
    assert_only_trained(model, before, trained_entries(model, layout, trained, False, shared))


@both_modes
def test_biases_of_output_projections_belong_to_no_unit(families, mode):
    """They stay frozen with ``train_only`` and train with ``freeze_units``, sliced or not."""
    model = families("llama", attention_bias=True, mlp_bias=True)
    layout = UnitLayout.of(model)
    # One block wholly in the mask, one in parts, the others not at all.
    mask = layout.none()
    mask["layers.0.attn"][:] = True
    mask["layers.0.mlp"][:20] = True
    before = parameters_of(model)
    if mode == "sliced":
        block, entries = train_only(model, mask), trained_entries(model, layout, mask, False)
    else:
        block, entries = freeze_units(model, mask), trained_entries(model, layout, ~mask, True)
    with block:
        train(model)
    assert_only_trained(model, before, entries)


def test_a_weight_that_was_frozen_before_stays_frozen(tiny_model):
    """With ``freeze_units``; ``train_only`` names what trains, whatever was set before."""
    layout = UnitLayout.of(tiny_model)
    tiny_model.model.layers[0].requires_grad_(False)
    tiny_model.model.layers[1].mlp.up_proj.requires_grad_(False)
    required = {name: p.requires_grad for name, p in tiny_model.named_parameters()}
    mask, before = draw(layout, 0.07), parameters_of(tiny_model)
    entries = trained_entries(tiny_model, layout, ~mask, rest=True)
    with freeze_units(tiny_model, mask):
        train(tiny_model)
    still = {name: part & required[name] for name, part in entries.items()}
    assert_only_trained(tiny_model, before, still)

    before = parameters_of(tiny_model)
    with train_only(tiny_model, mask):
        train(tiny_model)
    entries = trained_entries(tiny_model, layout, mask, rest=False)
    assert_only_trained(tiny_model, before, entries)
    assert {name: p.requires_grad for name, p in tiny_model.named_parameters()} == required


def test_frozen_bias_rows_where_only_biases_train(families):
    model = families("qwen2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    layout = UnitLayout.of(model)
    mask, before = draw(layout, 0.3), parameters_of(model)
    entries = trained_entries(model, layout, ~mask, rest=True)
    with freeze_units(model, mask):
        train(model)
    biases = {name: part & name.endswith("bias") for name, part in entries.items()}
    assert_only_trained(model, before, biases)


@both_modes
def test_forgotten_gradients_move_nothing(tiny_model, mode):
    """An optimizer over all parameters steps each that has a gradient, required or not."""
    loss_of(tiny_model, batch_of(50)).backward()
    before = parameters_of(tiny_model)
    block, entries = block_of(tiny_model, mode)
    plain = dict.fromkeys(tiny_model.parameters())
    with block:
        train(tiny_model, make=lambda parameters: adamw(plain | dict.fromkeys(parameters)))
    assert_only_trained(tiny_model, before, entries)


@pytest.mark.parametrize("unit_kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_empty_and_full_masks(families, model_type, unit_kind):
    model = families(model_type)
    layout = UnitLayout.of(model, unit_kind)
    none, names = layout.none(), {name for name, _ in model.named_parameters()}

    def training() -> set[str]:
        assert not sliced_layers(model)
        return {name for name, p in model.named_parameters() if p.requires_grad}

    with train_only(model, none):
        assert training() == set()
    with freeze_units(model, ~none, train_rest=False):
        assert training() == set()
    with freeze_units(model, none):
        assert training() == names
    for block, trained, rest in (
        (train_only(model, ~none), ~none, False),
        (freeze_units(model, ~none), none, True),
    ):
        before = parameters_of(model)
        with block:
            train(model)
        assert_only_trained(model, before, trained_entries(model, layout, trained, rest))


def test_a_mask_that_does_not_fit_is_refused(tiny_model, families):
    required = {name: p.requires_grad for name, p in tiny_model.named_parameters()}
    smaller = UnitLayout.of(families("llama", num_hidden_layers=1)).none()
    for block in (train_only, freeze_units):
        with pytest.raises(ValueError, match="does not fit"), block(tiny_model, smaller):
            pytest.fail("The block was entered.")
    assert {name: p.requires_grad for name, p in tiny_model.named_parameters()} == required


def test_a_block_inside_a_block_is_refused(tiny_model):
    mask = draw(UnitLayout.of(tiny_model), 0.2)
    with (
        train_only(tiny_model, mask),
        pytest.raises(ValueError, match="inside another"),
        freeze_units(tiny_model, mask),
    ):
        pytest.fail("The block was entered.")
    assert not sliced_layers(tiny_model)


# --- one sliced layer ------------------------------------------------------------------------


def sliced_and_plain(dim: int, bias: bool) -> tuple[SlicedLinear, nn.Linear, Tensor]:
    """A sliced layer (5 inputs, 6 outputs), a plain one of the same weights, and the index."""
    torch.manual_seed(0)
    plain = nn.Linear(5, 6, bias=bias, dtype=torch.float64)
    index = torch.tensor([1, 4])
    return SlicedLinear(copy.deepcopy(plain), index, dim), plain, index


def assert_same_gradients(sliced: SlicedLinear, plain: nn.Linear, index: Tensor) -> None:
    weight = plain.weight.grad.index_select(sliced.dim, index)
    torch.testing.assert_close(sliced.part.grad, weight)
    if plain.bias is not None:
        bias = plain.bias.grad[index] if sliced.dim == 0 else plain.bias.grad
        torch.testing.assert_close(sliced.bias_part.grad, bias)


every_layer = pytest.mark.parametrize(
    ("dim", "bias"), [(0, True), (0, False), (1, True), (1, False)]
)


@every_layer
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_gradients_of_a_sliced_layer(dim, bias, shape):
    sliced, plain, index = sliced_and_plain(dim, bias)
    inputs = torch.randn(shape, dtype=torch.float64)
    x, y = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    got, expected = sliced(x), plain(y)
    assert torch.equal(got, expected)
    got.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert_same_gradients(sliced, plain, index)


@every_layer
def test_two_forward_passes_before_a_backward_pass(dim, bias):
    sliced, plain, index = sliced_and_plain(dim, bias)
    x, y = torch.randn(2, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    for layer in (sliced, plain):
        first, second = layer(x).sin().sum(), layer(y).cos().sum()
        (first + second).backward()
    assert_same_gradients(sliced, plain, index)


@every_layer
def test_checkpointed_sliced_layer(dim, bias):
    sliced, plain, index = sliced_and_plain(dim, bias)
    for layer in (sliced, plain):
        x = torch.ones(2, 5, dtype=torch.float64, requires_grad=True)
        checkpoint(layer, x, use_reentrant=False).sin().sum().backward()
    assert_same_gradients(sliced, plain, index)


def test_second_derivatives_are_refused():
    """They would be wrong, since the graph leaves out the frozen part."""
    sliced, _, _ = sliced_and_plain(0, True)
    x = torch.ones(2, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(sliced(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@every_layer
def test_weight_and_state_are_current(dim, bias):
    """However the part was changed: with or without a new version, or by loading."""
    sliced, plain, index = sliced_and_plain(dim, bias)
    part = sliced.part
    for change in (lambda: part.data.add_(1), lambda: part.detach().mul_(2)):
        change()
        assert torch.equal(sliced.state_dict()["weight"].index_select(dim, index), part)
        change()
        assert torch.equal(sliced.weight.index_select(dim, index), part)
    assert not sliced.weight.requires_grad
    assert list(sliced.state_dict()) == list(plain.state_dict())
    expected = part.detach() + 1
    part.data.add_(1)
    sliced.load_state_dict({}, strict=False)  # lacks the layer: nothing may go back
    assert torch.equal(part, expected)

    other = nn.Linear(5, 6, bias=bias, dtype=torch.float64)
    sliced.load_state_dict(other.state_dict())
    assert torch.equal(part, other.weight.index_select(dim, index))
    x = torch.randn(2, 5, dtype=torch.float64)
    assert torch.equal(sliced(x), other(x))
    part.data.add_(1)
    copied = copy.deepcopy(sliced)
    assert torch.equal(copied(x), sliced(x))
    assert torch.equal(copied.float().merge().weight, sliced.merge().weight.float())


# --- the model inside the block --------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("unit_kind", KINDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_outputs_are_those_of_the_plain_model(families, model_type, unit_kind, mode):
    model = families(model_type)
    expected = model(batch_of(0)).logits
    block, _ = block_of(model, mode, unit_kind)
    with block:
        assert torch.equal(model(batch_of(0)).logits, expected)
        with torch.inference_mode():
            assert torch.equal(model(batch_of(0)).logits, expected)
    assert torch.equal(model(batch_of(0)).logits, expected)


@both_modes
def test_generating_in_mid_training(tiny_model, mode):
    def answers() -> Tensor:
        tiny_model.eval()
        ids = batch_of(0)
        return tiny_model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6
        )

    untrained = answers()
    block, _ = block_of(tiny_model, mode)
    with block:
        assert torch.equal(answers(), untrained)
        train(tiny_model.train(), make=lambda parameters: adamw(parameters, lr=0.1))
        trained = answers()
    assert torch.equal(answers(), trained)
    assert not torch.equal(trained, untrained)


@both_modes
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["qwen2", "phi3"])
def test_saving_inside_and_after_the_block(families, tmp_path, model_type, tied, mode):
    model = families(model_type, tie_word_embeddings=tied)
    keys = list(model.state_dict())
    block, entries = block_of(model, mode)
    before = parameters_of(model)
    with block:
        train(model, 5)
        inside = {name: t.clone() for name, t in model.state_dict().items()}
        logits = model(batch_of(0)).logits
        model.save_pretrained(tmp_path / "inside")
    assert list(inside) == keys == list(model.state_dict())
    model.save_pretrained(tmp_path / "after")
    for folder in ("inside", "after"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert_only_trained(loaded, before, entries)
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, inside[name]), name
            assert torch.equal(tensor, model.state_dict()[name]), name
        torch.testing.assert_close(loaded(batch_of(0)).logits, logits)


@both_modes
def test_state_loaded_inside_the_block_is_kept(families, mode):
    """As a run does that resumes: its frozen bits are those of the checkpoint."""
    other = families("qwen2")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    before, model = parameters_of(other), families("qwen2")
    block, entries = block_of(model, mode)
    with block:
        model.load_state_dict(other.state_dict())
        train(model)
    assert_only_trained(model, before, entries)


@both_modes
def test_changing_the_precision_inside_the_block(families, mode):
    model = families("qwen2")
    before = {name: tensor.double() for name, tensor in parameters_of(model).items()}
    block, entries = block_of(model, mode)
    with block:
        model.double()
        train(model)
    assert_only_trained(model, before, entries)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both_modes
def test_moving_the_model_inside_the_block(families, tmp_path, mode):
    """What Trainer does with a model that is still in main memory."""
    model = families("qwen2")
    before = parameters_of(model)
    block, entries = block_of(model, mode)
    with block:
        trainer_for(model, tmp_path, use_cpu=False).train()
    assert_only_trained(model.cpu(), before, entries)


# --- the model after the block ---------------------------------------------------------------


class Interruption(Exception):
    """Stands for whatever may go wrong in training."""


@both_modes
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "phi3"])
def test_afterwards_the_model_is_a_plain_one(families, model_type, fails, mode):
    model = families(model_type, tie_word_embeddings=True).train()
    model.model.layers[1].input_layernorm.requires_grad_(False)
    objects = dict(model.named_parameters())
    required = {name: p.requires_grad for name, p in objects.items()}
    modules = dict(model.named_modules())
    before = parameters_of(model)
    hooks = dict(torch_optimizer._global_optimizer_post_hooks)
    block, entries = block_of(model, mode)
    with pytest.raises(Interruption) if fails else nullcontext(), block:
        assert sliced_layers(model) or mode == "restored"
        train(model)
        model.eval()
        if fails:
            raise Interruption
    after = dict(model.named_parameters())
    assert list(after) == list(objects)
    for name, parameter in after.items():
        assert parameter is objects[name], name
        assert parameter.requires_grad == required[name], name
        assert not parameter._post_accumulate_grad_hooks, name
    assert dict(model.named_modules()) == modules
    for module in modules.values():
        assert not module.training
        assert not module._load_state_dict_post_hooks
    assert dict(torch_optimizer._global_optimizer_post_hooks) == hooks
    assert model.lm_head.weight is model.model.embed_tokens.weight
    layernorm = "model.layers.1.input_layernorm.weight"
    entries[layernorm][:] = False
    assert_only_trained(model, before, entries)


# --- transformers.Trainer --------------------------------------------------------------------


def trainer_for(model, folder, **changes) -> Trainer:
    """Six steps of two accumulated micro-batches, with a checkpoint after the third."""
    arguments = {
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.05,
        "disable_tqdm": True,
    }
    rows = [{"input_ids": ids, "labels": ids} for step in range(5) for ids in batch_of(step)]
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **(arguments | changes)),
        train_dataset=rows,
    )


@both_modes
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_resumes_to_the_same_bits(families, tmp_path, checkpointing, mode):
    changes = {
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }

    def run(checkpoint=None):
        model = families("qwen2", tie_word_embeddings=True)
        before = parameters_of(model)
        block, entries = block_of(model, mode)
        with block:
            trainer = trainer_for(model, tmp_path, **changes)
            trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 6
        # Trainer applies no weight decay to biases and norms, but their gradients move them.
        assert_only_trained(model, before, entries)
        return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole, losses = run()
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert list(half.state_dict()) == list(whole.state_dict())
    resumed, resumed_losses = run(str(tmp_path / "checkpoint-3"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(bits(resumed.state_dict()[name]), bits(tensor)), name
    assert resumed_losses == losses
    assert len(losses) == 6
