"""Reasoning-direction probes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from ...core.errors import SsahError
from ...core.paths import RESOURCES
from ...data.rows import Row
from ...evaluate.generate import continuations
from ...evaluate.probes import Openings, Probe, probe
from ...text.chat import encode, render_prompt
from ..lab import Lab
from ..specs import Model
from ..stage import stage


def probed_rows(lab: Lab, name: str, *, few: bool = False) -> tuple[Row, ...]:
    """As many rows of a set as configured, spread over it."""
    config, many = lab.config.probes, name == "harmful_evaluation" and not few
    return lab.spread(name, config.evaluation_queries if many else config.queries)


@functools.cache
def opening_texts() -> dict[str, list[str]]:
    """Openings of refusals and of answers, neutral ones, and the words that all models read."""
    return yaml.safe_load((RESOURCES / "openings.yaml").read_text(encoding="utf-8"))


def openings(lab: Lab) -> Openings:
    """All cut to the same number of tokens."""
    length = lab.config.probes.opening_tokens
    ids = {
        kind: [encode(lab.tokenizer, text)[:length] for text in opening_texts()[kind]]
        for kind in ("refusal", "compliance", "neutral")
    }
    shortest = min(len(tokens) for kind in ids.values() for tokens in kind)
    if shortest < length:
        raise SsahError(
            f"probes.opening_tokens={length}, but an opening has only {shortest} tokens: "
            "choose fewer."
        )
    return Openings(**{kind: torch.tensor(tokens) for kind, tokens in ids.items()})


@stage("probe", version=2)
def _probe(
    lab: Lab,
    folder: Path,
    model: Model,
    queries: Sequence[str],
    texts: dict[str, list[str]],
    opening_tokens: int,
    positions: Sequence[int],
    own_words: int,
    label: str,
) -> None:
    """``probe.safetensors``: at the model's own words (in batches of ``own_words``), or at words
    that are every model's where that is 0."""
    ids = [encode(lab.tokenizer, render_prompt(lab.tokenizer, query)) for query in queries]
    with lab.use(model) as loaded:
        if own_words:
            words = continuations(loaded, lab.tokenizer, ids, max(positions), own_words)
        else:
            words = [encode(lab.tokenizer, texts["words"][0])] * len(ids)
        probe(loaded, ids, words, openings(lab), positions).save(folder / "probe.safetensors")


def probed(lab: Lab, model: Model, name: str, *, same_words: bool = False) -> Probe:
    """A model on the queries of a set, at its own words or at words that are every model's.

    The same words are those of a neutral text; few queries are enough for them.
    """
    config = lab.config.probes
    run = _probe(
        lab,
        model,
        [row.prompt for row in probed_rows(lab, name, few=same_words)],
        opening_texts(),
        config.opening_tokens,
        config.positions,
        0 if same_words else lab.config.evaluate.batch_size,
        label=name,
    )
    return Probe.load(run.path("probe.safetensors"))
