"""Precision of matrix products: what it is, where it is chosen, and what it is part of."""

from __future__ import annotations

import pytest
import torch

from ssah.app.study import Study
from ssah.core.errors import SsahError
from ssah.core.runtime import pick_precision, products_in
from ssah.lab.stage import stage

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=[True, False], ids=["with bfloat16", "without"])
def able(request, monkeypatch) -> bool:
    """Whether the processor says that it has instructions for bfloat16."""
    return says(monkeypatch, request.param)


def says(monkeypatch, able: bool) -> bool:
    known = {"avx2": True, "avx512_bf16": able}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    return able


def test_auto_is_bfloat16_where_the_hardware_has_it(able, monkeypatch):
    assert pick_precision("auto", CPU) == ("bfloat16" if able else "float32")
    assert pick_precision("float32", CPU) == "float32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: able)
    assert pick_precision("auto", GPU) == ("bfloat16" if able else "float32")


@pytest.mark.parametrize("device", [CPU, GPU])
def test_bfloat16_that_would_not_help_is_refused(able, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: able)
    if able:
        assert pick_precision("bfloat16", device) == "bfloat16"
    else:
        with pytest.raises(SsahError, match="has no instructions for it: choose float32, or auto"):
            pick_precision("bfloat16", device)


def test_a_pytorch_that_cannot_be_asked_gives_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert pick_precision("auto", CPU) == "float32"


def test_products_are_what_they_were_after_the_block():
    before = torch.get_float32_matmul_precision()
    with products_in("bfloat16"):
        assert torch.get_float32_matmul_precision() == "medium"
        with products_in("float32"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(RuntimeError, match="stop"), products_in("bfloat16"):
        raise RuntimeError("stop")
    assert torch.get_float32_matmul_precision() == before


def test_factors_are_rounded_and_sums_are_not():
    """On hardware that has it; elsewhere nothing may change."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 576, generator=generator)
    weight = torch.randn(96, 576, generator=generator)
    exact = x.double() @ weight.double().T
    rounded = x.bfloat16().double() @ weight.bfloat16().double().T
    with products_in("bfloat16"):
        found = torch.nn.functional.linear(x, weight)
    assert found.dtype == torch.float32
    expected = rounded if pick_precision("auto", CPU) == "bfloat16" else exact
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    assert (exact - rounded).abs().max() > 0.05  # the two are told apart


def test_the_precision_is_part_of_every_key_and_holds_while_a_stage_is_built(
    smoke_lab, monkeypatch
):
    says(monkeypatch, True)
    seen = []

    @stage("precision_seen", version=1)
    def look(lab, folder, number: int) -> None:
        seen.append(torch.get_float32_matmul_precision())
        (folder / "seen.json").write_text("1")

    plain, same, other = (
        look(smoke_lab(*overrides), 1)
        for overrides in ([], ["runtime.precision=float32"], ["runtime.precision=auto"])
    )
    assert plain.key == same.key != other.key
    plain.path("seen.json")
    other.path("seen.json")
    assert seen == ["highest", "medium"]
    trained = {smoke_lab(*o).training(smoke_lab(*o).aligned).key for o in ([], [_ASKED])}
    assert len(trained) == 2


_ASKED = "runtime.precision=bfloat16"


@pytest.mark.parametrize("wanted", ["bfloat16", "auto"])
def test_results_of_another_precision_have_a_folder_of_their_own(wanted, able, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if wanted == "bfloat16" and not able:
        with pytest.raises(SsahError, match="this processor has no instructions"):
            Study("smoke", [_ASKED])
        return
    study = Study("smoke", [f"runtime.precision={wanted}", "runtime.threads=1"])
    usual = Study("smoke", ["runtime.precision=float32"])
    assert usual.overrides == []
    assert study.overrides == ([_ASKED] if able else [])
    assert (study.results == usual.results) is not able
    assert (_ASKED in study.stamp["overrides"]) is able  # in the last line of each table


def test_a_model_is_trained_in_bfloat16_and_frozen_weights_keep_their_bits(smoke_study):
    """The stage compares the bits itself."""
    if pick_precision("auto", CPU) != "bfloat16":
        pytest.skip("This processor has no instructions for bfloat16.")
    study = smoke_study(_ASKED, "experiment.frozen={instructions: [ESU + 6 % CU]}")
    study.collect(["table2"])
    assert not any(job.missing() for job in study.jobs(["table2"]))
