"""Stages: what is in a key, and what is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ssah.core.store import Handle, Store
from ssah.data.rows import Row
from ssah.lab.lab import Lab
from ssah.lab.specs import GIVEN, Model
from ssah.lab.stage import identity, stage
from ssah.units.mask import UnitMask

ROW = Row("id-1", "Do it.", "source", "MIT", "category", "Done.", ("a", "b"))


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float = 1.0
    mask: UnitMask | None = None


def mask(*chosen: int) -> UnitMask:
    return UnitMask({"layers.0.mlp": torch.tensor([i in chosen for i in range(4)])})


@pytest.fixture
def lab(tmp_path) -> Lab:
    """What a stage asks of a lab."""
    return cast(
        Lab,
        SimpleNamespace(
            store=Store(tmp_path / "runs"),
            settings={"dtype": "float32"},
            precision="float32",
            config=SimpleNamespace(model=SimpleNamespace(name="model")),
            identity=lambda model: "given" if model == GIVEN else "made",
            runs_of=lambda model: iter(() if model == GIVEN else ("the training's key",)),
        ),
    )


def written(version: int = 1) -> Any:
    @stage("thing", version=version)
    def thing(lab: Lab, folder: Path, value: Any, other: int = 0, label: str = "") -> None:
        (folder / "out.txt").write_text(f"{value} {other}")

    return thing


def test_a_stage_is_built_with_its_arguments_when_an_output_is_read(lab):
    handle = written()(lab, "text", other=3, label="named")
    assert not handle.folder.exists()
    assert handle.path("out.txt").read_text() == "text 3"
    assert handle.folder.name.startswith("thing_named-model-")


def test_arguments_are_the_same_however_they_are_given(lab):
    thing = written()
    assert len({thing(lab, 1).key, thing(lab, value=1).key, thing(lab, 1, 0).key}) == 1
    assert thing(lab, 1, label="a").config == thing(lab, 1, label="b").config


def test_everything_that_shapes_an_output_is_in_the_key(lab, tmp_path):
    thing = written()
    other = Handle(lab.store, "other", "x", {"version": 1}, lambda folder: None)
    values = [
        1, 1.5, True, "1", None, [1, 2], {"a": 1}, {"a": 2}, GIVEN, Model(GIVEN), other, ROW,
        dataclasses.replace(ROW, prompt="Do."), dataclasses.replace(ROW, response=None),
        dataclasses.replace(ROW, choices=()), mask(1), mask(2), UnitMask(mask(1), "channel"),
        Settings(), Settings(2.0), Settings(1.0, mask(1)), Settings(1.0, mask(2)),
    ]  # fmt: skip
    keys = [thing(lab, value).key for value in values]
    keys.append(thing(lab, 1, other=1).key)
    keys.append(written(version=2)(lab, 1).key)
    lab.settings["dtype"] = "bfloat16"
    keys.append(thing(lab, 1).key)
    assert len(set(keys)) == len(keys)


def test_what_does_not_shape_an_output_is_not(lab):
    thing = written()
    same = [
        (ROW, dataclasses.replace(ROW, id="other", source="x", licence="y", category="z")),
        ([1, 2], (1, 2)),
        (mask(1), UnitMask({name: part.clone() for name, part in mask(1).items()})),
    ]
    for one, other in same:
        assert thing(lab, one).key == thing(lab, other).key


def test_what_cannot_be_compared_is_no_argument(lab):
    with pytest.raises(TypeError, match="A Tensor cannot be part of a key"):
        identity(lab, torch.ones(2))


def test_runs_in_arguments_are_inputs(lab):
    thing = written()
    one, two = thing(lab, 1), thing(lab, 2)
    handle = thing(lab, [one, Settings(), {"x": 1}, Model(GIVEN), (two,)])
    assert set(handle.inputs) == {one.key, two.key, "the training's key"}
