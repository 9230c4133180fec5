"""The embedded model end to end, in miniature: table 1 through the command line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers import CommandLine, built, copy_project
from ssah.app.study import Study
from ssah.artefacts.pick import estimate, rows_of
from ssah.core.paths import home
from ssah.core.store import Handle, Store
from ssah.data.assets import EMBEDDED, fetch
from ssah.lab.config import compose
from ssah.lab.load import load_model, locate
from ssah.lab.specs import GIVEN
from ssah.lab.stages.attribution import activations, statistics
from ssah.lab.stages.roles import roles
from ssah.lab.table import read_table

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
    "experiment.removed=[ESU,EUU,RU,'ESU, mean','EUU, mean','RU, mean',"
    "'largest magnitude, as ESU','smallest magnitude, as RU']",
    "experiment.removed_draws=1",
    "evaluate.trivia_items=8",
    "evaluate.arithmetic_items=4",
    "evaluate.perplexity_rows=8",
    "experiment.sweep_shares=[0.02]",
    "experiment.sweep_draws=1",
]


@pytest.fixture(scope="module")
def ssah(tmp_path_factory) -> CommandLine:
    """A copy of the project with a cache of its own, but for the downloads and the base model."""
    shared = Store(home() / "runs")
    runs = [fetch(shared, name) for name in EMBEDDED]
    given = locate(shared, compose("laptop").model).source
    assert isinstance(given, Handle)
    runs.append(given)
    for run in runs:
        run.path("")
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
def table(ssah) -> pd.DataFrame:
    found = list(ssah.results.glob("laptop/*/measurements.parquet"))
    assert len(found) == 1, "overrides have a results folder of their own"
    return read_table(found[0].parent)


def removed(table: pd.DataFrame, metric: str, rule: str, like: str = "") -> float:
    return estimate(table, metric, method="removed", rule=rule, like=like).value


def test_every_arm_is_measured(table):
    for rule, like, setting in (
        *((group, "", setting) for group in ("ESU", "EUU", "RU") for setting in ("", "mean")),
        ("random", "ESU", ""),
        ("random", "RU", ""),
        ("largest magnitude", "ESU", ""),
        ("smallest magnitude", "RU", ""),
    ):
        for metric in ("ASR", "no refusal phrase", "perplexity"):
            columns = {"method": "removed", "rule": rule, "like": like, "setting": setting}
            assert len(rows_of(table, metric, **columns)) == 1, (metric, columns)


def test_perplexities_are_those_of_a_language_model(table):
    for base in ("aligned", "unaligned"):
        assert 2 < estimate(table, "perplexity", base=base).value < 200
    assert table[table["metric"] == "perplexity"]["value"].between(0.5, 1e6).all()


def test_what_is_removed_matters(table):
    whole = estimate(table, "perplexity").value
    assert removed(table, "perplexity", "EUU") > whole
    assert removed(table, "perplexity", "RU") != whole


def test_groups_have_the_shares_that_were_asked_for(table):
    for group, share in (("RU", 10), ("ESU", 2), ("EUU", 10)):
        assert removed(table, "units", group) == pytest.approx(share, abs=0.5)
    for control, like in (("random", "ESU"), ("smallest magnitude", "RU")):
        for metric in ("heads", "neurons"):
            assert removed(table, metric, control, like) == removed(table, metric, like)


def fingerprint(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(name.encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def test_weights_are_unchanged_after_every_ablation(ssah, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("SSAH_HOME", str(ssah.home))
    study = Study("laptop", MINIATURE, results=tmp_path)
    lab = study.labs[0]
    activations(lab).path("")  # which Table 1 asks for in `experiment=published` alone
    before = ssah.finished_runs()
    ids = torch.arange(1, 9)[None]

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).logits

    with lab.use(lab.aligned) as model:
        whole, plain = fingerprint(model), logits(model)
    for group in ("ESU", "EUU", "RU"):
        mask = roles(lab).mask(group)
        for changed in (
            lab.aligned.ablated(mask),
            lab.aligned.ablated(mask, "mean", statistics(lab, "utility")),
            lab.aligned.ablated(mask, "resample", activations(lab)),
            lab.aligned.patched(mask, GIVEN),
        ):
            with lab.use(changed) as other:
                assert not torch.equal(logits(other), plain), (group, changed)
            assert fingerprint(model) == whole, (group, changed)
            assert torch.equal(logits(model), plain), (group, changed)
    saved = load_model(lab.checkpoint(lab.aligned), study.config.model, lab.device)
    assert fingerprint(saved) == whole, "and they are those that were saved"
    assert ssah.finished_runs() == before, "all of this was computed by the command"
