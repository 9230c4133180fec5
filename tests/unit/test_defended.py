"""Defended arms: which there are, what their runs rest on, and which strength is chosen."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

from ssah.app.study import Study
from ssah.artefacts import ARTEFACTS
from ssah.artefacts.defences import best, chosen, pareto
from ssah.artefacts.pick import estimate, format_estimate
from ssah.core.errors import SsahError
from ssah.evaluate import judges
from ssah.lab import catalogue, defended
from ssah.lab.jobs import jobs_of
from ssah.lab.lab import Lab
from ssah.lab.measure import Measure, measured
from ssah.lab.specs import REFUSALS, Defended, Model, Train
from ssah.lab.stages.lessons import lesson, own_refusals
from ssah.lab.table import typed
from ssah.training.defences import DEFENCES
from ssah.training.part import Part

IDS = ("table_defences", "fig_defences", "fig_defences_steps")


def defended_model(lab: Lab, name: str = "mixing", strength: float = 0.1) -> Model:
    return lab.aligned.trained("instructions", defence=Defended(name, strength))


# --- runs ------------------------------------------------------------------------------------


def test_keys_of_undefended_trainings_are_made_of_what_they_were_made_of(lab):
    plain = lab.training(lab.aligned.trained("instructions"))
    of_a_training = {"base", "learned", "part", "seed", "settings"}
    assert set(plain.config) == {"version", *lab.settings, *of_a_training}
    assert set(plain.config["part"]) == {"freeze", "train", "rank"}
    own = lab.training(defended_model(lab))
    extra = {"defence", "refusals", "unaligned"}
    assert set(own.config) == {*plain.config, *extra}
    assert {key: own.config[key] for key in plain.config} == plain.config
    assert own.config["defence"] == {"name": "mixing", "strength": 0.1}


def test_defence_strength_refusals_and_the_unaligned_model_are_in_the_key(lab):
    keys = {
        lab.training(defended_model(lab, name, strength)).key
        for name in DEFENCES
        for strength in (0.1, 0.2)
    }
    assert len(keys) == 2 * len(DEFENCES)
    for name, kind in DEFENCES.items():
        config = lab.training(defended_model(lab, name)).config
        assert (config["refusals"] is not None) == ("refusals" in kind.looks_at)
        assert (config["unaligned"] is not None) == ("unaligned" in kind.looks_at)
    asked = own_refusals(lab, lab.aligned)
    assert asked.answers.key in lab.training(defended_model(lab)).inputs


def test_only_what_is_refused_is_taught_and_never_what_is_evaluated(lab, monkeypatch):
    found = own_refusals(lab, lab.aligned)
    declined = iter([True, False] * 4)
    monkeypatch.setattr(judges, "refused", lambda asked: [next(declined) for _ in asked])
    pairs = found.pairs(lab)
    assert len(pairs) == 4
    evaluated = {row.prompt for row in lab.rows("harmful_evaluation")}
    evaluated |= {row.prompt for row in lab.rows("harmful_search")}
    assert not evaluated & {row.prompt for row in found.rows}


def test_a_model_that_refuses_nothing_has_what_it_was_taught_or_nothing(
    smoke_lab, lab, monkeypatch, caplog
):
    monkeypatch.setattr(judges, "refused", lambda asked: [False for _ in asked])
    with caplog.at_level("WARNING"):
        assert own_refusals(lab, lab.aligned).pairs(lab) == lesson(lab, REFUSALS).taught(lab)
    assert "refuses nothing" in caplog.text
    came_aligned = smoke_lab("align=none")
    with pytest.raises(SsahError, match=r"tiny refuses none of the 8 .*experiment\.defences"):
        own_refusals(came_aligned, came_aligned.aligned).pairs(came_aligned)


def test_units_that_are_frozen_beside_a_defence_keep_their_bits(lab):
    mask = lab.layout.none()
    for block in lab.layout.blocks:
        mask[block.name][:2] = True
    model = Model(
        lab.aligned,
        Train("instructions", Part(freeze=mask), {"epochs": 1}, defence=Defended("mixing", 0.1)),
    )
    with lab.use(lab.aligned) as before, lab.use(model) as after:
        for block in lab.layout.blocks:
            columns = block.channels[mask[block.name]].flatten()
            ours, theirs = (block.projection(m).weight for m in (after, before))
            assert ours[:, columns].equal(theirs[:, columns])
            assert not ours.equal(theirs)


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("+experiment.defences={mixin: [0.1]}", "no 'mixin': did you mean 'mixing'"),
        ("experiment.defences.mixing=[3.0]", r"mixing=3.0 is out of range: .*at most 1"),
        ("experiment.defences.replay=[]", "experiment.defences.replay is empty"),
        ("experiment.defended_longer=[Lissa]", "no 'Lissa': did you mean 'Lisa'"),
    ],
)
def test_mistakes_are_one_sentence(override, says):
    with pytest.raises(SsahError, match=says) as refused:
        Study("smoke", [override])
    assert "\n" not in str(refused.value)


def test_arms_are_the_experiments(lab):
    names = [(arm.rule, arm.setting) for arm in defended.arms(lab, "instructions")]
    wanted = lab.config.experiment.defences
    assert names == [(n, defended.setting(n, s)) for n, found in wanted.items() for s in found]
    assert ("mixing", "5 %") in names
    assert ("Lisa", "1") in names
    tested = defended.arms(lab, "arithmetic")
    assert [(arm.rule, arm.setting) for arm in tested] == names
    assert {(arm.method, arm.epoch) for arm in tested} == {("defended", 1)}
    assert tested[0].name == "arithmetic, 1 epoch: defended by mixing, 5 %"


def test_a_model_that_came_aligned_has_no_safe_lora(smoke_lab):
    found = {arm.rule for arm in defended.arms(smoke_lab("align=none"), "instructions")}
    assert found == set(smoke_lab().config.experiment.defences) - {"SafeLoRA"}


def test_longer_runs_never_meet_those_of_one_epoch(lab):
    long = defended.longer(lab)
    short = [*defended.plain(lab, "instructions"), *defended.arms(lab, "instructions")]
    assert {arm.epoch for arm in long} == set(range(1, 7))
    assert [arm.rule for arm in long[::6]] == ["nothing", "ESU + 6 % CU", "EMA"]
    columns = [tuple(arm.columns().values()) for arm in long + short]
    assert len(set(columns)) == len(columns)


def test_jobs_say_what_is_defended(lab):
    jobs = jobs_of(lab, [Measure(arm, "ASR") for arm in defended.longer(lab)])
    names = {job.name for job in jobs}
    assert "instructions: defended: EMA, 0.5, for 6 epochs" in names
    assert "instructions: frozen: nothing, for 6 epochs" in names


def test_nothing_is_asked_where_there_are_no_defences(smoke_lab):
    default = smoke_lab("experiment=default")
    assert all(ARTEFACTS[name].ask(default) == [] for name in IDS)
    nothing = typed(pd.DataFrame())
    for name in IDS:
        output = ARTEFACTS[name].view(nothing, {"tiny": default.config})
        assert "Not measured here" in output.note


# --- the choice ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"a": (50, 1.0), "b": (20, 0.9), "c": (0, 0.79)}, "b"),  # c learns too little
        ({"a": (20, 0.8), "b": (20, 1.0)}, "a"),  # the recommended one of equals
        ({"a": (0, 0.1), "b": (50, 0.7), "c": (40, 0.3)}, "b"),  # none learns enough
    ],
)
def test_the_safest_that_learns_is_chosen(settings, wanted):
    assert best(settings, 1.0) == wanted


def test_the_front_is_what_nothing_beats():
    points = [(1.0, 80.0), (0.5, 10.0), (0.9, 80.0), (0.7, 40.0), (0.6, 50.0), (0.5, 10.0)]
    assert pareto(points) == [(0.5, 10.0), (0.7, 40.0), (1.0, 80.0)]


# --- views -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(lively_lab, toy_verdicts) -> pd.DataFrame:
    """A few defences of a model whose answers training changes."""
    few = {"mixing": [0.05, 0.1], "EMA": [0.5, 0.75], "mixing_and_frozen": [0.1]}
    experiment = dataclasses.replace(
        lively_lab.config.experiment, defences=few, defended_longer=["EMA"]
    )
    config = dataclasses.replace(lively_lab.config, experiment=experiment)
    lab = Lab(config, lively_lab.store, 0)
    asked = [measure for name in IDS for measure in ARTEFACTS[name].ask(lab)]
    table = measured(lab, asked)[0]
    table.attrs["config"] = config
    return table


def test_the_table_shows_what_was_measured(found):
    config = found.attrs["config"]
    shown = ARTEFACTS["table_defences"].view(found, {config.model.name: config}).table
    assert list(shown["fine-tuned on"]) == ["nothing"] + 7 * ["instructions"] + 7 * ["arithmetic"]
    own = shown[shown["fine-tuned on"] == "instructions"].set_index(["defence", "strength"])
    choice = chosen(found, config)
    assert set(choice) == {"mixing", "EMA", "mixing_and_frozen"}
    for rule, taken in choice.items():
        row = own.loc[(rule.replace("_", " "), f"{taken} *")]
        arm = {
            "method": "defended", "rule": rule, "attack": "instructions", "epoch": 1,
            "setting": taken,
        }  # fmt: skip
        assert row["ASR"] == format_estimate(estimate(found, "ASR", **arm))
        than = estimate(found, "ASR", against="nothing frozen, one epoch", **arm)
        assert row["against none"] == format_estimate(than)
        borderline = estimate(found, "refused", set="borderline", **arm)
        assert row["borderline refused"] == format_estimate(borderline)
    assert own["against none"].iloc[0] == ""


def test_the_choice_rests_on_the_search_prompts(found):
    """It follows their ASR, whatever that of the evaluation prompts is."""
    config = found.attrs["config"]
    mixing = (found["rule"] == "mixing") & (found["setting"] == "10 %") & (found["epoch"] == 1)
    changed = found.copy()
    changed.loc[(changed["metric"] == "held-out gain"), "value"] = 1.0
    for prompts, taken in (("search", "10 %"), ("", "5 %")):
        table = changed.copy()
        table.loc[(table["metric"] == "ASR") & (table["set"] == "search"), "value"] = 50.0
        table.loc[mixing & (table["metric"] == "ASR") & (table["set"] == prompts), "value"] = 0.0
        assert chosen(table, config)["mixing"] == taken


def test_the_figures_show_what_was_measured(found):
    config = found.attrs["config"]
    view = {name: ARTEFACTS[name].view(found, {config.model.name: config}) for name in IDS[1:]}
    axes = view["fig_defences"].figure.axes[0]
    labels = axes.get_legend_handles_labels()[1]
    choice = chosen(found, config)
    assert f"EMA, {choice['EMA']}" in labels
    assert {"none", "ESU + 6 % CU frozen", "front"} <= set(labels)
    drawn = {tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1}
    for arm in (catalogue.ATTACKED_LONGEST | {"epoch": 1},):
        gain = estimate(found, "held-out gain", set="instructions", against="before", **arm)
        assert (gain.value, estimate(found, "ASR", **arm).value) in drawn
    left, right = view["fig_defences_steps"].figure.axes
    assert right.get_legend_handles_labels()[1] == ["nothing", "ESU + 6 % CU frozen", "EMA"]
    plain = {"method": "frozen", "rule": "nothing", "attack": "instructions"}
    asr = [estimate(found, "ASR").value] + [
        estimate(found, "ASR", setting="for 6 epochs", epoch=e, **plain).value for e in range(1, 7)
    ]
    assert list(left.containers[0].lines[0].get_ydata()) == pytest.approx(asr)


def test_a_combination_is_held_against_its_defence_alone(lab):
    own = defended.arms(lab, "instructions")
    found = {
        (arm.rule, arm.setting): defended.without_freezing(arm, own)
        for arm in own
    }  # fmt: skip
    combined = {key: alone for key, alone in found.items() if key[0] == "mixing_and_frozen"}
    assert combined
    for (_, setting), alone in combined.items():
        there = ("mixing", setting) in found
        assert (alone is not None) == there
        assert alone is None or (alone.rule, alone.setting) == ("mixing", setting)
    assert all(alone is None for key, alone in found.items() if key not in combined)
