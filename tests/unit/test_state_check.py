"""An optimizer whose state was made for other parameters than those that train is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from ssah.training.slicing import freeze_units, train_only
from ssah.units.layout import UnitLayout
from ssah.units.mask import UnitMask


def share(model, fraction: float, seed: int = 0) -> UnitMask:
    """Some units, the same ones among more where the fraction is larger."""
    layout = UnitLayout.of(model)
    order = torch.randperm(layout.units, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(layout.units, dtype=torch.bool)
    chosen[order[: round(fraction * layout.units)]] = True
    return layout.mask(chosen)


def trained(model, folder, checkpoint=None, **changes) -> None:
    """Two steps with the Trainer's own optimizer (fused AdamW), a checkpoint after each."""
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", max_steps=2, save_steps=1, disable_tqdm=True,
        per_device_train_batch_size=1, **changes,
    )  # fmt: skip
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]} for _ in range(4)]
    Trainer(model=model, args=arguments, train_dataset=rows).train(
        resume_from_checkpoint=checkpoint and str(checkpoint)
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("train", 0.25), ("train", 0.25, 1)),  # as many other units: equal shapes
        (("freeze", 0.07), ("freeze", 0.10)),  # most trains: whole weights in both
        (("freeze", 0.07), ("freeze", 0.07, 1)),
        (None, ("freeze", 0.07)),
    ],
)
def test_a_checkpoint_of_another_mask_is_refused(families, tmp_path, before, after):
    model = families("qwen2")
    run(model, before, tmp_path)
    with pytest.raises(ValueError, match="The optimizer's state was made while") as refused:
        run(families("qwen2"), after, tmp_path, tmp_path / "checkpoint-1")
    wanted = "while all units train, and now"
    if before is not None:
        mask = share(model, *before[1:])
        trains = mask if before[0] == "train" else ~mask
        wanted = f"while {trains.count():,} of {UnitLayout.of(model).units:,} units train and "
        assert f"(mask {trains.digest()[:10]}" in str(refused.value)
    assert wanted in str(refused.value)
    run(families("qwen2"), before, tmp_path, tmp_path / "checkpoint-1")  # where it belongs


@pytest.mark.parametrize("before", [None, ("freeze", 0.07), ("train", 0.25), ("train", 0.3)])
def test_a_checkpoint_with_more_or_fewer_parameters_is_refused_by_torch(families, tmp_path, before):
    """Embeddings and norms trained as well, or layers of which nothing trains now."""
    run(families("qwen2"), before, tmp_path)
    after = ("train", 0.25 if before != ("train", 0.25) else 0.3)
    with pytest.raises(ValueError, match="doesn't match the size"):
        run(families("qwen2"), after, tmp_path, tmp_path / "checkpoint-1")


def run(model, block, folder, checkpoint=None) -> None:
    """Train inside a block: its kind, and the share (and seed) of its units."""
    if block is None:
        return trained(model, folder, checkpoint)
    kind, *size = block
    with (train_only if kind == "train" else freeze_units)(model, share(model, *size)):
        return trained(model, folder, checkpoint)


def step(model, optimizer) -> None:
    ids = torch.tensor([[3, 4, 5]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_an_optimizer_made_before_the_block_must_be_handed_over(tiny_model):
    optimizer = torch.optim.AdamW(tiny_model.parameters())
    block = train_only(tiny_model, share(tiny_model, 0.2))
    with block, pytest.raises(ValueError, match="would not move what is to train: make it inside"):
        step(tiny_model, optimizer)
    with train_only(tiny_model, share(tiny_model, 0.2), optimizer=optimizer):
        step(tiny_model, optimizer)
    assert not any("ssah_trains" in group for group in optimizer.param_groups)
    step(tiny_model, optimizer)  # outside, all of it trains


def test_an_optimizer_of_an_earlier_block_is_refused(tiny_model):
    with train_only(tiny_model, share(tiny_model, 0.2)):
        optimizer = torch.optim.AdamW([p for p in tiny_model.parameters() if p.requires_grad])
        step(tiny_model, optimizer)
    block = train_only(tiny_model, share(tiny_model, 0.2))
    with block, pytest.raises(ValueError, match="made outside of this"):
        step(tiny_model, optimizer)


def test_optimizers_of_other_models_are_left_alone(tiny_model, families):
    other = families("llama")
    optimizer = torch.optim.AdamW(other.parameters())
    step(other, optimizer)
    with train_only(tiny_model, share(tiny_model, 0.2)):
        step(other, optimizer)
    assert "ssah_trains" not in optimizer.param_groups[0]


def test_one_optimizer_goes_through_masks_that_change(tiny_model):
    optimizer = torch.optim.AdamW(tiny_model.parameters())
    for seed in range(3):
        with freeze_units(tiny_model, share(tiny_model, 0.3, seed), optimizer=optimizer):
            step(tiny_model, optimizer)
            step(tiny_model, optimizer)
