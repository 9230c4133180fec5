"""The measurements of one seed, each cached by content: effects, the ablation search, utility."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from .config import RolesConfig
from .data import Row, read_jsonl
from .evaluate.judges import attack_success
from .evaluate.stats import Estimate, perplexity
from .evaluate.utility import exact_match, lm_eval_outcomes, multiple_choice, text_losses
from .preparation import Arm, Preparation
from .roles import Effect, Roles, Shares, Trial, classify, search_share
from .store import Run
from .units import BlockKind, UnitMask


class Stages(Preparation):
    """All stages of one seed under one configuration."""

    def completions(self, set_name: str, arm: Arm, *, system: bool = False) -> list[str]:
        """An arm's completions of a prompt set at the configured length."""
        evaluate = self.config.evaluate
        prompt = evaluate.system_prompt if system else ""
        run = self.answers(self.rows(set_name), arm, evaluate.max_new_tokens, prompt)
        return [record["completion"] for record in read_jsonl(run.path("completions.jsonl"))]

    # --- roles

    def classify(self, shares: Shares, redundant_kinds: list[str] | None = None) -> Roles:
        """Roles at given shares; RU of the configured kinds unless others are named."""
        kinds = redundant_kinds or self.config.roles.redundant_kinds
        return classify(self.layout, *self.scores, shares, cast(list[BlockKind], kinds))

    @functools.cached_property
    def shares(self) -> Shares:
        """The shares that the ablation search found."""
        return Shares(**self._search_run().json("shares.json"))

    @property
    def search_trials(self) -> list[Trial]:
        records = self._search_run().json("trials.json")
        return [Trial(**{**r, "effect": Effect(**r["effect"])}) for r in records]

    @functools.cached_property
    def roles(self) -> Roles:
        return Roles.load(self._search_run().path("roles.safetensors"), self.layout)

    def _search_run(self) -> Run:
        config = self.config.roles
        inputs = [self._statistics_run("safety").key, self._statistics_run("utility").key]
        evaluate = self.config.evaluate
        key = self._key(
            1,
            config=dataclasses.asdict(config),
            inputs=[*inputs, self.sets.key],
            measured=[evaluate.max_new_tokens, evaluate.batch_size, evaluate.perplexity_rows],
        )

        def build(folder: Path) -> None:
            shares, trials = self._search(config)
            (folder / "shares.json").write_text(json.dumps(dataclasses.asdict(shares)))
            (folder / "trials.json").write_text(json.dumps([dataclasses.asdict(t) for t in trials]))
            self.classify(shares).save(folder / "roles.safetensors")

        return self.store.get("roles", self.config.model.name, key, build)

    def _search(self, config: RolesConfig) -> tuple[Shares, list[Trial]]:
        """RU first, then ESU given RU, then EUU given both: the order of the claims."""
        whole = self.effect(None)
        ru, trials_ru = search_share(
            "RU",
            config.ru_shares,
            lambda share: self.classify(Shares(share, 0, 0)).mask("RU"),
            self.effect,
            lambda e: (
                e.asr <= whole.asr + config.ru_max_asr_rise
                and e.perplexity_ratio <= config.ru_max_perplexity_ratio
            ),
        )
        esu, trials_esu = search_share(
            "ESU",
            config.esu_shares,
            lambda share: self.classify(Shares(ru, share, 0)).mask("ESU"),
            self.effect,
            lambda e: (
                e.asr >= whole.asr + config.esu_min_asr_rise
                and e.perplexity_ratio <= config.esu_max_perplexity_ratio
            ),
        )
        euu, trials_euu = search_share(
            "EUU",
            config.euu_shares,
            lambda share: self.classify(Shares(ru, esu, share)).mask("EUU"),
            self.effect,
            lambda e: e.perplexity_ratio >= config.euu_min_perplexity_ratio,
        )
        return Shares(ru, esu, euu), trials_ru + trials_esu + trials_euu

    def effect(self, mask: UnitMask | None) -> Effect:
        """ASR on the search prompts and perplexity, of the aligned model without these units."""
        arm = Arm("aligned", mask)
        success = attack_success(self.completions("harmful_search", arm))
        return Effect(sum(success) / len(success), self.perplexity_ratio(arm).value)

    # --- utility -----------------------------------------------------------------------------

    def _score(self, task: str, arm: Arm, rows: list[Row], compute: Callable[[Any], Any]) -> Any:
        """One utility task of one arm, as ``scores.json``."""
        batch_size = self.config.evaluate.batch_size
        key = self._key(
            1,
            task=task,
            arm=self._arm_key(arm),
            items=[dataclasses.asdict(row) for row in rows],
            batch_size=batch_size,
        )

        def build(folder: Path) -> None:
            with self.in_effect(arm) as model:
                (folder / "scores.json").write_text(json.dumps(compute(model)))

        return self.store.get(task, self.config.model.name, key, build).json("scores.json")

    def _text_losses(self, arm: Arm) -> tuple[list[int], list[float]]:
        rows = self.rows("heldout_text", self.config.evaluate.perplexity_rows)
        batch = self.config.evaluate.batch_size
        counts, losses = self._score(
            "perplexity", arm, rows, lambda m: text_losses(m, self.tokenizer, rows, batch)
        )
        return counts, losses

    def perplexity(self, arm: Arm) -> Estimate:
        """Perplexity of held-out answers given their prompts."""
        return perplexity(*self._text_losses(arm))

    def perplexity_ratio(self, arm: Arm) -> Estimate:
        """Perplexity relative to the whole aligned model's, text by text."""
        counts, losses = self._text_losses(arm)
        _, whole = self._text_losses(Arm())
        return perplexity(counts, [a - b for a, b in zip(losses, whole, strict=True)])

    def task_outcomes(self, arm: Arm) -> dict[str, list[bool]]:
        """Right or wrong by item, by task."""
        evaluate, tokenizer = self.config.evaluate, self.tokenizer
        batch = evaluate.batch_size
        if evaluate.utility == "lm_eval":
            tasks, limit = list(evaluate.lm_eval_tasks), evaluate.lm_eval_limit
            return self._score(
                f"lm_eval_{'_'.join(tasks)}_{limit}",
                arm,
                [],
                lambda m: lm_eval_outcomes(m, tokenizer, tasks, limit, batch),
            )
        trivia = self.rows("trivia", evaluate.trivia_items)
        sums = self.rows("arithmetic", evaluate.arithmetic_items)
        return {
            "trivia": self._score(
                "trivia", arm, trivia, lambda m: multiple_choice(m, tokenizer, trivia, batch)
            ),
            "arithmetic": self._score(
                "arithmetic", arm, sums, lambda m: exact_match(m, tokenizer, sums, batch)
            ),
        }
