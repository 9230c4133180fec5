"""The command line as a user meets it, on the smoke profile, in a copy of the project."""

from __future__ import annotations

import errno
import math
import os
import signal
import threading

import pandas as pd
import pytest
from transformers import MixtralConfig

from helpers import CommandLine, built, copy_project, finish
from ssah.app import cli, commands
from ssah.artefacts import ARTEFACTS
from ssah.claims.table import claims
from ssah.lab.table import read_table

TABLE = ("table1", "profile=smoke")


# --- in this process: nothing is computed ----------------------------------------------------


def test_help_lists_artefacts_commands_and_groups(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        assert cli.main(arguments) == 0
        text = capsys.readouterr().out
        for name in [*ARTEFACTS, *cli.ssah.commands, *cli.GROUPS]:
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
        (["table1", "--fast"], "No such option"),
        (["notebook"], "Missing argument 'NAME'"),
        (["reproduce", "table1"], "'table1' is not of the form key=value, and reproduce takes no"),
        (["plan", "table1"], "takes no other words"),
        (["claims", "sed=1"], "did you mean 'seed'?"),
        (["read", "ESU", "--n", "0"], "0 is not in the range"),
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
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(commands, "artefacts", fail)
    assert cli.main(["table1"]) == status
    captured = capsys.readouterr().err.strip()
    assert words in captured
    assert len(captured.splitlines()) == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.EACCES, "denied")])
def test_bugs_are_not_hidden(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(commands, "artefacts", fail)
    with pytest.raises(type(error)):
        cli.main(["table1"])


def test_clean_cache_deletes_the_cache_and_nothing_else(tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    (home / "runs" / "x").mkdir(parents=True)
    (home / "mine").touch()
    monkeypatch.setenv("SSAH_HOME", str(home))
    monkeypatch.setattr("click.confirm", lambda question: False)
    assert cli.main(["clean-cache"]) == 0
    assert {p.name for p in home.iterdir()} == {"runs", "mine"}, "nobody agreed"
    assert cli.main(["clean-cache", "--yes"]) == 0
    assert [p.name for p in home.iterdir()] == ["mine"]
    assert cli.main(["clean-cache", "--yes"]) == 0
    assert "There is no" in capsys.readouterr().out


def test_an_unsupported_model_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "moe"
    MixtralConfig().save_pretrained(folder)
    (folder / "model.safetensors").touch()
    monkeypatch.setenv("SSAH_HOME", str(tmp_path / "home"))
    source = f"model.source={folder}"
    assert cli.main(["table1", "profile=smoke", "model=local", source, "align=none"]) == 1
    assert "Model type 'mixtral' has no unit layout" in capsys.readouterr().err
    assert not [*(tmp_path / "home").rglob("run.json")]


def test_the_smoke_profile_cannot_be_published(capsys):
    assert cli.main(["publish", "profile=smoke"]) == 1
    assert "mean nothing" in capsys.readouterr().err


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
    table = read_table(folder)
    removed = table[table["method"] == "removed"]
    assert set(removed["rule"]) >= {"ESU", "EUU", "RU", "random"}
    assert set(table["base"]) == {"aligned", "unaligned"}
    assert table[["value", "low", "high"]].map(math.isfinite).all(axis=None)
    text = (folder / "tables" / "table1.md").read_text()
    assert "Command: ssah table1 profile=smoke" in text
    assert "measured at commit" in text


def test_table1_decides_every_claim_that_rests_on_it(ssah):
    found = pd.read_csv(ssah.results / "smoke" / "claims.csv").set_index("claim")
    for claim in claims():
        if claim["artefact"] == "table1":
            assert found.loc[claim["id"], "verdict"] != "not run", claim["id"]


def test_nothing_half_written_stays(ssah):
    assert not list(ssah.runs.glob("*.partial"))
    files = {p.name for p in (ssah.results / "smoke").rglob("*") if p.is_file()}
    hidden = {name for name in files if name.startswith(".") and not name.endswith(".lock")}
    assert not hidden
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


def test_a_corrupted_run_is_repaired_and_no_other(ssah):
    victim = next(ssah.runs.glob("answers-tiny-*/answers.json"))
    original, table = victim.read_text(), ssah.results / "smoke" / "tables" / "table1.csv"
    before, numbers = ssah.finished_runs(), table.read_text()
    victim.write_text(original[: len(original) // 2])
    done = ssah(*TABLE)
    assert done.returncode == 0, done.stderr
    name = victim.parent.name
    assert f"{name}: answers.json is not what was written; computing it again." in done.stderr
    assert built(done.stderr) == [name]
    assert victim.read_text() == original
    after = ssah.finished_runs()
    assert {n for n in after if after[n] != before[n]} == {name}
    assert table.read_text() == numbers


def test_a_sweep_keeps_its_results_apart(ssah):
    before = read_table(ssah.results / "smoke")
    done = ssah("fig_roles_map", "profile=smoke", "-m", "seed=0,1")
    assert done.returncode == 0, done.stderr
    folders = [ssah.results / "smoke" / f"seed={seed}" for seed in (0, 1)]
    seeds = []
    for folder in folders:
        for name in ("figures/fig_roles_map.png", "figures/fig_roles_map.svg"):
            assert (folder / name).stat().st_size > 0
            assert str(folder / name) in done.stdout
        seeds.append(set(read_table(folder)["seed"]))
    assert seeds == [{0}, {1}]
    assert read_table(ssah.results / "smoke").equals(before)
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
        if "Building train_refusals" in line:
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
    numbers = [read_table(c.results / "smoke").drop(columns="commits") for c in (empty, ssah)]
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
    assert len(read_table(empty.results / "smoke"))
