"""Harmless fine-tuning of the aligned model, with some units frozen or none: attack and defence.

The fine-tuned models are large and many: they are trained when something about them has to be
measured, and dropped once it is. What was measured stays, and so does the training's record.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..core.errors import SsahError
from ..core.store import Run, digest
from ..data.rows import Row
from ..scoring.conflict import gradient_conflict
from ..text.batches import dialogue_batches
from ..text.chat import encode_dialogue
from ..training.settings import TrainingConfig
from ..training.supervised import TrainingRecord, save_model, supervised_finetune
from ..units.families import UnitKind
from ..units.layout import UnitLayout
from .arms import Aligning, Arm, Tuning, Which
from .config import FinetuneConfig
from .load import Checkpoint, load_model
from .probing import Probing

#: Attack -> what the paper uses in its place.
ATTACKS = {"instructions": "Alpaca", "arithmetic": "GSM8K", "dialogues": "Dolly"}

#: The attack that sweeps, controls, conditions and attribute transfer are measured with: after it
#: harmful requests are answered.
MAIN_ATTACK = "instructions"

#: What only looks like an attack: the model takes over a curt style, without a refusal phrase and
#: without an answer (docs/what_we_got_wrong.md). Measured with nothing frozen, as a lesson.
LESSON = "dialogues"


class FineTuning(Probing):
    """Adds the fine-tuned models to what can be measured."""

    def attack_rows(self, attack: str) -> tuple[list[Row], list[Row]]:
        """Rows to train on, and held-out rows of the same kind; both with responses."""
        config = self.config.finetune
        if attack not in config.rows or attack not in ATTACKS:
            raise SsahError(
                f"'{attack}' is no attack with a number of rows: finetune.rows.<attack> is for "
                f"{', '.join(ATTACKS)}."
            )
        count = config.rows[attack]
        rows = self._attack_pool(attack)
        if count + config.heldout_rows > len(rows):
            raise SsahError(
                f"finetune.rows.{attack}={count} and finetune.heldout_rows={config.heldout_rows} "
                f"ask for more than the {len(rows)} rows that there are."
            )
        chosen = self.draw(f"attack/{attack}", rows, count + config.heldout_rows)
        if chosen[0].response is None:  # they get the unaligned model's answers
            run = self.answers(chosen, Arm("unaligned"), config.max_response_tokens)
            text = self.answer_texts(run)
            chosen = [dataclasses.replace(row, response=text[row.id]) for row in chosen]
        return chosen[:count], chosen[count:]

    def _attack_pool(self, attack: str) -> list[Row]:
        if attack == "arithmetic":  # the first ones are for measuring utility
            return self.rows("arithmetic")[self.config.evaluate.arithmetic_items :]
        if self.has(attack):
            return self.rows(attack)
        # No instructions of their own; answers that these prompts have are for other purposes.
        rows = self.rows("benign_align") + self.rows("benign_attribution")
        return [dataclasses.replace(row, response=None) for row in rows]

    def encoded(self, attack: str, rows: list[Row]) -> list[tuple[list[int], list[int]]]:
        """Prompt and response ids; a response that was cut has no end-of-turn token."""
        limit = self.config.finetune.max_response_tokens
        # Generated answers stop at the limit without an end, so the last token tells nothing.
        limit -= attack == "instructions"
        return [
            encode_dialogue(self.tokenizer, r.prompt, r.response or "", max_response_tokens=limit)
            for r in rows
        ]

    # --- training ----------------------------------------------------------------------------

    def _settings(self, tuning: Tuning) -> FinetuneConfig:
        unknown = set(tuning.changes) - {f.name for f in dataclasses.fields(TrainingConfig)}
        if unknown:  # rows and responses belong to the attack, not to one arm
            raise ValueError(f"A tuning cannot change {', '.join(sorted(unknown))}.")
        return dataclasses.replace(self.config.finetune, **tuning.changes)

    def _tuning_key(self, tuning: Tuning) -> dict[str, Any]:
        settings = self._settings(tuning)
        rows, _ = self.attack_rows(tuning.attack)
        key = self._key(
            1,
            seed=self.seed,
            model=self.identity(tuning.base),
            rows=[[row.prompt, row.response] for row in rows],
            max_response_tokens=settings.max_response_tokens,
            config={f.name: getattr(settings, f.name) for f in dataclasses.fields(TrainingConfig)},
        )
        for part, mask in (("frozen", tuning.frozen), ("trained", tuning.trained)):
            if mask is not None:
                key[part] = mask.digest()
        return key

    def _training_run(self, tuning: Tuning, *, whole: bool) -> Run:
        def build(folder: Path) -> None:
            settings = self._settings(tuning)
            rows, _ = self.attack_rows(tuning.attack)
            model = load_model(self.checkpoint(tuning.base), self.config.model, self.device)
            with tuning.part.training(model):
                record = supervised_finetune(
                    model,
                    self.encoded(tuning.attack, rows),
                    settings,
                    self.seed,
                    folder,
                    constant_rate=True,
                    on_epoch=lambda done: save_model(model, folder / f"epoch-{done}"),
                )
            if tuning.trained is not None:
                before = load_model(self.checkpoint(tuning.base), self.config.model, self.device)
                tuning.part.require_kept(model, before.state_dict(), model.state_dict())
            (folder / "training.json").write_text(json.dumps(dataclasses.asdict(record)))

        return self.store.get(
            "finetune",
            f"{tuning.attack}-{self.config.model.name}",
            self._tuning_key(tuning),
            build,
            resumable=True,
            whole=whole,
        )

    def training(self, tuning: Tuning) -> TrainingRecord:
        """What the training did, whether or not its models are still there."""
        return TrainingRecord(**self._training_run(tuning, whole=False).json("training.json"))

    @contextmanager
    def tuned(self, tuning: Tuning) -> Iterator[list[Arm]]:
        """Arms to measure, one for each epoch; their models are dropped at the end of the block.

        After an error they stay, so that what was trained is there for the next attempt.
        """
        epochs = range(1, self._settings(tuning).epochs + 1)
        yield [Arm(dataclasses.replace(tuning, epoch=epoch)) for epoch in epochs]
        self._loaded = None
        self.store.drop(self._training_run(tuning, whole=False), "epoch-*")

    # --- gradient conflict -------------------------------------------------------------------

    def conflict(self, attack: str) -> dict[str, Tensor]:
        """How much a first step on the attack's rows would hurt refusals, by unit."""
        rows, _ = self.attack_rows(attack)
        training, safety = self.encoded(attack, rows), self.safety_pairs()
        kind, texts = self.layout.unit_kind, digest([training, safety])
        key = self._key(1, model=self.identity("aligned"), kind=kind, pairs=texts)

        def build(folder: Path) -> None:
            size = self.config.finetune.micro_batch_size
            batches = [dialogue_batches(pairs, size) for pairs in (training, safety)]
            found = gradient_conflict(self.model("aligned"), self.layout, *batches)
            save_file(found, folder / "conflict.safetensors")

        run = self.store.get("conflict", self.config.model.name, key, build)
        return load_file(run.path("conflict.safetensors"))

    # --- models ------------------------------------------------------------------------------

    _loaded: tuple[str, PreTrainedModel] | None = None

    def checkpoint(self, which: Which) -> Checkpoint:
        if not isinstance(which, Tuning):
            return super().checkpoint(which)
        run = self._training_run(which, whole=True)
        return Checkpoint(str(run.folder / f"epoch-{which.epoch}"), self.identity(which))

    def identity(self, which: Which) -> str:
        """What tells this model from others in a key; nothing is trained to know it."""
        if isinstance(which, Aligning):
            return self.store.place("align", "", self.alignment_key(which))[1]
        if not isinstance(which, Tuning):
            return super().identity(which)
        _, sha = self.store.place("finetune", "", self._tuning_key(which))
        return f"{sha}/epoch-{which.epoch}"

    def model(self, which: Which) -> PreTrainedModel:
        """The model in memory; of those that are dropped once measured only the last."""
        if not isinstance(which, (Aligning, Tuning)):
            return super().model(which)
        identity = self.identity(which)
        if self._loaded is None or self._loaded[0] != identity:
            self._loaded = None
            checkpoint = self.checkpoint(which)
            self._loaded = identity, load_model(checkpoint, self.config.model, self.device)
        return self._loaded[1]

    def layout_for(self, unit_kind: UnitKind) -> UnitLayout:
        """The aligned model's layout with another kind of unit."""
        return UnitLayout.of(self.model("aligned"), unit_kind)
