"""Machines and places that are not the usual ones."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ssah.app.commands import submit
from ssah.app.notebooks import execute
from ssah.app.study import Study, slug
from ssah.core.errors import SsahError
from ssah.core.paths import home
from ssah.core.runtime import peak_memory_mib
from ssah.lab.config import check_keys, compose, with_absolute_paths

# --- processes and devices -------------------------------------------------------------------


def test_a_study_under_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SsahError, match=r"A study is one process \(WORLD_SIZE is 2\).*ssah submit"):
        Study("smoke")


def test_a_machine_without_slurm_is_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SSAH_HOME", str(tmp_path / "home"))
    with pytest.raises(SsahError, match=r"is no part of a slurm cluster \(.*srun.*--cluster local"):
        submit("smoke", [], "slurm", None, {})


def test_a_cluster_without_a_controller_is_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    for name in ("srun", "sbatch"):
        program = tmp_path / name
        program.write_text(
            "#!/bin/sh\necho 'error: Unable to contact slurm controller' >&2\nexit 1\n"
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SSAH_HOME", str(tmp_path / "home"))
    with pytest.raises(SsahError, match=r"slurm took no job: error: Unable to contact.*--cluster"):
        submit("smoke", [], "slurm", None, {})


def test_a_training_on_two_devices_is_refused(smoke_lab, monkeypatch):
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: 2))
    lab = smoke_lab(seed=77)
    with pytest.raises(SsahError, match="CUDA_VISIBLE_DEVICES=0, or send each model to a device"):
        lab.training(lab.aligned).path("epoch-1")


def test_a_system_that_does_not_say_how_much_memory_was_used(monkeypatch):
    assert peak_memory_mib() > 0
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows has none
    assert peak_memory_mib() == 0


# --- paths -----------------------------------------------------------------------------------


def test_relative_paths_reach_a_notebook_as_absolute_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSAH_HOME", "cache")
    assert home() == tmp_path / "cache"
    (tmp_path / "my model").mkdir()
    (tmp_path / "rows.csv").write_text("prompt\nx")
    here = str(tmp_path)
    assert with_absolute_paths("model.source='my model'") == f"model.source='{here}/my model'"
    bare = with_absolute_paths("data.files.harmful=rows.csv")
    whole = with_absolute_paths("data.files.benign={path: rows.csv, limit: 3, gated: false}")
    config = compose("smoke", ["data=files", bare, whole])
    assert config.data.files["harmful"] == f"{here}/rows.csv"
    assert config.data.files["benign"] == {
        "path": f"{here}/rows.csv", "limit": 3, "gated": False
    }  # fmt: skip
    everything = with_absolute_paths("data.files={harmful: rows.csv}")
    assert everything == f"data.files={{harmful: '{here}/rows.csv'}}"
    (tmp_path / "tiny").mkdir()
    (tmp_path / "output").mkdir()
    for kept in (
        "model.source=org/name", "seed=1", f"model.source={here}", "align=none",
        "model.source=tiny", "data.files.benign.response=output", "model.source=tiny,embedded",
    ):  # fmt: skip
        assert with_absolute_paths(kept) == kept


def sentence(call: Callable[[], object]) -> str:
    """What is said about bad input; nothing where it is none."""
    try:
        call()
    except SsahError as error:
        return str(error)
    return ""


def test_two_folders_never_share_results():
    names = [slug([f"model.source={path}"]) for path in ("/m/a-b", "/m/a/b", "/m/a b", "/m/ab")]
    assert len(set(names)) == 4
    assert slug(["seed=1", "n_seeds=3"]) == "n_seeds=3,seed=1"
    assert not set("{}") & set(slug(["+experiment.defences={mixing: [0.1]}"]))
    assert all("/" not in name for name in names)


@pytest.mark.parametrize("value", ["a=b", "f(x", "[x", "a#b", "~x", "a:b", "ü", "模型", "a b,c"])
def test_how_to_quote_a_value_is_said_and_works(value):
    override = f"model.source=/data/{value}"
    said = sentence(lambda: check_keys([override]))
    if said:
        assert "put it in quotes, and once more in others for the shell" in said
        assert f"'model.source=\"/data/{value}\"'" in said
    quoted = f'model.source="/data/{value}"'
    check_keys([quoted])
    assert compose("smoke", ["model=local", quoted]).model.source == f"/data/{value}"


# --- notebooks -------------------------------------------------------------------------------


def test_a_kernel_of_another_environment_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    program = tmp_path / "other" / "bin" / "python"
    spec = {"argv": [str(program), "-m", "ipykernel"], "display_name": "x", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with pytest.raises(
        SsahError, match=r"is .*other/bin/python, of another environment"
    ) as refused:
        execute("00_index", tmp_path / "results", "smoke")
    assert f"{sys.executable} -m ipykernel install --sys-prefix" in str(refused.value)
    assert not (tmp_path / "results").exists()
    program.parent.mkdir(parents=True)
    program.symlink_to(Path(sys.executable).resolve())  # the same interpreter, elsewhere
    with pytest.raises(SsahError, match="of another environment"):
        execute("00_index", tmp_path / "results", "smoke")
