"""Roles: ESU, EUU, CU and RU from two scores, and the search for their shares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssah.lab.stages.roles import Effect, search_share
from ssah.units.layout import Block, UnitLayout
from ssah.units.mask import UnitMask
from ssah.units.roles import GROUPS, Roles, Shares, classify


def layout_of(heads: int, neurons: int) -> UnitLayout:
    """One attention block and one MLP block, without weights."""
    blocks = []
    for kind, units in (("attn", heads), ("mlp", neurons)):
        channels = torch.arange(units)[:, None]
        blocks.append(Block(f"layers.0.{kind}", 0, kind, f"{kind}.out", channels, ()))
    return UnitLayout("toy", "head", tuple(blocks))


def classify_flat(safety: list[float], utility: list[float], shares: Shares, **options) -> Roles:
    """Roles of two heads and as many neurons as there are scores left."""
    layout = layout_of(2, len(safety) - 2)
    # In float64 from the start: what ties here has to tie there.
    split = [
        layout.split(torch.tensor(scores, dtype=torch.float64)) for scores in (safety, utility)
    ]
    return classify(layout, *split, shares, **options)


def named(roles: Roles) -> list[str]:
    """Group of every unit, in the layout's order."""
    return [GROUPS[code] for part in roles.labels.values() for code in part.tolist()]


def positions(mask: UnitMask) -> list[int]:
    return torch.cat(list(mask.values())).nonzero().flatten().tolist()


scores = st.floats(-5, 5).map(lambda value: round(value, 2))  # rounded, so that ties occur


@settings(max_examples=200, deadline=None)
@given(
    pairs=st.lists(st.tuples(scores, scores), min_size=3, max_size=40),
    cuts=st.lists(st.integers(0, 100), min_size=3, max_size=3),
)
def test_groups_are_disjoint_exhaustive_and_in_order(pairs, cuts):
    """RU is claimed first, then ESU, then EUU, each with its share of all units."""
    low, middle, high = sorted(cuts)
    shares = Shares(ru=low / 100, esu=(middle - low) / 100, euu=(high - middle) / 100)
    safety, utility = ([pair[i] for pair in pairs] for i in (0, 1))
    roles = classify_flat(safety, utility, shares)

    members = {group: positions(roles.mask(group)) for group in GROUPS}
    assert sorted(i for own in members.values() for i in own) == list(range(len(pairs)))

    left = len(pairs)
    for group, share in (("RU", shares.ru), ("ESU", shares.esu), ("EUU", shares.euu)):
        size = min(round(share * len(pairs)), left)
        assert len(members[group]) == size
        left -= size

    total = [s + u for s, u in zip(safety, utility, strict=True)]
    difference = [s - u for s, u in zip(safety, utility, strict=True)]

    def ordered(values: list[float], first: list[int], rest: list[int]) -> bool:
        low, high = [values[i] for i in first], [values[i] for i in rest]
        return not low or not high or max(low) <= min(high)

    others = members["ESU"] + members["EUU"] + members["CU"]
    assert ordered(total, members["RU"], others)
    assert ordered([-d for d in difference], members["ESU"], members["EUU"] + members["CU"])
    assert ordered(difference, members["EUU"], members["CU"])


def test_a_unit_claimed_twice_goes_to_the_first_group():
    # Unit 0 has the lowest sum *and* the highest difference, unit 1 the second highest.
    safety = [-3.0, 2.0, 1.0, 0.0, 0.0]
    utility = [-9.0, 1.0, 1.0, 1.0, 5.0]
    roles = classify_flat(safety, utility, Shares(ru=0.2, esu=0.2, euu=0.2))
    assert named(roles) == ["RU", "ESU", "CU", "CU", "EUU"]
    roles = classify_flat(safety, utility, Shares(ru=0.0, esu=0.2, euu=0.2))
    assert named(roles) == ["ESU", "CU", "CU", "CU", "EUU"]
    # With nothing left for it, EUU gets the units that ESU did not claim.
    roles = classify_flat(safety, utility, Shares(ru=0.0, esu=0.8, euu=0.2))
    assert named(roles) == ["ESU", "ESU", "ESU", "ESU", "EUU"]


def test_ranking_is_global():
    """Nothing makes each block give its share: all ESU may lie in one."""
    roles = classify_flat([9.0, 8.0, 0.0, 0.0], [0.0] * 4, Shares(ru=0, esu=0.5, euu=0))
    assert roles.mask("ESU").count("attn") == 2
    assert roles.mask("ESU").count("mlp") == 0


def test_rounding_never_takes_a_claimed_unit():
    # Of 10 units, 3.5 round to 4 twice and 3.0 makes 11: EUU has to make do with 2.
    roles = classify_flat(list(range(10)), [0] * 10, Shares(ru=0.35, esu=0.35, euu=0.3))
    assert [named(roles).count(group) for group in GROUPS] == [4, 4, 2, 0]


