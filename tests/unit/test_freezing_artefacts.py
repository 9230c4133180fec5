"""Tables on fine-tuning: every number against one that is counted from the stages."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ssah.app.study import Study
from ssah.artefacts import Output, find
from ssah.claims import CLAIMS
from ssah.core.paths import reference_csv
from ssah.evaluate.judges import attack_success
from ssah.lab.arms import Arm, Tuning
from ssah.lab.selections import ALL, CONFLICT_ARM, CU6, FULL, contenders, random_controls
from ssah.lab.stages import Stages

pytestmark = pytest.mark.usefixtures("toy_verdicts")

NAMES = ("table2", "table3", "table14", "fig13")
ATTACKS = ("instructions",)
RANDOM = f"random, as {CU6}"
#: Epoch by the paper's rule.
RULE = {FULL: 1, CU6: 2, ALL: 2, RANDOM: 2}


@pytest.fixture(scope="module")
def outputs(attacked_study) -> dict[str, Output]:
    return {name: find(name).compute(attacked_study) for name in NAMES}


@pytest.fixture(scope="module")
def stages(attacked_study) -> Stages:
    return attacked_study.stages(0)


def metric(output: Output, arm: str, name: str, seed: Any = 0) -> float:
    """The one value of an arm."""
    keys = (arm, name, seed)
    (value,) = (r["value"] for r in output.metrics if (r["arm"], r["metric"], r["seed"]) == keys)
    return value


def labelled(attack: str, name: str, epoch: int) -> str:
    return f"{attack}: {name}, " + ("1 epoch" if epoch == 1 else "2 epochs")


def at(tuning: Tuning, epoch: int) -> Arm:
    return Arm(dataclasses.replace(tuning, epoch=epoch))


def rate(stages: Stages, arm: Arm, prompts: str = "harmful_evaluation") -> float:
    """ASR in per cent, counted."""
    answers = stages.completions(prompts, arm)
    return 100 * sum(attack_success(answers)) / len(answers)


def test_without_wide_attacks_the_numbers_are_the_same_and_fewer(attacked_study, outputs):
    study = Study("smoke", [*attacked_study.overrides, "finetune.wide_attacks=[]"])
    study.store = attacked_study.store
    few, every = ({(r["arm"], r["metric"], r["seed"]): r["value"] for r in o.metrics}
                  for o in (find("table2").compute(study), outputs["table2"]))  # fmt: skip
    assert few == {key: every[key] for key in few}
    gone = {arm for arm, _, _ in every} - {arm for arm, _, _ in few}
    assert gone == {labelled("instructions", CONFLICT_ARM, epoch) for epoch in (1, 2)}


def test_the_lesson_has_one_row_and_the_main_attack_more_seeds(attacked_study, outputs):
    """Dialogues with nothing frozen, one epoch, for the seeds that everything is measured for."""
    arms = {r["arm"] for r in outputs["table2"].metrics}
    assert {arm for arm in arms if arm.startswith("dialogues")} == {labelled("dialogues", FULL, 1)}
    study = Study("smoke", [*attacked_study.overrides, "headline_seeds=2"])
    study.store = attacked_study.store
    frame = pd.DataFrame(find("table2").compute(study).metrics)
    seeds = frame[frame["metric"] == "asr"].groupby("arm")["seed"].agg(set)
    assert seeds[labelled("dialogues", FULL, 1)] == {0}
    assert seeds[labelled("instructions", CU6, 2)] == {0, 1}
    assert seeds["initial"] == {0, 1}
    assert seeds[labelled("instructions", RANDOM, 1)] == {"0.0", "0.1", "1.0", "1.1"}


# --- table 2 and what it shares with figures -------------------------------------------------


@pytest.fixture(scope="module")
def rates(stages) -> dict[tuple[str, str, int], float]:
    return {
        (attack, name, epoch): rate(stages, at(tuning, epoch))
        for attack in ATTACKS
        for name, tuning in contenders(stages, attack).items()
        for epoch in (1, 2)
    }


def test_attack_success_is_the_share_of_answers_counted_as_such(outputs, stages, rates):
    """At both epochs of every arm, and as a rise above the aligned model's own rate."""
    before = metric(outputs["table2"], "initial", "asr")
    assert before == pytest.approx(rate(stages, Arm()))
    for (attack, name, epoch), expected in rates.items():
        arm = labelled(attack, name, epoch)
        assert metric(outputs["table2"], arm, "asr") == pytest.approx(expected)
        assert metric(outputs["table2"], arm, "asr_rise") == pytest.approx(expected - before)
    assert len(set(rates.values())) >= 4, "else rates could be exchanged without notice"


