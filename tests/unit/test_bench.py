"""What training costs: each way trains what its name says, and the table has what was measured."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from ssah.app import bench, cli, report
from ssah.training.defences import DEFENCES
from ssah.units.layout import UnitLayout

#: Of the tiny model, whose units are 8 heads and 128 neurons: heads and neurons that train.
TRAINED = {
    "all units": (8, 128),
    "RU 20 %": (0, 27),
    "RU 10 %": (0, 14),
    "RU 40 %": (0, 54),
    "all heads": (8, 0),
    "LoRA, as many weights as RU": (8, 128),
    "LoRA inside RU": (0, 27),
    "all but ESU + 6 % CU": (7, 119),
    **{f"all units, {name}": (8, 128) for name in DEFENCES},
}

#: Weights of one neuron: three matrices of width 32.
NEURON = 3 * 32


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def results(home, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SSAH_HOME", str(home))
    monkeypatch.setattr("ssah.app.study.results_root", lambda: tmp_path)
    return tmp_path


def weights() -> dict[str, Tensor]:
    with bench._training(bench.FULL, "smoke", []) as training:
        return {name: t.clone() for name, t in training.model.state_dict().items()}


def parameters(training: bench.Training) -> int:
    return sum(p.numel() for group in training.optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("name", bench.WAYS)
def test_a_way_trains_the_units_of_its_name(name):
    """Told by the columns that units write through, which no two share."""
    before = weights()
    with bench._training(name, "smoke", []) as training:
        training.step()
        size = parameters(training)
    after, counts = training.model.state_dict(), {"attn": 0, "mlp": 0}
    assert set(after) == set(before), "a plain model is left"
    changed = {key: after[key] != t for key, t in before.items()}
    for block in UnitLayout.of(training.model).blocks:
        columns = changed[f"{block.output}.weight"].any(0)
        counts[block.kind] += int(columns[block.channels].any(1).sum())
    if "gradient masking" in name:  # decay reaches what is masked: why masks are no freezing
        assert counts["mlp"] == 128
        assert size > parameters_of("RU 40 %")
        return
    assert (counts["attn"], counts["mlp"]) == TRAINED[name]
    if name.startswith("RU"):
        assert size == TRAINED[name][1] * NEURON
        others = [key for key, mask in changed.items() if "mlp" not in key and mask.any()]
        assert not others


def parameters_of(name: str) -> int:
    with bench._training(name, "smoke", []) as training:
        return parameters(training)


def test_a_way_is_measured_in_the_precision_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    for overrides, found in (([], "highest"), (["runtime.precision=bfloat16"], "medium")):
        with bench._training(bench.FULL, "smoke", overrides):
            assert torch.get_float32_matmul_precision() == found


def test_the_optimizer_keeps_two_moments_of_what_trains():
    found = bench._memory("RU 20 %", "smoke", [])
    assert found["trained, M"] * 1e6 == pytest.approx(27 * NEURON)
    assert found["optimizer, MiB"] * 2**20 == pytest.approx(2 * 4 * 27 * NEURON, rel=0.01)
    assert 100 < found["peak, MiB"] < 20_000


def test_the_table_is_printed_written_and_published(results, monkeypatch, capsys):
    ways = {name: bench.WAYS[name] for name in (bench.FULL, "RU 20 %")}
    monkeypatch.setattr(bench, "WAYS", ways)
    monkeypatch.setattr(bench, "PAIRS", 1)
    assert cli.main(["bench", "profile=smoke"]) == 0
    printed = capsys.readouterr().out
    table = results / "smoke" / "tables" / "bench.md"
    assert table.read_text() in printed
    assert "Attribution / forward passes" in printed
    frame = pd.read_csv(table.with_suffix(".csv"), index_col=0)
    assert list(frame.index) == list(ways)
    assert frame["step, x full"].isna().tolist() == [True, False]

    filled = {}
    monkeypatch.setattr(report, "results_root", lambda: results)
    monkeypatch.setattr(report, "_fill", lambda name, block, table: filled.update({block: table}))
    report.publish(results / "smoke")
    assert (results / "published" / "tables" / "bench.md").read_text() == table.read_text()
    assert list(filled["costs"]["way to train"]) == list(ways)

    another = results / "another"
    (another / "tables").mkdir(parents=True)
    report.publish(another)
    assert (results / "published" / "tables" / "bench.csv").exists(), "no notebook measures it"
