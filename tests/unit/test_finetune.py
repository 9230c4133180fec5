"""Fine-tuning: the usual loss and gradients, frozen embeddings, and resuming to the same bits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from helpers import AtNextEpoch, Dialogues, Interruption, dialogues, small_training, weights
from ssah.training import supervised as finetune
from ssah.training.supervised import ResponseTrainer, collate, save_model, supervised_finetune


def rows_of(pairs: Dialogues) -> list[dict[str, list[int]]]:
    return [{"prompt": prompt, "response": response} for prompt, response in pairs]


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def usual_loss(model, pairs: Dialogues) -> tuple[float, dict[str, torch.Tensor]]:
    """The library's loss on one batch of all dialogues, and its gradients."""
    reference = copy.deepcopy(model)
    reference.zero_grad()
    loss = reference(**collate(rows_of(pairs)), use_cache=False).loss
    loss.backward()
    return loss.item(), gradients(reference)


def assert_same_gradients(got: dict, expected: dict) -> None:
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_collate_pads_on_the_right_and_scores_the_response():
    batch = collate([{"prompt": [5, 6], "response": [7]}, {"prompt": [8], "response": [9, 4, 2]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 4, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, 9, 4, 2]]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen2"])
def test_loss_and_gradients_are_the_usual_ones(families, tmp_path, model_type):
    """Gemma 2 caps its logits, which a loss computed apart from the model must not forget."""
    cap = {"final_logit_softcapping": 2.0} if model_type == "gemma2" else {}
    model = families(model_type, **cap).double()
    pairs = dialogues(6)
    expected_loss, expected = usual_loss(model, pairs)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = ResponseTrainer(model=model, args=arguments, data_collator=collate)
    loss = trainer.compute_loss(model, collate(rows_of(pairs)))
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients(model), expected)
    # Told that the batch is one part of a larger one, it divides by the number in the whole.
    scored = sum(len(response) for _, response in pairs)
    part = trainer.compute_loss(model, collate(rows_of(pairs)), num_items_in_batch=2 * scored)
    assert part.item() == pytest.approx(expected_loss / 2, rel=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2, 6])
@pytest.mark.parametrize("trainer_class", [ResponseTrainer, Trainer])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    tiny_model, tmp_path, micro_batch, trainer_class
):
    """The library's own trainer on the same rows is held to the same numbers."""
    model, pairs = tiny_model.double(), dialogues(6, seed=3)
    expected_loss, expected = usual_loss(model, pairs)
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **rest):
            seen.append(gradients(model))

    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=6 // micro_batch,
        num_train_epochs=1,
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=rows_of(pairs),
        callbacks=[Watch()],
    )
    trainer.train()
    assert len(seen) == 1
    assert_same_gradients(seen[0], expected)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([expected_loss], abs=1e-4)