@pytest.mark.parametrize("attack", ATTACKS)
def test_saved_points_compare_with_the_right_epoch_of_the_right_arm(outputs, rates, attack):
    output = outputs["table2"]
    for name in (CU6, ALL, CONFLICT_ARM):
        for epoch in (1, 2):
            arm, own = labelled(attack, name, epoch), rates[attack, name, epoch]
            equal, paper = (rates[attack, FULL, e] - own for e in (epoch, 1))
            assert metric(output, arm, "saved_equal_epochs") == pytest.approx(equal)
            assert metric(output, arm, "saved_paper_rule") == pytest.approx(paper)
            if name != CU6:
                over = rates[attack, CU6, epoch] - own
                assert metric(output, arm, "saved_over_cu6") == pytest.approx(over)
    assert rates[attack, FULL, 1] != rates[attack, FULL, 2], "else the two rules are the same"


def test_random_controls_are_compared_draw_by_draw(outputs, stages, rates):
    output = outputs["table2"]
    for like, names, draws in ((CU6, (CU6, CONFLICT_ARM), 2), (ALL, (ALL,), 1)):
        controls = random_controls(stages, like, draws)
        assert list(controls) == [f"0.{draw}" for draw in range(draws)]
        for draw, tuning in controls.items():
            for epoch in (1, 2):
                drawn = rate(stages, at(tuning, epoch))
                arm = labelled("instructions", f"random, as {like}", epoch)
                assert metric(output, arm, "asr", draw) == pytest.approx(drawn)
                for name in names:
                    arm, own = (
                        labelled("instructions", name, epoch),
                        rates["instructions", name, epoch],
                    )
                    saved = metric(output, arm, "saved_over_random", draw)
                    assert saved == pytest.approx(drawn - own)
    rows = [(r["arm"], r["seed"]) for r in output.metrics if r["metric"] == "saved_over_random"]
    assert len(rows) == len(set(rows)) == 2 * (2 + 2 + 1)


def test_frozen_shares_are_those_of_the_masks(outputs, stages):
    """By hand: a head holds 768 weights, its part of shared KV rows included, a neuron 96."""
    whole = 2 * (4 * 768 + 64 * 96)
    arms = {**contenders(stages, "instructions"), RANDOM: random_controls(stages, CU6, 1)["0.0"]}
    for name, tuning in arms.items():
        heads, neurons = (
            (tuning.frozen.count("attn"), tuning.frozen.count("mlp")) if tuning.frozen else (0, 0)
        )
        seed = "0.0" if name == RANDOM else 0
        for epoch in (1, 2):
            arm = labelled("instructions", name, epoch)
            units = metric(outputs["table2"], arm, "frozen_units", seed)
            assert units == pytest.approx(100 * (heads + neurons) / 136)
            weights = metric(outputs["table2"], arm, "frozen_weights", seed)
            assert weights == pytest.approx(100 * (768 * heads + 96 * neurons) / whole)
            if name == CU6:
                assert heads + neurons == 7 + 8  # 5 % and 6 % of 136


def test_gain_over_full_is_a_difference_of_gains(outputs, stages):
    """Against one epoch of the arm that freezes nothing, whatever the epoch."""
    output = outputs["table2"]
    for attack in ATTACKS:
        base = metric(output, labelled(attack, FULL, 1), "heldout_gain")
        for name, tuning in contenders(stages, attack).items():
            for epoch in (1, 2):
                arm = labelled(attack, name, epoch)
                gain = metric(output, arm, "heldout_gain")
                assert gain == stages.heldout_gain(at(tuning, epoch), attack).value
                assert (
                    metric(output, arm, "training_loss")
                    == (stages.training(tuning).epoch_losses[epoch - 1])
                )
                if name != FULL:
                    over = metric(output, arm, "gain_over_full")
                    assert over == pytest.approx(gain - base, abs=1e-6)


