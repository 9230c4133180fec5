"""The computations of one seed, each cached by content in the run store.

Everything slow happens here and only here: answering, alignment, attribution, the ablation search,
completions and utility scores. Artefacts ask for what they need and draw.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from .ablation import ablate
from .arms import Arm, Tuning, Which
from .attribution import ActivationStatistics, VarianceOver, collect_statistics, unit_scores
from .config import Config
from .data import Row, compose_refusal, read_jsonl, write_jsonl
from .evaluate.generate import complete
from .finetune import save_model, supervised_finetune
from .inputs import Inputs
from .models import (
    Checkpoint,
    dialogue_batches,
    encode_dialogue,
    load_model,
    render_prompt,
)
from .store import Run, Store
from .units import UnitKind, UnitLayout

Purpose = Literal["safety", "utility"]


class Preparation(Inputs):
    """Models, answers, alignment and attribution scores of one seed."""

    def __init__(self, config: Config, store: Store, seed: int):
        super().__init__(config, store, seed)
        self._models: dict[str, PreTrainedModel] = {}

    def checkpoint(self, which: Which) -> Checkpoint:
        assert not isinstance(which, Tuning), "FineTuning knows them"
        if which == "unaligned" or not self.config.align.enabled:
            return self.unaligned
        run = self.align()
        return Checkpoint(str(run.folder), run.key)

    def identity(self, which: Which) -> str:
        """What tells this model from others in a key."""
        return self.checkpoint(which).identity

    def model(self, which: Which) -> PreTrainedModel:
        """The model in memory, loaded at most once; ablations leave it as it was."""
        checkpoint = self.checkpoint(which)
        if checkpoint.identity not in self._models:
            model = load_model(checkpoint, self.config.model, self.device)
            self._models[checkpoint.identity] = model
        return self._models[checkpoint.identity]

    def layout_of(self, model: PreTrainedModel) -> UnitLayout:
        return UnitLayout.of(model, cast(UnitKind, self.config.attribution.unit_kind))

    @functools.cached_property
    def layout(self) -> UnitLayout:
        return self.layout_of(self.model("aligned"))

    # --- completions -------------------------------------------------------------------------

    def answers(
        self,
        rows: list[Row],
        arm: Arm,
        max_new_tokens: int,
        system: str = "",
        sample_seed: int | None = None,
    ) -> Run:
        """An arm's answers to some prompts: ``completions.jsonl``, in the rows' order.

        Greedy, unless ``sample_seed`` asks for a draw from the model's distribution.
        """
        batch_size = self.config.evaluate.batch_size
        key = self._key(
            1,
            arm=self._arm_key(arm),
            prompts=[row.prompt for row in rows],
            system=system,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            sample_seed=sample_seed,
        )

        def build(folder: Path) -> None:
            texts = [render_prompt(self.tokenizer, row.prompt, system) for row in rows]
            with self.in_effect(arm) as model:
                answers = complete(
                    model, self.tokenizer, texts, max_new_tokens, batch_size, sample_seed
                )
            pairs = zip(rows, answers, strict=True)
            write_jsonl(
                folder / "completions.jsonl", [{"id": r.id, "completion": a} for r, a in pairs]
            )

        return self.store.get("answers", self.config.model.name, key, build)

    @contextmanager
    def in_effect(self, arm: Arm) -> Iterator[PreTrainedModel]:
        """The arm's model, with its ablation in force inside the ``with`` block."""
        model = self.model(arm.which)
        if arm.mask is None:
            yield model
            return
        mean = self.statistics("utility").mean if arm.mode == "mean" else None
        with ablate(model, self.layout, arm.mask, arm.mode, mean):
            yield model

    def _arm_key(self, arm: Arm) -> dict[str, Any]:
        key: dict[str, Any] = {"model": self.identity(arm.which)}
        if arm.mask is not None:
            bits = self.layout.flatten(arm.mask).numpy().tobytes()
            key |= {"units": hashlib.sha256(bits).hexdigest(), "mode": arm.mode}
            key["unit_kind"] = self.layout.unit_kind
            if arm.mode == "mean":
                key["mean"] = self.statistics_run("utility").key
        return key

    # --- alignment ---------------------------------------------------------------------------

    def align(self) -> Run:
        """The aligned model: fine-tuned on varied refusals, and held in place on benign prompts.

        On its own sampled answers to those it is trained towards the unaligned model's whole
        distribution; greedy answers as targets would sharpen it and cost perplexity.
        """
        config = self.config.align
        harmful = self.sample("harmful_align", config.harmful)
        benign = self.sample("benign_align", config.benign)
        answers = self.answers(
            benign,
            Arm("unaligned"),
            config.anchor_tokens,
            sample_seed=self.seed,
        )
        key = self._key(
            2,
            seed=self.seed,
            config=dataclasses.asdict(config),
            model=self.unaligned.identity,
            sets=self.sets.key,
            answers=answers.key,
        )

        def build(folder: Path) -> None:
            rng = random.Random(self.seed)
            refusals = [
                (row.prompt, compose_refusal(row.category, rng, config.safe_alternative))
                for row in harmful
            ]
            text = self.answer_texts(answers)
            replies = [(row.prompt, text[row.id]) for row in benign]
            taught = [encode_dialogue(self.tokenizer, *pair) for pair in refusals]
            # Sampling stopped for want of room, or at the end-of-turn token, which is not in the
            # text: either way no end belongs to what is here.
            held = [encode_dialogue(self.tokenizer, *pair, end=False) for pair in replies]
            model = load_model(self.unaligned, self.config.model, self.device)
            reference = self.model("unaligned")
            record = supervised_finetune(
                model,
                taught,
                config,
                self.seed,
                folder,
                held,
                reference,
                anchor_weight=config.anchor_weight,
            )
            save_model(model, folder)
            (folder / "training.json").write_text(json.dumps(dataclasses.asdict(record)))

        return self.store.get("align", self.config.model.name, key, build, resumable=True)

    @staticmethod
    def answer_texts(run: Run) -> dict[str, str]:
        return {r["id"]: r["completion"] for r in read_jsonl(run.path("completions.jsonl"))}

    # --- attribution and roles ---------------------------------------------------------------

    def statistics_run(self, purpose: Purpose, which: Which = "aligned", resample: int = 0) -> Run:
        """Activation statistics of a model on the aligned model's own answers to a sampled set.

        ``resample`` draws another sample of prompts.
        """
        config = self.config.attribution
        rows, answers = self._own_answers(purpose, resample)
        key = self._key(1, config=dataclasses.asdict(config), answers=answers.key)
        if which != "aligned":
            key["model"] = self.identity(which)

        def build(folder: Path) -> None:
            pairs = self._encoded_answers(rows, answers)
            batches = dialogue_batches(
                pairs, config.batch_size, tokens=config.tokens, drop_first=config.drop_first
            )
            model = self.model(which)
            statistics = collect_statistics(
                model, self.layout, batches, cast(VarianceOver, config.variance_over)
            )
            statistics.save(folder / "statistics.safetensors")

        return self.store.get(f"statistics_{purpose}", self.config.model.name, key, build)

    def _own_answers(self, purpose: Purpose, resample: int) -> tuple[list[Row], Run]:
        """Prompts of a sampled set and what the aligned model says to them."""
        config = self.config.attribution
        source = {"safety": "harmful_attribution", "utility": "benign_attribution"}[purpose]
        drawn = f"{source}#{resample}" if resample else source
        rows = self.draw(drawn, self.rows(source), config.samples)
        # Refusals come from the aligned model, and so do its benign answers: what it says itself.
        return rows, self.answers(rows, Arm("aligned"), config.max_response_tokens)

    def _encoded_answers(self, rows: list[Row], answers: Run) -> list[tuple[list[int], list[int]]]:
        text, limit = self.answer_texts(answers), self.config.attribution.max_response_tokens - 1
        return [
            encode_dialogue(self.tokenizer, r.prompt, text[r.id], max_response_tokens=limit)
            for r in rows
        ]

    def safety_pairs(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and response ids of the safety set: harmful prompts, the model's own answers."""
        return self._encoded_answers(*self._own_answers("safety", 0))

    def statistics(self, purpose: Purpose) -> ActivationStatistics:
        """Those of the aligned model."""
        run = self.statistics_run(purpose)
        return ActivationStatistics.load(run.path("statistics.safetensors"))

    @functools.cached_property
    def scores(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """I_S and I_U of the aligned model's units by block, ``[units]``."""
        return self.scores_of("aligned")

    def scores_of(
        self, which: Which, resample: int = 0
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """I_S and I_U of any model's units, on the same texts."""
        runs = [self.statistics_run(p, which, resample) for p in ("safety", "utility")]
        key = self._key(1, statistics=[run.key for run in runs], model=self.identity(which))

        def build(folder: Path) -> None:
            for name, run in zip(("safety", "utility"), runs, strict=True):
                statistics = ActivationStatistics.load(run.path("statistics.safetensors"))
                scores = unit_scores(self.model(which), self.layout, statistics)
                save_file(scores, folder / f"{name}.safetensors")

        run = self.store.get("scores", self.config.model.name, key, build)
        safety, utility = (load_file(run.path(f"{n}.safetensors")) for n in ("safety", "utility"))
        return safety, utility
