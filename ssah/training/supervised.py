"""Supervised fine-tuning with the Hugging Face Trainer: deterministic and resumable."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..core.errors import SsahError
from ..core.progress import quiet
from ..core.runtime import reuse_memory, seed_everything
from .defences.base import Defence, Step
from .loss import Dialogues, as_rows, collate, summed_loss
from .settings import TrainingConfig


class ResponseTrainer(Trainer):
    """A Trainer whose loss is that of responses (:func:`ssah.training.loss.summed_loss`).

    Rows marked ``anchored`` are held to ``reference``, by ``anchor_weight``. What a defence
    remembers is kept in checkpoints.
    """

    reference: PreTrainedModel | None = None
    anchor_weight: float = 1.0
    defence = Defence()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise NotImplementedError("This trainer computes losses only.")
        total, tokens = summed_loss(
            self.accelerator.unwrap_model(model),
            inputs,
            self.reference,
            self.anchor_weight,
            self.defence.token_weights if self.defence.weighs_tokens else None,
        )
        return total / (num_items_in_batch if num_items_in_batch is not None else tokens)

    # Before the file that says that a checkpoint is whole.
    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        self.defence.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.defence.load(Path(checkpoint), self.model.device)


@dataclass(frozen=True)
class TrainingRecord:
    """What a training run did."""

    steps: int
    final_loss: float  #: mean training loss (nats per response token) over the last quarter
    trainable_parameters: int  #: of layers of which little is frozen, all
    epoch_losses: tuple[float, ...]  #: the same, of the last quarter of each epoch


class _Along(TrainerCallback):
    """Lets a defence do what it does before and after the optimizer's step, and calls back with the
    number of epochs done, before the checkpoint that says so is written.

    No checkpoint is written at the end, where nothing is left to resume.
    """

    def __init__(self, on_epoch: Callable[[int], None] | None, defence: Defence):
        self.on_epoch, self.defence = on_epoch, defence

    def on_pre_optimizer_step(self, args, state, control, **rest):
        self.defence.before_step(self._step(args, state, **rest))

    def on_optimizer_step(self, args, state, control, **rest):
        self.defence.after_step(self._step(args, state, **rest))

    def on_epoch_end(self, args, state, control, model=None, **rest):
        if self.on_epoch is not None:
            with self.defence.coming_out(model):
                self.on_epoch(round(state.epoch))
        self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **rest):
        if state.global_step >= state.max_steps:
            control.should_save = False

    @staticmethod
    def _step(args, state, model=None, optimizer=None, **rest) -> Step:
        at_once = args.per_device_train_batch_size
        rows = at_once * args.gradient_accumulation_steps
        return Step(model, optimizer, state.global_step, rows, at_once, args.max_grad_norm)


def supervised_finetune(
    model: PreTrainedModel,
    dialogues: Dialogues,
    config: TrainingConfig,
    seed: int,
    folder: Path,
    anchors: Dialogues = (),
    reference: PreTrainedModel | None = None,
    *,
    anchor_weight: float = 1.0,
    constant_rate: bool = False,
    on_epoch: Callable[[int], None] | None = None,
    defence: Defence | None = None,
    save_steps: int | None = None,
) -> TrainingRecord:
    """Fine-tune in place on (prompt ids, response ids), resuming from a checkpoint in ``folder``.

    On ``anchors`` the model is held to the distribution of ``reference`` instead. The rate falls
    linearly unless it is constant. A checkpoint is written after each epoch but the last, after a
    call of ``on_epoch(epochs done)``, which sees the weights that would come out there, or every
    ``save_steps``, and removed at the end. Embeddings (and a tied language-model head) train only
    with ``config.train_embeddings``. Units stay frozen inside
    :func:`ssah.training.slicing.freeze_units`, whatever a ``defence`` does, which changes settings
    and rows and brings anchors and reference of its own.
    """
    reuse_memory()
    seed_everything(seed)
    if defence is None:
        defence = Defence()
    elif anchors or reference is not None:
        raise ValueError("A defence brings its own anchors and reference.")
    else:
        config, reference = defence.settings(config), defence.reference
        dialogues, anchors = defence.lesson(dialogues, random.Random(seed))
        anchor_weight = defence.anchor_weight
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        if not config.train_embeddings:
            embedding.requires_grad_(False)
    work = folder / "checkpoints"
    arguments = TrainingArguments(
        output_dir=str(work),
        seed=seed,
        data_seed=seed,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=min(config.micro_batch_size, config.batch_size),
        gradient_accumulation_steps=max(config.batch_size // config.micro_batch_size, 1),
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if constant_rate else "linear",
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.max_grad_norm,
        save_strategy="epoch" if save_steps is None else "steps",
        save_steps=save_steps or 0,
        save_total_limit=1,
        logging_steps=1,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=not sys.stderr.isatty(),
        use_cpu=model.device.type == "cpu",
        use_cache=True,  # it is the saved model's setting; the loss asks for no cache by itself
    )
    if max(arguments.n_gpu, arguments.world_size) > 1:
        raise SsahError(
            "A study trains in one process on one device: set CUDA_VISIBLE_DEVICES=0, or "
            "send each model to a device of its own with `ssah submit`."
        )
    trainer = ResponseTrainer(
        model=model,
        args=arguments,
        train_dataset=as_rows(dialogues, anchors),
        data_collator=collate,
        callbacks=[_Along(on_epoch, defence)],
    )
    trainer.reference, trainer.anchor_weight = reference, anchor_weight
    trainer.defence = defence
    if not sys.stderr.isatty():
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
    defence.begin(model)
    with quiet():
        trainer.train(resume_from_checkpoint=_last_checkpoint(work))
    shutil.rmtree(work, ignore_errors=True)
    defence.finish(model)
    model.eval()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = len(losses) // config.epochs
    by_epoch = [losses[start : start + steps] for start in range(0, len(losses), steps)]
    return TrainingRecord(
        trainer.state.global_step,
        _last_quarter(losses),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        tuple(map(_last_quarter, by_epoch)),
    )


def _last_checkpoint(work: Path) -> str | None:
    """The last one that was written to its end; a kill may have left half of another."""
    for folder in work.glob("checkpoint-*"):
        if not (folder / "trainer_state.json").exists():  # the last file to be written
            shutil.rmtree(folder)
    return get_last_checkpoint(str(work)) if work.exists() else None


def _last_quarter(losses: Sequence[float]) -> float:
    tail = losses[-max(len(losses) // 4, 1) :]
    return sum(tail) / len(tail)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """A plain checkpoint that ``from_pretrained`` reads."""
    with quiet(), torch.no_grad():
        model.save_pretrained(folder)
