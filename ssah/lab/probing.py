"""Reasoning-direction probes of one seed's models, each cached by content."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import yaml

from ..core.errors import SsahError
from ..core.paths import RESOURCES
from ..data.rows import Row
from ..evaluate.generate import continuations
from ..evaluate.probes import Openings, Probe, probe
from ..text.chat import encode, render_prompt
from .arms import Which
from .preparation import Preparation


class Probing(Preparation):
    """Adds probes to what can be measured."""

    def probed_rows(self, name: str, *, few: bool = False) -> list[Row]:
        """As many rows of a set as configured, spread over it."""
        config, many = self.config.probes, name == "harmful_evaluation" and not few
        return self.spread(name, config.evaluation_queries if many else config.queries)

    @functools.cached_property
    def opening_texts(self) -> dict[str, list[str]]:
        return yaml.safe_load((RESOURCES / "openings.yaml").read_text(encoding="utf-8"))

    @functools.cached_property
    def openings(self) -> Openings:
        """All cut to the same number of tokens."""
        length = self.config.probes.opening_tokens
        ids = {
            kind: [encode(self.tokenizer, text)[:length] for text in self.opening_texts[kind]]
            for kind in ("refusal", "compliance", "neutral")
        }
        shortest = min(len(tokens) for kind in ids.values() for tokens in kind)
        if shortest < length:
            raise SsahError(
                f"probes.opening_tokens={length}, but an opening has only {shortest} tokens: "
                "choose fewer."
            )
        return Openings(**{kind: torch.tensor(tokens) for kind, tokens in ids.items()})

    def probe(self, which: Which, set_name: str, *, same_words: bool = False) -> Probe:
        """A model on the queries of a set, at its own words or at words that are every model's.

        The same words are those of a neutral text; few queries are enough for them.
        """
        rows = self.probed_rows(set_name, few=same_words)
        queries, config = [row.prompt for row in rows], self.config.probes
        key = self._key(
            1,
            model=self.identity(which),
            queries=queries,
            texts=self.opening_texts,
            opening_tokens=config.opening_tokens,
            positions=list(config.positions),
            words="same" if same_words else self.config.evaluate.batch_size,
        )

        def build(folder: Path) -> None:
            ids = [encode(self.tokenizer, render_prompt(self.tokenizer, q)) for q in queries]
            model, length = self.model(which), max(config.positions)
            if same_words:
                words = [encode(self.tokenizer, self.opening_texts["words"][0])] * len(ids)
            else:
                batch_size = self.config.evaluate.batch_size
                words = continuations(model, self.tokenizer, ids, length, batch_size)
            found = probe(model, ids, words, self.openings, config.positions)
            found.save(folder / "probe.safetensors")

        run = self.store.get(f"probe_{set_name}", self.config.model.name, key, build)
        return Probe.load(run.path("probe.safetensors"))
