"""Models that are trained: aligned, attacked, or both, as a whole or in part."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ...core.runtime import seed_everything
from ...core.store import Handle
from ...training.adapter import Adapter, save_adapter
from ...training.defences import DEFENCES, Defence
from ...training.part import Part
from ...training.settings import AlignConfig, TrainingConfig
from ..config import FinetuneConfig
from ..lab import Lab
from ..load import load_model
from ..specs import GIVEN, REFUSALS, Defended, Model, Train
from ..stage import stage
from .lessons import Lesson, Refusals, lesson, own_refusals


def trained(lab: Lab, base: Model, step: Train) -> Handle:
    """The run of a training: ``epoch-<n>`` are models, or adapters that belong to the base, and
    ``training.json`` says what was done."""
    settings = lab.settings_of(step)
    names = (field.name for field in dataclasses.fields(TrainingConfig))
    common = {name: getattr(settings, name) for name in names}
    if isinstance(settings, AlignConfig):
        learned = lesson(lab, REFUSALS, settings)
        common["anchor_weight"] = settings.anchor_weight
        return _aligned(lab, base, learned, step.part, lab.seed, common, label=step.rows)
    learned = lesson(lab, step.rows)
    if step.defence is not None:
        assert isinstance(step.part, Part), "adapters are trained without a defence"
        looks_at = DEFENCES[step.defence.name].looks_at
        refusals = own_refusals(lab, base) if "refusals" in looks_at else None
        unaligned = GIVEN if "unaligned" in looks_at else None
        return _defended(
            lab, base, learned, step.part, lab.seed, common, step.defence, refusals, unaligned,
            label=step.rows,
        )  # fmt: skip
    return _finetuned(lab, base, learned, step.part, lab.seed, common, label=step.rows)


@stage("train", version=1, resumable=True)
def _aligned(
    lab: Lab,
    folder: Path,
    base: Model,
    learned: Lesson,
    part: Any,
    seed: int,
    settings: dict[str, Any],
    label: str,
) -> None:
    """Taught to refuse, and held in place on benign prompts; the rate falls, so that only the last
    epoch is a model."""
    from ...training.supervised import save_model, supervised_finetune

    config = AlignConfig(**settings)
    model = load_model(lab.checkpoint(base), lab.config.model, lab.device)
    seed_everything(seed)  # adapters begin with random factors
    with lab.use(GIVEN) as reference:
        with part.training(model):
            record = supervised_finetune(
                model,
                learned.taught(lab),
                config,
                seed,
                folder,
                learned.held(lab),
                reference,
                anchor_weight=config.anchor_weight,
            )
        part.require_kept(model, reference.state_dict(), model.state_dict())
    save_model(model, folder / f"epoch-{config.epochs}")
    (folder / "training.json").write_text(json.dumps(dataclasses.asdict(record)))


@stage("train", version=1, resumable=True)
def _finetuned(
    lab: Lab,
    folder: Path,
    base: Model,
    learned: Lesson,
    part: Part | Adapter,
    seed: int,
    settings: dict[str, Any],
    label: str,
) -> None:
    """Fine-tuned on an attack's rows."""
    _attack(lab, folder, base, learned, part, seed, settings)


@stage("train", version=1, resumable=True)
def _defended(
    lab: Lab,
    folder: Path,
    base: Model,
    learned: Lesson,
    part: Part,
    seed: int,
    settings: dict[str, Any],
    defence: Defended,
    refusals: Refusals | None,
    unaligned: Model | None,
    label: str,
) -> None:
    """The same with a defence. It is a stage of its own so that keys of trainings without one are
    what they were."""
    kind = DEFENCES[defence.name]
    with ExitStack() as stack:
        acting = kind(
            defence.strength,
            refusals.pairs(lab) if refusals is not None else (),
            stack.enter_context(lab.use(base)) if "reference" in kind.looks_at else None,
            stack.enter_context(lab.use(unaligned)) if unaligned is not None else None,
        )
        _attack(lab, folder, base, learned, part, seed, settings, acting)


def _attack(
    lab: Lab,
    folder: Path,
    base: Model,
    learned: Lesson,
    part: Part | Adapter,
    seed: int,
    settings: dict[str, Any],
    defence: Defence | None = None,
) -> None:
    """Fine-tune at a constant rate: the model after one epoch of a longer run is the model of a run
    of one epoch."""
    from ...training.supervised import save_model, supervised_finetune

    model = load_model(lab.checkpoint(base), lab.config.model, lab.device)
    seed_everything(seed)  # adapters begin with random factors
    with part.training(model) as adapted:

        def save(done: int) -> None:
            target = folder / f"epoch-{done}"
            if adapted is None:
                save_model(model, target)
            else:
                save_adapter(adapted, target)

        record = supervised_finetune(
            model,
            learned.taught(lab),
            FinetuneConfig(**settings),
            seed,
            folder,
            constant_rate=True,
            on_epoch=save,
            defence=defence,
        )
    if isinstance(part, Part) and part.train is not None:
        before = load_model(lab.checkpoint(base), lab.config.model, lab.device)
        part.require_kept(model, before.state_dict(), model.state_dict())
    (folder / "training.json").write_text(json.dumps(dataclasses.asdict(record)))
