"""The command line as a user meets it, on the smoke profile, in a copy of the project."""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
from pathlib import Path

import pandas as pd
import pytest
from transformers import MixtralConfig

from helpers import CommandLine, built, copy_project, finish
from ssah import cli
from ssah.artefacts import ARTEFACTS
from ssah.claims import CLAIMS

TABLE = ("table1", "profile=smoke")
ARMS = {"dense", "unaligned", "ESU", "EUU", "RU", "ESU, mean", "EUU, mean", "RU, mean"}


def read_metrics(results: Path) -> pd.DataFrame:
    return pd.read_csv(results / "metrics.csv", dtype={"seed": str})


# --- in this process: nothing is computed ----------------------------------------------------


def test_help_lists_artefacts_commands_and_groups(capsys):
    for arguments in ([], ["--help"], ["table1", "-h"]):
        assert cli.main(arguments) == 0
        text = capsys.readouterr().out
        for name in [*ARTEFACTS, *cli.COMMANDS, *cli.GROUPS]:
            assert name in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tabel1"], "Unknown artefact or command 'tabel1': did you mean 'table1'?"),
        (["table1", "fig_roles_mp"], "did you mean 'fig_roles_map'?"),
        (["reproduc"], "did you mean 'reproduce'?"),
        (["table1", "attribution.token=all"], "did you mean 'attribution.tokens'?"),
        (["table1", "profile=smok"], "did you mean 'smoke'?"),
        (["table1", "profile=smoke", "seed=abc"], "seed"),
        (["table1", "--fast"], "Unknown option --fast"),
        (["notebook"], "Name one notebook"),
        (["table1", "profile=smoke", "seed=0,1"], "Cannot compose"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SSAH_HOME", str(tmp_path / "home"))
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("ssah: ")
    assert sentence in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("CUDA out of memory"), 1, "runtime.device=cpu"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "no disk space is left"),
        (KeyboardInterrupt(), 130, "finished stages are kept"),
    ],
)
def test_what_a_machine_cannot_do_is_one_sentence(monkeypatch, capsys, error, status, words):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main(["table1"]) == status
    captured = capsys.readouterr().err
    assert words in captured
    assert len(captured.splitlines()) == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.EACCES, "denied")])
