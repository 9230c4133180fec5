"""Models that are studied in another way: for aligning alone, aligned by their makers, or not of
the paper's main family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pandas as pd
import pytest

from ssah.app.study import Study
from ssah.artefacts import ARTEFACTS, BUDGET
from ssah.artefacts.pick import paper
from ssah.lab import catalogue
from ssah.lab.catalogue import headline
from ssah.lab.config import Config
from ssah.lab.lab import Lab
from ssah.lab.measure import measured

PAIRED = ("fig2", "fig4", "fig_margin", "fig_readout")


def changed(config: Config, **model: str) -> Config:
    """The same study of a model of which something else is said."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


# --- for aligning alone ----------------------------------------------------------------------


def test_of_a_model_for_aligning_only_its_alignment_is_asked(smoke_lab):
    lab = smoke_lab("model.use=aligning")
    asking = {name for name, artefact in ARTEFACTS.items() if artefact.ask(lab)}
    assert asking == {"table4", "table_instructions", "fig_budget", "fig6", "fig9", "fig10"}
    own = {n for n, artefact in ARTEFACTS.items() if artefact.notebook == BUDGET}
    assert asking <= own
    measures = [m for name in asking for m in ARTEFACTS[name].ask(lab)]
    arms = {arm for measure in measures for arm, _ in measure.questions}
    assert {arm.attack for arm in arms if arm.setting != catalogue.LEARNS} == {""}
    assert all(arm.base == "unaligned" and arm.method in ("", "trained") for arm in arms)
    everything = {arm for m in ARTEFACTS["table4"].ask(smoke_lab()) for arm, _ in m.questions}
    assert any(arm.attack == "instructions" for arm in everything), "of others it is"


def test_its_headline_arms_are_not_attacked(smoke_lab):
    arms = headline(smoke_lab("model.use=aligning"))
    assert {arm.attack for arm in arms} == {""}
    assert {arm.method for arm in arms} == {"", "trained"}


@pytest.mark.parametrize("name", ARTEFACTS)
def test_what_is_not_measured_of_it_says_so(lively_table, lively_lab, name):
    config = changed(lively_lab.config, use="aligning")
    if ARTEFACTS[name].notebook != BUDGET:
        output = ARTEFACTS[name].view(lively_table.iloc[:0], {config.model.name: config})
        assert "is for aligning alone" in output.note
        assert (output.table is None) == (not name.startswith("table"))
        return
    unattacked = lively_table[lively_table["attack"] == ""]
    output = ARTEFACTS[name].view(unattacked, {config.model.name: config})
    assert output.table is not None or output.figure.axes
    if name == "table4":
        assert "ASR, attacked" not in output.table
        assert "so nothing is attacked" in output.note


# --- aligned by its makers -------------------------------------------------------------------


def test_a_model_is_held_against_the_unaligned_one_or_itself_without_esu(smoke_lab):
    assert [arm.name for arm in catalogue.pair(smoke_lab())] == ["aligned", "unaligned"]
    whole, other = catalogue.pair(smoke_lab("align=none"))
    assert (whole.name, other.name) == ("aligned", "ESU removed")
    assert other == catalogue.without(smoke_lab("align=none"), "ESU"), "it is Table 1's arm"


@pytest.fixture(scope="module")
def came_aligned(smoke_home, lively) -> Lab:
    """A model whose answers say something, and that is not aligned here."""
    from ssah.core.store import Store
    from ssah.lab.config import compose

    return Lab(compose("smoke", [*lively, "align=none"]), Store(smoke_home / "runs"), 0)


@pytest.fixture(scope="module")
def paired(came_aligned) -> pd.DataFrame:
    return measured(came_aligned, [m for n in PAIRED for m in ARTEFACTS[n].ask(came_aligned)])[0]


