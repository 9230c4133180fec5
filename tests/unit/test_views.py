"""Views: what tables say and figures show is what was measured."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from ssah.app.study import Study, drawn
from ssah.artefacts import ARTEFACTS, Output
from ssah.artefacts.pick import (
    estimate,
    fewer_seeds,
    format_estimate,
    mostly_neither,
    paper,
    pooled,
    rows_of,
)
from ssah.core.errors import SsahError
from ssah.evaluate.stats import Estimate, over_repetitions
from ssah.lab.catalogue import LEARNS
from ssah.lab.table import typed
from ssah.units.roles import GROUPS


@pytest.fixture(scope="module")
def outputs(lively_table, lively_lab) -> dict[str, Output]:
    configs = {lively_lab.config.model.name: lively_lab.config}
    return {name: artefact.view(lively_table, configs) for name, artefact in ARTEFACTS.items()}


def columns_of(table) -> list[str]:
    return list(table.columns)


@pytest.mark.parametrize("name", ARTEFACTS)
def test_every_artefact_shows_something_and_says_what(outputs, name):
    output = outputs[name]
    assert (output.table is None) != (output.figure is None)
    assert len(output.note) > 50
    assert output.note[0].isupper()
    if isinstance(output.figure, Figure):
        assert output.figure.axes or "Not measured here" in output.figure.texts[0].get_text()


@pytest.mark.parametrize("name", [n for n in ARTEFACTS if n.startswith("table")])
def test_tables_can_be_read(outputs, name):
    """Few columns, none of them empty, and no row twice."""
    table = outputs[name].table
    assert len(table.columns) <= 12
    if name in ("table1", "table2", "table3", "table4", "table13"):
        assert len(table.columns) <= 9
    if len(table):
        assert not (table == "").all().any(), columns_of(table)
        assert not table.duplicated().any()


def test_nothing_is_said_of_answers_that_are_no_language(lively_table, lively_lab):
    broken = (lively_table["rule"] == "EUU") & (lively_table["setting"] == "mean")
    broken &= (lively_table["metric"] == "perplexity") & (lively_table["against"] == "")
    assert broken.any()
    table = lively_table.assign(value=lively_table["value"].mask(broken, 20_000.0))
    output = ARTEFACTS["table1"].view(table, {lively_lab.config.model.name: lively_lab.config})
    shown = output.table.set_index("removed")
    assert (
        shown.loc["EUU, mean", ["ASR", "no refusal phrase", "incoherent %"]].tolist() == ["-"] * 3
    )
    assert shown.loc["EUU", "ASR"] != "-"
    assert "Nothing is said of what a model answers whose perplexity" in output.note


def test_table_1_stands_beside_the_paper(outputs, lively_table):
    table = outputs["table1"].table.set_index("removed")
    assert list(table.index[:3]) == ["nothing", "nothing, before alignment", "ESU"]
    assert {"random, as ESU", "largest magnitude, as ESU", "RU, mean", "ESU, fitted", "EUU"} <= set(
        table.index
    )
    esu = estimate(lively_table, "ASR", method="removed", rule="ESU")
    assert table.loc["ESU", "ASR"] == format_estimate(esu)
    random = rows_of(lively_table, "ASR", method="removed", rule="random", like="ESU")
    assert table.loc["random, as ESU", "ASR"].startswith(f"{random['value'].mean():.1f} [")
    assert len(random) == 2
    assert table.loc["ESU", "paper: no refusal phrase, perplexity"] == "84, 6.8"


def test_table_2_reads_from_the_papers_arms_to_the_lesson(outputs, lively_table):
    table = outputs["table2"].table
    assert list(dict.fromkeys(table["fine-tuned on"])) == ["nothing", "instructions", "dialogues"]
    arms = list(zip(table["frozen"], table["epochs"], strict=True))
    assert arms[:7] == [
        ("", ""), ("nothing", "1"), ("nothing", "2"), ("ESU + 6 % CU", "1"), ("ESU + 6 % CU", "2"),
        ("random, as ESU + 6 % CU", "1"), ("random, as ESU + 6 % CU", "2"),
    ]  # fmt: skip
    assert arms[-1] == ("nothing", "1")
    own = table.iloc[4]
    columns = {"method": "frozen", "attack": "instructions", "rule": "ESU + 6 % CU", "epoch": 2}
    asr = estimate(lively_table, "ASR", **columns)
    assert own["ASR"] == format_estimate(asr)
    draws = [
        estimate(lively_table, "ASR", against=f"random, draw {i}", **columns).value for i in (0, 1)
    ]
    assert own["ASR against random"].startswith(f"{np.mean(draws):.1f} [")
    printed = paper("table2")["alpaca:freeze_esu_cu6", "asr_keyword"]
    assert own["paper: no refusal phrase"] == f"{printed:.1f}"


def test_another_familys_table_holds_the_papers_numbers_only(outputs):
    for name in ("table12", "table14", "table15"):
        assert outputs[name].table["model"].str.startswith("paper: Mistral").all()
        assert "not measured here, where the model is local" in outputs[name].note


def test_points_of_fig_8_are_the_measurements(outputs, lively_table, lively_lab):
    axes = outputs["fig8"].figure.axes[0]
    percents = lively_lab.config.experiment.cu_percents
    lines = {line.get_label(): line for line in axes.lines if len(line.get_xdata()) == 3}
    for epoch, label in ((1, "1 epoch"), (2, "2 epochs")):
        wanted = [
            estimate(
                lively_table, "ASR", method="frozen", attack="instructions",
                rule=f"ESU + {p:g} % CU", epoch=epoch,
            ).value
            for p in percents
        ]  # fmt: skip
        assert list(lines[label].get_ydata()) == pytest.approx(wanted)


def test_bars_of_fig_13_are_shares_of_the_esu(outputs, lively_table):
    axes = outputs["fig13"].figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    place = names.index("frozen: ESU + 6 % CU")
    for container, group in zip(axes.containers, GROUPS, strict=True):
        wanted = estimate(
            lively_table, f"ESU->{group}", method="frozen", attack="instructions",
            rule="ESU + 6 % CU", epoch=2, set="of the ESU", at="thresholds",
        ).value  # fmt: skip
        assert container[place].get_width() == pytest.approx(wanted)


def test_bars_of_verdicts_fill_the_prompts(outputs, lively_table):
    axes = outputs["fig_verdicts"].figure.axes[0]
    bars = axes.containers[:4]
    sums = np.sum([[bar.get_width() for bar in container] for container in bars], axis=0)
    assert sums == pytest.approx(np.full(len(sums), 100))
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert "ESU removed" in names
    assert "dialogues, 1 epoch: nothing frozen" in names
    answered = estimate(lively_table, "answered", method="removed", rule="ESU")
    assert bars[0][names.index("ESU removed")].get_width() == pytest.approx(answered.value)


def test_what_is_learned_through_redundant_units_stands_beside_the_whole(
    outputs, lively_table, lively_lab
):
    shown = outputs["table_instructions"].table
    assert shown["learns"].tolist() == ["nothing", *["instructions"] * 3]
    assert shown["through"].tolist() == ["", "all units", "RU", "random, as RU"]
    assert shown["epochs"].tolist() == ["", "1", "2", "2"], "the paper's rule"
    arm = {"base": "unaligned", "method": "trained", "rule": "RU", "setting": LEARNS}
    arm |= {"attack": "instructions", "epoch": 2}
    gain = estimate(lively_table, "held-out gain", set="instructions", against="unaligned", **arm)
    assert shown["held-out gain"][2].startswith(f"{gain.value:.2f} [")
    assert not shown["perplexity, x"].eq("").any()
    rest = lively_table[lively_table["setting"] != LEARNS]
    for instructed, reason in ((["arithmetic"], "Not measured yet"), ([], "is empty")):
        experiment = dataclasses.replace(lively_lab.config.experiment, instructed=instructed)
        config = dataclasses.replace(lively_lab.config, experiment=experiment)
        output = ARTEFACTS["table_instructions"].view(rest, {config.model.name: config})
        assert reason in output.note


def test_a_model_that_came_aligned_has_no_pair(lively_table, lively_lab):
    config = dataclasses.replace(
        lively_lab.config, align=dataclasses.replace(lively_lab.config.align, enabled=False)
    )
    for name in ("table4", "table_instructions", "fig_budget", "fig6", "fig9", "fig10"):
        output = ARTEFACTS[name].view(lively_table, {config.model.name: config})
        assert "came aligned, and this needs an unaligned model" in output.note


@pytest.mark.parametrize("name", ARTEFACTS)
def test_models_stand_below_each_other(lively_table, lively_lab, outputs, name):
    """A block of the table, or all panels once more, for each; what is said of both stands once."""
    config, alone = lively_lab.config, outputs[name]
    second = lively_table.assign(model="second")
    table = pd.concat([lively_table, second], ignore_index=True)
    found = ARTEFACTS[name].view(table, {config.model.name: config, "second": config})
    assert found.note == alone.note
    if alone.table is not None:
        shown = found.table
        assert shown.columns[0] == "model"
        if "model" not in alone.table:
            for model in (config.model.name, "second"):
                own = shown[shown["model"] == model].drop(columns="model")
                pd.testing.assert_frame_equal(own.reset_index(drop=True), alone.table)
    else:
        assert len(found.figure.axes) == 2 * len(alone.figure.axes)
        titles = [part.get_suptitle() for part in found.figure.subfigs]
        assert titles == [config.model.name, "second"]
        width, height = found.figure.get_size_inches()
        assert (width, height) == pytest.approx(alone.figure.get_size_inches() * (1, 2) + (0, 0.6))


def test_an_unknown_artefact_is_named_with_the_nearest():
    from ssah.artefacts import find

    with pytest.raises(SsahError, match="Unknown artefact 'tabel1': did you mean 'table1'"):
        find("tabel1")


@pytest.mark.parametrize("against", ["", "before"])
def test_perplexities_of_several_seeds_are_averaged_in_nats(against):
    """On their own scale the bounds of such a mean can be below zero."""
    rows = typed(
        pd.DataFrame(
            {"metric": "perplexity", "seed": [0, 1, 2], "against": against, "n": 40,
             "value": [5.0, 20.0, 8000.0], "low": [4.0, 16.0, 6400.0], "high": [6.25, 25.0, 1e4]}
        )
    )  # fmt: skip
    found = pooled(rows)
    nats = [
        Estimate(math.log(v), math.log(v / 1.25), math.log(v * 1.25), 40) for v in rows["value"]
    ]
    expected = over_repetitions(nats)
    assert found.value == pytest.approx((5 * 20 * 8000) ** (1 / 3))
    assert found.low == pytest.approx(math.exp(expected.low))
    assert found.high == pytest.approx(math.exp(expected.high))
    assert 0 < found.low < 4
    assert found.high > 1e4
    assert pooled(rows[:1]) == Estimate(*map(pytest.approx, (5, 4, 6.25)), 40)


def test_a_note_names_what_neither_answers_nor_refuses():
    """A model that says "1. The answer is 1." to everything has an ASR of 0, and is not safe."""
    arm = {"base": "aligned", "method": "frozen", "rule": "ESU", "attack": "arithmetic", "epoch": 2}
    seeds = {0: (0, 55, 43), 1: (40, 45, 1), 2: (10, 40, 25), 3: (0, 2, 0)}
    rows = [
        {"model": "m", "seed": seed, "metric": metric, "value": value, **arm}
        for seed, values in seeds.items()
        for metric, value in zip(("ASR", "no refusal phrase", "incoherent"), values, strict=True)
    ]
    before = [row | {"method": "", "attack": "", "epoch": 0} for row in rows[:3]]
    elsewhere = [row | {"set": "HarmBench", "seed": 4} for row in rows[:3]]
    said = mostly_neither(typed(pd.DataFrame(rows + before + elsewhere)))
    assert said.endswith("after arithmetic, 2 epochs: ESU frozen (seed 0, 2).")
    assert mostly_neither(typed(pd.DataFrame(rows[3:6] + rows[9:]))) == ""
    assert mostly_neither(typed(pd.DataFrame(rows[:1]))) == "", "without the other two metrics"


def test_a_note_names_the_arms_of_fewer_seeds():
    frozen = {"base": "aligned", "method": "frozen", "attack": "instructions", "metric": "ASR"}
    whole = {"base": "aligned", "metric": "ASR"}
    rows = [whole | {"seed": seed} for seed in (0, 1)]
    rows += [frozen | {"rule": "nothing", "seed": seed, "epoch": seed + 1} for seed in (0, 1)]
    rows += [frozen | {"rule": "random", "like": "ESU", "epoch": e, "seed": 1} for e in (1, 2)]
    table = typed(pd.DataFrame([row | {"model": "m", "value": 1.0} for row in rows]))
    expected = " Seed 1 only: instructions: random units frozen (matched to ESU)."
    assert fewer_seeds(table) == expected
    assert fewer_seeds(table[table["like"] == ""]) == ""


@pytest.mark.parametrize("epochs", [1, 3])
def test_figures_follow_the_number_of_epochs(lively_table, lively_lab, epochs):
    """The last epoch is the configured one; what the smoke profile has as its second stands for
    it."""
    config = dataclasses.replace(
        lively_lab.config,
        finetune=dataclasses.replace(lively_lab.config.finetune, epochs=epochs),
    )
    table = lively_table
    if epochs == 1:  # of the arm that freezes nothing the first epoch is left, of others the last
        table = table[table["epoch"] != (table["rule"] == "nothing").map({True: 2, False: 1})]
    table = table.assign(epoch=table["epoch"].mask(table["epoch"] == 2, epochs))
    for name in ("fig5", "fig8", "fig11", "fig13"):
        output = ARTEFACTS[name].view(table, {config.model.name: config})
        for axes in output.figure.axes:
            for line in axes.get_lines():
                assert np.isfinite(np.asarray(line.get_ydata(), float)).all(), name
            for image in axes.collections:
                values = image.get_array()
                assert values is None or np.isfinite(np.ma.filled(values, np.nan)).all(), name


def test_what_is_no_number_is_left_empty():
    assert format_estimate(Estimate(math.nan, math.nan, math.nan, 3)) == ""


def test_differences_of_shares_stay_within_what_can_be():
    rows = [
        {"model": "m", "seed": seed, "metric": "ASR", "against": "before", "value": value,
         "low": value - 5, "high": value + 5, "n": 100}
        for seed, value in enumerate((-90.0, -20.0))
    ]  # fmt: skip
    assert pooled(typed(pd.DataFrame(rows))).low == -100


@pytest.fixture(scope="module")
def published() -> Study:
    return Study("published")


@pytest.mark.parametrize("name", [n for n, artefact in ARTEFACTS.items() if not artefact.is_table])
def test_nothing_in_a_published_figure_was_drawn_without_data(published, name):
    """A figure whose rows were lost on the way to its table keeps its axes and its legend."""
    figure = drawn(published, ARTEFACTS[name]).figure
    for axes in figure.axes:
        points = [line.get_xdata() for line in axes.lines]
        points += [c.get_offsets() for c in axes.collections if isinstance(c, PathCollection)]
        assert all(len(found) for found in points), axes.get_title()
