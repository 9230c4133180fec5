"""A mask that changes in mid-run under one optimizer: momentum stays with what trains."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from ssah.training.slicing import freeze_units, train_only
from ssah.units.layout import UnitLayout
from ssah.units.mask import UnitMask

STEPS = 5


def draw(layout: UnitLayout, share: float, seed: int) -> UnitMask:
    generator = torch.Generator().manual_seed(seed)
    return UnitMask(
        {b.name: torch.rand(b.units, generator=generator) < share for b in layout.blocks}
    )


def entries_of(model, layout: UnitLayout, trained: UnitMask, rest: bool) -> dict[str, torch.Tensor]:
    """By hand: which entries of each parameter train. A shared row trains with all its heads."""
    entries = {n: torch.full(p.shape, rest) for n, p in model.named_parameters()}
    for block in layout.blocks:
        for part in block.slices:
            lines = entries[part.parameter].movedim(part.dim, 0)
            lines[part.index.flatten()] = True
            lines[part.index[~trained[block.name]].flatten()] = False
    return entries


def step(model, optimizer, number: int, entries: dict[str, torch.Tensor] | None = None) -> None:
    ids = torch.randint(3, 40, (4, 8), generator=torch.Generator().manual_seed(number))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    if entries is not None:
        for name, parameter in model.named_parameters():
            parameter.grad *= entries[name]
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    optimizer.zero_grad()


def adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def run_in_blocks(model, phases) -> torch.optim.Optimizer:
    optimizer = adamw(model)
    for phase, (way, mask) in enumerate(phases):
        with nullcontext() if way is None else way(model, mask, optimizer=optimizer):
            for i in range(STEPS):
                step(model, optimizer, STEPS * phase + i)
    return optimizer


def run_by_hand(model, layout: UnitLayout, phases) -> torch.optim.Optimizer:
    """Whole parameters; at each change what is frozen loses its state, and it is put back."""
    optimizer = adamw(model)
    for phase, (way, mask) in enumerate(phases):
        entries = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
        if way is not None:
            trained = mask if way is train_only else ~mask
            entries = entries_of(model, layout, trained, rest=way is freeze_units)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            if not entries[name].any():
                optimizer.state.pop(parameter, None)
            for key in ("exp_avg", "exp_avg_sq"):
                if key in optimizer.state.get(parameter, {}):
                    optimizer.state[parameter][key] *= entries[name]
        for i in range(STEPS):
            step(model, optimizer, STEPS * phase + i, entries)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(torch.where(entries[name], parameter, before[name]))
                    if not entries[name].any():  # it had no gradient, so no state either
                        optimizer.state.pop(parameter, None)
    return optimizer


PHASES = {
    "little frozen": ((None, 0), (freeze_units, 0.1), (None, 0)),
    "much frozen": ((None, 0), (freeze_units, 0.8), (None, 0)),
    "little trained": ((None, 0), (train_only, 0.2), (None, 0)),
    "another mask": ((freeze_units, 0.8), (freeze_units, 0.3), (train_only, 0.3)),
}


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])  # without biases, with biases
@pytest.mark.parametrize("name", PHASES)
def test_a_change_of_mask_keeps_the_momentum_of_what_trains(families, model_type, name):
    first, second = families(model_type).double(), families(model_type).double()
    layout = UnitLayout.of(first)
    phases = [(way, draw(layout, share, i)) for i, (way, share) in enumerate(PHASES[name])]
    one, other = run_in_blocks(first, phases), run_by_hand(second, layout, phases)
    expected = dict(second.named_parameters())
    for parameter_name, parameter in first.named_parameters():
        torch.testing.assert_close(
            parameter, expected[parameter_name], rtol=1e-7, atol=1e-9, msg=parameter_name
        )
        state, wanted = one.state.get(parameter, {}), other.state.get(expected[parameter_name], {})
        assert set(state) == set(wanted), parameter_name
        for key in wanted:
            torch.testing.assert_close(state[key], wanted[key], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("way", "share"), [(freeze_units, 0.1), (freeze_units, 0.8)])
def test_frozen_bits_survive_momentum_from_before(families, way, share):
    model = families("llama")
    layout = UnitLayout.of(model)
    optimizer = adamw(model)
    for i in range(STEPS):
        step(model, optimizer, i)
    mask = draw(layout, share, 0)
    entries = entries_of(model, layout, ~mask, rest=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with way(model, mask, optimizer=optimizer):
        for i in range(20):
            step(model, optimizer, STEPS + i)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert {id(p) for p in model.parameters() if p.requires_grad} <= held
    for name, parameter in model.named_parameters():
        moved = parameter != before[name]
        assert not moved[~entries[name]].any(), name
        assert moved[entries[name]].any() or not entries[name].any(), name
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} == held