def test_predictions_are_refused(tiny_model, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = ResponseTrainer(model=tiny_model, args=arguments)
    with pytest.raises(NotImplementedError, match="losses only"):
        trainer.compute_loss(tiny_model, {}, return_outputs=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("train_embeddings", [True, False])
def test_embeddings_train_only_when_asked(families, tmp_path, tied, train_embeddings):
    model = families("llama", tie_word_embeddings=tied)
    before = weights(model)
    # With decay, even a weight without a gradient would move if the optimiser held it.
    config = small_training(train_embeddings=train_embeddings, weight_decay=0.1)
    record = supervised_finetune(model, dialogues(16), config, 0, tmp_path)
    for name, tensor in model.state_dict().items():
        embedding = "embed_tokens" in name or "lm_head" in name
        assert torch.equal(tensor, before[name]) is (embedding and not train_embeddings), name
    frozen = 0 if train_embeddings else 40 * 16 * (1 if tied else 2)
    assert record.trainable_parameters == sum(p.numel() for p in model.parameters()) - frozen


def test_training_lowers_the_loss_and_records_it(tiny_model, tmp_path):
    pairs = dialogues(16)
    start, _ = usual_loss(tiny_model, pairs)
    record = supervised_finetune(tiny_model, pairs, small_training(epochs=6), 0, tmp_path)
    assert record.steps == 6 * 4
    end, _ = usual_loss(tiny_model, pairs)
    assert end < 0.7 * start
    assert record.final_loss == pytest.approx(end, rel=0.3)
    assert math.isfinite(record.final_loss)
    assert not tiny_model.training
    assert list(tmp_path.iterdir()) == []  # checkpoints are gone


def test_training_is_deterministic_by_seed(families, tmp_path):
    """Dropout included, whatever was drawn from the global generators before."""
    results = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(noise)
        model = families("llama", attention_dropout=0.1)
        supervised_finetune(
            model, dialogues(16), small_training(), seed, tmp_path / f"{seed}-{noise}"
        )
        results.append(weights(model))
    same = [all(torch.equal(results[0][n], other[n]) for n in other) for other in results[1:]]
    assert same == [True, False]


class InMidEpoch(TrainerCallback):
    """Two steps into the second epoch, which have to be taken again."""

    def on_step_end(self, args, state, control, **rest):
        if state.global_step == 6:
            raise Interruption


@pytest.mark.parametrize("callback", [AtNextEpoch, InMidEpoch])
def test_resumed_training_equals_uninterrupted(families, tmp_path, monkeypatch, callback):
    pairs, config = dialogues(16), small_training(epochs=3, weight_decay=0.01)
    whole = families("llama", attention_dropout=0.1)
    expected = supervised_finetune(whole, pairs, config, 5, tmp_path / "whole")

    class Interrupted(ResponseTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(callback())

    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "ResponseTrainer", Interrupted)
        with pytest.raises(Interruption):
            supervised_finetune(families("llama", attention_dropout=0.1), pairs, config, 5, folder)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["checkpoint-4"]

    steps = []

    class Counting(ResponseTrainer):
        def training_step(self, *args, **kwargs):
            steps.append(self.state.global_step)
            return super().training_step(*args, **kwargs)

    torch.manual_seed(99)  # a new process would not have the old one's random state either
    resumed = families("llama", attention_dropout=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "ResponseTrainer", Counting)
        record = supervised_finetune(resumed, pairs, config, 5, folder)
    assert min(steps) == 4  # the first epoch was not repeated
    assert record == expected
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert not (folder / "checkpoints").exists()


def test_saved_model_loads_with_the_same_weights(tiny_model, tmp_path):
    save_model(tiny_model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_anchored_rows_are_held_to_the_reference(families, tmp_path):
    """Their loss is KL(reference || model) by hand; the other rows keep the usual loss."""
    model, reference = families("llama").double(), families("llama").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    taught, held = dialogues(3, seed=1), dialogues(2, seed=2)
    rows = rows_of(taught) + [row | {"anchored": True} for row in rows_of(held)]
    trainer = ResponseTrainer(
        model=model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    )
    trainer.reference = reference
    loss = trainer.compute_loss(model, collate(rows), num_items_in_batch=1)

    expected = usual_loss(model, taught)[0] * sum(len(response) for _, response in taught)
    for prompt, response in held:
        ids = torch.tensor([prompt + response])
        span = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        ours, theirs = (m(ids).logits[0, span].log_softmax(-1) for m in (model, reference))
        expected += (theirs.exp() * (theirs - ours)).sum().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_anchors_pull_only_once_the_model_has_moved(families, tmp_path):
    """At the reference itself neither loss nor gradient is left."""
    model, reference = families("llama").double(), families("llama").double()
    trainer = ResponseTrainer(
        model=model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    )
    trainer.reference = reference
    rows = [row | {"anchored": True} for row in rows_of(dialogues(4))]
    loss = trainer.compute_loss(model, collate(rows))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients(model).values())
