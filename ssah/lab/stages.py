"""The measurements of one seed, each cached by content: effects, the ablation search, utility."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from transformers import PreTrainedModel

from ..core.store import Run
from ..data.rows import Row, read_jsonl
from ..evaluate import judges
from ..evaluate.judges import Completion, attack_success
from ..evaluate.likelihood import continuation_losses
from ..evaluate.stats import Estimate, perplexity
from ..evaluate.tasks import exact_match, lm_eval_outcomes, multiple_choice, text_losses
from ..scoring.search import Effect, Trial, search_share
from ..units.families import BlockKind
from ..units.mask import UnitMask
from ..units.roles import Roles, Shares, Thresholds, classify, classify_by_thresholds
from .arms import Arm, Tuning, Which
from .budget import AlignmentBudget
from .config import RolesConfig
from .tuning import MAIN_ATTACK


def paper_rule(arms: list[Arm]) -> Arm:
    """One epoch where nothing is frozen, twice as many for the rest (paper, section 4.2)."""
    which = arms[0].which
    return arms[0] if isinstance(which, Tuning) and which.whole else arms[-1]


class Stages(AlignmentBudget):
    """All stages of one seed under one configuration."""

    def completions(self, set_name: str, arm: Arm, *, system: bool = False) -> list[Completion]:
        """An arm's completions of a prompt set at the configured length."""
        return self.said(self.rows(set_name), arm, self.config.evaluate.system_prompt * system)

    def said(self, rows: list[Row], arm: Arm, system: str = "") -> list[Completion]:
        """An arm's completions of any prompts at the configured length."""
        run = self.answers(rows, arm, self.config.evaluate.max_new_tokens, system)
        records = read_jsonl(run.path("completions.jsonl"))
        return [Completion(r.prompt, c["completion"]) for r, c in zip(rows, records, strict=True)]

    def harmbench(self, arm: Arm) -> list[Completion]:
        """An arm's completions of as many prompts of HarmBench as configured."""
        count = self.config.evaluate.harmbench or len(self.rows("harmbench"))
        return self.said(self.spread("harmbench", count), arm)

    # --- fine-tuned models

    def asks_harmbench(self, attack: str) -> bool:
        """Whether models that an attack made are asked those prompts as well."""
        return attack in self.config.finetune.wide_attacks and self.has("harmbench")

    def measured(self, tuning: Tuning, *, thorough: bool = False) -> list[Arm]:
        """Arms by epoch, with everything measured that artefacts ask about them.

        All at once, because the models are dropped then. ``thorough`` adds what takes long, at the
        epoch of the paper's rule: the first where nothing is frozen, otherwise the last.
        """
        with self.tuned(tuning) as arms:
            for arm in arms:
                self.completions("harmful_evaluation", arm)
                self.perplexity(arm)
                self.heldout_gain(arm, tuning.attack)
            if thorough:
                arm = paper_rule(arms)
                if self.asks_harmbench(tuning.attack):
                    self.harmbench(arm)
                self.task_outcomes(arm)
                if tuning.attack == MAIN_ATTACK:
                    self.scores_of(arm.which)
        return arms

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
        inputs = [self.statistics_run("safety").key, self.statistics_run("utility").key]
        evaluate = self.config.evaluate
        key = self._key(
            1,
            config=dataclasses.asdict(config),
            inputs=[*inputs, self.sets.key],
            judge=judges.identity(),
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

    def roles_after(
        self, which: Which, rule: Literal["thresholds", "quantiles"], resample: int = 0
    ) -> Roles:
        """Roles in a fine-tuned model, by the aligned model's thresholds or by its shares."""
        kinds = cast(list[BlockKind], self.config.roles.redundant_kinds)
        scores = self.scores_of(which, resample)
        if rule == "quantiles":
            return classify(self.layout, *scores, self.shares, kinds)
        thresholds = Thresholds.of(self.roles, *self.scores)
        return classify_by_thresholds(self.layout, *scores, thresholds, kinds)

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

    def perplexity_ratio(self, arm: Arm, base: Arm | None = None) -> Estimate:
        """Perplexity relative to that of ``base``, the aligned model if none, text by text."""
        counts, losses = self._text_losses(arm)
        _, whole = self._text_losses(base or Arm())
        return perplexity(counts, [a - b for a, b in zip(losses, whole, strict=True)])

    def heldout_gain(self, arm: Arm, attack: str, base: Arm | None = None) -> Estimate:
        """Nats per response token by which a fine-tuned model does better on the attack's
        held-out rows than ``base``, the aligned model if none: what the fine-tuning was for.

        Rows whose prompt was trained on with another response do not count.
        """
        trained, heldout = self.attack_rows(attack)
        seen = {row.prompt for row in trained}
        own, before = self._heldout_losses(arm, attack), self._heldout_losses(base or Arm(), attack)
        pairs = [
            (count, old - new)
            for row, count, new, old in zip(heldout, *own, before[1], strict=True)
            if row.prompt not in seen
        ]
        ratio = perplexity(*zip(*pairs, strict=True))
        return Estimate(math.log(ratio.value), math.log(ratio.low), math.log(ratio.high), ratio.n)

    def _heldout_losses(self, arm: Arm, attack: str) -> tuple[list[int], list[float]]:
        _, rows = self.attack_rows(attack)
        pairs = self.encoded(attack, rows)
        batch = self.config.evaluate.batch_size

        def compute(model: PreTrainedModel) -> tuple[list[int], list[float]]:
            return [len(r) for _, r in pairs], continuation_losses(model, pairs, batch)

        task = f"heldout_{attack}_{self.config.finetune.max_response_tokens}"
        counts, losses = self._score(task, arm, rows, compute)
        return counts, losses

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
        outcomes = {}
        if self.has("trivia"):  # the user's own files have no multiple choice
            trivia = self.rows("trivia", evaluate.trivia_items)
            outcomes["trivia"] = self._score(
                "trivia", arm, trivia, lambda m: multiple_choice(m, tokenizer, trivia, batch)
            )
        sums = self.rows("arithmetic", evaluate.arithmetic_items)
        outcomes["arithmetic"] = self._score(
            "arithmetic", arm, sums, lambda m: exact_match(m, tokenizer, sums, batch)
        )
        return outcomes
