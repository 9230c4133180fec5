"""Harmless fine-tuning in the smoke profile: what trains on what, and when it trains at all."""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from helpers import assert_frozen, built, frozen_entries, weights
from ssah.lab import tuning as tuning_module
from ssah.lab.arms import Arm, Tuning
from ssah.lab.load import load_model
from ssah.lab.selections import ALL, CU6, FULL, headline
from ssah.lab.stages import Stages, paper_rule
from ssah.units.mask import UnitMask


@pytest.fixture(scope="module")
def stages(smoke_study) -> Stages:
    return smoke_study().stages(0)


class Beginnings(logging.Handler):
    """Names of the runs that a store begins to build, whoever else listens."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.names += built(record.getMessage())


@pytest.fixture
def trainings() -> Iterator[Callable[[], list[str]]]:
    """Fine-tunings that began in this test."""
    logger, handler = logging.getLogger("ssah.core.store"), Beginnings()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: [name for name in handler.names if name.startswith("finetune")]
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def models_on_disk(stages: Stages) -> set[str]:
    """Of all fine-tunings: run/epoch."""
    found = stages.store.root.glob("finetune-*/epoch-*/model.safetensors")
    return {path.parent.relative_to(stages.store.root).as_posix() for path in found}


def assert_same_weights(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def measurements(stages: Stages, arms: list[Arm], attack: str = "dialogues") -> list:
    return [
        (
            stages.completions("harmful_evaluation", arm),
            stages.perplexity(arm),
            stages.heldout_gain(arm, attack),
        )
        for arm in arms
    ]


# --- what tells one fine-tuned model from another --------------------------------------------


def test_identity_tells_models_apart_and_trains_none(smoke_study, stages, trainings):
    mask = stages.roles.select("ESU", "CU:6%")
    one_more = UnitMask({name: part.clone() for name, part in mask.items()})
    one_more["layers.1.attn"][2] = True
    base = Tuning("dialogues", mask)
    different = [
        base,
        dataclasses.replace(base, attack="instructions"),
        dataclasses.replace(base, attack="arithmetic"),
        dataclasses.replace(base, frozen=None),
        dataclasses.replace(base, frozen=one_more),
        dataclasses.replace(base, frozen=~mask),
        dataclasses.replace(base, epoch=2),
        dataclasses.replace(base, changes={"learning_rate": 2e-3}),
        dataclasses.replace(base, changes={"train_embeddings": True}),
        dataclasses.replace(base, changes={"epochs": 1}),
        dataclasses.replace(base, base="unaligned"),
        dataclasses.replace(base, frozen=None, trained=mask),
        dataclasses.replace(base, frozen=None, trained=one_more),
    ]
    identities = [stages.identity(tuning) for tuning in different]
    identities.append(smoke_study().stages(1).identity(base))
    identities.append(smoke_study("finetune.rows.dialogues=15").stages(0).identity(base))
    identities.append(smoke_study("finetune.max_response_tokens=7").stages(0).identity(base))
    identities += [stages.identity("aligned"), stages.identity("unaligned")]
    assert len(set(identities)) == len(identities)

    copied = UnitMask({name: part.clone() for name, part in mask.items()})
    rate = stages.config.finetune.learning_rate
    for same in (Tuning("dialogues", copied), Tuning("dialogues", mask, {}, 1)):
        assert stages.identity(same) == identities[0]
    explicit = dataclasses.replace(base, changes={"learning_rate": rate})
    assert stages.identity(explicit) == identities[0]
    # What is only measured differently is the same model.
    measured = smoke_study("evaluate.max_new_tokens=5", "finetune.heldout_rows=7").stages(0)
    assert measured.identity(base) == identities[0]
    assert trainings() == []


# --- when something trains, and what stays ---------------------------------------------------


def test_models_are_there_inside_the_block_and_dropped_after_it(stages):
    tuning = Tuning("dialogues", changes={"learning_rate": 1.1e-3})
    before = models_on_disk(stages)
    with stages.tuned(tuning) as arms:
        assert arms == [Arm(dataclasses.replace(tuning, epoch=epoch)) for epoch in (1, 2)]
        assert models_on_disk(stages) == before  # nothing was asked about them yet
        first, second = (weights(stages.model(arm.which)) for arm in arms)
        added = models_on_disk(stages) - before
        assert {name.split("/")[1] for name in added} == {"epoch-1", "epoch-2"}
        record = stages.training(tuning)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert models_on_disk(stages) == before
    (run,) = {name.split("/")[0] for name in added}
    assert {p.name for p in (stages.store.root / run).rglob("*") if p.is_file()} == {
        "training.json",
        "run.json",
    }
    assert record.steps == 2 * 16 / 8


def test_the_record_of_a_training_outlives_its_models(smoke_study, stages, trainings):
    tuning = Tuning("dialogues", changes={"learning_rate": 1.2e-3})
    with stages.tuned(tuning):
        record = stages.training(tuning)
    assert len(trainings()) == 1
    assert stages.training(tuning) == record
    assert smoke_study().stages(0).training(tuning) == record
    assert len(trainings()) == 1
    assert record.steps == 4
    assert len(record.epoch_losses) == 2
    assert record.final_loss == record.epoch_losses[1]  # a step each: the last of two and of four


def test_with_trained_units_named_nothing_else_changes(stages):
    """Of the unaligned model, as it learns from instructions."""
    mask = stages.redundant(0.2)
    tuning = Tuning("arithmetic", base="unaligned", trained=mask)
    with stages.tuned(tuning) as arms:
        after = weights(stages.model(arms[1].which))
    before, model = weights(stages.model("unaligned")), stages.model("unaligned")
    own = frozen_entries(model, stages.layout, mask, embeddings=True)
    others = frozen_entries(model, stages.layout, ~mask, embeddings=True)
    for name, tensor in before.items():
        if name not in own:  # a tied head
            continue
        moved = tensor.view(torch.int32) != after[name].view(torch.int32)
        allowed = own[name] & ~others[name]
        assert not moved[~allowed].any(), name
        assert moved.sum() >= 0.8 * allowed.sum(), name


def test_a_change_elsewhere_is_an_error(stages, monkeypatch):
    monkeypatch.setattr(tuning_module, "train_only", lambda *_, **__: nullcontext())
    tuning = Tuning("arithmetic", base="unaligned", trained=stages.redundant(0.19))
    with pytest.raises(RuntimeError, match="frozen weights changed"), stages.tuned(tuning) as arms:
        stages.model(arms[0].which)


def test_models_stay_after_an_error_for_the_next_attempt(smoke_study, stages, trainings):
    tuning = Tuning("dialogues", changes={"learning_rate": 1.3e-3})
    before = models_on_disk(stages)

    def fail() -> None:
        with stages.tuned(tuning) as arms:
            stages.model(arms[0].which)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    expected = weights(stages.model(tuning))
    assert len(models_on_disk(stages) - before) == 2
    later = smoke_study().stages(0)
    with later.tuned(tuning) as arms:
        assert_same_weights(weights(later.model(arms[0].which)), expected)
    assert len(trainings()) == 1
    assert models_on_disk(stages) == before


def test_what_was_measured_needs_no_training(smoke_study, stages, trainings):
    tuning = Tuning("dialogues")
    arms = stages.measured(tuning)
    expected = measurements(stages, arms)
    assert expected[0] != expected[1]
    started, left = trainings(), models_on_disk(stages)

    later = smoke_study().stages(0)
    assert later.measured(tuning) == arms
    assert measurements(later, arms) == expected
    assert trainings() == started
    assert models_on_disk(later) == left


def test_what_artefacts_ask_after_a_thorough_measurement_trains_nothing(smoke_study, trainings):
    """It is measured while the models are there, or else each question would bring them back."""
    seed = 7  # which no other test has trained
    stages = smoke_study().stages(seed)
    for name, tuning in headline(stages, "instructions").items():
        arms = stages.measured(tuning, thorough=True)
        assert [arm.which.epoch for arm in arms] == [1, 2]
        arm = paper_rule(arms)
        assert arm.which.epoch == (1 if name == FULL else 2)
        started = trainings()
        later = smoke_study().stages(seed)
        measurements(later, arms, "instructions")
        later.training(tuning)
        later.completions("harmbench", arm)
        later.task_outcomes(arm)
        for rule in ("thresholds", "quantiles"):
            assert later.roles_after(arm.which, rule).mask("CU").count() > 0
        assert trainings() == started
    assert len(trainings()) >= 2


def test_asking_something_new_trains_again_and_says_so(smoke_study, stages, trainings, capsys):
    tuning = Tuning("dialogues", changes={"learning_rate": 1.4e-3})
    with stages.tuned(tuning) as arms:
        expected = weights(stages.model(arms[1].which))
    before = models_on_disk(stages)
    capsys.readouterr()
    for asked in (stages, smoke_study().stages(0)):
        begun = len(trainings())
        with asked.tuned(tuning) as arms:
            got = weights(asked.model(arms[1].which))
        assert_same_weights(got, expected)
        assert len(trainings()) == begun + 1
        lines = [line for line in capsys.readouterr().err.splitlines() if "again" in line]
        assert len(lines) == 1
        assert lines[0].startswith("finetune-dialogues-tiny-")
        assert lines[0].endswith("and the like were dropped; computing it again.")
        assert models_on_disk(stages) == before


def test_one_fine_tuned_model_is_in_memory(stages, monkeypatch):
    """They are as large as the aligned model, and there are dozens. Not even while one loads."""
    alive = []

    def load(*arguments):
        gc.collect()
        alive.append(first() is not None)
        return load_model(*arguments)

    with stages.tuned(Tuning("dialogues", changes={"learning_rate": 1.5e-3})) as arms:
        first = weakref.ref(stages.model(arms[0].which))
        assert stages.model(arms[0].which) is first()
        monkeypatch.setattr(tuning_module, "load_model", load)
        second = weakref.ref(stages.model(arms[1].which))
        assert alive == [False]
        assert second() is not None
    gc.collect()
    assert second() is None


# --- what trains -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [FULL, CU6, ALL])
def test_frozen_weights_are_those_of_the_aligned_model(stages, name):
    tuning = headline(stages, "instructions")[name]
    before = weights(stages.model("aligned"))
    mask = stages.layout.none() if tuning.frozen is None else tuning.frozen
    with stages.tuned(tuning) as arms:
        for arm in arms:
            model = stages.model(arm.which)
            assert_frozen(model, before, frozen_entries(model, stages.layout, mask))
            assert model.config.use_cache
    assert_same_weights(weights(stages.model("aligned")), before)


def test_channels_freeze_by_their_own_mask(stages):
    layout = stages.layout_for("channel")
    mask = layout.none()
    mask["layers.0.attn"][[3, 17]] = True
    mask["layers.1.mlp"][::2] = True
    before = weights(stages.model("aligned"))
    with stages.tuned(Tuning("dialogues", mask)) as arms:
        model = stages.model(arms[0].which)
        entries = frozen_entries(model, layout, mask)
        # Query and key rows belong to no single channel.
        assert not entries["model.layers.0.self_attn.q_proj.weight"].any()
        assert_frozen(model, before, entries)


def test_changes_reach_the_training(stages):
    rate = stages.config.finetune.learning_rate
    embedding = "model.embed_tokens.weight"
    before = weights(stages.model("aligned"))[embedding]
    for changes, moves in (({"learning_rate": rate}, False), ({"train_embeddings": True}, True)):
        with stages.tuned(Tuning("dialogues", changes=changes)) as arms:
            after = weights(stages.model(arms[0].which))[embedding]
        assert torch.equal(after, before) is not moves


def test_one_epoch_is_the_first_of_two(stages):
    """Arms of one epoch are compared with the first epoch of longer ones.

    Of four steps: with fewer, a falling rate would hardly have fallen in the first epoch.
    """
    mask, short = stages.roles.select("ESU", "CU:6%"), {"batch_size": 4, "micro_batch_size": 4}
    with stages.tuned(Tuning("dialogues", mask, changes=short)) as arms:
        expected = weights(stages.model(arms[0].which))
    with stages.tuned(Tuning("dialogues", mask, changes=short | {"epochs": 1})) as arms:
        (arm,) = arms
        assert_same_weights(weights(stages.model(arm.which)), expected)


def test_training_lowers_the_loss_on_rows_held_out(stages):
    gains = [stages.heldout_gain(arm, "dialogues") for arm in stages.measured(Tuning("dialogues"))]
    assert 0 < gains[0].low < gains[0].value < gains[1].value
    assert stages.heldout_gain(Arm(), "dialogues").value == 0