def test_bugs_are_not_hidden(monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    with pytest.raises(type(error)):
        cli.main(["table1"])


def test_clean_cache_deletes_the_cache_and_nothing_else(tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    (home / "runs" / "x").mkdir(parents=True)
    (home / "mine").touch()
    monkeypatch.setenv("SSAH_HOME", str(home))
    assert cli.main(["clean-cache"]) == 0
    assert [p.name for p in home.iterdir()] == ["mine"]


def test_an_unsupported_model_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "moe"
    MixtralConfig().save_pretrained(folder)
    (folder / "model.safetensors").touch()
    monkeypatch.setenv("SSAH_HOME", str(tmp_path / "home"))
    source = f"model.source={folder}"
    assert cli.main(["table1", "profile=smoke", "model=local", source, "align=none"]) == 1
    assert "Model type 'mixtral' has no unit layout" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def test_the_smoke_profile_cannot_be_published(capsys):
    assert cli.main(["publish", "profile=smoke"]) == 1
    assert "mean nothing" in capsys.readouterr().err


def test_what_cannot_be_published_is_named(capsys):
    assert cli.main(["publish", "table44"]) == 1
    assert "There is no notebook or artefact 'table44': did you mean" in capsys.readouterr().err
    assert cli.main(["publish", "table4", "profile=smoke"]) == 1
    assert "mean nothing" in capsys.readouterr().err


def test_a_part_is_measured_as_the_published_run_and_added_to_it(monkeypatch, tmp_path):
    """With the published run's settings unless others are named; the claims are redrawn."""
    calls = []
    monkeypatch.setattr("ssah.study.results_root", lambda: tmp_path)
    monkeypatch.setattr("ssah.cli.results_root", lambda: tmp_path)
    monkeypatch.setattr(cli, "_prepare", lambda *a: calls.append(("prepare", *a[:2])))
    monkeypatch.setattr("ssah.notebooks.execute", lambda *a: calls.append(("execute", *a)))
    monkeypatch.setattr("ssah.study.Study.show", lambda self, name: calls.append(("show", name)))
    for name in ("publish_part", "print_claims"):
        monkeypatch.setattr(f"ssah.report.{name}", lambda *a, name=name: calls.append((name, *a)))
    assert cli.main(["publish", "table1", "06_alignment_budget", "seed=1"]) == 0
    wide = [f"{group}=wide" for group in ("finetune", "evaluate", "probes", "budget")]
    overrides = ["headline_seeds=3", *wide, "seed=1", "add_to=published"]
    results, published = calls[3][1], tmp_path / "published"
    artefacts = ["table1", "table4", "fig_budget", "fig6", "fig9", "fig10"]
    assert calls == [
        ("prepare", "laptop", overrides),
        ("show", "table1"),
        ("execute", "06_alignment_budget", results, "laptop", overrides),
        ("publish_part", results, artefacts, ["06_alignment_budget"]),
        ("execute", "00_index", published, "laptop", ["n_seeds=0"]),
        ("print_claims", published),
    ]
    assert results.parent == tmp_path / "laptop"


# --- in processes of their own ---------------------------------------------------------------


@pytest.fixture(scope="module")
def ssah(tmp_path_factory) -> CommandLine:
    """A copy of the project with a cache in which table 1 has been computed."""
    folder = tmp_path_factory.mktemp("cli")
    command_line = CommandLine(copy_project(folder / "project"), folder / "home")
    done = command_line(*TABLE)
    assert done.returncode == 0, done.stderr
    assert built(done.stderr), "the first run computes"
    command_line.first = done
    return command_line


@pytest.fixture
def empty(tmp_path) -> CommandLine:
    return CommandLine(copy_project(tmp_path / "project"), tmp_path / "home")


def test_table1_from_scratch_writes_its_files(ssah):
    folder = ssah.results / "smoke"
    for suffix in ("csv", "md", "tex"):
        path = folder / "tables" / f"table1.{suffix}"
        assert path.stat().st_size > 0
        assert str(path) in ssah.first.stdout
    metrics = read_metrics(folder)
    assert set(metrics["artefact"]) == {"table1"}
    assert set(metrics["arm"]) >= ARMS
    assert set(metrics["profile"]) == {"smoke"}
    assert metrics[["value", "low", "high"]].map(math.isfinite).all(axis=None)
    assert (metrics["low"] <= metrics["value"] + 1e-9).all()
    assert (metrics["value"] <= metrics["high"] + 1e-9).all()
    text = (folder / "tables" / "table1.md").read_text()
    assert "python -m ssah table1 profile=smoke" in text
    assert "paper: Llama-2-7B-Chat" in text


def test_table1_decides_every_claim_that_rests_on_it(ssah):
    claims = pd.read_csv(ssah.results / "smoke" / "claims.csv").set_index("claim")
    for claim in CLAIMS:
        if claim.artefact == "table1":
            assert claims.loc[claim.id, "verdict"] != "not run", claim.id


def test_nothing_half_written_stays(ssah):
    assert not list(ssah.runs.glob("*.partial"))
    files = {p.name for p in (ssah.results / "smoke").rglob("*") if p.is_file()}
    hidden = {name for name in files if name.startswith(".") and not name.endswith(".lock")}
    assert hidden == {".runs.json"}  # which runs an artefact used, for the times
    top = {p.name for p in ssah.project.iterdir()}
    assert top <= {"conf", "notebooks", "ssah", "results", "pyproject.toml"}


def test_no_completion_leaves_the_cache(ssah):
    for path in (ssah.results / "smoke").rglob("*.csv"):
        assert not {"completion", "response", "prompt"} & set(pd.read_csv(path).columns)


def test_the_second_run_computes_nothing_and_changes_nothing(ssah):
    before = ssah.finished_runs()
    table = (ssah.results / "smoke" / "tables" / "table1.csv").read_text()
    done = ssah(*TABLE)
    assert done.returncode == 0, done.stderr
    assert built(done.stderr) == []
    assert ssah.finished_runs() == before
    assert (ssah.results / "smoke" / "tables" / "table1.csv").read_text() == table
    metrics = read_metrics(ssah.results / "smoke")
    assert not metrics.duplicated(["artefact", "arm", "metric", "seed"]).any()


def test_a_corrupted_run_is_repaired_and_no_other(ssah):
    victim = next(ssah.runs.glob("answers-tiny-*/completions.jsonl"))
    original, table = victim.read_text(), ssah.results / "smoke" / "tables" / "table1.csv"
    before, numbers = ssah.finished_runs(), table.read_text()
    victim.write_text(original[: len(original) // 2])
    done = ssah(*TABLE)
    assert done.returncode == 0, done.stderr
    name = victim.parent.name
    assert f"{name}: completions.jsonl is not what was written; computing it again." in done.stderr
    assert built(done.stderr) == [name]
    assert victim.read_text() == original
    after = ssah.finished_runs()
    assert {n for n in after if after[n] != before[n]} == {name}
    assert table.read_text() == numbers


def test_a_sweep_keeps_its_results_apart(ssah):
    before = (ssah.results / "smoke" / "metrics.csv").read_text()
    done = ssah("fig_roles_map", "profile=smoke", "-m", "seed=0,1")
    assert done.returncode == 0, done.stderr
    folders = [ssah.results / "smoke" / f"seed={seed}" for seed in (0, 1)]
    seeds = []
    for folder in folders:
        for name in ("figures/fig_roles_map.png", "figures/fig_roles_map.svg"):
            assert (folder / name).stat().st_size > 0
            assert str(folder / name) in done.stdout
        seeds.append(set(read_metrics(folder)["seed"]))
    assert seeds == [{"0"}, {"1"}]
    assert (ssah.results / "smoke" / "metrics.csv").read_text() == before
    assert {p.name for p in ssah.project.iterdir()} <= {
        "conf", "notebooks", "ssah", "results", "pyproject.toml"
    }, "a sweep leaves no files of its own"  # fmt: skip


def test_a_kill_in_the_middle_costs_one_stage(empty, ssah):
    process = empty.start(*TABLE)
    lines: list[str] = []
    watchdog = threading.Timer(200, process.kill)
    watchdog.start()
    for line in process.stderr:
        lines.append(line)
        if "Building align" in line:
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.communicate()
    watchdog.cancel()
    assert process.returncode == -signal.SIGKILL, lines
    finished = empty.finished_runs()
    assert finished, "stages before the alignment were finished"
    assert not (empty.results / "smoke").exists()

    done = empty(*TABLE)
    assert done.returncode == 0, done.stderr
    assert not set(built(done.stderr)) & set(finished)
    after = empty.finished_runs()
    assert {name: after[name] for name in finished} == finished
    assert not list(empty.runs.glob("*.partial"))
    # The same seeds give the same names and the same numbers, interrupted or not.
    numbers = [read_metrics(c.results / "smoke")[["arm", "metric", "value"]] for c in (empty, ssah)]
    pd.testing.assert_frame_equal(*numbers)


def test_two_processes_side_by_side_share_the_work(empty):
    processes = [empty.start(*TABLE) for _ in range(2)]
    # Both pipes are drained at the same time: a full one would stop its process.
    done = [None, None]

    def wait(i: int) -> None:
        done[i] = finish(processes[i])

    threads = [threading.Thread(target=wait, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
    names = [name for d in done for name in built(d.stderr)]
    assert len(names) == len(set(names)), "no stage was computed twice"
    assert set(names) == set(empty.finished_runs())
    metrics = read_metrics(empty.results / "smoke")
    assert not metrics.duplicated(["artefact", "arm", "metric", "seed"]).any()
    assert set(metrics["arm"]) >= ARMS
