"""What one seed's computations start from: sets, draws from them, the given model's files."""

from __future__ import annotations

import functools
import random
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from ..core.errors import SsahError
from ..core.progress import quiet
from ..core.runtime import pick_device
from ..core.store import Run, Store
from ..data.rows import Row, read_set
from ..data.sets import build_sets
from ..units.families import family_of
from .config import Config
from .load import Checkpoint, load_tokenizer, locate


class Inputs:
    """Sets, draws and the model under study, of one seed."""

    def __init__(self, config: Config, store: Store, seed: int):
        self.config, self.store, self.seed = config, store, seed
        self.device = pick_device(config.runtime.device)

    @functools.cached_property
    def sets(self) -> Run:
        return build_sets(self.store, self.config.data)

    def has(self, name: str) -> bool:
        """Whether this data source has a set."""
        return self.sets.path(f"{name}.jsonl").exists()

    @functools.cached_property
    def _read(self) -> dict[str, list[Row]]:
        """Sets that were read; hundreds of keys ask for them."""
        return {}

    def rows(self, name: str, limit: int | None = None) -> list[Row]:
        """The rows of a set; asking for more than there are is an error."""
        if name not in self._read:
            self._read[name] = read_set(self.sets, name)
        rows = self._read[name]
        if limit is not None and limit > len(rows):
            raise SsahError(f"Set '{name}' has {len(rows)} rows but {limit} are asked for.")
        return rows[:limit]

    def spread(self, name: str, count: int) -> list[Row]:
        """Up to ``count`` rows of a set, evenly spread over it: the same for every seed."""
        rows = self.rows(name)
        count = min(count, len(rows))
        return [rows[i * len(rows) // count] for i in range(count)]

    def sample(self, name: str, count: int) -> list[Row]:
        """A seeded sample without replacement: what varies between seeds."""
        return self.draw(name, self.rows(name), count)

    def draw(self, purpose: str, rows: list[Row], count: int) -> list[Row]:
        """The seed's draw of ``count`` of these rows, one for each purpose."""
        if count > len(rows):
            raise SsahError(f"Set '{purpose}' has {len(rows)} rows but {count} are asked for.")
        return random.Random(f"{purpose}/{self.seed}").sample(rows, count)

    @functools.cached_property
    def unaligned(self) -> Checkpoint:
        return locate(self.store, self.config.model)

    def check_model(self) -> None:
        """Raise before any work where the architecture has no unit layout."""
        checkpoint = self.unaligned
        with quiet():
            config = AutoConfig.from_pretrained(checkpoint.path, revision=checkpoint.revision)
        family_of(config.get_text_config().model_type)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.unaligned, self.config.model)

    def _key(self, version: int, **parts: Any) -> dict[str, Any]:
        model = self.config.model
        return {
            "version": version,
            "dtype": model.dtype,
            "attention": model.attn_implementation,
            "template": model.chat_template,
            **parts,
        }
