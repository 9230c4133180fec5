"""Roles by fixed thresholds, and how units move between groups when a model is fine-tuned."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssah.units.layout import Block, UnitLayout
from ssah.units.roles import (
    GROUPS,
    Roles,
    Shares,
    Thresholds,
    classify,
    classify_by_thresholds,
    transfer,
)

KINDS = (("attn", "mlp"), ("mlp",))


def layout_of(*sizes: int) -> UnitLayout:
    """Blocks of so many units, attention and MLP in turns, without weights."""
    blocks = []
    for i, units in enumerate(sizes):
        kind = ("attn", "mlp")[i % 2]
        channels = torch.arange(units)[:, None]
        blocks.append(Block(f"layers.{i // 2}.{kind}", i // 2, kind, f"{i}.out", channels, ()))
    return UnitLayout("toy", "head", tuple(blocks))


LAYOUT = layout_of(5, 20, 5, 20)


def distinct_scores(layout: UnitLayout, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores without ties in their sum or difference, in float32 as the real ones are."""
    generator = torch.Generator().manual_seed(seed)
    total, difference = (
        torch.randperm(layout.units, generator=generator) - layout.units / 3 for _ in range(2)
    )
    return layout.split((total + difference) / 2), layout.split((total - difference) / 2)


def assert_same_roles(got: Roles, expected: Roles) -> None:
    assert list(got.labels) == list(expected.labels)
    for name, label in expected.labels.items():
        assert got.labels[name].tolist() == label.tolist(), name
        assert torch.equal(got.difference[name], expected.difference[name]), name


@settings(max_examples=80, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 100), min_size=3, max_size=3),
    kinds=st.sampled_from(KINDS),
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_thresholds_give_back_the_classification_that_they_were_read_off(cuts, kinds, sizes, seed):
    """Whatever the shares, groups of no units among them."""
    low, middle, high = sorted(cuts)
    layout = layout_of(*sizes)
    eligible = sum(b.units for b in layout.blocks if b.kind in kinds)
    ru = min(low / 100, eligible / layout.units - 0.5 / layout.units)
    shares = Shares(ru=max(ru, 0), esu=(middle - low) / 100, euu=(high - middle) / 100)
    scores = distinct_scores(layout, seed)
    roles = classify(layout, *scores, shares, kinds)
    thresholds = Thresholds.of(roles, *scores)
    assert_same_roles(classify_by_thresholds(layout, *scores, thresholds, kinds), roles)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("empty", ["RU", "ESU", "EUU"])
def test_an_empty_group_stays_empty(kinds, empty):
    """Its threshold lets nobody in, however extreme the scores become."""
    parts = {"ru": 0.2, "esu": 0.2, "euu": 0.2} | {empty.lower(): 0.0}
    scores = distinct_scores(LAYOUT, 3)
    roles = classify(LAYOUT, *scores, Shares(**parts), kinds)
    thresholds = Thresholds.of(roles, *scores)
    assert_same_roles(classify_by_thresholds(LAYOUT, *scores, thresholds, kinds), roles)
    for scale in (-1e6, 1e6):
        extreme = [{name: part * scale for name, part in by_block.items()} for by_block in scores]
        moved = classify_by_thresholds(LAYOUT, *extreme, thresholds, kinds)
        assert moved.mask(empty).count() == 0
        assert moved.mask("CU").count() < LAYOUT.units  # the others' thresholds do let units in


def test_thresholds_are_the_last_scores_of_each_group():
    layout = layout_of(3, 5)
    #       heads: CU, ESU, EUU   neurons: ESU, RU, RU, CU, EUU
    safety = layout.split(torch.tensor([1.0, 9.0, 1.0, 8.0, -4.0, -9.0, 2.0, 0.5]))
    utility = layout.split(torch.tensor([1.0, 1.0, 7.0, 2.0, -4.0, -9.0, 2.0, 8.0]))
    roles = classify(layout, safety, utility, Shares(ru=0.25, esu=0.25, euu=0.25))
    thresholds = Thresholds.of(roles, safety, utility)
    assert thresholds == Thresholds(ru=-8.0, esu=6.0, euu=-6.0)


@pytest.mark.parametrize(
    ("safety", "utility", "neuron", "head"),
    [
        (0, 0, "CU", "CU"),
        (3, -2, "ESU", "ESU"),  # exactly at the threshold
        (3, -1.5, "CU", "CU"),
        (-1, 1, "EUU", "EUU"),
        (-1, 0.5, "CU", "CU"),
        (-3, -2, "RU", "CU"),
        (-2.5, -2, "CU", "CU"),
        (2, -9, "RU", "ESU"),
        (-9, 2, "RU", "EUU"),
    ],
)
def test_each_threshold_by_hand_and_redundant_units_first(safety, utility, neuron, head):
    """Where heads cannot be RU, they keep the role of their difference."""
    layout, thresholds = layout_of(1, 1), Thresholds(ru=-5.0, esu=5.0, euu=-2.0)
    scores = [layout.split(torch.tensor([float(s), float(s)])) for s in (safety, utility)]
    roles = classify_by_thresholds(layout, *scores, thresholds, ("mlp",))
    assert [GROUPS[int(label)] for label in roles.labels.values()] == [head, neuron]
    roles = classify_by_thresholds(layout, *scores, thresholds)
    assert [GROUPS[int(label)] for label in roles.labels.values()] == [neuron, neuron]