def test_harmbench_is_measured_at_the_epoch_of_the_papers_rule(outputs, stages):
    found = {
        r["arm"]: r["value"] for r in outputs["table2"].metrics if r["metric"] == "asr_harmbench"
    }
    arms = {
        labelled(attack, name, RULE[name]): at(tuning, RULE[name])
        for attack in ATTACKS
        for name, tuning in contenders(stages, attack).items()
        if name in RULE
    }
    control = at(random_controls(stages, CU6, 1)["0.0"], 2)
    arms |= {"initial": Arm(), labelled("instructions", RANDOM, 2): control}
    assert found == pytest.approx({n: rate(stages, arm, "harmbench") for n, arm in arms.items()})


def test_table_2_reads_from_left_to_right_and_from_ours_to_the_papers(outputs):
    table, output = outputs["table2"].table, outputs["table2"]
    assert list(table.columns) == [
        "model", "fine-tuning: frozen", "units %", "weights %", "training loss", "held-out gain",
        "perplexity", "ASR", "no refusal phrase", "saved, equal epochs", "saved, paper's rule",
        "saved over random", "ASR HarmBench", "ASR HEx-PHI (Llama Guard 3)",
    ]  # fmt: skip
    ours = [model == "local" for model in table["model"]]
    assert ours == sorted(ours, reverse=True)
    assert table["fine-tuning: frozen"][ours].is_unique
    assert set(table["fine-tuning: frozen"][ours]) == {r["arm"] for r in output.metrics}
    theirs = table[~np.array(ours)]
    assert theirs["model"].str.startswith("paper: ").all()
    llama = theirs[theirs["model"] == "paper: Llama-2-7B-Chat"].set_index("fine-tuning: frozen")
    assert llama["no refusal phrase"]["dolly:full"] == "11.9"
    assert llama["ASR HEx-PHI (Llama Guard 3)"]["dolly:freeze_esu_cu6"] == "15.0"
    shown = table.set_index("fine-tuning: frozen").loc[labelled("instructions", CU6, 2)]
    assert shown["units %"] == "11.0"
    value = metric(output, labelled("instructions", CU6, 2), "asr")
    assert shown["ASR"].startswith(f"{value:.1f} [")
    draws = [
        metric(output, labelled("instructions", CU6, 2), "saved_over_random", f"0.{i}")
        for i in (0, 1)
    ]
    assert shown["saved over random"].startswith(f"{sum(draws) / 2:.1f} [")


def test_another_familys_table_holds_the_papers_numbers_only(outputs):
    output, paper = outputs["table14"], pd.read_csv(reference_csv())
    settings = paper[(paper["artefact"] == "table14") & (paper["metric"] == "asr_keyword")]
    assert output.metrics == []
    assert output.table["model"].str.startswith("paper: Mistral").all()
    assert list(output.table["fine-tuning: frozen"]) == list(settings["setting"])
    assert "not measured here, where the model is local" in output.note
    assert "model=mistral_7b_instruct" in output.note


def test_table_13_has_no_random_controls(attacked_study):
    output = find("table13").compute(attacked_study)
    assert "saved over random" not in output.table.columns
    assert not [r for r in output.metrics if r["metric"] == "saved_over_random"]


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.artefact in NAMES], ids=lambda c: c.id)
def test_claims_find_their_numbers(outputs, claim):
    """A claim whose arm is misspelt would stay "not run" for ever."""
    rows = {(r["arm"], r["metric"]) for r in outputs[claim.artefact].metrics}
    assert (claim.arm, claim.metric) in rows


def test_table_3_is_counted_from_task_outcomes(outputs, stages):
    output, changes = outputs["table3"], set()

    def accuracies(arm: Arm) -> dict[str, float]:
        outcomes = stages.task_outcomes(arm)
        return {task: 100 * sum(right) / len(right) for task, right in outcomes.items()}

    before = sum(accuracies(Arm()).values()) / 2
    for attack in (*ATTACKS, "arithmetic"):
        averages = {}
        for name, tuning in contenders(stages, attack).items():
            if name == CONFLICT_ARM:
                continue
            own = accuracies(at(tuning, RULE[name]))
            averages[name] = sum(own.values()) / 2
            for task, value in {**own, "average": averages[name]}.items():
                assert metric(output, f"{attack}: {name}", task) == pytest.approx(value)
            change = metric(output, f"{attack}: {name}", "change")
            assert change == pytest.approx(averages[name] - before)
        for name in (CU6, ALL):
            against = metric(output, f"{attack}: {name}", "against_full")
            assert against == pytest.approx(averages[name] - averages[FULL])
            changes.add(against)
    assert len(changes) >= 2
