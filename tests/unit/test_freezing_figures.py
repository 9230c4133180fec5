"""Figures on freezing: metrics against the stages, and what is drawn against the metrics."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

from ssah.artefacts import Output, find
from ssah.evaluate.judges import attack_success
from ssah.lab.arms import Arm
from ssah.lab.selections import ALL, CU6, FULL, conditions, contenders, random_controls, ratios
from ssah.lab.stages import Stages

pytestmark = pytest.mark.usefixtures("toy_verdicts")

PERCENTS = [0, 6, 12]


@pytest.fixture(scope="module")
def outputs(attacked_study) -> dict[str, Output]:
    return {name: find(name).compute(attacked_study) for name in ("fig8", "fig_conditions")}


@pytest.fixture(scope="module")
def stages(attacked_study) -> Stages:
    return attacked_study.stages(0)


def rate(stages: Stages, tuning, epoch: int) -> float:
    """ASR in per cent, counted."""
    arm = Arm(dataclasses.replace(tuning, epoch=epoch))
    success = attack_success(stages.completions("harmful_evaluation", arm))
    return 100 * sum(success) / len(success)


def values_of(output: Output, name: str, epoch: int, metric: str) -> list[float]:
    """By seed or draw."""
    arm = f"instructions: {name}, " + ("1 epoch" if epoch == 1 else "2 epochs")
    return [r["value"] for r in output.metrics if (r["arm"], r["metric"]) == (arm, metric)]


def test_the_ratio_sweep_is_counted_from_answers(outputs, stages):
    output = outputs["fig8"]
    for epoch in (1, 2):
        full = rate(stages, contenders(stages, "instructions")[FULL], epoch)
        assert values_of(output, FULL, epoch, "asr") == pytest.approx([full])
        for percent, tuning in zip(PERCENTS, ratios(stages).values(), strict=True):
            name, own = f"ESU + {percent} % CU", rate(stages, tuning, epoch)
            assert values_of(output, name, epoch, "asr") == pytest.approx([own])
            saved = values_of(output, name, epoch, "saved_equal_epochs")
            assert saved == pytest.approx([full - own])
            frozen = values_of(output, name, epoch, "frozen_units")
            assert frozen == pytest.approx([100 * (7 + round(1.36 * percent)) / 136])


def test_points_of_fig8_are_the_metrics(outputs, attacked_study):
    """Two lines, their dotted references, and controls with a bar from draw to draw."""
    output = outputs["fig8"]
    (axes,) = output.figure.axes
    assert attacked_study.config.finetune.cu_percents == PERCENTS
    drawn = {}
    for line in axes.lines:
        x, y = (list(map(float, data)) for data in line.get_data())
        drawn[line.get_color(), line.get_linestyle(), line.get_marker(), len(x), x[-1]] = y
    for epoch, colour, marker in ((1, "#56B4E9", "o"), (2, "#CC79A7", "s")):
        means = [values_of(output, f"ESU + {p} % CU", epoch, "asr")[0] for p in PERCENTS]
        assert drawn[colour, "-", marker, 3, 12.0] == pytest.approx(means)
        full = values_of(output, FULL, epoch, "asr")
        assert drawn[colour, ":", "None", 2, 1.0] == pytest.approx(full * 2)
        draws = values_of(output, f"random, as {CU6}", epoch, "asr")
        assert len(draws) == 2
        assert drawn[colour, "None", "x", 1, 6.0] == pytest.approx([sum(draws) / 2])
        everything = values_of(output, ALL, epoch, "asr")
        assert drawn[colour, "None", marker, 1, 16.0] == pytest.approx(everything)
    bars = [list(c.lines[2][0].get_segments()[0][:, 1]) for c in axes.containers]
    expected = []
    for epoch in (1, 2):
        for name in (f"random, as {CU6}", ALL):
            draws = values_of(output, name, epoch, "asr")
            expected.append((min(draws), max(draws)))
    assert [low for low, _ in bars] == pytest.approx([low for low, _ in expected])
    assert [high for _, high in bars] == pytest.approx([high for _, high in expected])
    assert any(low < high for low, high in expected), "else no bar has a length"
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["0", "6", "12", "all"]


@pytest.fixture(scope="module")
def first_epochs(stages) -> dict[str, list[float]]:
    """ASR after one epoch of every arm of the conditions, by draw."""
    arms = contenders(stages, "instructions") | conditions(stages)
    found = {name: [rate(stages, tuning, 1)] for name, tuning in arms.items()}
    for like, draws in ((CU6, 2), (ALL, 1)):
        controls = random_controls(stages, like, draws).values()
        found[f"random, as {like}"] = [rate(stages, tuning, 1) for tuning in controls]
    return found


def test_conditions_are_compared_under_the_same_setting(outputs, first_epochs):
    """A frozen arm at a lower rate against nothing frozen at that rate, not against the default."""
    output = outputs["fig_conditions"]
    settings = ("embeddings trained", "lower rate")
    assert len({first_epochs[name][0] for name in (FULL, *(f"{FULL}, {s}" for s in settings))}) > 1
    for name, rates in first_epochs.items():
        assert values_of(output, name, 1, "asr") == pytest.approx(rates)
        setting = name.partition(", ")[2]
        base = f"{FULL}, {setting}" if setting in settings else FULL
        saved = values_of(output, name, 1, "saved")
        if name == base:
            assert saved == []
        else:
            assert saved == pytest.approx([first_epochs[base][0] - own for own in rates])
    arms = {r["arm"] for r in output.metrics if r["arm"].endswith("1 epoch")}
    assert arms == {f"instructions: {name}, 1 epoch" for name in first_epochs}


def test_lines_of_the_trade_off_start_where_nothing_is_frozen(outputs):
    output = outputs["fig_conditions"]
    rules = {
        "highest I_S - I_U": [CU6, "ESU + CU, 25 %", ALL],
        "random": [f"random, as {CU6}", "random, 25 %", f"random, as {ALL}"],
        "lowest I_S - I_U": ["lowest I_S - I_U, 7 %", "lowest I_S - I_U, 25 %"],
        "largest magnitude": ["largest magnitude, 7 %", "largest magnitude, 25 %"],
        "moved most by alignment": [f"moved most by alignment, {p} %" for p in (7, 25)],
        "gradient conflict": [f"gradient conflict, as {CU6}", "gradient conflict, 25 %"],
        "all heads": ["all heads"],
    }
    left, _ = output.figure.axes
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines) == list(rules)
    for rule, arms in rules.items():
        for data, metric in zip(lines[rule].get_data(), ("heldout_gain", "asr"), strict=True):
            values = [values_of(output, arm, 1, metric) for arm in (FULL, *arms)]
            assert list(data) == pytest.approx([sum(v) / len(v) for v in values]), (rule, metric)


def test_saved_points_are_drawn_with_their_intervals(outputs, first_epochs):
    output = outputs["fig_conditions"]
    _, right = output.figure.axes
    names = [label.get_text() for label in right.get_yticklabels()]
    bases = {FULL, f"{FULL}, embeddings trained", f"{FULL}, lower rate"}
    assert set(names) == set(first_epochs) - bases
    frame = pd.DataFrame(output.metrics)
    frame = frame[frame["metric"] == "saved"].groupby("arm")[["value", "low", "high"]].mean()
    assert len(right.containers) == len(names) == len(frame)
    for row, (name, point) in enumerate(zip(names, right.containers, strict=True)):
        value, low, high = frame.loc[f"instructions: {name}, 1 epoch"]
        ((x,), (y,)) = point.lines[0].get_data()
        assert (x, y) == pytest.approx((value, row))
        ends = point.lines[2][0].get_segments()[0][:, 0]
        assert list(ends) == pytest.approx([low, high])
