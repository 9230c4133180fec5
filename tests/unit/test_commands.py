"""Commands: what a plan says, jobs that run apart, reading, merging, and what may be published."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from ssah.app import cli, commands, processes, report
from ssah.app.study import Study
from ssah.artefacts import ARTEFACTS
from ssah.core.errors import SsahError
from ssah.lab import lab as lab_module
from ssah.lab.catalogue import headline
from ssah.lab.config import compose
from ssah.lab.jobs import FIRST
from ssah.lab.measure import collect, measured
from ssah.lab.table import read_table, typed, write_table


def table(value: float, seed: int = 0, commits: str = "") -> pd.DataFrame:
    row = {"model": "m", "base": "aligned", "metric": "ASR", "seed": seed, "value": value, "n": 3}
    return typed(pd.DataFrame([row | {"low": value, "high": value, "commits": commits}]))


# --- plans and jobs --------------------------------------------------------------------------


def test_a_plan_names_every_job_and_loads_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SSAH_HOME", str(tmp_path))
    study = Study("smoke", ["seed=40", "n_seeds=2"])
    monkeypatch.setattr(lab_module, "load_model", lambda *_: pytest.fail("a model was loaded"))
    commands.plan(study)
    printed = capsys.readouterr().out
    jobs = study.jobs()
    assert [job.name for job in jobs[:2]] == [FIRST, FIRST], "what others need comes first"
    for job in jobs:
        assert job.name in printed
        # What compares a model with itself needs nothing.
        assert job.asked - 2 <= job.missing() <= job.asked > 0
    assert {job.lab.seed for job in jobs} == {40, 41}


def test_jobs_that_run_apart_compute_what_one_run_does(smoke_study):
    """In any order after the first; then nothing is left to do."""
    names = ["table1", "table2", "table4", "table_defences", "fig_sufficiency"]
    study = smoke_study("seed=42")
    first, *others = study.jobs(names)
    for job in (first, *reversed(others)):
        collect(job.lab, job.measures)
    later = smoke_study("seed=42")
    assert [job.missing() for job in later.jobs(names)] == [0] * (1 + len(others))
    (lab,) = later.labs
    (_, asked), *_ = later.asked([ARTEFACTS[name] for name in names])
    with lab.store.only_reading():
        assert len(measured(lab, asked)[0]) > 500


def test_jobs_side_by_side_give_the_table_of_one_process(smoke_study, tmp_path, monkeypatch):
    found = []
    for count in (1, 2):
        home = tmp_path / str(count)
        monkeypatch.setenv("SSAH_HOME", str(home))
        study = Study("smoke", [f"runtime.processes={count}"], results=home / "results")
        study.collect(["table1", "fig_roles_map"])
        with study.store.only_reading():
            study.show("table1")
        found.append(read_table(study.results).drop(columns="runs"))
    assert found[0].equals(found[1])


def test_a_job_that_fails_in_another_process_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("SSAH_HOME", str(tmp_path))
    rows = "finetune.rows={instructions: 9999, dialogues: 9999, arithmetic: 9999}"
    study = Study("smoke", [rows, "runtime.processes=2"], results=tmp_path / "results")
    with pytest.raises(SsahError, match=r"ask for more than the \d+ rows that there are"):
        study.collect(["table2"])


@pytest.mark.parametrize(
    ("memory", "cores", "source", "device", "expected"),
    [
        (24, 2, "embedded", "cpu", 2),
        (8, 2, "embedded", "cpu", 1),
        (64, 4, "embedded", "cpu", 4),
        (16, 8, "embedded", "cpu", 2),
        (24, 2, "/a/folder", "cpu", 1),
        (24, 2, "embedded", "cuda", 1),
    ],
)
def test_processes_are_as_many_as_memory_and_cores_allow(
    monkeypatch, memory, cores, source, device, expected
):
    total = SimpleNamespace(total=memory * 2**30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: total)
    monkeypatch.setattr("torch.get_num_threads", lambda: cores)
    monkeypatch.setattr(processes, "pick_device", lambda _: torch.device(device))
    config = compose("laptop")
    config.model.source = source
    assert processes.side_by_side(config) == expected
    config.runtime.processes = 3
    assert processes.side_by_side(config) == 3


def test_there_is_no_job_beyond_the_plan(smoke_study, monkeypatch):
    study = smoke_study()
    monkeypatch.setattr(commands, "Study", lambda *_: study)
    with pytest.raises(SsahError, match=f"no job 999: the plan has 0 to {len(study.jobs()) - 1}"):
        commands.run_job(999, "smoke", [])


# --- reading ---------------------------------------------------------------------------------


def test_read_prints_verdicts_and_writes_nothing(smoke_study, monkeypatch, capsys):
    study = smoke_study()
    monkeypatch.setattr(commands, "Study", lambda *_: study)
    before = set(study.results.rglob("*")) if study.results.exists() else set()
    assert cli.main(["read", "ESU removed", "profile=smoke", "--n", "2"]) == 0
    printed = capsys.readouterr().out
    prompts = [row.prompt for row in study.labs[0].rows("harmful_evaluation")]
    assert sum(prompt in printed for prompt in prompts) >= 2
    assert (set(study.results.rglob("*")) if study.results.exists() else set()) == before
    assert cli.main(["read", "profile=smoke"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names == [arm.name for arm in headline(study.labs[0])]
    assert {"aligned", "ESU removed", "instructions, 1 epoch: nothing frozen"} <= set(names)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ESU remover"], "no arm 'ESU remover': did you mean 'ESU removed'"),
        (["--n", "0"], "not in the range"),
        (["--n", "many"], "not a valid integer"),
        (["dense", "no.such=1"], "Unknown override"),
        (["dense", "profile=none"], "Unknown profile"),
    ],
)
def test_bad_words_are_one_sentence(smoke_study, monkeypatch, capsys, arguments, says):
    if says.startswith("no arm"):
        monkeypatch.setattr(commands, "Study", lambda *_: smoke_study())
    assert cli.main(["read", *arguments]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("command", [["table1"], ["plan"]])
def test_a_word_that_takes_a_key_away_is_an_override(capsys, command):
    assert cli.main([*command, "profile=smoke", "~experiment.defences.Lissa"]) == 1
    error = capsys.readouterr().err
    assert "Unknown override 'experiment.defences.Lissa': did you mean" in error


# --- merging and publishing ------------------------------------------------------------------


def test_seeds_of_several_machines_are_merged_and_drawn_as_if_measured_together(
    smoke_study, tmp_path
):
    folders = []
    for seeds in (["seed=0"], ["seed=1"], ["seed=0", "n_seeds=2"]):
        study = smoke_study(*seeds)
        study.results = tmp_path / ",".join(seeds)
        for artefact in ("table1", "fig_share_sweep"):
            study.show(artefact)
        folders.append(study.results)
    zero, one, both = folders
    commands.merge([one, zero], tmp_path / "merged")
    by_seed = read_table(both).sort_values("seed", kind="stable", ignore_index=True)
    assert read_table(tmp_path / "merged").equals(by_seed)
    for name in ("tables/table1.csv", "tables/fig_share_sweep.csv"):
        # What two artefacts ask stands where the later one put it.
        made, wanted = (
            sorted((folder / name).read_text().splitlines())
            for folder in (tmp_path / "merged", both)
        )
        assert made == wanted, name
    assert (tmp_path / "merged" / "figures" / "fig_share_sweep.png").exists()
    shown, wanted = (
        (folder / "tables" / "table1.md").read_text().split("Profile")[0]
        for folder in (tmp_path / "merged", both)
    )
    assert shown == wanted
    with pytest.raises(SsahError, match=r"holds no measurements\.parquet"):
        commands.merge([zero, tmp_path / "nothing"], tmp_path / "both")


def test_models_are_merged_and_drawn_below_each_other(smoke_study, tmp_path):
    folders = []
    for overrides in ([], ["model.name=second"]):
        study = smoke_study(*overrides)
        study.results = tmp_path / (study.config.model.name)
        for artefact in ("table1", "fig_share_sweep"):
            study.show(artefact)
        folders.append(study.results)
    commands.merge(folders, tmp_path / "both")
    shown = (tmp_path / "both" / "tables" / "table1.md").read_text()
    assert shown.count("| tiny ") == shown.count("| second ") > 3
    assert "model tiny, second, seeds 0" in shown
    assert set(read_table(tmp_path / "both")["model"]) == {"tiny", "second"}
    commands.merge([tmp_path / "both"], tmp_path / "again")
    assert (tmp_path / "again" / "tables" / "table1.md").read_text() == shown, "it names both"


def shown(study: Study, folder: Path, artefact: str = "table1") -> Path:
    study.results = folder
    study.show(artefact)
    return folder


def test_runs_that_ask_for_other_arms_are_drawn_with_the_arms_of_both(smoke_study, tmp_path):
    asked = ("ESU", "RU")
    folders = [
        shown(smoke_study(f"experiment.removed=[{name}]"), tmp_path / name) for name in asked
    ]
    commands.merge(folders, tmp_path / "both")
    drawn = (tmp_path / "both" / "tables" / "table1.md").read_text()
    for name in asked:
        assert f"| {name} " in drawn
    assert "in the runs that settings.json lists" in drawn
    runs = json.loads((tmp_path / "both" / "settings.json").read_text())["tiny"]
    assert [run["overrides"] for run in runs] == [[f"experiment.removed=[{n}]"] for n in asked]


def test_runs_of_other_settings_are_not_merged(smoke_study, tmp_path):
    folders = [shown(smoke_study(), tmp_path / "own")]
    folders += [shown(smoke_study("evaluate.max_new_tokens=3", "seed=1"), tmp_path / "shorter")]
    with pytest.raises(SsahError, match=r"Runs of tiny differ in evaluate\.max_new_tokens: only"):
        commands.merge(folders, tmp_path / "both")
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"tiny": {"profile": "smoke", "overrides": []}}'])
def test_settings_that_say_nothing_of_runs_are_one_sentence(smoke_study, tmp_path, text):
    folder = shown(smoke_study(), tmp_path / "own")
    (folder / "settings.json").write_text(text)
    with pytest.raises(SsahError, match=r"settings\.json does not say which runs made the results"):
        commands.merge([folder], tmp_path / "both")


def test_published_results_are_shown_and_nothing_is_computed(smoke_study, tmp_path, monkeypatch):
    folder = shown(smoke_study(), tmp_path / "published")
    monkeypatch.setattr("ssah.app.study.results_root", lambda: tmp_path)
    monkeypatch.setenv("SSAH_HOME", str(tmp_path / "home"))
    study = Study("published", only=["table1", "fig5"])
    expected = smoke_study().show("table1")
    pd.testing.assert_frame_equal(study.show("table1"), expected)
    assert study.show("fig5") is not None, "it says that it was not measured"
    assert study.show("table2") is None, "it was not asked for"
    assert not (tmp_path / "home" / "runs").exists()
    for command in ("plan", "table1", "reproduce"):
        assert cli.main([command, "profile=published"]) == 1
    with pytest.raises(SsahError, match="takes no overrides: choose profile=laptop"):
        Study("published", ["seed=1"])
    (folder / "settings.json").unlink()
    with pytest.raises(SsahError, match="published is not there: the published results come with"):
        Study("published")


def test_only_what_the_repository_made_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "results_root", lambda: tmp_path)
    for commits in ("0123456789", "HEAD 0123456789"):
        with pytest.raises(SsahError, match="commit 0123456789, which is not in the repository"):
            report.require_known_commits(table(1, commits=commits))
    report.require_known_commits(table(1, commits="HEAD"))
    write_table(table(1, commits="abc+"), tmp_path / "own")
    with pytest.raises(SsahError, match="uncommitted changes"):
        report.publish(tmp_path / "own")
    assert not (tmp_path / "published").exists()


def test_publishing_a_run_loses_no_other_model_or_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "results_root", lambda: tmp_path)
    both = pd.concat([table(1, commits="HEAD"), table(1, commits="HEAD").assign(seed=7)])
    write_table(both, tmp_path / "published")
    write_table(table(1, commits="HEAD"), tmp_path / "own")
    with pytest.raises(SsahError, match=r"holds \w+ seed 7, which this run lacks"):
        report.publish(tmp_path / "own")
