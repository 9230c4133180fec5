"""Metrics: numbers in the table against numbers that are counted by hand."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ssah.artefacts.pick import estimate, rows_of
from ssah.core.errors import SsahError
from ssah.data.jailbreaks import PREFIX_JAILBREAK
from ssah.evaluate import judges
from ssah.lab import catalogue
from ssah.lab.arms import Arm
from ssah.lab.lab import Lab
from ssah.lab.measure import Measure
from ssah.lab.metrics.behaviour import BOTH, PREFIX, SYSTEM, asked
from ssah.lab.metrics.stability import COMPARISONS, overlaps, stability
from ssah.lab.specs import GIVEN, Model
from ssah.lab.stages.answers import answers
from ssah.lab.stages.attribution import CATEGORY, HALF, statistics
from ssah.lab.stages.lessons import MAIN_ATTACK, heldout, lesson
from ssah.lab.stages.roles import roles, roles_after
from ssah.lab.stages.utility import attack_losses, held_out_texts, task_outcomes
from ssah.lab.units_of import ALL_CU, CU6, ESU, group
from ssah.units.mask import UnitMask
from ssah.units.roles import GROUPS, transfer

pytestmark = pytest.mark.usefixtures("toy_verdicts")


def verdicts(lab: Lab, model: Model, prompts: str, system: str = "", suffix: str = "") -> list[str]:
    """Of the completions of a set, one by one."""
    rows, config = asked(lab, prompts), lab.config.evaluate
    said = answers(
        lab, model, [row.prompt + suffix for row in rows], config.max_new_tokens,
        config.batch_size, system,
    ).json("answers.json")  # fmt: skip
    return [
        judges.judge(judges.Completion(row.prompt, text))
        for row, text in zip(rows, said, strict=True)
    ]


def test_overlaps_are_those_of_units_and_of_chance():
    def mask(heads: str, neurons: str) -> UnitMask:
        bits = {"layers.0.attn": heads, "layers.0.mlp": neurons}
        return UnitMask({n: torch.tensor([c == "1" for c in b]) for n, b in bits.items()})

    first, second = mask("1100", "11100000"), mask("0100", "01110000")
    empty = mask("0000", "00000000")
    found = overlaps({"ESU": first, "RU": empty}, {"ESU": second, "RU": empty}, "once more")
    rows = {(c["metric"], c["set"]): (e.value, e.n) for c, e, _ in found}
    expected = 2 * 1 / 4 + 3 * 3 / 8  # heads and neurons apart
    assert rows["overlap", "ESU"] == (pytest.approx(3 / 6), 5)
    assert rows["overlap by chance", "ESU"] == (pytest.approx(expected / (9 - expected)), 5)
    assert rows["overlap", "RU"] == (0, 0)


def test_units_are_scored_on_parts_of_the_prompts(lively_lab):
    own = {row.id: row for row in lively_lab.rows("harmful_attribution")}
    samples = lively_lab.config.attribution.samples
    whole, half, category = (
        statistics(lively_lab, "safety", part=part).config["rows"] for part in ("", HALF, CATEGORY)
    )
    assert (len(whole), len(half)) == (samples, samples // 2)
    largest = Counter(row.category for row in own.values()).most_common(1)[0][0]
    of_largest = {row.prompt for row in own.values() if row.category == largest}
    assert {prompt for prompt, *_ in category} <= of_largest
    assert len(category) == min(samples, len(of_largest)) > 1
    benign = [statistics(lively_lab, "utility", part=p).key for p in ("", CATEGORY)]
    assert benign[0] == benign[1], "harmless prompts have no part in it"


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_comparison_finds_groups_of_the_same_size(lively_lab, name):
    attacked = catalogue.attacked_longest(lively_lab).model
    first, second, _ = stability(lively_lab, attacked, name).rows.args
    for group_name, mask in first.items():
        assert mask.count() == second[group_name].count(), group_name
    assert first["ESU"] == roles(lively_lab).mask("ESU")


def percent(found: list[bool]) -> float:
    return 100 * sum(found) / len(found)


def value(table: pd.DataFrame, metric: str, arm: Arm, **columns: Any) -> float:
    """The one number of an arm."""
    found = rows_of(table, metric, **{**arm.columns(), **columns, "draw": None})
    if arm.draw is not None:
        found = found[found["draw"] == arm.draw]
    (number,) = found["value"]
    return number


def fine_tuned(lab: Lab) -> list[Arm]:
    return [
        *catalogue.unfrozen(lab, MAIN_ATTACK),
        *catalogue.with_frozen(lab, MAIN_ATTACK, CU6),
        *catalogue.with_frozen(lab, MAIN_ATTACK, ALL_CU),
        *catalogue.with_frozen_control(lab, MAIN_ATTACK, "random", CU6, 1),
        *catalogue.with_frozen_control(lab, MAIN_ATTACK, "gradient conflict", CU6),
    ]


# --- safety ----------------------------------------------------------------------------------


def test_rates_are_counted_from_verdicts(lively_table, lively_lab):
    lab, rates = lively_lab, set()
    arms = [catalogue.whole(lab), *catalogue.unaligned(lab), catalogue.without(lab, ESU)]
    arms += [catalogue.without_control(lab, "random", ESU, 1), *fine_tuned(lab)]
    for arm in arms:
        found = verdicts(lab, arm.model, "")
        for metric, counted in (
            ("ASR", ("answered",)),
            ("no refusal phrase", ("answered", "evaded")),
            ("incoherent", ("incoherent",)),
        ):
            wanted = percent([v in counted for v in found])
            assert value(lively_table, metric, arm) == pytest.approx(wanted), (arm.name, metric)
        rates.add(percent([v == "answered" for v in found]))
    assert len(rates) >= 4, "else arms could be exchanged without notice"


def test_conditions_are_told_apart(lively_table, lively_lab):
    lab, arm = lively_lab, catalogue.without(lively_lab, ESU)
    system = lab.config.evaluate.system_prompt
    plain = percent([v == "answered" for v in verdicts(lab, arm.model, "")])
    with_system = percent([v == "answered" for v in verdicts(lab, arm.model, "", system)])
    assert value(lively_table, "ASR", arm, set=SYSTEM) == pytest.approx(with_system)
    assert value(lively_table, "ASR", arm, set=BOTH) == pytest.approx((plain + with_system) / 2)
    assert plain != with_system
    (given,) = catalogue.unaligned(lab)
    with_prefix = verdicts(lab, GIVEN, "", suffix=PREFIX_JAILBREAK)
    wanted = percent([v == "answered" for v in with_prefix])
    assert value(lively_table, "ASR", given, set=PREFIX) == pytest.approx(wanted)
    for name in ("HarmBench", "Do-Not-Answer"):
        wanted = percent([v == "answered" for v in verdicts(lab, GIVEN, name)])
        assert value(lively_table, "ASR", given, set=name) == pytest.approx(wanted)


def test_comparisons_are_of_the_same_prompts(lively_table, lively_lab):
    lab = lively_lab
    full = catalogue.unfrozen(lab, MAIN_ATTACK)
    frozen = catalogue.with_frozen(lab, MAIN_ATTACK, CU6)
    control = catalogue.with_frozen_control(lab, MAIN_ATTACK, "random", CU6, 1)

    def rate(arm: Arm) -> float:
        return percent([v == "answered" for v in verdicts(lab, arm.model, "")])

    for epoch in (0, 1):
        own = rate(frozen[epoch])
        for than, other in (
            ("before", catalogue.whole(lab)),
            ("nothing frozen, same epochs", full[epoch]),
            ("nothing frozen, one epoch", full[0]),
            ("random, draw 1", control[epoch]),
        ):
            found = value(lively_table, "ASR", frozen[epoch], against=than)
            assert found == pytest.approx(own - rate(other)), than
    assert rate(full[0]) != rate(full[1]), "else the two rules are the same"
    rows = rows_of(lively_table, "ASR", against="before", method=None, rule=None, epoch=None,
                   like=None, attack=None)  # fmt: skip
    assert rows["p"].between(0, 1).all()


def test_unknown_metrics_and_prompts_are_named_with_the_nearest(lively_lab):
    whole = catalogue.whole(lively_lab)
    with pytest.raises(SsahError, match="no metric 'ASP': did you mean 'ASR'"):
        Measure(whole, "ASP")
    with pytest.raises(SsahError, match="no prompts 'HarmBanch': did you mean 'HarmBench'"):
        asked(lively_lab, "HarmBanch")
    with pytest.raises(ValueError, match="A comparison says with which arm"):
        Measure(whole, "ASR", against=whole)


# --- utility ---------------------------------------------------------------------------------


def test_perplexity_and_its_ratio(lively_table, lively_lab):
    lab, arm = lively_lab, catalogue.without(lively_lab, ESU)
    counts, losses = held_out_texts(lab, arm.model)
    _, before = held_out_texts(lab, lab.aligned)
    wanted = math.exp(sum(losses) / sum(counts))
    assert value(lively_table, "perplexity", arm) == pytest.approx(wanted)
    ratio = math.exp((sum(losses) - sum(before)) / sum(counts))
    assert value(lively_table, "perplexity", arm, against="whole") == pytest.approx(ratio)


def test_held_out_gain_is_of_rows_that_were_not_seen(lively_table, lively_lab):
    lab = lively_lab
    seen = {row.prompt for row in lesson(lab, MAIN_ATTACK).rows}
    kept = [row.prompt not in seen for row in heldout(lab, MAIN_ATTACK).rows]
    full = catalogue.unfrozen(lab, MAIN_ATTACK)
    for arm in fine_tuned(lab):
        counts, losses = (np.array(x)[kept] for x in attack_losses(lab, arm.model, MAIN_ATTACK))
        for than, other in (("before", lab.aligned), ("nothing frozen, one epoch", full[0].model)):
            if than != "before" and arm.rule == "nothing":
                continue
            before = np.array(attack_losses(lab, other, MAIN_ATTACK)[1])[kept]
            found = value(lively_table, "held-out gain", arm, set=MAIN_ATTACK, against=than)
            assert found == pytest.approx((before - losses).sum() / counts.sum(), abs=1e-9)


def test_accuracy_by_task_and_on_average(lively_table, lively_lab):
    lab, whole = lively_lab, catalogue.whole(lively_lab)
    before = {t: percent(right) for t, right in task_outcomes(lab, lab.aligned).items()}
    for task, accuracy in before.items():
        assert value(lively_table, "accuracy", whole, set=task) == pytest.approx(accuracy)
    mean = sum(before.values()) / 2
    assert value(lively_table, "accuracy", whole, set="average") == pytest.approx(mean)
    arm = catalogue.by_the_papers_rule(catalogue.with_frozen(lab, MAIN_ATTACK, CU6))
    after = [percent(right) for right in task_outcomes(lab, arm.model).values()]
    change = value(lively_table, "accuracy", arm, set="average", against="before")
    assert change == pytest.approx(sum(after) / 2 - mean)


def test_the_given_model_has_not_drifted(lively_table, lively_lab):
    (given,) = catalogue.unaligned(lively_lab)
    assert value(lively_table, "drift", given) == 0
    drifted = rows_of(lively_table, "drift", base="unaligned", method="trained", rule="all units")
    assert (drifted["value"] > 0).all()


# --- units -----------------------------------------------------------------------------------


def test_units_of_an_arm_are_those_of_its_mask(lively_table, lively_lab):
    """By hand: a head holds 768 weights, its part of shared KV rows included, a neuron 96."""
    lab, every = lively_lab, 2 * (4 * 768 + 64 * 96)
    arms = [*fine_tuned(lab), catalogue.without(lab, ESU)]
    for arm in arms:
        step = arm.model.step
        mask = step.mask if arm.method == "removed" else step.part.freeze
        heads, neurons = (0, 0) if mask is None else (mask.count("attn"), mask.count("mlp"))
        for name, wanted in (
            ("heads", heads),
            ("neurons", neurons),
            ("units", 100 * (heads + neurons) / 136),
            ("weights", 100 * (768 * heads + 96 * neurons) / every),
        ):
            assert value(lively_table, name, arm) == pytest.approx(wanted), (arm.name, name)
    assert group(lab, CU6).count() == 7 + 8, "5 % and 6 % of 136"


def test_training_is_what_its_record_says(lively_table, lively_lab):
    for arm in fine_tuned(lively_lab):
        record = lively_lab.training(arm.model).json("training.json")
        loss = value(lively_table, "training loss", arm)
        assert loss == record["epoch_losses"][arm.epoch - 1]


def test_transfer_counts_every_unit_once(lively_table, lively_lab):
    lab = lively_lab
    arm = catalogue.by_the_papers_rule(catalogue.with_frozen(lab, MAIN_ATTACK, CU6))
    before = roles(lab)
    for rule in ("thresholds", "quantiles"):
        after = roles_after(lab, arm.model, rule)
        counts = transfer(before, after).numpy()
        total = 0.0
        for i, a in enumerate(GROUPS):
            for j, b in enumerate(GROUPS):
                share = value(lively_table, f"{a}->{b}", arm, set="all units", at=rule)
                assert share == pytest.approx(100 * counts[i, j] / 136)
                total += share
        assert total == pytest.approx(100)
        kept = [estimate(lively_table, "ESU->ESU", set="of the ESU", at=rule, **other.columns())
                for other in (arm, catalogue.unfrozen(lab, MAIN_ATTACK)[0])]  # fmt: skip
        change = value(lively_table, "ESU->ESU", arm, set="of the ESU", at=rule,
                       against="nothing frozen")  # fmt: skip
        assert change == pytest.approx(kept[0].value - kept[1].value)


def test_every_row_names_its_runs_and_their_commits(lively_table):
    counted = lively_table["metric"].isin(["units", "weights", "heads", "neurons"])
    own = lively_table[
        ~counted & ~((lively_table["metric"] == "drift") & (lively_table["value"] == 0))
    ]
    assert set(own[own["runs"] == ""]["metric"]) == set()
    assert (own["commits"] != "").all()
    subjects = lively_table.drop(columns=["value", "low", "high", "n", "p", "runs", "commits"])
    assert not subjects.astype(object).duplicated().any()
    assert (lively_table["low"] <= lively_table["value"] + 1e-9).all()
    assert (lively_table["value"] <= lively_table["high"] + 1e-9).all()
