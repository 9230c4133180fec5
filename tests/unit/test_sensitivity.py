"""ESI and Fisher information, against the library's gradients, unit by unit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers import Dialogues, dialogues
from ssah.scoring.sensitivity import expected_impact, fisher_information
from ssah.text.batches import dialogue_batches
from ssah.units.layout import UnitLayout


def gradients(model, pairs: Dialogues) -> dict[str, Tensor]:
    """Of the responses' log-likelihood."""
    model.zero_grad()
    for prompt, response in pairs:
        labels = torch.tensor([[-100] * len(prompt) + response])
        loss = model(torch.tensor([prompt + response]), labels=labels).loss
        (-loss * len(response)).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def summed(layout: UnitLayout, values: dict[str, Tensor]) -> dict[str, list[float]]:
    """Over each unit's rows and columns, one after the other."""
    found: dict[str, list[float]] = {}
    for block in layout.blocks:
        for unit in range(block.units):
            lines = [
                values[part.parameter].movedim(part.dim, 0)[i]
                for part in block.slices
                for i in part.index[unit]
            ]
            found.setdefault(block.name, []).append(sum(line.sum().item() for line in lines))
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, list[float]]) -> None:
    assert set(found) == set(wanted)
    for name, part in found.items():
        assert part.tolist() == pytest.approx(wanted[name], rel=1e-3), name


@pytest.fixture(params=["llama", "qwen2"])
def model(families: Callable, request):
    """The second one has biases."""
    return families(request.param)


def test_esi_is_the_slope_of_refusals_times_the_spread_of_the_weights(model):
    layout, pairs = UnitLayout.of(model), dialogues(5)
    parameters = dict(model.named_parameters())
    wanted = {
        name: (slope * parameters[name].detach().std()).abs()
        for name, slope in gradients(model, pairs).items()
    }
    found = expected_impact(model, layout, dialogue_batches(pairs, 2))
    assert_same(found, summed(layout, wanted))


def test_fisher_is_the_squared_slope_of_each_refusal(model):
    layout, pairs = UnitLayout.of(model), dialogues(4)
    apart = [gradients(model, [pair]) for pair in pairs]
    wanted = {name: sum(part[name] ** 2 for part in apart) for name in apart[0]}
    found = fisher_information(model, layout, dialogue_batches(pairs, 1))
    assert_same(found, summed(layout, wanted))
    with pytest.raises(ValueError, match="A batch of 2 texts"):
        fisher_information(model, layout, dialogue_batches(pairs, 2))


def test_the_model_is_left_as_it_was(model):
    layout, pairs = UnitLayout.of(model), dialogues(2)
    model.get_parameter("model.norm.weight").requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected_impact(model, layout, dialogue_batches(pairs, 1))
    fisher_information(model, layout, dialogue_batches(pairs, 1))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad == (name != "model.norm.weight")


def test_gradients_that_are_not_finite_are_refused_by_name(tiny_model):
    layout = UnitLayout.of(tiny_model)
    with torch.no_grad():
        tiny_model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = torch.nan
    for measure in (expected_impact, fisher_information):
        with pytest.raises(ValueError, match="The gradient of model"):
            measure(tiny_model, layout, dialogue_batches(dialogues(1), 1))
