"""Reasoning-direction probes."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from ...core.errors import SsahError
from ...core.paths import RESOURCES
from ...core.store import Handle
from ...data.rows import Row
from ...evaluate.generate import continuations
from ...evaluate.probes import Openings, Probe, probe, read_out
from ...evaluate.stats import Estimate, auroc, pool
from ...text.chat import encode, render_prompt
from ..lab import Lab
from ..specs import Model
from ..stage import stage

#: Queries as figures call them -> the set.
QUERIES = {
    "harmful": "harmful_evaluation",
    "borderline": "borderline",
    "benign": "benign_evaluation",
    "HEx-PHI": "hexphi",
    "HarmBench": "harmbench",
    "Do-Not-Answer": "do_not_answer",
}

#: Harm categories on each of which a read-out is trained: the largest.
CATEGORIES = 3

#: Read-outs with shuffled labels, for each category: one alone may point anywhere.
SHUFFLES = 5


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


def _probed(lab: Lab, model: Model, name: str, *, same_words: bool = False) -> Handle:
    config = lab.config.probes
    return _probe(
        lab,
        model,
        [row.prompt for row in probed_rows(lab, name, few=same_words)],
        opening_texts(),
        config.opening_tokens,
        config.positions,
        0 if same_words else lab.config.evaluate.batch_size,
        label=name,
    )


def probed(lab: Lab, model: Model, name: str, *, same_words: bool = False) -> Probe:
    """A model on the queries of a set, at its own words or at words that are every model's.

    The same words are those of a neutral text; few queries are enough for them.
    """
    return Probe.load(_probed(lab, model, name, same_words=same_words).path("probe.safetensors"))


# --- read-outs -------------------------------------------------------------------------------


def read_outs(lab: Lab, model: Model) -> list[dict[str, Estimate]]:
    """How well linear read-outs of the query tell harmful queries from others, by block: AUROC
    against harmless and borderline queries, and with shuffled labels."""
    harmful, benign, borderline = (
        _probed(lab, model, QUERIES[name]) for name in ("harmful", "benign", "borderline")
    )
    parts = [part.tolist() for part in _parts(probed_rows(lab, QUERIES["harmful"]))]
    blocks = _read_outs(lab, harmful, benign, borderline, parts).json("readout.json")
    return [{name: Estimate(*numbers) for name, numbers in block.items()} for block in blocks]


@stage("readout", version=1)
def _read_outs(
    lab: Lab, folder: Path, harmful: Handle, benign: Handle, borderline: Handle, parts: Any
) -> None:
    """``readout.json``: estimates by block, each read-out trained on one part of the harmful
    queries and tested on the others."""
    states = [
        Probe.load(run.path("probe.safetensors")).query for run in (harmful, benign, borderline)
    ]
    chosen = [np.array(part) for part in parts]
    found = []
    for block in range(states[0].shape[1]):
        estimates = _read_out_of_block([part[:, block] for part in states], chosen)
        found.append({name: astuple(pool(own)) for name, own in estimates.items()})
    (folder / "readout.json").write_text(json.dumps(found))


def _read_out_of_block(
    states: Sequence[Tensor], parts: Sequence[np.ndarray]
) -> dict[str, list[Estimate]]:
    harmful, benign, borderline = states
    names = "AUROC, benign", "AUROC, borderline", "AUROC, shuffled"
    found: dict[str, list[Estimate]] = {name: [] for name in names}
    for number, part in enumerate(parts):
        chosen = torch.from_numpy(part)
        train = torch.cat([harmful[chosen], benign[::2]])
        labels = np.arange(len(train)) < int(part.sum())
        test = torch.cat([harmful[~chosen], benign[1::2], borderline])
        ends = np.cumsum([int((~part).sum()), len(benign[1::2])])
        scores, unseen, looks = np.split(read_out(train, labels, test), ends)
        found[names[0]].append(auroc(scores, unseen))
        found[names[1]].append(auroc(scores, looks))
        for draw in range(SHUFFLES):
            shuffled = _shuffle(labels, seed=SHUFFLES * number + draw)
            scores, unseen, _ = np.split(read_out(train, shuffled, test), ends)
            found[names[2]].append(auroc(scores, unseen))
    return found


def _parts(rows: Sequence[Row]) -> list[np.ndarray]:
    """Which queries each read-out is trained on: the largest categories, or two halves if there
    are no categories."""
    names = pd.Series([row.category for row in rows])
    if names.nunique() < 2:
        return [np.arange(len(rows)) % 2 == half for half in (0, 1)]
    return [np.array(names == name) for name in names.value_counts().index[:CATEGORIES]]


def _shuffle(labels: np.ndarray, seed: int) -> np.ndarray:
    """Random labels, as many true in either kind: across the kinds a few follow them by chance."""
    rng, shuffled = np.random.default_rng(seed), np.empty_like(labels)
    for kind in (False, True):
        count = int((labels == kind).sum())
        shuffled[labels == kind] = rng.permutation(np.arange(count) % 2 == 0)
    return shuffled
