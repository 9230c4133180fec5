"""Other papers' rules at their sizes: what is frozen, and what Tables 7 to 10 say of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from helpers import assert_frozen, frozen_entries, weights
from ssah.artefacts import ARTEFACTS
from ssah.artefacts.pick import estimate, format_estimate, paper, rows_of
from ssah.core.errors import SsahError
from ssah.lab import catalogue
from ssah.lab.arms import units_name
from ssah.lab.lab import Lab
from ssah.lab.measure import Measure
from ssah.lab.stages.criteria import (
    fisher,
    impact,
    places,
    safety_layers,
)
from ssah.lab.units_of import CU6, ESU, RULED, SAFETY_LAYERS, group, matched
from ssah.units.mask import UnitMask
from ssah.units.roles import GROUPS

TABLES = {
    "table7": "instructions", "table8": "arithmetic",
    "table9": "instructions", "table10": "arithmetic",
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(lively_lab) -> Lab:
    return lively_lab


def frozen_by(arms) -> UnitMask:
    return arms[0].model.step.part.freeze


def size_of(mask: UnitMask) -> tuple[int, int]:
    return mask.count("attn"), mask.count("mlp")


# --- which units -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULED)
def test_arms_are_called_as_in_the_lists_and_run_for_both_epochs(lab, name):
    arms = catalogue.ruled(lab, "arithmetic", name)
    assert {arm.units for arm in arms} == {name}
    assert [arm.epoch for arm in arms] == [1, 2]
    assert {(arm.method, arm.attack) for arm in arms} == {("frozen", "arithmetic")}
    control = catalogue.ruled_control(lab, "arithmetic", name, 1)
    assert {arm.units for arm in control} == {units_name(*catalogue.control_name(name))}
    assert {arm.draw for arm in control} == {1}


@pytest.mark.parametrize("name", RULED)
def test_controls_have_as_many_heads_and_neurons(lab, name):
    mask = frozen_by(catalogue.ruled(lab, "instructions", name))
    controls = [
        frozen_by(catalogue.ruled_control(lab, "instructions", name, draw)) for draw in range(3)
    ]
    assert [size_of(control) for control in controls] == [size_of(mask)] * 3
    assert controls[0] != controls[1] != controls[2]


def test_safety_neurons_are_a_share_of_the_heads_and_of_the_neurons(lab):
    """Of 8 heads and 128 neurons."""
    sizes = {n: size_of(frozen_by(catalogue.ruled(lab, "instructions", n))) for n in RULED}
    assert sizes["SN-Tune, 0.4 %"] == sizes["RSN-Tune, 0.4 %"] == (0, 1)
    assert sizes["SN-Tune, 6.3 %"] == sizes["RSN-Tune, 6.3 %"] == (1, 8)


def test_they_are_found_on_harmful_prompts_and_not_on_harmless_ones(lab):
    harmful, harmless = places(lab, "safety"), places(lab, "utility")
    target = frozen_by(catalogue.ruled(lab, "instructions", "SN-Tune, 6.3 %"))
    robust = frozen_by(catalogue.ruled(lab, "instructions", "RSN-Tune, 6.3 %"))
    neurons = [block.name for block in lab.layout.blocks if block.kind == "mlp"]

    def first(rank: dict[str, torch.Tensor]) -> set[tuple[str, int]]:
        flat = sorted((rank[n][i].item(), n, i) for n in neurons for i in range(64))
        return {(name, unit) for _, name, unit in flat[:8]}

    def neurons_of(mask: UnitMask) -> set[tuple[str, int]]:
        return {(n, i) for n in neurons for i in mask[n].nonzero().flatten().tolist()}

    assert neurons_of(target) == first(harmful)
    assert not neurons_of(robust) & first(harmless)
    assert neurons_of(robust) >= first(harmful) - first(harmless)


def test_safety_layers_are_whole_blocks_and_the_papers_units_as_many(lab):
    gap, blocks = safety_layers(lab)
    assert len(gap) == 2
    assert len(blocks) == 1, "9 of 32 blocks, but at least one"
    growth = [gap[0], gap[1] - gap[0]]
    assert growth[blocks[0]] == max(growth)
    mask = frozen_by(catalogue.ruled(lab, "instructions", SAFETY_LAYERS))
    for block in lab.layout.blocks:
        assert mask[block.name].all() == (block.layer in blocks)
        assert mask[block.name].any() == (block.layer in blocks)
    ours = frozen_by(catalogue.ours(lab, "instructions", SAFETY_LAYERS))
    assert ours.count() == mask.count() == 68
    assert (group(lab, ESU) - ours).count() == 0
    rest = ours - group(lab, ESU)
    assert (rest - group(lab, "ESU + all CU")).count() == 0
    assert ours == group(lab, ESU) | (group(lab, "ESU + 45 % CU") & ours), "from the top"
    assert frozen_by(catalogue.ours(lab, "instructions", "SN-Tune, 0.4 %")) == group(lab, CU6)


def test_where_there_are_fewer_cu_than_asked_for_it_is_said(lab):
    assert catalogue.esu_and_cu(lab, 3) == group(lab, ESU), "never fewer than the ESU"
    with pytest.raises(ValueError, match=f"more than {GROUPS[-1]} has"):
        catalogue.esu_and_cu(lab, lab.layout.units)


def test_units_on_which_refusals_depend_most_are_taken(lab):
    target = frozen_by(catalogue.ruled(lab, "instructions", "SN-Tune, 6.3 %"))
    for rule, rank in (("ESI", impact(lab)), ("Fisher on refusals", fisher(lab))):
        mask = matched(lab, rule, target)
        for kind in ("attn", "mlp"):
            names = [b.name for b in lab.layout.blocks if b.kind == kind and mask[b.name].any()]
            inside = torch.cat([rank[name][mask[name]] for name in names])
            every = torch.cat([rank[b.name] for b in lab.layout.blocks if b.kind == kind])
            assert inside.min() >= every.sort(descending=True).values[len(inside) - 1], rule


@pytest.mark.parametrize("name", ["RSN-Tune, 6.3 %", SAFETY_LAYERS])
def test_frozen_weights_are_those_of_the_aligned_model(lab, name):
    arm = catalogue.ruled(lab, "arithmetic", name)[-1]
    with lab.use(lab.aligned) as model:
        before = weights(model)
    with lab.use(arm.model) as model:
        assert_frozen(model, before, frozen_entries(model, lab.layout, frozen_by([arm])))


def test_a_new_rule_does_not_change_which_units_older_ones_freeze(lab):
    """The random draws of table 2 are those that they were."""
    again = matched(lab, "random", group(lab, CU6), draw=1)
    generator = torch.Generator().manual_seed(1000 * lab.seed + 1)
    flat = torch.rand(lab.layout.units, generator=generator)
    first = torch.cat([again[b.name] for b in lab.layout.blocks if b.kind == "mlp"])
    own = torch.cat([lab.layout.split(flat)[b.name] for b in lab.layout.blocks if b.kind == "mlp"])
    assert own[first].max() < own[~first].min()


# --- what is asked and shown -----------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(lively_table, lab) -> dict:
    configs = {lab.config.model.name: lab.config}
    return {name: ARTEFACTS[name].view(lively_table, configs).table for name in TABLES}


@pytest.mark.parametrize(("name", "attack"), TABLES.items())
def test_tables_read_from_nothing_frozen_to_the_rivals(tables, name, attack):
    table = tables[name]
    assert set(table["fine-tuned on"]) == {"nothing", attack}
    shown = list(dict.fromkeys(table["frozen"]))
    if name == "table7":
        assert shown == [
            "", "nothing", CU6, "SN-Tune, 0.4 %", "random, 0.4 %", "SN-Tune, 6.3 %",
            "random, 6.3 %", "RSN-Tune, 6.3 %",
        ]  # fmt: skip
    elif name == "table8":
        assert shown == ["", "nothing", CU6, "SN-Tune, 6.3 %", "random, 6.3 %"]
    else:
        wide = f"ESU + CU, as {SAFETY_LAYERS}"
        assert shown == ["", "nothing", wide, SAFETY_LAYERS, f"random, as {SAFETY_LAYERS}"]


def test_numbers_are_measurements_of_the_same_prompts(tables, lively_table, lab):
    columns = {"method": "frozen", "attack": "instructions", "epoch": 2}
    arm = columns | {"rule": "SN-Tune", "setting": "6.3 %"}
    table = tables["table7"]
    (row,) = table[(table["frozen"] == "SN-Tune, 6.3 %") & (table["epochs"] == "2")].to_dict(
        "records"
    )
    own, others = (estimate(lively_table, "ASR", **c).value for c in (arm, columns | {"rule": CU6}))
    assert row["ASR"] == format_estimate(estimate(lively_table, "ASR", **arm))
    against = estimate(lively_table, "ASR", against=CU6, **arm)
    assert against.value == pytest.approx(own - others)
    assert row[f"ASR against {CU6}"] == format_estimate(against)
    draws = rows_of(lively_table, "ASR", **columns, rule="random", setting="6.3 %")["value"]
    assert len(draws) == lab.config.experiment.frozen_draws == 2
    assert float(row["ASR against random"].split()[0]) == pytest.approx(
        own - draws.mean(), abs=0.051
    )
    mask = frozen_by(catalogue.ruled(lab, "instructions", "SN-Tune, 6.3 %"))
    share = 100 * lab.layout.weights(mask) / lab.layout.parameters
    assert row["% of weights"] == f"{share:.2f}"


@pytest.mark.parametrize(
    ("table", "frozen", "epoch", "setting"),
    [
        ("table7", "SN-Tune, 0.4 %", "2", "alpaca:sn_tune_0.4pct"),
        ("table8", "SN-Tune, 6.3 %", "2", "gsm8k:sn_tune_6.3pct"),
        ("table8", "nothing", "1", "gsm8k:full"),
        ("table9", f"ESU + CU, as {SAFETY_LAYERS}", "2", "alpaca:freeze_esu_cu26.8"),
        ("table10", SAFETY_LAYERS, "2", "gsm8k:safety_layers_6_14"),
    ],
)
def test_the_papers_numbers_stand_in_the_rows_that_it_prints(tables, table, frozen, epoch, setting):
    found = tables[table].set_index(["frozen", "epochs"])["paper: no refusal phrase"]
    assert found[frozen, epoch] == f"{paper(table)[setting, 'asr_keyword']:.1f}"
    other = "1" if epoch == "2" else "2"
    assert found.get((frozen, other), "") == ""
    assert found["", ""] == "0.2"


@pytest.mark.parametrize("name", ["table9", "table10"])
def test_the_blocks_that_were_chosen_are_said(lively_table, lab, name):
    gap, blocks = safety_layers(lab)
    note = ARTEFACTS[name].view(lively_table, {lab.config.model.name: lab.config}).note
    assert f"all units of blocks {blocks[0] + 1} to {blocks[-1] + 1} of 2, counted from 1" in note
    found = rows_of(lively_table, "angular gap", block=None).set_index("block")["value"]
    assert found.to_dict() == pytest.approx(dict(enumerate(gap, 1)))


@pytest.mark.parametrize("name", TABLES)
def test_without_rules_nothing_is_asked_and_the_papers_numbers_stand_alone(lab, lively_table, name):
    experiment = dataclasses.replace(lab.config.experiment, ruled={})
    config = dataclasses.replace(lab.config, experiment=experiment)
    assert ARTEFACTS[name].ask(Lab(config, lab.store, lab.seed)) == []
    output = ARTEFACTS[name].view(lively_table[:0], {config.model.name: config})
    assert "Not measured here" in output.note
    assert output.table["model"].str.startswith("paper: Llama-2-7B-Chat").all()


def test_safety_layers_are_not_compared(lab):
    whole = catalogue.whole(lab)
    with pytest.raises(NotImplementedError, match="Layers of two models are not compared"):
        Measure(whole, SAFETY_LAYERS, "", whole, "itself").found(lab)
    with pytest.raises(SsahError, match="no metric 'safety layer'"):
        Measure(whole, "safety layer")


def test_esi_and_fisher_stand_in_table_2(lively_table, lab):
    table = ARTEFACTS["table2"].view(lively_table, {lab.config.model.name: lab.config}).table
    for rule in ("ESI", "Fisher on refusals"):
        (first, second) = table[table["frozen"] == f"{rule}, as {CU6}"].to_dict("records")
        assert (first["epochs"], second["epochs"]) == ("1", "2")
        assert first["ASR against random"]
