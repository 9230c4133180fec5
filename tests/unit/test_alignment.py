"""Alignment through a part of a model: what it leaves alone, its key, and when it trains."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers import assert_frozen, frozen_entries, weights
from ssah.lab import preparation, tuning
from ssah.lab.arms import Aligning, Arm, Tuning
from ssah.lab.stages import Stages
from ssah.scoring.selectors import random_units
from ssah.training.checks import changed_outside
from ssah.training.supervised import supervised_finetune
from ssah.units.layout import UnitLayout
from ssah.units.mask import UnitMask

# --- what counts as changed ------------------------------------------------------------------


@pytest.fixture
def two_heads(tiny_model) -> tuple[UnitLayout, UnitMask, dict[str, Tensor]]:
    """A layout, a mask with heads 0 and 3 of the first block and one neuron, and the weights.

    Heads 0 and 1 share key and value rows 0 to 3, heads 2 and 3 rows 4 to 7.
    """
    layout = UnitLayout.of(tiny_model)
    mask = layout.none()
    mask["layers.0.attn"][[0, 3]] = True
    mask["layers.1.mlp"][5] = True
    return layout, mask, weights(tiny_model)


def test_changes_inside_the_units_do_not_count(two_heads):
    layout, mask, before = two_heads
    assert changed_outside(layout, mask, before, before) == 0
    after = copy.deepcopy(before)
    after["model.layers.0.self_attn.q_proj.weight"][:4] += 1
    after["model.layers.0.self_attn.o_proj.weight"][:, 12:] += 1
    after["model.layers.1.mlp.up_proj.weight"][5] += 1
    after["model.layers.1.mlp.gate_proj.weight"][5] += 1
    after["model.layers.1.mlp.down_proj.weight"][:, 5] += 1
    assert changed_outside(layout, mask, before, after) == 0
    count = 4 * 16 + 16 * 4 + 3 * 16
    assert changed_outside(layout, layout.none(), before, after) == count


def test_every_changed_weight_outside_is_counted(two_heads):
    layout, mask, before = two_heads
    after = copy.deepcopy(before)
    planted = [
        ("model.embed_tokens.weight", (7, 3)),
        ("model.layers.1.input_layernorm.weight", (4,)),
        ("model.layers.0.self_attn.q_proj.weight", (4, 0)),  # of head 1
        ("model.layers.0.self_attn.o_proj.weight", (9, 4)),
        ("model.layers.1.mlp.down_proj.weight", (5, 6)),  # row 5 is no unit's, column 6 another's
        ("lm_head.weight", (1, 2)),
    ]
    for number, (name, place) in enumerate(planted, 1):
        after[name][place] = torch.nextafter(after[name][place], torch.tensor(9.0))
        after["model.layers.1.mlp.up_proj.weight"][5] += 1  # which may change
        assert changed_outside(layout, mask, before, after) == number


def test_the_sign_of_a_zero_counts_and_a_nan_is_itself(two_heads):
    layout, mask, before = two_heads
    norm = "model.norm.weight"
    before[norm][:3] = torch.tensor([0.0, torch.nan, 0.0])
    after = copy.deepcopy(before)
    assert changed_outside(layout, mask, before, after) == 0
    after[norm][0] = -0.0
    assert torch.equal(after[norm][[0, 2]], before[norm][[0, 2]]), "equal numbers, other bits"
    assert changed_outside(layout, mask, before, after) == 1


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_shared_rows_may_change_only_with_all_their_heads(two_heads, name):
    layout, mask, before = two_heads
    after = copy.deepcopy(before)
    rows = after[f"model.layers.0.self_attn.{name}.weight"]
    rows[0] += 1
    rows[5] += 1
    assert changed_outside(layout, mask, before, after) == 2 * 16
    mask["layers.0.attn"][1] = True  # with head 0 the whole first group
    assert changed_outside(layout, mask, before, after) == 16
    mask["layers.0.attn"][2] = True
    assert changed_outside(layout, mask, before, after) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_compared_by_their_bits(two_heads, dtype):
    layout, mask, before = two_heads
    before = {name: tensor.to(dtype) for name, tensor in before.items()}
    after = copy.deepcopy(before)
    place = after["model.embed_tokens.weight"][3, :2]
    place.copy_(torch.nextafter(place, torch.full_like(place, 9)))
    assert changed_outside(layout, mask, before, after) == 2


# --- in the smoke profile --------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(smoke_study) -> Stages:
    """With the aligned model there, so that each test counts its own trainings only."""
    found = smoke_study().stages(0)
    found.align()
    return found


@pytest.fixture
def trainings(monkeypatch) -> list[str]:
    """Alignments and fine-tunings that began in this test."""
    begun: list[str] = []

    def spied(kind: str, function: Callable) -> Callable:
        def spy(*arguments, **settings):
            begun.append(kind)
            return function(*arguments, **settings)

        return spy

    align, finetune = preparation.align_model, tuning.supervised_finetune
    monkeypatch.setattr(preparation, "align_model", spied("align", align))
    monkeypatch.setattr(tuning, "supervised_finetune", spied("finetune", finetune))
    return begun


def through(stages: Stages, rate: float, **changes) -> Aligning:
    """Aligned through the RU; a rate of its own makes a model that no other test has trained."""
    how = Aligning(stages.redundant(0.2), changes={"learning_rate": rate})
    return dataclasses.replace(how, **changes)


def files_of(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name].view(torch.int32), tensor.view(torch.int32)), name


@pytest.mark.parametrize("name", ["RU", "random", "LoRA inside"])
def test_nothing_else_changes_on_disk(stages, name):
    redundant = stages.redundant(0.2)
    drawn = random_units(stages.layout, redundant, 0)
    how = {
        "RU": through(stages, 2e-3),
        "random": through(stages, 2e-3, trained=drawn),
        "LoRA inside": through(stages, 2e-3, rank=2),
    }[name]
    run = stages.align(how)
    record = run.json("training.json")
    assert record["changed_outside"] == 0
    assert record["steps"] == 4
    before = load_file(Path(stages.checkpoint("unaligned").path) / "model.safetensors")
    after = load_file(run.path("model.safetensors"))
    assert set(after) == set(before)
    model, trained = stages.model("unaligned"), how.trained
    own = frozen_entries(model, stages.layout, trained, embeddings=True)
    others = frozen_entries(model, stages.layout, ~trained, embeddings=True)
    for part, tensor in before.items():
        moved = tensor.view(torch.int32) != after[part].view(torch.int32)
        allowed = own[part] & ~others[part]
        assert not moved[~allowed].any(), part
        assert moved.sum() >= 0.8 * allowed.sum(), part
    assert sum(int(part.sum()) for part in own.values()) > 0


def test_a_frozen_weight_that_changed_is_an_error(stages, monkeypatch):
    """The check is there for the day on which the freezing has a mistake."""

    def slip(model, *arguments, **settings):
        record = supervised_finetune(model, *arguments, **settings)
        with torch.no_grad():
            model.get_parameter("model.embed_tokens.weight")[3, 3] += 1
        return record

    monkeypatch.setattr("ssah.training.aligning.supervised_finetune", slip)
    how = through(stages, 2.1e-3)
    with pytest.raises(RuntimeError, match="frozen weight"):
        stages.align(how)
    assert not stages.store.place("align", "tiny", stages.alignment_key(how))[0].exists()


def test_aligning_everything_has_the_key_that_it_always_had(stages):
    key = stages.alignment_key()
    assert set(key) == {
        "version", "dtype", "attention", "template", "seed", "config", "model", "sets", "answers",
    }  # fmt: skip
    assert key["config"] == dataclasses.asdict(stages.config.align)
    run = stages.align()
    assert run.key == stages.store.place("align", "tiny", key)[1] == stages.identity("aligned")
    assert json.loads(run.path("run.json").read_text())["config"] == key
    assert "changed_outside" not in run.json("training.json")


def test_identity_tells_alignments_apart_and_trains_none(smoke_study, stages, trainings):
    how = Aligning(stages.redundant(0.2))
    one_more = UnitMask({name: part.clone() for name, part in how.trained.items()})
    one_more["layers.1.attn"][2] = ~one_more["layers.1.attn"][2]
    stages.identity("aligned")
    trainings.clear()
    different = [
        how,
        Aligning(one_more),
        Aligning(~how.trained),
        Aligning(how.trained, rank=2),
        Aligning(how.trained, rank=3),
        Aligning(None, rank=2),
        Aligning(None, rank=3),
        Aligning(how.trained, changes={"epochs": 2}),
        Aligning(how.trained, changes={"learning_rate": 2e-3}),
        Aligning(how.trained, rank=2, changes={"epochs": 2}),
    ]
    identities = [stages.identity(each) for each in different]
    identities += [
        smoke_study().stages(1).identity(how),
        smoke_study("align.harmful=15").stages(0).identity(how),
        smoke_study("align.anchor_tokens=9").stages(0).identity(how),
        stages.identity("aligned"),
        stages.identity("unaligned"),
    ]
    assert len(set(identities)) == len(identities)
    copied = UnitMask({name: part.clone() for name, part in how.trained.items()})
    rate = stages.config.align.learning_rate
    for same in (Aligning(copied), Aligning(copied, changes={"learning_rate": rate})):
        assert stages.identity(same) == identities[0]
    measured = smoke_study("evaluate.max_new_tokens=5", "finetune.learning_rate=2e-3").stages(0)
    assert measured.identity(how) == identities[0]
    assert trainings == []


def test_identity_is_the_key_of_the_run(stages, trainings):
    how = through(stages, 2.2e-3)
    identity = stages.identity(how)
    assert trainings == []
    assert stages.align(how).key == identity == stages.checkpoint(how).identity
    assert trainings == ["align"]


def test_the_model_is_dropped_after_the_block_and_its_record_stays(stages, trainings):
    how = through(stages, 2.3e-3)
    with stages.aligned(how) as arm:
        assert arm == Arm(how)
        assert trainings == []  # nothing was asked about it yet
        folder = Path(stages.checkpoint(how).path)
        assert "model.safetensors" in files_of(folder)
        record = stages.alignment(how)
    left = files_of(folder)
    assert {"training.json", "run.json"} <= left
    assert not [name for name in left if name.endswith(".safetensors")]
    assert stages.alignment(how) == record == json.loads((folder / "training.json").read_text())
    assert trainings == ["align"]


def test_the_model_of_everything_else_is_never_dropped(stages):
    with stages.aligned(None) as arm:
        assert arm == Arm()
        folder = Path(stages.checkpoint("aligned").path)
    assert (folder / "model.safetensors").exists()
    assert stages.alignment(None) == stages.align().json("training.json")


@pytest.mark.parametrize("rank", [None, 2], ids=["sliced", "LoRA"])
def test_what_was_measured_trains_nothing_and_what_is_new_trains_to_the_same_bits(
    smoke_study, stages, trainings, capsys, rank
):
    """Or else the numbers of one arm would be those of two models."""
    how = through(stages, 2.4e-3, rank=rank)
    with stages.aligned(how) as arm:
        expected = stages.completions("harmful_evaluation", arm), stages.perplexity(arm)
        bits = weights(stages.model(how))
    assert trainings == ["align"]
    later = smoke_study().stages(0)
    with later.aligned(how) as arm:
        got = later.completions("harmful_evaluation", arm), later.perplexity(arm)
        assert got == expected
        assert later.alignment(how)["changed_outside"] == 0
    assert trainings == ["align"]
    capsys.readouterr()
    torch.manual_seed(12345)  # as another process would, whatever it drew before
    with later.aligned(how) as arm:
        assert later.completions("borderline", arm)
        assert_same_bits(weights(later.model(how)), bits)
    assert trainings == ["align", "align"]
    assert "computing it again" in capsys.readouterr().err
    assert not later.align(how, whole=False).path("model.safetensors").exists()


def test_longer_adapters_resume_to_the_same_bits(stages, monkeypatch):
    """A checkpoint is written between two epochs, with the adapters as they are then."""
    how = through(stages, 2.5e-3, rank=2)
    how = dataclasses.replace(how, changes=how.changes | {"epochs": 2})
    with stages.aligned(how):
        expected = weights(stages.model(how))

    class Interruption(Exception):
        pass

    def interrupted(*arguments, **settings):
        def stop(done: int) -> None:
            if done == 2:
                raise Interruption

        return supervised_finetune(*arguments, **settings, on_epoch=stop)

    monkeypatch.setattr("ssah.training.aligning.supervised_finetune", interrupted)
    with pytest.raises(Interruption):
        stages.align(how)
    monkeypatch.undo()
    folder = stages.store.place("align", "tiny", stages.alignment_key(how))[0]
    assert list(folder.with_name(folder.name + ".partial").glob("trainer/checkpoint-4"))
    with stages.aligned(how):
        assert_same_bits(weights(stages.model(how)), expected)
        assert stages.alignment(how)["steps"] == 8


# --- fine-tuning of such a model -------------------------------------------------------------


def test_fine_tuning_starts_from_the_model_that_it_names(stages, trainings):
    how = through(stages, 2.6e-3)
    frozen = stages.redundant(0.1)
    with stages.aligned(how):
        start = weights(stages.model(how))
        after = {}
        for base in ("aligned", how):
            for mask in (None, frozen):
                attack = Tuning("dialogues", mask, changes={"epochs": 1}, base=base)
                with stages.tuned(attack) as (arm,):
                    model = stages.model(arm.which)
                    key = (base == how, mask is not None)
                    after[key] = weights(model)
                    if base == how:
                        entries = frozen_entries(model, stages.layout, mask or stages.layout.none())
                        assert_frozen(model, start, entries)
    assert trainings.count("finetune") == 4

    def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return max(float((one[name] - other[name]).abs().max()) for name in one)

    for one, other in itertools.combinations(after, 2):
        assert apart(after[one], after[other]) > 0
    # One step of Adam's moves a weight by little more than the rate of 1e-3.
    assert 0 < apart(after[True, False], start) < 2e-3 < apart(after[False, False], start)


def test_identity_of_an_attack_follows_its_base(stages, trainings):
    how, other = through(stages, 2.7e-3), through(stages, 2.8e-3)
    bases = ("aligned", how, other)
    identities = {i: stages.identity(Tuning("dialogues", base=b)) for i, b in enumerate(bases)}
    assert len(set(identities.values())) == 3
    assert identities[0] == stages.identity(Tuning("dialogues"))
    assert trainings == []


def test_the_key_of_an_attack_names_its_base_and_nothing_new(stages):
    """What is cached of attacks on the aligned model stays valid."""
    how = through(stages, 2.9e-3)
    for base, identity in (("aligned", stages.align().key), (how, stages.identity(how))):
        attack = Tuning("dialogues", changes={"learning_rate": 1.7e-3, "epochs": 1}, base=base)
        with stages.tuned(attack) as (arm,):
            folder = Path(stages.checkpoint(arm.which).path).parent
            key = json.loads((folder / "run.json").read_text())["config"]
        assert set(key) == {
            "version", "dtype", "attention", "template", "seed", "model", "rows",
            "max_response_tokens", "config",
        }  # fmt: skip
        assert key["version"] == 1
        assert key["model"] == identity
