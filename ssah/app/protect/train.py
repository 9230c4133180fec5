"""Fine-tuning with a defence: steps on the model's own refusals, refusals among the rows, frozen
units."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...core.runtime import peak_memory_mib, seed_everything
from ...core.store import Handle, digest
from ...data.dialogues import Dialogue
from ...data.rows import Row
from ...evaluate import judges
from ...evaluate.judges import Completion
from ...text.chat import Pair, encode, encode_dialogue
from ...training.lora import adapters, save_adapters
from ...training.settings import LISA_PERIOD, TrainingConfig
from .settings import Settings
from .subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens of a refusal that is learned.
REFUSAL_TOKENS = 96

#: Pairs that units are found on, of each kind.
PAIRS_FOR_UNITS = 64

#: Folder of what comes out of a training with LoRA, as peft reads it.
ADAPTER = "adapter"

#: Checkpoints of a training: a kill loses at most one part in so many.
CHECKPOINTS = 10


def encode_rows(
    subject: Subject, rows: Sequence[Dialogue], max_tokens: int
) -> tuple[list[Pair], int]:
    """Prompt and response ids, and how many responses were cut.

    Rows whose prompt alone takes more than half of the room are left out.
    """
    pairs, cut = [], 0
    for row in rows:
        head, body = encode_dialogue(
            subject.tokenizer, row.prompt, row.response, system=row.system, before=row.before
        )
        if len(head) <= max_tokens // 2:
            room = max_tokens - len(head)
            cut += len(body) > room
            pairs.append((head, body[:room]))
    return pairs, cut


def refusal_pairs(prompts: Sequence[Row], run: Handle) -> list[tuple[str, str]]:
    """Those of a model's answers to harmful prompts that are refusals, as (prompt, response)."""
    said = run.json("answers.json")
    return [
        (row.prompt, text)
        for row, text in zip(prompts, said, strict=True)
        if judges.judge(Completion(row.prompt, text)) == "refused"
    ]


def encode_refusals(subject: Subject, refusals: Sequence[tuple[str, str]]) -> list[Pair]:
    """Without an end of turn where the answer was cut."""
    tokenizer = subject.tokenizer
    return [
        encode_dialogue(
            tokenizer, prompt, text, end=len(encode(tokenizer, text)) < REFUSAL_TOKENS - 1
        )
        for prompt, text in refusals
    ]


def mixed(rows: Sequence[Pair], refusals: Sequence[Pair], share: float, seed: int) -> list[Pair]:
    """All rows and, behind them, refusals, as many as a fraction of the rows: all of them, in a
    random order, before any is taken again.

    A study's :class:`ssah.training.defences.mixing.Mixing` puts them in the place of rows, so that
    arms take equally many steps; whoever brings rows wants all of them learned.
    """
    shuffled = random.Random(seed).sample(list(refusals), len(refusals))
    return [*rows, *itertools.islice(itertools.cycle(shuffled), count_refusals(rows, share))]


def count_refusals(rows: Sequence[Pair], share: float) -> int:
    """How many refusals go with so many rows."""
    return max(round(share * len(rows)), 1)


def count_steps(rows: Sequence[Pair], settings: Settings) -> int:
    """Steps on so many rows."""
    return settings.epochs * -(-len(rows) // settings.batch_size)


def learned_refusals(training: Mapping[str, Any], settings: Settings) -> str:
    """How many of its own refusals the model learned from, in words."""
    different, steps = training["different_refusals"], training["steps"]
    if settings.alternates:
        between = steps // LISA_PERIOD
        count = between * min(settings.batch_size, different)
        said = f"{count} in {between} steps, beside {steps} steps on rows"
    else:
        count = training["mixed_in"]
        said = f"{count} beside {training['rows']} rows"
    return said + (f", {different} different ones" if count > different else "")


def tuned(
    subject: Subject,
    rows: Sequence[Pair],
    refusals: Sequence[Pair],
    settings: Settings,
    micro_batch_size: int,
    inputs: tuple[str, ...] = (),
) -> Handle:
    """The model after fine-tuning, as a plain checkpoint with its tokenizer; ``training.json``
    says what was done. With LoRA the adapters are merged into it, and in ``adapter`` by themselves.
    A training that was killed goes on from its last checkpoint."""
    share = settings.refusals_a_row
    taught = mixed(rows, refusals, share, settings.seed) if settings.mixes else [*rows]
    key: dict[str, Any] = {
        "version": 1,
        "model": subject.checkpoint.identity,
        "taught": digest(taught),
        "frozen": digest([rows[:PAIRS_FOR_UNITS], refusals[:PAIRS_FOR_UNITS]])
        if settings.freezes
        else None,
        "between": digest(list(refusals)) if settings.alternates else None,
        "settings": dataclasses.asdict(settings) | {"learning_rate": settings.rate},
        "micro_batch_size": micro_batch_size,
        "device": subject.device.type,
        "saved_in": str(subject.saved_in),
    }

    def build(folder: Path) -> None:
        from ...training.defences.lisa import Lisa
        from ...training.supervised import save_model, supervised_finetune

        begin = time.monotonic()
        seed_everything(settings.seed)  # adapters begin with random factors
        model = subject.load(subject.checkpoint)
        config = TrainingConfig(
            epochs=settings.epochs,
            learning_rate=settings.rate,
            batch_size=settings.batch_size,
            micro_batch_size=micro_batch_size,
        )
        every = max(count_steps(taught, settings) // CHECKPOINTS, 1)
        part: AbstractContextManager[Any] = nullcontext()
        frozen = 0.0
        if settings.freezes:
            part, frozen = _frozen(model, rows, refusals)
        elif settings.lora is not None:
            part = adapters(model, settings.lora)
        with part:
            record = supervised_finetune(
                model,
                taught,
                config,
                settings.seed,
                folder,
                defence=Lisa(refusals=refusals) if settings.alternates else None,
                save_steps=every,
            )
            if settings.lora is not None:
                save_adapters(model, folder / ADAPTER, subject.name)
                subject.tokenizer.save_pretrained(folder / ADAPTER)
        torch.nn.Module.to(model, subject.saved_in)
        save_model(model, folder)
        subject.tokenizer.save_pretrained(folder)
        done = {
            **dataclasses.asdict(record),
            "rows": len(rows),
            "mixed_in": len(taught) - len(rows),
            "different_refusals": len(refusals),
            "frozen_share": frozen,
            "seconds": round(time.monotonic() - begin, 1),
            "peak_gb": round(_peak_gb(subject), 2),
        }
        (folder / "training.json").write_text(json.dumps(done))

    name = subject.config.name
    stage = f"protected_{settings.defence}"
    return Handle(subject.store, stage, name, key, build, inputs, resumable=True)


def _frozen(
    model: PreTrainedModel, rows: Sequence[Pair], refusals: Sequence[Pair]
) -> tuple[AbstractContextManager[Any], float]:
    """A block in which the units that the paper freezes are frozen, and their share of all."""
    from ...scoring.find import roles_of
    from ...training.slicing import freeze_units

    mask = roles_of(model, refusals[:PAIRS_FOR_UNITS], rows[:PAIRS_FOR_UNITS]).select(
        "ESU", "CU:6%"
    )
    return freeze_units(model, mask), mask.share()


def _peak_gb(subject: Subject) -> float:
    if subject.device.type == "cuda":
        return torch.cuda.max_memory_allocated(subject.device) / 1e9
    return peak_memory_mib() * 2**20 / 1e9
