"""The computations of one seed, each cached by content in the run store.

Everything slow happens here and only here: answering, alignment, attribution, the ablation search,
completions and utility scores. Artefacts ask for what they need and draw.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..core.store import Run, Store
from ..data.refusals import compose_refusal
from ..data.rows import Row, read_jsonl, write_jsonl
from ..evaluate.generate import complete
from ..scoring.attribution import (
    ActivationStatistics,
    VarianceOver,
    collect_statistics,
    unit_scores,
)
from ..text.batches import dialogue_batches
from ..text.chat import encode_dialogue, render_prompt
from ..training.ablation import ablate
from ..training.aligning import align_model
from ..training.settings import AlignConfig
from ..training.supervised import save_model
from ..units.families import UnitKind
from ..units.layout import UnitLayout
from .arms import Aligning, Arm, Tuning, Which
from .config import Config
from .inputs import Inputs
from .load import Checkpoint, load_model

Purpose = Literal["safety", "utility"]


class Preparation(Inputs):
    """Models, answers, alignment and attribution scores of one seed."""

    def __init__(self, config: Config, store: Store, seed: int):
        super().__init__(config, store, seed)
        self._models: dict[str, PreTrainedModel] = {}

    def checkpoint(self, which: Which) -> Checkpoint:
        """Where the model's files are; it is made first where there is none."""
        assert not isinstance(which, Tuning), "FineTuning knows them"
        if isinstance(which, Aligning):
            run = self.align(which)
        elif which == "unaligned" or not self.config.align.enabled:
            return self.unaligned
        else:
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
        return self.layout_of(self.model("unaligned"))  # alignment changes no shape

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
            key |= {"units": arm.mask.digest(), "mode": arm.mode}
            if arm.mode == "mean":
                key["mean"] = self.statistics_run("utility").key
        return key

    # --- alignment ---------------------------------------------------------------------------

    def alignment_key(self, how: Aligning | None = None) -> dict[str, Any]:
        """What tells one alignment from others; nothing is trained to know it."""
        config = self._align_config(how)
        key = self._key(
            2,
            seed=self.seed,
            config=dataclasses.asdict(config),
            model=self.unaligned.identity,
            sets=self.sets.key,
            answers=self._anchors(config)[1].key,
        )
        if how is not None:
            key["rank"] = how.rank
            if how.trained is not None:
                key["trained"] = how.trained.digest()
        return key

    def _align_config(self, how: Aligning | None) -> AlignConfig:
        return dataclasses.replace(self.config.align, **(how.changes if how else {}))

    def _anchors(self, config: AlignConfig) -> tuple[list[Row], Run]:
        """Benign prompts and the unaligned model's sampled answers."""
        benign = self.sample("benign_align", config.benign)
        unaligned, seed = Arm("unaligned"), self.seed
        return benign, self.answers(benign, unaligned, config.anchor_tokens, sample_seed=seed)

    def align(self, how: Aligning | None = None, *, whole: bool = True) -> Run:
        """The aligned model: fine-tuned on varied refusals, and held in place on benign prompts.

        On its own sampled answers to those it is trained towards the unaligned model's whole
        distribution; greedy answers as targets would sharpen it and cost perplexity. ``how`` aligns
        through a part of the model, and records that nothing else changed a bit.
        """
        config = self._align_config(how)
        harmful = self.sample("harmful_align", config.harmful)
        benign, answers = self._anchors(config)

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
            training = align_model(
                model, reference, taught, held, config, self.seed, folder, how.part if how else None
            )
            save_model(model, folder)
            (folder / "training.json").write_text(json.dumps(training))

        key, name = self.alignment_key(how), self.config.model.name
        return self.store.get("align", name, key, build, resumable=True, whole=whole)

    @staticmethod
    def answer_texts(run: Run) -> dict[str, str]:
        return {r["id"]: r["completion"] for r in read_jsonl(run.path("completions.jsonl"))}

    # --- attribution and roles ---------------------------------------------------------------

    def statistics_run(
        self,
        purpose: Purpose,
        which: Which = "aligned",
        resample: int = 0,
        author: Which = "aligned",
    ) -> Run:
        """Activation statistics of a model on the author's own answers to a sampled set.

        ``resample`` draws another sample of prompts.
        """
        config = self.config.attribution
        rows, answers = self._own_answers(purpose, resample, author)
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

    def _own_answers(
        self, purpose: Purpose, resample: int, author: Which = "aligned"
    ) -> tuple[list[Row], Run]:
        """Prompts of a sampled set and what a model says to them, by default the aligned one."""
        config = self.config.attribution
        source = {"safety": "harmful_attribution", "utility": "benign_attribution"}[purpose]
        drawn = f"{source}#{resample}" if resample else source
        rows = self.draw(drawn, self.rows(source), config.samples)
        # Refusals come from the aligned model, and so do its benign answers: what it says itself.
        return rows, self.answers(rows, Arm(author), config.max_response_tokens)

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
