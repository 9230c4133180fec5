"""Epochs of a fine-tuning: models saved in between, the constant rate, and losses by epoch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers import (
    Interrupted,
    Interruption,
    assert_frozen,
    dialogues,
    frozen_entries,
    small_training,
    weights,
)
from ssah.training import supervised as finetune
from ssah.training.slicing import SlicedLinear, freeze_units
from ssah.training.supervised import (
    ResponseTrainer,
    TrainingRecord,
    save_model,
    supervised_finetune,
)
from ssah.units.layout import UnitLayout
from ssah.units.mask import UnitMask

PAIRS = dialogues(16)
#: Units kept of every 4 heads and 24 neurons: much frozen leads to sliced layers only, little to
#: whole parameters whose frozen part is put back.
FROZEN = {"sliced": (2, 18), "restored": (1, 2)}

both_ways = pytest.mark.parametrize("way", FROZEN)


def mask_of(layout: UnitLayout, way: str) -> UnitMask:
    """The last units of the first layer and the first ones of the second."""
    heads, neurons = FROZEN[way]
    mask = layout.none()
    for block in layout.blocks:
        count = heads if block.kind == "attn" else neurons
        units = range(block.units)
        mask[block.name][list(units[-count:] if block.layer == 0 else units[:count])] = True
    return mask


def assert_same_weights(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def assert_way(model: PreTrainedModel, way: str) -> None:
    """The linear layers of units are what the mask was chosen for."""
    sliced = [module for module in model.modules() if isinstance(module, SlicedLinear)]
    # With little frozen, key and value rows are sliced all the same: half of them are shared.
    assert len(sliced) == {"sliced": 14, "restored": 4}[way]


@pytest.fixture
def fresh(families) -> Callable[[], PreTrainedModel]:
    """The same model every time; dropout makes the random state count as well."""
    return lambda: families("llama", attention_dropout=0.1)


def epochs_of(
    model: PreTrainedModel, folder: Path, epochs: int, *, mask: UnitMask | None = None, **options
) -> list[dict[str, Tensor]]:
    """Weights at the end of each epoch of one training, and after it."""
    seen = []

    def keep(done: int) -> None:
        seen.append(weights(model))
        assert len(seen) == done

    with nullcontext() if mask is None else freeze_units(model, mask):
        supervised_finetune(
            model, PAIRS, small_training(epochs=epochs), 5, folder, on_epoch=keep, **options
        )
    return [*seen, weights(model)]


@pytest.mark.parametrize("way", [None, *FROZEN])
def test_at_a_constant_rate_an_epoch_is_a_run_of_one_epoch(fresh, tmp_path, way):
    """So that one training serves the rows of one epoch and of two."""
    mask = mask_of(UnitLayout.of(fresh()), way) if way else None
    one = epochs_of(fresh(), tmp_path / "one", 1, mask=mask, constant_rate=True)
    two = epochs_of(fresh(), tmp_path / "two", 2, mask=mask, constant_rate=True)
    assert len(one) == 2
    assert len(two) == 3
    assert_same_weights(one[0], one[1])  # what on_epoch sees last is the result
    assert_same_weights(two[1], two[2])
    assert_same_weights(two[0], one[0])
    moved = [not torch.equal(two[0][name], two[1][name]) for name in two[0]]
    assert sum(moved) == len(moved) - 2  # all but the embeddings and the head


def test_at_a_falling_rate_it_is_not(fresh, tmp_path):
    one = epochs_of(fresh(), tmp_path / "one", 1)
    two = epochs_of(fresh(), tmp_path / "two", 2)
    assert any(not torch.equal(two[0][name], one[0][name]) for name in one[0])


def test_the_constant_rate_is_the_configured_one_after_warming_up(fresh, tmp_path, monkeypatch):
    logs = watch_logs(monkeypatch)
    config = small_training(epochs=2, warmup_steps=2)
    supervised_finetune(fresh(), PAIRS, config, 5, tmp_path, constant_rate=True)
    rates = [entry["learning_rate"] for entry in logs() if "loss" in entry]
    assert rates == pytest.approx([0, 0.005, *[0.01] * 6])


# --- frozen units ----------------------------------------------------------------------------


@both_ways
def test_models_saved_inside_the_block_are_plain_and_keep_frozen_bits(fresh, tmp_path, way):
    model = fresh()
    layout, before = UnitLayout.of(model), weights(model)
    mask = mask_of(layout, way)
    entries = frozen_entries(model, layout, mask)
    assert model.config.use_cache
    inside = []

    def keep(done: int) -> None:
        assert_way(model, way)
        save_model(model, tmp_path / f"epoch-{done}")
        inside.append(weights(model))

    with freeze_units(model, mask):
        supervised_finetune(
            model,
            PAIRS,
            small_training(weight_decay=0.1),
            5,
            tmp_path,
            constant_rate=True,
            on_epoch=keep,
        )
    for done in (1, 2):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"epoch-{done}")
        assert_same_weights(weights(loaded), inside[done - 1])
        assert list(inside[done - 1]) == list(before)
        assert_frozen(loaded, before, entries)
        # Trainer switches it off by default, and then every generation would be slow.
        assert loaded.config.use_cache is True
    assert_same_weights(weights(model), inside[1])
    assert any(not torch.equal(inside[0][name], inside[1][name]) for name in before)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch-1", "epoch-2"}


@both_ways
def test_resumed_training_of_some_units_equals_uninterrupted(fresh, tmp_path, monkeypatch, way):
    mask = mask_of(UnitLayout.of(fresh()), way)
    before = weights(fresh())

    def run(folder: Path) -> tuple[PreTrainedModel, dict[int, dict[str, Tensor]], TrainingRecord]:
        model, seen = fresh(), {}

        def keep(done: int) -> None:
            save_model(model, folder / f"epoch-{done}")
            seen[done] = weights(model)

        with freeze_units(model, mask):
            assert_way(model, way)
            record = supervised_finetune(
                model,
                PAIRS,
                small_training(weight_decay=0.01),
                5,
                folder,
                constant_rate=True,
                on_epoch=keep,
            )
        return model, seen, record

    whole, expected, expected_record = run(tmp_path / "whole")
    folder = tmp_path / "cut"

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "ResponseTrainer", Interrupted)
        with pytest.raises(Interruption):
            run(folder)
    assert {path.name for path in folder.iterdir()} == {"checkpoints", "epoch-1"}
    saved = (folder / "epoch-1" / "model.safetensors").stat().st_mtime_ns

    torch.manual_seed(99)  # a new process would not have the old one's random state
    resumed, seen, record = run(folder)
    assert list(seen) == [2]  # the first epoch was neither trained nor saved again
    assert (folder / "epoch-1" / "model.safetensors").stat().st_mtime_ns == saved
    assert_same_weights(seen[2], expected[2])
    assert_same_weights(weights(resumed), weights(whole))
    assert record == expected_record
    for done in (1, 2):
        loaded = AutoModelForCausalLM.from_pretrained(folder / f"epoch-{done}")
        assert_same_weights(weights(loaded), expected[done])
    layout = UnitLayout.of(resumed)
    assert_frozen(resumed, before, frozen_entries(resumed, layout, mask))


# --- losses ----------------------------------------------------------------------------------


def watch_logs(monkeypatch) -> Callable[[], list[dict[str, float]]]:
    """What the next training logs, step by step."""
    trainers = []

    class Watched(ResponseTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    monkeypatch.setattr(finetune, "ResponseTrainer", Watched)
    return lambda: trainers[-1].state.log_history


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_losses_by_epoch_are_of_each_epochs_last_quarter(fresh, tmp_path, monkeypatch, epochs):
    """Eight steps an epoch: the last two. The final loss is of the last quarter of them all."""
    logs = watch_logs(monkeypatch)
    config = small_training(epochs=epochs, batch_size=2)
    record = supervised_finetune(fresh(), PAIRS, config, 5, tmp_path, constant_rate=True)
    losses = [entry["loss"] for entry in logs() if "loss" in entry]
    assert len(losses) == len(set(losses)) == record.steps == 8 * epochs
    expected = [mean(losses[8 * epoch + 6 : 8 * epoch + 8]) for epoch in range(epochs)]
    assert record.epoch_losses == pytest.approx(expected)
    assert record.final_loss == pytest.approx(mean(losses[-2 * epochs :]))
    if epochs == 1:
        assert record.epoch_losses == (record.final_loss,)


def test_losses_of_very_short_epochs(fresh, tmp_path):
    """One step an epoch: its loss is all there is."""
    config = small_training(epochs=3, batch_size=16)
    record = supervised_finetune(fresh(), PAIRS, config, 5, tmp_path, constant_rate=True)
    assert record.steps == len(record.epoch_losses) == 3
    assert record.epoch_losses[-1] == record.final_loss
    assert len(set(record.epoch_losses)) > 1
