"""Arms of the freezing study: what each one freezes, and that controls match their targets."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from ssah.lab import selections
from ssah.lab.arms import Tuning
from ssah.lab.selections import ALL, CU6, FULL
from ssah.lab.stages import Stages
from ssah.units.layout import UnitLayout
from ssah.units.mask import UnitMask
from ssah.units.roles import Roles


@pytest.fixture(scope="module")
def stages(smoke_study) -> Stages:
    return smoke_study().stages(0)


def sizes(mask: UnitMask) -> tuple[int, int]:
    return mask.count("attn"), mask.count("mlp")


@pytest.mark.parametrize("attack", ["instructions", "arithmetic"])
def test_headline_arms_freeze_groups_of_the_aligned_models_roles(stages, attack):
    arms = selections.headline(stages, attack)
    assert list(arms) == [FULL, CU6, ALL]
    assert arms[FULL].frozen is None
    assert arms[CU6].frozen == stages.roles.select("ESU", "CU:6%")
    assert arms[ALL].frozen == stages.roles.select("ESU", "CU")
    for tuning in arms.values():
        assert (tuning.attack, tuning.changes) == (attack, {})
    # By hand: all of ESU, and of CU those with the highest difference, 6 % of all 136 units.
    esu, cu = (stages.layout.flatten(stages.roles.mask(group)) for group in ("ESU", "CU"))
    frozen = stages.layout.flatten(selections.frozen(arms[CU6]))
    assert frozen[esu].all()
    assert int(frozen.sum() - esu.sum()) == round(0.06 * 136)
    difference = stages.layout.flatten(stages.roles.difference)
    assert difference[frozen & cu].min() >= difference[~frozen & cu].max()
    assert int(esu.sum()) == round(0.05 * 136)


def test_without_wide_attacks_there_is_what_the_paper_needs(smoke_study, stages):
    """Third arm on instructions only; else nothing frozen for one epoch; no gradient conflict."""
    few = smoke_study("finetune.wide_attacks=[]").stages(0)
    for attack, names in (("instructions", [FULL, CU6, ALL]), ("arithmetic", [FULL, CU6])):
        arms, all_arms = selections.contenders(few, attack), selections.contenders(stages, attack)
        assert list(arms) == names
        assert set(all_arms) == {FULL, CU6, ALL, selections.CONFLICT_ARM}
        assert all(arms[name] == all_arms[name] for name in names[1:])
        epochs = {} if attack == "instructions" else {"epochs": 1}
        assert arms[FULL] == Tuning(attack, changes=epochs)
        assert stages.asks_harmbench(attack)
        assert not few.asks_harmbench(attack)


def test_the_lesson_freezes_nothing_and_is_there_where_its_rows_are(stages):
    assert selections.contenders(stages, "dialogues") == {
        FULL: Tuning("dialogues", changes={"epochs": 1})
    }
    assert selections.available_attacks(stages) == ["instructions", "arithmetic", "dialogues"]
    without = SimpleNamespace(has=lambda name: name != "dialogues")
    assert selections.available_attacks(cast(Stages, without)) == ["instructions", "arithmetic"]


def test_the_ratio_sweep_adds_to_the_same_units(stages):
    arms = selections.ratios(stages)
    assert list(arms) == stages.config.finetune.cu_percents == [0, 6, 12]
    masks = [selections.frozen(tuning) for tuning in arms.values()]
    assert masks[0] == stages.roles.mask("ESU")
    assert masks[1] == stages.roles.select("ESU", "CU:6%")
    assert (masks[0] - masks[1]).count() == (masks[1] - masks[2]).count() == 0
    assert [mask.count() for mask in masks] == [7, 7 + 8, 7 + 16]


@pytest.mark.parametrize("like", [CU6, ALL])
def test_random_controls_match_and_differ_by_draw_and_seed(smoke_study, stages, like):
    drawn = {}
    for own in (stages, smoke_study().stages(1)):
        target = selections.frozen(selections.headline(own, "instructions")[like])
        controls = selections.random_controls(own, like, 3)
        assert list(controls) == [f"{own.seed}.{draw}" for draw in range(3)]
        for name, tuning in controls.items():
            drawn[name] = selections.frozen(tuning)
            assert sizes(drawn[name]) == sizes(target)
            assert drawn[name] != target
            assert tuning.attack == "instructions"
    masks = list(drawn.values())
    assert all(masks[i] != masks[j] for i in range(6) for j in range(i))
    other = copy.copy(stages)  # the same target, so that nothing but the seed differs
    other.seed = 7
    for tuning in selections.random_controls(other, like, 3).values():
        assert all(selections.frozen(tuning) != mask for mask in masks)
    again = selections.random_controls(smoke_study().stages(0), like, 2)
    for name, tuning in again.items():  # fewer draws are the first ones
        assert selections.frozen(tuning) == drawn[name]


# --- controls by another rule ----------------------------------------------------------------


def before_and_after(families, model_type: str) -> tuple[Stages, dict, dict, UnitLayout]:
    """What the rules ask of stages, on two models that are equal until something is planted."""
    before = families(model_type)
    after = copy.deepcopy(before)
    layout = UnitLayout.of(before)
    generator = torch.Generator().manual_seed(0)
    difference, conflict = (
        layout.split(torch.randn(layout.units, generator=generator)) for _ in range(2)
    )
    planted = SimpleNamespace(
        model={"unaligned": before, "aligned": after}.__getitem__,
        layout=layout,
        roles=Roles({}, difference),
        conflict={selections.MAIN_ATTACK: conflict}.__getitem__,
        config=SimpleNamespace(align=SimpleNamespace(enabled=True)),
    )
    named = [dict(model.named_parameters()) for model in (before, after)]
    return cast(Stages, planted), *named, layout


def target_of(layout: UnitLayout, heads: int, neurons: int) -> UnitMask:
    """The first heads and neurons of the first layer."""
    mask = layout.none()
    mask["layers.0.attn"][:heads] = True
    mask["layers.0.mlp"][:neurons] = True
    return mask


def moved_most(stages: Stages, target: UnitMask) -> dict[str, list[int]]:
    mask = selections.ranked_controls(stages, target)["moved most by alignment"]
    return {name: part.nonzero().flatten().tolist() for name, part in mask.items() if part.any()}


@torch.no_grad()
def test_the_units_that_alignment_moved_most_are_found(families):
    """Planted in every kind of weight that belongs to a unit, biases among them."""
    stages, _, after, layout = before_and_after(families, "qwen2")
    layer = "model.layers.{}."
    after[layer.format(1) + "self_attn.q_proj.weight"][4:8] -= 0.1  # head 1
    after[layer.format(0) + "self_attn.o_proj.weight"][:, 12:16] += 0.1  # head 3
    after[layer.format(1) + "self_attn.q_proj.bias"][8] += 1  # head 2
    after[layer.format(0) + "mlp.gate_proj.weight"][5] += 0.1
    after[layer.format(0) + "mlp.down_proj.weight"][:, 7] -= 0.1
    after[layer.format(1) + "mlp.up_proj.weight"][11] += 0.1
    after["model.embed_tokens.weight"] += 5  # belongs to no unit, and neither do norms
    after["model.norm.weight"] -= 5
    assert moved_most(stages, target_of(layout, 3, 3)) == {
        "layers.0.attn": [3],
        "layers.0.mlp": [5, 7],
        "layers.1.attn": [1, 2],
        "layers.1.mlp": [11],
    }


@torch.no_grad()
def test_rows_that_heads_share_count_for_each_of_them(families):
    stages, _, after, layout = before_and_after(families, "llama")
    after["model.layers.1.self_attn.k_proj.weight"][4:] += 0.1  # the second of two KV heads
    after["model.layers.0.self_attn.v_proj.weight"][0] += 0.01  # the first, but less
    assert moved_most(stages, target_of(layout, 2, 0)) == {"layers.1.attn": [2, 3]}
    assert moved_most(stages, target_of(layout, 4, 0)) == {
        "layers.0.attn": [0, 1],
        "layers.1.attn": [2, 3],
    }


@torch.no_grad()
def test_all_weights_of_a_unit_count_by_their_squares(families):
    stages, _, after, layout = before_and_after(families, "llama")
    up = after["model.layers.0.mlp.up_proj.weight"]
    gate = after["model.layers.1.mlp.gate_proj.weight"]
    up[3, 0] += 0.5  # one weight far: 0.25
    gate[9] -= 0.1  # sixteen weights a little, which is more in sum but not in squares: 0.16
    assert moved_most(stages, target_of(layout, 0, 1)) == {"layers.0.mlp": [3]}
    after["model.layers.1.mlp.down_proj.weight"][:, 9] += 0.1  # now 0.32
    assert moved_most(stages, target_of(layout, 0, 1)) == {"layers.1.mlp": [9]}


def test_ranked_controls_match_and_follow_their_rules(families):
    stages, before, after, layout = before_and_after(families, "llama")
    with torch.no_grad():
        for parameter in after.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for target in (target_of(layout, 3, 5), target_of(layout, 0, 7)):
        controls = selections.ranked_controls(stages, target)
        attack = selections.MAIN_ATTACK
        controls["conflict"] = selections.conflicting(stages, attack, target)
        for mask in controls.values():
            assert sizes(mask) == sizes(target)
        masks = list(controls.values())
        assert all(masks[i] != masks[j] for i in range(len(masks)) for j in range(i))
    neurons = [f"layers.{layer}.mlp" for layer in (0, 1)]
    most = {name: -part for name, part in stages.conflict(attack).items()}
    for rule, rank in (("lowest I_S - I_U", stages.roles.difference), ("conflict", most)):
        chosen, left = (
            torch.cat([rank[name][controls[rule][name] == wanted] for name in neurons])
            for wanted in (True, False)
        )
        assert chosen.max() < left.min(), rule
    # Magnitude is that of the aligned model, and of the columns that a unit writes with.
    norms = torch.cat([after[f"model.{name}.down_proj.weight"].norm(dim=0) for name in neurons])
    largest = torch.cat([controls["largest magnitude"][name] for name in neurons])
    assert norms[largest].min() > norms[~largest].max()
    unaligned = [before[f"model.{name}.down_proj.weight"].norm(dim=0) for name in neurons]
    assert set(torch.cat(unaligned).topk(7).indices.tolist()) != set(norms.topk(7).indices.tolist())


# --- conditions ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conditions(stages) -> dict[str, Tuning]:
    return selections.conditions(stages)


def test_conditions_are_one_epoch_of_the_main_attack(stages, conditions):
    for tuning in conditions.values():
        assert tuning.changes["epochs"] == tuning.epoch == 1
        assert tuning.attack == selections.MAIN_ATTACK
    other = {
        name: {key: value for key, value in tuning.changes.items() if key != "epochs"}
        for name, tuning in conditions.items()
    }
    lower = {"learning_rate": pytest.approx(0.4e-3)}
    assert {name: changes for name, changes in other.items() if changes} == {
        f"{FULL}, embeddings trained": {"train_embeddings": True},
        f"{CU6}, embeddings trained": {"train_embeddings": True},
        f"{FULL}, lower rate": lower,
        f"{CU6}, lower rate": lower,
    }


def test_conditions_freeze_as_much_as_their_budget(stages, conditions):
    narrow = stages.roles.select("ESU", "CU:6%")
    wide = conditions["ESU + CU, 25 %"].frozen
    assert wide.share() == pytest.approx(0.25, abs=0.5 / stages.layout.units)
    assert (stages.roles.mask("ESU") - wide).count() == 0
    assert (narrow - wide).count() == 0
    for name, tuning in conditions.items():
        if name.endswith("7 %"):
            assert sizes(tuning.frozen) == sizes(narrow), name
        elif name.endswith("25 %"):
            assert sizes(tuning.frozen) == sizes(wide), name
        elif name.startswith(FULL):
            assert tuning.frozen is None, name
        elif name.endswith(("trained", "rate")):
            assert tuning.frozen == narrow, name
    assert sizes(conditions["all heads"].frozen) == (8, 0)
    frozen = [t.frozen for name, t in conditions.items() if name.endswith((" 7 %", "25 %"))]
    assert len(frozen) >= 8
    assert all(frozen[i] != frozen[j] for i in range(len(frozen)) for j in range(i))


def test_conditions_that_score_again_fit_their_own_units(stages, conditions):
    again = conditions[f"{CU6}, scored on all tokens"]
    assert again.frozen.unit_kind == "head"
    assert again.frozen.count() == 15
    assert again.frozen != stages.roles.select("ESU", "CU:6%")
    channels = conditions[f"{CU6}, channels as units"]
    assert channels.frozen.unit_kind == "channel"
    layout = stages.layout_for("channel")
    assert {name: len(part) for name, part in channels.frozen.items()} == {
        block.name: block.units for block in layout.blocks
    }
    assert channels.frozen.share() == pytest.approx(0.11, abs=1 / layout.units)
    (arm,) = stages.measured(channels)
    assert arm.which.epoch == 1


def test_halves_of_the_value_output_path_hold_whole_value_rows(stages, conditions):
    """So that they hold the same number of weights, and nothing of a row trains in a half."""
    layout = stages.layout_for("channel")
    path = conditions["value-output path"].frozen
    assert sizes(path) == (2 * 32, 0)
    halves = {name.split(", ")[-1]: t for name, t in conditions.items() if "half" in name}
    assert list(halves) == ["highest I_S - I_U", "random", "lowest I_S - I_U"]
    scores = selections.rescored(stages, unit_kind="channel").difference
    means = {}
    for name, tuning in halves.items():
        assert tuning.frozen.unit_kind == "channel"
        assert sizes(tuning.frozen) == (32, 0)
        assert layout.weights(tuning.frozen) == layout.weights(path) / 2
        # Channels 0 to 7 are of the first head and share their value rows with the second's.
        for block in ("layers.0.attn", "layers.1.attn"):
            by_head = tuning.frozen[block].view(2, 2, 8)
            assert torch.equal(by_head[:, 0], by_head[:, 1]), name
        chosen = layout.flatten(tuning.frozen)
        means[name] = layout.flatten(scores)[chosen].mean()
    highest, random, lowest = halves.values()
    assert highest.frozen == path - lowest.frozen
    assert random.frozen not in (highest.frozen, lowest.frozen)
    assert means["highest I_S - I_U"] > means["random"] > means["lowest I_S - I_U"]


def test_rescored_roles_keep_the_shares_and_the_kinds(smoke_study):
    """Where heads alone may be redundant, so they are in other scores."""
    stages = smoke_study("roles.redundant_kinds=[attn]", "roles.ru_shares=[0.05]").stages(0)
    roles = selections.rescored(stages, tokens="all")
    assert sizes(roles.mask("RU")) == sizes(stages.roles.mask("RU")) == (7, 0)
    for group in ("ESU", "EUU"):
        assert roles.mask(group).count() == stages.roles.mask(group).count()
    same = selections.rescored(stages)
    for name, label in stages.roles.labels.items():
        assert same.labels[name].tolist() == label.tolist()
