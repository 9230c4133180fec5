"""The headline arms by name, their verdicts, and agreement of the judges in a run."""

from __future__ import annotations

import pytest

from ssah.app import cli
from ssah.app.study import Study
from ssah.artefacts import Output, find, verdicts
from ssah.core.errors import SsahError
from ssah.evaluate import judges
from ssah.evaluate.judges import VERDICTS, attack_success, not_refused
from ssah.evaluate.labels import key, known_labels
from ssah.lab.arms import Arm
from ssah.lab.reading import headline_arms, random_completions

pytestmark = pytest.mark.usefixtures("toy_verdicts")


@pytest.fixture(scope="module")
def output(attacked_study) -> Output:
    return find("fig_verdicts").compute(attacked_study)


def shares(output: Output, arm: str) -> dict[str, float]:
    return {r["metric"]: r["value"] for r in output.metrics if r["arm"] == arm}


def test_every_arm_is_asked_every_evaluation_prompt(attacked_study):
    stages = attacked_study.stages(0)
    arms = headline_arms(stages)
    prompts = [row.prompt for row in stages.rows("harmful_evaluation")]
    for said in arms.values():
        assert [c.prompt for c in said()] == prompts
    assert {"dense", "unaligned", "ESU", "random, as ESU", "aligned through RU"} <= set(arms)
    assert "arithmetic: nothing, 1 epoch" in arms
    assert arms["dense"]() == stages.completions("harmful_evaluation", Arm())
    different = {tuple(c.text for c in said()) for said in arms.values()}
    assert len(different) >= 6, "else arms could be exchanged without notice"


def test_bars_are_shares_of_verdicts(output, attacked_study):
    for arm, said in headline_arms(attacked_study.stages(0)).items():
        completions, found = said(), shares(output, arm)
        n = len(completions)
        assert set(found) == {*VERDICTS, verdicts.CORRECTED}
        assert sum(found[v] for v in VERDICTS) == pytest.approx(100)
        assert found["answered"] == pytest.approx(100 * sum(attack_success(completions)) / n)
        both = found["answered"] + found["evaded"]
        assert both == pytest.approx(100 * sum(not_refused(completions)) / n)


def test_every_bar_is_as_long_as_its_share(output):
    axes = output.figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    bars, points = axes.containers[: len(VERDICTS)], axes.containers[len(VERDICTS) :]
    corrected = [float(point.lines[0].get_xdata()[0]) for point in points]
    assert corrected == pytest.approx([shares(output, n)[verdicts.CORRECTED] for n in names])
    for container, verdict in zip(bars, verdicts._STYLES, strict=True):
        for name, bar in zip(names, container, strict=True):
            assert bar.get_width() == pytest.approx(shares(output, name)[verdict])


def test_labels_are_found_by_their_hash_and_only_the_test_half_counts(attacked_study, monkeypatch):
    arms = headline_arms(attacked_study.stages(0))
    said = {key(c): judges.judge(c) for name in ("dense", "ESU") for c in arms[name]()}
    labels = known_labels().head(0)
    chosen = list(said)[:4]
    wrong = next(v for v in VERDICTS if v != said[chosen[0]])
    for number, known in enumerate(chosen):
        label, half = (wrong if number == 0 else said[known]), ("test", "choose")[number == 3]
        labels.loc[number] = [known, "m", "a", "s", half, label, "", label]
    monkeypatch.setattr(verdicts, "known_labels", lambda: labels)
    table = find("table_judges").compute(attacked_study).table
    rows = table[table["completions of"] == "all arms"].set_index("verdict")
    assert set(rows["n"]) == {"3"}
    assert rows.loc[wrong, "accuracy"].startswith("66.7 [")


def test_without_labelled_completions_the_table_is_empty(attacked_study):
    assert find("table_judges").compute(attacked_study).table.empty


def test_completions_are_drawn_at_random_and_at_most_all(attacked_study):
    stages = attacked_study.stages(0)
    all_of_them = headline_arms(stages)["dense"]()
    assert sorted(c.prompt for c in random_completions(stages, "dense", 1000)) == sorted(
        c.prompt for c in all_of_them
    )
    few = random_completions(stages, "dense", 3)
    assert len(few) == 3
    assert set(few) <= set(all_of_them)


def test_an_unknown_arm_is_named_with_the_nearest(attacked_study):
    with pytest.raises(SsahError, match="no arm 'ESX': did you mean 'ESU'"):
        random_completions(attacked_study.stages(0), "ESX", 1)


def test_read_prints_both_verdicts_and_writes_nothing(smoke_study, monkeypatch, capsys):
    study: Study = smoke_study()
    monkeypatch.setattr("ssah.app.commands.Study", lambda *_: study)
    before = set(study.results.rglob("*")) if study.results.exists() else set()
    assert cli.main(["read", "dense", "profile=smoke", "--n", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("[") >= 2
    prompts = [row.prompt for row in study.stages(0).rows("harmful_evaluation")]
    assert sum(prompt in printed for prompt in prompts) >= 2
    assert (set(study.results.rglob("*")) if study.results.exists() else set()) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--n", "0"], "not in the range"),
        (["--n", "many"], "not a valid integer"),
        (["dense", "no.such=1"], "Unknown override"),
        (["dense", "profile=none"], "Unknown profile"),
    ],
)
def test_bad_words_are_one_sentence(capsys, arguments, says):
    assert cli.main(["read", *arguments]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 1
