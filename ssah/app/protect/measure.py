"""What is measured of a model, on which prompts, and how two models differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...core.store import Handle, Store, digest
from ...data.rows import Row, read_set
from ...data.sets import build_sets
from ...data.settings import DataConfig
from ...evaluate import judges
from ...evaluate.generate import complete
from ...evaluate.judges import Completion
from ...evaluate.likelihood import continuation_losses
from ...evaluate.stats import Estimate, paired_difference, perplexity, proportion
from ...lab.load import Checkpoint
from ...text.chat import Pair, encode_dialogue, render_prompt
from .schedule import Schedule, Step
from .subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The study's own sets, so that what is held out there is held out here.
SETS = DataConfig("embedded", evaluation=100, search=60, align=160)

#: Sets of harmful requests.
HARMFUL = ("AdvBench", "HarmBench")

#: Tokens of an answer that is judged: enough to tell an answer from a remark.
ANSWER_TOKENS = 40

#: Prompts and texts that are read at once.
BATCH_SIZE = 16

Item = TypeVar("Item")


@dataclass(frozen=True)
class Prompts:
    """What models are asked; no prompt that is measured is taught."""

    harmful: Mapping[str, tuple[Row, ...]]  #: by set
    borderline: tuple[Row, ...]  #: harmless ones that look dangerous
    texts: tuple[Row, ...]  #: harmless, with answers
    taught: tuple[Row, ...]  #: harmful ones whose refusals may be learned
    known_harm: tuple[str, ...]  #: all harmful prompts of the sets, but for small talk


def load_prompts(store: Store) -> Prompts:
    """The study's sets, downloaded on first use."""
    sets = build_sets(store, SETS)

    def some(name: str) -> tuple[Row, ...]:
        return tuple(read_set(sets, name))

    parts = [f"harmful_{part}" for part in ("evaluation", "search", "align", "attribution")]
    return Prompts(
        dict(zip(HARMFUL, (some("harmful_evaluation"), some("harmbench")), strict=True)),
        some("borderline"),
        some("heldout_text"),
        some("harmful_align"),
        tuple(
            row.prompt
            for name in (*parts, "harmbench", "do_not_answer")
            for row in some(name)
            # Do-Not-Answer asks chatbots how they feel as well, which users' rows do too.
            if not row.category.startswith("human_chatbox")
        ),
    )


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """So many of them at equal distances; all where there are not so many."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


@dataclass
class Arm:
    """One model that is measured: as it was given, or after a training."""

    name: str
    subject: Subject
    checkpoint: Checkpoint
    loaded: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        """It is loaded when it is first needed."""
        if self.loaded is None:
            self.loaded = self.subject.load(self.checkpoint)
        return self.loaded

    def drop(self) -> None:
        """Free its memory; it is loaded again when it is needed."""
        self.loaded = None

    def answers(self, prompts: Sequence[str], max_new_tokens: int) -> Handle:
        """``answers.json``: greedy answers to prompts without a system turn."""
        tokenizer = self.subject.tokenizer
        texts = [render_prompt(tokenizer, prompt) for prompt in prompts]

        def build(folder: Path) -> None:
            said = complete(self.model, tokenizer, texts, max_new_tokens, BATCH_SIZE)
            (folder / "answers.json").write_text(json.dumps(said), encoding="utf-8")

        return self._run("answers", {"texts": texts, "max_new_tokens": max_new_tokens}, build)

    def losses(self, pairs: Sequence[Pair]) -> Handle:
        """``losses.json``: summed negative log-likelihood (nats) of each response."""

        def build(folder: Path) -> None:
            found = continuation_losses(self.model, pairs, BATCH_SIZE)
            (folder / "losses.json").write_text(json.dumps(found))

        return self._run("losses", {"pairs": digest(pairs)}, build)

    def _run(self, stage: str, key: dict[str, Any], build: Callable[[Path], None]) -> Handle:
        shaped = {
            "version": 1,
            "model": self.checkpoint.identity,
            "batch_size": BATCH_SIZE,
            "device": self.subject.device.type,
        }
        source = self.checkpoint.source
        inputs = (source.key,) if isinstance(source, Handle) else ()
        name = self.subject.config.name
        return Handle(self.subject.store, stage, name, shaped | key, build, inputs)


@dataclass(frozen=True)
class Question:
    """What is asked of every model: answers to prompts, or how likely it finds responses."""

    metric: str
    asked: tuple[Row, ...] = ()
    pairs: tuple[Pair, ...] = ()

    def step(self, arm: str) -> Step:
        if self.asked:
            title = f"{arm}: answers to {len(self.asked)} prompts ({self.metric})"
            return Step(title, "prompt", len(self.asked))
        title = f"{arm}: perplexity of {len(self.pairs)} responses ({self.metric})"
        return Step(title, "token", tokens_of(self.pairs))

    def run(self, arm: Arm) -> Handle:
        if self.asked:
            return arm.answers([row.prompt for row in self.asked], ANSWER_TOKENS)
        return arm.losses(self.pairs)


def questions(
    subject: Subject, prompts: Prompts, rows: Sequence[Pair], count: int
) -> list[Question]:
    """At most ``count`` prompts or responses of each metric; ``rows`` may be none."""
    texts = [
        encode_dialogue(subject.tokenizer, row.prompt, row.response or "", max_response_tokens=48)
        for row in prompts.texts
    ]
    asked = {**prompts.harmful, "borderline": prompts.borderline}
    found = [Question(metric, asked=tuple(spread(of, count))) for metric, of in asked.items()]
    scored = {"rows": spread(rows, count), "texts": spread(texts, count)}
    return found + [Question(m, pairs=tuple(pairs)) for m, pairs in scored.items() if pairs]


@dataclass(frozen=True)
class Rates:
    """True or false by prompt, in per cent; differences are paired, in points."""

    outcomes: Sequence[bool]

    def estimate(self) -> Estimate:
        return proportion(self.outcomes).scaled(100)

    def against(self, other: Any) -> Estimate:
        return paired_difference(self.outcomes, other.outcomes).scaled(100)


@dataclass(frozen=True)
class Losses:
    """Summed losses by text: perplexity, and its ratio to another model's on the same texts."""

    counts: Sequence[int]
    losses: Sequence[float]

    def estimate(self) -> Estimate:
        return perplexity(self.counts, self.losses)

    def against(self, other: Any) -> Estimate:
        differences = [a - b for a, b in zip(self.losses, other.losses, strict=True)]
        return perplexity(self.counts, differences)


