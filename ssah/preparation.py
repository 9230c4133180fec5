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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from .ablation import ablate
from .attribution import ActivationStatistics, VarianceOver, collect_statistics, unit_scores
from .config import Config
from .data import Row, compose_refusal, read_jsonl, read_set, write_jsonl
from .errors import SsahError
from .evaluate.generate import complete
from .finetune import save_model, supervised_finetune
from .models import (
    Checkpoint,
    dialogue_batches,
    encode_dialogue,
    load_model,
    load_tokenizer,
    locate,
    quiet,
    render_prompt,
)
from .runtime import pick_device
from .sources import build_sets
from .store import Run, Store
from .units import UnitKind, UnitLayout, UnitMask, require_supported

Which = Literal["unaligned", "aligned"]


@dataclass(frozen=True)
class Arm:
    """A model as it is evaluated: whole, or with some units ablated."""

    which: Which = "aligned"
    mask: UnitMask | None = None
    mode: Literal["zero", "mean"] = "zero"


class Preparation:
    """Sets, models, answers, alignment and attribution scores of one seed."""

    def __init__(self, config: Config, store: Store, seed: int):
        self.config, self.store, self.seed = config, store, seed
        self.device = pick_device(config.runtime.device)
        self._models: dict[str, PreTrainedModel] = {}

    # --- inputs ------------------------------------------------------------------------------

    @functools.cached_property
    def sets(self) -> Run:
        return build_sets(self.store, self.config.data)

    def rows(self, name: str, limit: int | None = None) -> list[Row]:
        """The rows of a set; asking for more than there are is an error."""
        rows = read_set(self.sets, name)
        if limit is not None and limit > len(rows):
            raise SsahError(f"Set '{name}' has {len(rows)} rows but {limit} are asked for.")
        return rows[:limit]

    def sample(self, name: str, count: int) -> list[Row]:
        """A seeded sample without replacement: what varies between seeds."""
        rows = self.rows(name)
        if count > len(rows):
            raise SsahError(f"Set '{name}' has {len(rows)} rows but {count} are asked for.")
        return random.Random(f"{name}/{self.seed}").sample(rows, count)

    @functools.cached_property
    def unaligned(self) -> Checkpoint:
        return locate(self.store, self.config.model)

    def check_model(self) -> None:
        """Raise before any work where the architecture has no unit layout."""
        checkpoint = self.unaligned
        with quiet():
            config = AutoConfig.from_pretrained(checkpoint.path, revision=checkpoint.revision)
        require_supported(config.get_text_config().model_type)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.unaligned, self.config.model)

    def checkpoint(self, which: Which) -> Checkpoint:
        if which == "unaligned" or not self.config.align.enabled:
            return self.unaligned
        run = self.align()
        return Checkpoint(str(run.folder), run.key)

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

    def _key(self, version: int, **parts: Any) -> dict[str, Any]:
        model = self.config.model
        return {
            "version": version,
            "dtype": model.dtype,
            "attention": model.attn_implementation,
            "template": model.chat_template,
            **parts,
        }

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
        key: dict[str, Any] = {"model": self.checkpoint(arm.which).identity}
        if arm.mask is not None:
            bits = self.layout.flatten(arm.mask).numpy().tobytes()
            key |= {"units": hashlib.sha256(bits).hexdigest(), "mode": arm.mode}
            key["unit_kind"] = self.layout.unit_kind
            if arm.mode == "mean":
                key["mean"] = self._statistics_run("utility").key
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
            text = self._answer_texts(answers)
            replies = [(row.prompt, text[row.id]) for row in benign]
            taught = [encode_dialogue(self.tokenizer, *pair) for pair in refusals]
            # Sampling stopped for want of room, or at the end-of-turn token, which is not in the
            # text: either way no end belongs to what is here.
            held = [encode_dialogue(self.tokenizer, *pair, end=False) for pair in replies]
            model = load_model(self.unaligned, self.config.model, self.device)
            reference = self.model("unaligned")
            record = supervised_finetune(model, taught, config, self.seed, folder, held, reference)
            save_model(model, folder)
            (folder / "training.json").write_text(json.dumps(dataclasses.asdict(record)))

        return self.store.get("align", self.config.model.name, key, build, resumable=True)

    @staticmethod
    def _answer_texts(run: Run) -> dict[str, str]:
        return {r["id"]: r["completion"] for r in read_jsonl(run.path("completions.jsonl"))}

    # --- attribution and roles ---------------------------------------------------------------

    def _statistics_run(self, purpose: Literal["safety", "utility"]) -> Run:
        """Activation statistics of the aligned model on its own answers to a sampled set."""
        config = self.config.attribution
        source = {"safety": "harmful_attribution", "utility": "benign_attribution"}[purpose]
        rows = self.sample(source, config.samples)
        # Refusals come from the aligned model, and so do its benign answers: what it says itself.
        answers = self.answers(rows, Arm("aligned"), config.max_response_tokens)
        key = self._key(1, config=dataclasses.asdict(config), answers=answers.key)

        def build(folder: Path) -> None:
            text = self._answer_texts(answers)
            limit = config.max_response_tokens - 1
            pairs = [
                encode_dialogue(self.tokenizer, r.prompt, text[r.id], max_response_tokens=limit)
                for r in rows
            ]
            batches = dialogue_batches(
                pairs, config.batch_size, tokens=config.tokens, drop_first=config.drop_first
            )
            model = self.model("aligned")
            statistics = collect_statistics(
                model, self.layout, batches, cast(VarianceOver, config.variance_over)
            )
            statistics.save(folder / "statistics.safetensors")

        return self.store.get(f"statistics_{purpose}", self.config.model.name, key, build)

    def statistics(self, purpose: Literal["safety", "utility"]) -> ActivationStatistics:
        run = self._statistics_run(purpose)
        return ActivationStatistics.load(run.path("statistics.safetensors"))

    @functools.cached_property
    def scores(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """I_S and I_U by block, ``[units]``."""
        model = self.model("aligned")
        safety, utility = self.statistics("safety"), self.statistics("utility")
        return (
            unit_scores(model, self.layout, safety),
            unit_scores(model, self.layout, utility),
        )