def test_figures_show_it_without_its_esu(paired, came_aligned):
    config = came_aligned.config
    shown = {n: ARTEFACTS[n].view(paired, {config.model.name: config}) for n in PAIRED}
    for name in ("fig2", "fig4"):
        words = [text.get_text() for text in shown[name].figure.axes[0].texts]
        assert words == ["aligned", "ESU removed"]
        assert "the same model without its ESU below" in shown[name].note
        low, high = shown[name].figure.axes[0].get_ylim()
        assert low == -high < 0
    for name in ("fig4", "fig_margin", "fig_readout"):
        axes = shown[name].figure.axes[2 if name == "fig4" else 0]
        labels = axes.get_legend_handles_labels()[1]
        assert {label.partition(",")[0] for label in labels} >= {"aligned", "ESU removed"}
        styles = {line.get_label().partition(",")[0]: line.get_linestyle() for line in axes.lines}
        assert styles["aligned"] != styles["ESU removed"]
    assert not paired[paired["base"] == "unaligned"].shape[0]
    against = paired[(paired["against"] == "ESU removed") & (paired["metric"] == "lean")]
    assert len(against) == 2
    assert (against["method"] == "").all()


def test_its_states_are_those_of_the_ablated_model(paired, came_aligned):
    """Not those of the whole model once more."""
    columns = ["metric", "set", "block", "at"]
    both = paired[paired["against"] == ""]
    whole, without = (both[both["method"] == m].set_index(columns) for m in ("", "removed"))
    shared = whole.index.intersection(without.index)
    assert len(shared) > 20
    assert (whole.loc[shared, "value"] != without.loc[shared, "value"]).mean() > 0.5


# --- of another family -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "same"), [("table12", "table1"), ("table14", "table2"), ("table15", "table13")]
)
def test_another_familys_rows_stand_beside_mistrals(
    smoke_lab, lively_table, lively_lab, name, same
):
    assert ARTEFACTS[name].ask(smoke_lab()) == []
    other = smoke_lab("model.family=qwen2")
    asked, known = ARTEFACTS[name].ask(other), ARTEFACTS[same].ask(other)
    assert asked
    assert set(asked) <= set(known)
    config = changed(lively_lab.config, family="qwen2")
    configs = {config.model.name: config}
    output = ARTEFACTS[name].view(lively_table, configs)
    shown, main = output.table, ARTEFACTS[same].view(lively_table, configs).table
    printed = next(c for c in shown if c.startswith("paper: "))
    if name == "table14":  # the lesson is no attack
        main = main[main["fine-tuned on"] != "dialogues"]
    pd.testing.assert_frame_equal(shown.drop(columns=printed), main.drop(columns=printed))
    assert "Mistral-7B-Instruct-v0.2" in output.note
    assert "Llama-2" not in output.note
    assert set(shown[printed]) != set(main[printed])


def test_the_papers_numbers_are_mistrals(lively_table, lively_lab):
    config = changed(lively_lab.config, family="qwen2")
    configs = {config.model.name: config}
    table = ARTEFACTS["table12"].view(lively_table, configs).table.set_index("removed")
    assert table.loc["ESU", "paper: no refusal phrase, perplexity"] == "91, 6.2"
    table = ARTEFACTS["table14"].view(lively_table, configs).table
    full = table[(table["frozen"] == "nothing") & (table["epochs"] == "1")]
    printed = paper("table14", "Mistral-7B-Instruct-v0.2")["alpaca:full", "asr_keyword"]
    assert list(full["paper: no refusal phrase"]) == [f"{printed:.1f}"]


def test_of_the_main_family_the_papers_rows_stand_alone(lively_table, lively_lab):
    config = lively_lab.config
    output = ARTEFACTS["table12"].view(lively_table, {config.model.name: config})
    assert list(output.table["removed"]) == ["dense", "ESU", "EUU", "RU"]
    assert list(output.table["no refusal phrase"]) == ["17.0", "91.0", "23.0", "12.0"]
    assert output.table["model"].str.startswith("paper: Mistral").all()
    assert 'make table12 ARGS="model=qwen2_5_coder"' in output.note


def test_headline_seeds_are_those_of_the_same_table(smoke_study: Callable[..., Study]):
    study = smoke_study("model.family=qwen2", "headline_seeds=2")
    for name, same in (("table12", "table1"), ("table14", "table2")):
        own = study.asked([ARTEFACTS[name]])
        assert own[1][0].only_headline
        assert own[1][1]
        assert set(own[1][1]) <= set(study.asked([ARTEFACTS[same]])[1][1])
