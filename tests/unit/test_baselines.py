"""Control selections: matched to a target in size, chosen by something else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ssah.scoring.selectors import RULES, magnitude, matched_by, sized
from ssah.units.layout import UnitLayout
from ssah.units.mask import UnitMask


@pytest.fixture
def layout(tiny_model) -> UnitLayout:
    """Two blocks of 4 heads and two of 24 neurons."""
    return UnitLayout.of(tiny_model)


def target_of(layout: UnitLayout, heads: int, neurons: int) -> UnitMask:
    """The last heads and neurons."""
    mask = torch.zeros(layout.units, dtype=torch.bool)
    kinds = [kind for b in layout.blocks for kind in [b.kind] * b.units]
    for kind, wanted in (("attn", heads), ("mlp", neurons)):
        own = [i for i, k in enumerate(kinds) if k == kind]
        mask[own[len(own) - wanted :]] = True
    return layout.mask(mask)


def random_units(layout: UnitLayout, target: UnitMask, seed: int) -> UnitMask:
    return matched_by(layout, target, RULES["random"](SimpleNamespace(layout=layout, seed=seed)))


def magnitude_units(model, layout: UnitLayout, target: UnitMask, largest: bool) -> UnitMask:
    rule = RULES["largest magnitude" if largest else "smallest magnitude"]
    found = magnitude(layout, dict(model.named_parameters()))
    evidence = SimpleNamespace(magnitude=lambda: found)
    return matched_by(layout, target, rule(evidence))


@pytest.mark.parametrize(("heads", "neurons"), [(3, 17), (0, 5), (1, 0), (8, 48), (0, 0)])
def test_controls_match_in_heads_neurons_and_weights(tiny_model, layout, heads, neurons):
    target = target_of(layout, heads, neurons)
    controls = [random_units(layout, target, seed) for seed in range(5)]
    for largest in (True, False):
        controls.append(magnitude_units(tiny_model, layout, target, largest=largest))
    for control in controls:
        assert list(control) == list(target)
        assert control.count("attn") == heads
        assert control.count("mlp") == neurons
        assert layout.weights(control) == layout.weights(target)


def test_random_units_are_reproducible(layout):
    target = target_of(layout, 2, 10)
    torch.manual_seed(1)
    first = random_units(layout, target, seed=7)
    torch.manual_seed(2)  # the global generator has no part in it
    state = torch.get_rng_state()
    assert random_units(layout, target, seed=7) == first
    assert torch.equal(torch.get_rng_state(), state)
    draws = [random_units(layout, target, seed) for seed in range(10)]
    assert all(draws[i] != draws[j] for i in range(10) for j in range(i))


def test_random_units_are_uniform_over_all_blocks(layout):
    """Each head is drawn in a quarter and each neuron in a third of the draws, give or take."""
    target, draws = target_of(layout, 2, 16), 600
    counts = torch.zeros(layout.units)
    for seed in range(draws):
        drawn = random_units(layout, target, seed)
        counts += torch.cat([drawn[b.name] for b in layout.blocks]).float()
    for name, part in layout.split(counts / draws).items():
        share = 2 / 8 if name.endswith("attn") else 16 / 48
        # Five standard errors of a proportion.
        assert (part - share).abs().max() < 5 * (share * (1 - share) / draws) ** 0.5


@pytest.mark.parametrize("largest", [True, False])
def test_magnitude_picks_the_extreme_norms(tiny_model, layout, largest):
    picked = {"layers.0.attn": [3], "layers.0.mlp": [0, 9], "layers.1.mlp": [23]}
    chosen = {b.name: torch.zeros(b.units, dtype=torch.bool) for b in layout.blocks}
    with torch.no_grad():
        for name, units in picked.items():
            chosen[name][units] = True
            block = layout[name]
            weight = tiny_model.get_submodule(block.output).weight
            weight[:, block.channels[units].flatten()] *= 100 if largest else 0.01
    target = target_of(layout, 1, 3)
    assert UnitMask(chosen, layout.unit_kind) != target
    control = magnitude_units(tiny_model, layout, target, largest=largest)
    assert control == UnitMask(chosen, layout.unit_kind)


def test_magnitude_of_a_head_is_that_of_all_its_columns(tiny_model, layout):
    """One large column does not outweigh four that are large enough."""
    block = layout["layers.0.attn"]
    with torch.no_grad():
        for name in ("layers.0.attn", "layers.1.attn"):
            tiny_model.get_submodule(layout[name].output).weight[:] = 0.1
        weight = tiny_model.get_submodule(block.output).weight
        weight[:, block.channels[0, 0]] = 0.5
        weight[:, block.channels[2]] = 0.3
    largest = magnitude_units(tiny_model, layout, target_of(layout, 1, 0), largest=True)
    assert largest["layers.0.attn"].tolist() == [False, False, True, False]


def test_matched_by_takes_the_lowest_of_each_kind(layout):
    rank = layout.split(torch.arange(layout.units, 0, -1).float())
    control = matched_by(layout, target_of(layout, 2, 3), rank)
    assert control["layers.1.attn"].tolist() == [False, False, True, True]
    assert control["layers.1.mlp"].nonzero().flatten().tolist() == [21, 22, 23]


@pytest.mark.parametrize(("heads", "neurons"), [(0, 0), (0.5, 0), (0.25, 0.5), (1, 1)])
def test_a_size_is_a_fraction_of_each_kind(layout, heads, neurons):
    mask = sized(layout, heads, neurons)
    for kind, fraction in (("attn", heads), ("mlp", neurons)):
        units = sum(block.units for block in layout.blocks if block.kind == kind)
        assert mask.count(kind) == round(fraction * units)
