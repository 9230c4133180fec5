"""The embedded model end to end, in miniature: table 1 through the command line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers import CommandLine, built, copy_project
from ssah.app.study import Study
from ssah.core.paths import home
from ssah.core.store import Store
from ssah.data.assets import ASSETS, fetch
from ssah.lab.arms import Arm
from ssah.lab.config import compose
from ssah.lab.load import load_model, locate

pytestmark = pytest.mark.real

MINIATURE = [
    "data.evaluation=6",
    "data.search=6",
    "data.align=40",
    "align.harmful=8",
    "align.benign=8",
    "align.epochs=1",
    "align.batch_size=8",
    "align.micro_batch_size=8",
    "attribution.samples=8",
    "attribution.max_response_tokens=12",
    "roles.ru_shares=[0.1]",
    "roles.esu_shares=[0.02]",
    "roles.euu_shares=[0.1]",
    "evaluate.max_new_tokens=6",
    "evaluate.random_draws=1",
    "evaluate.trivia_items=8",
    "evaluate.arithmetic_items=4",
    "evaluate.perplexity_rows=8",
    "evaluate.sweep_shares=[0.02]",
    "evaluate.sweep_random_draws=1",
]

ARMS = {
    "dense",
    "unaligned",
    "ESU",
    "EUU",
    "RU",
    "ESU, mean",
    "EUU, mean",
    "RU, mean",
    "random, as ESU",
    "random, as RU",
    "largest magnitude, as ESU",
    "smallest magnitude, as RU",
}


@pytest.fixture(scope="module")
def ssah(tmp_path_factory) -> CommandLine:
    """A copy of the project with a cache of its own, but for the downloads and the base model."""
    shared = Store(home() / "runs")
    runs = [fetch(shared, name) for name in ASSETS]
    runs.append(shared.touched[locate(shared, compose("laptop").model).identity])
    folder = tmp_path_factory.mktemp("real")
    own = folder / "home" / "runs"
    own.mkdir(parents=True)
    for run in runs:
        (own / run.folder.name).symlink_to(run.folder, target_is_directory=True)
    command_line = CommandLine(copy_project(folder / "project"), folder / "home")
    done = command_line("table1", *MINIATURE, timeout=420)
    assert done.returncode == 0, done.stderr
    assert not [name for name in built(done.stderr) if name.startswith(("asset-", "model-"))]
    return command_line


@pytest.fixture(scope="module")
def metrics(ssah) -> pd.DataFrame:
    found = list(ssah.results.glob("laptop/*/metrics.csv"))
    assert len(found) == 1, "overrides have a results folder of their own"
    return pd.read_csv(found[0], dtype={"seed": str})


def value(metrics: pd.DataFrame, arm: str, metric: str) -> float:
    found = metrics[(metrics["arm"] == arm) & (metrics["metric"] == metric)]
    assert len(found) == 1
    return found["value"].item()


def test_every_arm_is_measured(metrics):
    assert set(metrics["arm"]) >= ARMS
    for metric in ("asr_nosys", "perplexity"):
        assert set(metrics[metrics["metric"] == metric]["arm"]) >= ARMS


def test_perplexities_are_those_of_a_language_model(metrics):
    assert 2 < value(metrics, "dense", "perplexity") < 200
    assert 2 < value(metrics, "unaligned", "perplexity") < 200
    every = metrics[metrics["metric"] == "perplexity"]["value"]
    assert every.gt(1).all()
    assert every.map(lambda number: number < float("inf")).all()


def test_what_is_removed_matters(metrics):
    dense = value(metrics, "dense", "perplexity")
    assert value(metrics, "EUU", "perplexity") > dense
    assert value(metrics, "RU", "perplexity") != dense


def test_groups_have_the_shares_that_were_asked_for(metrics):
    for group, share in (("RU", 10), ("ESU", 2), ("EUU", 10)):
        assert value(metrics, group, "share_units") == pytest.approx(share, abs=0.5)
    for control, group in (("random, as ESU", "ESU"), ("smallest magnitude, as RU", "RU")):
        for metric in ("heads", "neurons"):
            assert value(metrics, control, metric) == value(metrics, group, metric)


def fingerprint(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(name.encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def test_weights_are_unchanged_after_every_ablation(ssah, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("SSAH_HOME", str(ssah.home))
    study = Study("laptop", MINIATURE, results=tmp_path)
    stages = study.all_stages[0]
    before = ssah.finished_runs()
    model = stages.model("aligned")
    whole = fingerprint(model)
    ids = torch.arange(1, 9)[None]

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).logits

    plain = logits()
    for group in ("ESU", "EUU", "RU"):
        for mode in ("zero", "mean"):
            with stages.in_effect(Arm("aligned", stages.roles.mask(group), mode)):
                assert not torch.equal(logits(), plain), (group, mode)
            assert fingerprint(model) == whole, (group, mode)
            assert torch.equal(logits(), plain), (group, mode)
    saved = load_model(stages.checkpoint("aligned"), study.config.model, stages.device)
    assert fingerprint(saved) == whole, "and they are those that were saved"
    assert ssah.finished_runs() == before, "all of this was computed by the command"