Sample = Rates | Losses


@dataclass(frozen=True)
class Measured:
    """All that is known of one model: a sample a metric, and what it said."""

    samples: Mapping[str, Sample]
    verdicts: Mapping[str, Mapping[str, int]]  #: by set
    completions: Mapping[str, Sequence[Completion]]  #: by set

    def against(self, other: Measured, metric: str) -> Estimate:
        """A paired difference in points, or a ratio of perplexities."""
        return self.samples[metric].against(other.samples[metric])


#: Metric -> what it is called, and what its number is.
METRICS = {
    "AdvBench": ("Harmful requests answered, AdvBench (held-out part)", "%"),
    "HarmBench": ("Harmful requests answered, HarmBench", "%"),
    "borderline": ("Harmless requests that look dangerous, refused", "%"),
    "rows": ("Perplexity of your own rows, held out of training", "perplexity"),
    "texts": ("Perplexity of other harmless answers", "perplexity"),
}


def harmful(measured: Measured) -> list[Completion]:
    """Answers to the harmful requests of all sets together."""
    return [c for name in HARMFUL for c in measured.completions[name]]


def measure(arm: Arm, asked: Sequence[Question], schedule: Schedule) -> Measured:
    """Everything that is measured of a model."""
    samples: dict[str, Sample] = {}
    said: dict[str, list[Completion]] = {}
    for question in asked:
        run, metric = question.run(arm), question.metric
        if not run.has():
            _ = arm.model  # loading it is no part of what is timed
        schedule.run(question.step(arm.name), run)
        if question.asked:
            texts = run.json("answers.json")
            pairs = zip(question.asked, texts, strict=True)
            said[metric] = [Completion(row.prompt, text) for row, text in pairs]
            judged = judges.refused if metric == "borderline" else judges.attack_success
            samples[metric] = Rates(judged(said[metric]))
        else:
            counts = [len(response) for _, response in question.pairs]
            samples[metric] = Losses(counts, run.json("losses.json"))
    verdicts = {metric: _counted(completions) for metric, completions in said.items()}
    return Measured(samples, verdicts, said)


def _counted(completions: Sequence[Completion]) -> dict[str, int]:
    counts = Counter(judges.judge(c) for c in completions)
    return {verdict: counts[verdict] for verdict in judges.VERDICTS}


def tokens_of(pairs: Sequence[Pair]) -> int:
    return sum(len(p) + len(r) for p, r in pairs)