def test_redundant_units_of_chosen_kinds_only():
    """The heads have the lowest sums; the share stays one of all units."""
    safety = [-9.0, -8.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    shares = Shares(ru=0.2, esu=0, euu=0)
    assert positions(classify_flat(safety, [0.0] * 10, shares).mask("RU")) == [0, 1]
    roles = classify_flat(safety, [0.0] * 10, shares, redundant_kinds=("mlp",))
    assert positions(roles.mask("RU")) == [2, 3]
    with pytest.raises(ValueError, match=r"30\.0% of all units, since the units of attn are fewer"):
        classify_flat(safety, [0.0] * 10, Shares(0.3, 0, 0), redundant_kinds=("attn",))


def test_difference_is_safety_minus_utility():
    roles = classify_flat([3.0, 1.0, 0.0], [1.0, 2.0, 0.0], Shares(0, 0, 0))
    assert torch.cat(list(roles.difference.values())).tolist() == [2, -1, 0]


@pytest.fixture
def roles() -> Roles:
    """Ten units: 0 is ESU, 1 to 7 are CU with falling difference, 8 is EUU and 9 is RU."""
    safety = [9.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -50.0]
    utility = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0, -50.0]
    return classify_flat(safety, utility, Shares(ru=0.1, esu=0.1, euu=0.1))


def test_top_takes_a_percentage_of_all_units(roles):
    assert positions(roles.mask("CU")) == [1, 2, 3, 4, 5, 6, 7]
    assert positions(roles.top("CU", 0.3)) == [1, 2, 3]
    assert positions(roles.top("CU", 0.0)) == []
    assert roles.top("CU", 0.7) == roles.mask("CU")
    assert roles.top("CU", 0.3).share() == pytest.approx(0.3)


def test_top_of_more_than_the_group_is_an_error(roles):
    with pytest.raises(ValueError, match=r"80\.0% of all units is more than CU has \(70\.0%\)"):
        roles.top("CU", 0.8)


def test_select_unites_groups(roles):
    assert positions(roles.select("ESU", "CU:20%")) == [0, 1, 2]
    assert roles.select("CU:20") == roles.select("CU:20%")
    assert positions(roles.select("EUU", "RU")) == [8, 9]
    assert roles.select(*GROUPS).share() == 1
    assert roles.select("ESU", "ESU") == roles.mask("ESU")


@pytest.mark.parametrize("group", ["SCU", "esu", ""])
def test_unknown_group_is_an_error(roles, group):
    with pytest.raises(ValueError, match=r"choose from RU, ESU, EUU, CU|did you mean 'CU'"):
        roles.mask(group)
    with pytest.raises(ValueError, match=r"group='.*' is unknown"):
        roles.select(f"{group}:5%")


def test_selecting_nothing_is_an_error(roles):
    with pytest.raises(ValueError, match="at least one group"):
        roles.select()


@pytest.mark.parametrize("parts", [(-0.01, 0.1, 0.1), (0.1, -0.5, 0.1), (0.5, 0.4, 0.2)])
def test_impossible_shares_are_rejected(parts):
    with pytest.raises(ValueError, match="sum to at most 1"):
        Shares(*parts)


@pytest.mark.parametrize("parts", [(0, 0, 0), (1, 0, 0), (0.34, 0.55, 0.11)])
def test_shares_up_to_the_whole_are_accepted(parts):
    """The last sums to a little more than 1 in binary."""
    assert Shares(*parts).esu == parts[1]


def test_roles_survive_saving(roles, tmp_path):
    roles.save(tmp_path / "roles.safetensors")
    loaded = Roles.load(tmp_path / "roles.safetensors", layout_of(2, 8))
    assert list(loaded.labels) == list(roles.labels)
    for group in GROUPS:
        assert loaded.mask(group) == roles.mask(group)
    assert loaded.top("CU", 0.3) == roles.top("CU", 0.3)
    for name, difference in roles.difference.items():
        assert torch.equal(loaded.difference[name], difference)


# --- search ------------------------------------------------------------------------------------


def removal(mask: UnitMask) -> Effect:
    """A pretended measurement: each tenth of the units costs 0.2 in perplexity."""
    return Effect(asr=mask.share(), perplexity_ratio=1 + 2 * mask.share())


def test_search_keeps_the_largest_accepted_share(roles):
    asked = []

    def removed(share: float) -> Effect:
        asked.append(share)
        return removal(roles.top("CU", share))

    share, trials = search_share(
        "CU", [0.2, 0.7, 0.1, 0.5], removed, lambda e: e.perplexity_ratio < 1.5
    )
    assert share == 0.2
    assert asked == [0.7, 0.5, 0.2]  # from large to small, and none after the accepted one
    assert [(t.group, t.share, t.accepted) for t in trials] == [
        ("CU", 0.7, False),
        ("CU", 0.5, False),
        ("CU", 0.2, True),
    ]
    assert [t.effect.asr for t in trials] == pytest.approx([0.7, 0.5, 0.2])


def test_search_without_an_accepted_share_returns_the_smallest(roles):
    share, trials = search_share(
        "CU", [0.1, 0.3], lambda s: removal(roles.top("CU", s)), lambda e: False
    )
    assert share == 0.1
    assert [t.accepted for t in trials] == [False, False]