def test_thresholds_that_cross_favour_safety():
    """Where scores have moved as far as that, ESU claim their units before EUU do."""
    layout = layout_of(1, 1)
    scores = [layout.split(torch.tensor([s, s])) for s in (1.0, 0.0)]
    roles = classify_by_thresholds(layout, *scores, Thresholds(ru=-9.0, esu=0.0, euu=2.0))
    assert [GROUPS[int(label)] for label in roles.labels.values()] == ["ESU", "ESU"]


@pytest.fixture
def scored() -> tuple[dict[str, Tensor], dict[str, Tensor], Roles]:
    scores = distinct_scores(LAYOUT, 7)
    return *scores, classify(LAYOUT, *scores, Shares(ru=0.2, esu=0.2, euu=0.2))


def test_only_those_move_whose_utility_rises(scored):
    """Planted: a little more I_U makes CU of some ESU, much more makes EUU of others."""
    safety, utility, before = scored
    thresholds = Thresholds.of(before, safety, utility)
    moving = LAYOUT.flatten(before.mask("ESU")).nonzero().flatten()[:6].tolist()
    raised = LAYOUT.flatten(utility).clone()
    difference = LAYOUT.flatten(before.difference)
    for position in moving[:4]:  # to half-way between the two thresholds
        raised[position] += difference[position] - (thresholds.esu + thresholds.euu) / 2
    for position in moving[4:]:
        raised[position] += difference[position] - thresholds.euu + 1
    after = classify_by_thresholds(LAYOUT, safety, LAYOUT.split(raised), thresholds)

    expected = LAYOUT.flatten(before.labels).clone()
    expected[moving[:4]] = GROUPS.index("CU")
    expected[moving[4:]] = GROUPS.index("EUU")
    assert LAYOUT.flatten(after.labels).tolist() == expected.tolist()

    counts = transfer(before, after)
    esu, euu, cu = (GROUPS.index(group) for group in ("ESU", "EUU", "CU"))
    assert counts[esu].tolist() == [0, 4, 2, 4]  # 10 ESU, of which 2 became EUU and 4 CU
    assert counts[cu, esu] == counts[euu, esu] == 0
    assert int(counts.sum() - counts.diagonal().sum()) == 6
    # By quantiles the group keeps its size instead: somebody else moves up.
    shares = Shares(ru=0.2, esu=0.2, euu=0.2)
    assert classify(LAYOUT, safety, LAYOUT.split(raised), shares).mask("ESU").count() == 10


# --- transfer ----------------------------------------------------------------------------------


def drawn_roles(seed: int) -> Roles:
    """Any labels, of different group sizes."""
    rng = random.Random(seed)
    weights = [rng.random() + 0.1 for _ in GROUPS]
    labels = torch.tensor(rng.choices(range(4), weights, k=LAYOUT.units), dtype=torch.int8)
    return Roles(LAYOUT.split(labels), LAYOUT.split(torch.zeros(LAYOUT.units)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", [None, "attn", "mlp"])
def test_margins_are_the_group_sizes(seed, kind):
    before, after = drawn_roles(seed), drawn_roles(seed + 100)
    counts = transfer(before, after, kind)
    assert counts.shape == (4, 4)
    assert counts.sum(1).tolist() == [before.mask(group).count(kind) for group in GROUPS]
    assert counts.sum(0).tolist() == [after.mask(group).count(kind) for group in GROUPS]
    sizes = {None: 50, "attn": 10, "mlp": 40}
    assert int(counts.sum()) == sizes[kind]
    assert counts.sum(1).tolist() != counts.sum(0).tolist()  # else the two could be exchanged


@pytest.mark.parametrize("seed", range(5))
def test_transfer_counts_unit_by_unit(seed):
    before, after = drawn_roles(seed), drawn_roles(seed + 100)
    expected = torch.zeros(4, 4, dtype=torch.long)
    for name, labels in before.labels.items():
        for first, second in zip(labels.tolist(), after.labels[name].tolist(), strict=True):
            expected[first, second] += 1
    assert torch.equal(transfer(before, after), expected)
    by_kind = transfer(before, after, "attn") + transfer(before, after, "mlp")
    assert torch.equal(by_kind, expected)


def test_who_stays_is_on_the_diagonal(scored):
    _, _, roles = scored
    counts = transfer(roles, roles)
    assert counts.tolist() == torch.diag(torch.tensor([10, 10, 10, 20])).tolist()


def test_blocks_are_paired_by_name():
    """Loaded roles may list their blocks in another order."""
    before, after = drawn_roles(1), drawn_roles(2)
    turned = Roles(dict(reversed(list(after.labels.items()))), after.difference)
    assert torch.equal(transfer(before, turned), transfer(before, after))
