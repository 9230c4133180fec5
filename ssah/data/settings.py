"""Settings of the sets and of models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..core.valid import one_of, within
from ..units.families import FAMILIES

#: Hydra's mark of a setting that has to be given (``omegaconf.MISSING``), which is not needed here.
REQUIRED: Any = "???"


@dataclass
class DataConfig:
    """Which sets, and how AdvBench is divided. ``source``: ``embedded``, ``toy`` or ``files``.

    Near-duplicates (token-set Jaccard >= ``near_duplicate``) always fall into one part. Sizes that
    are not set are shares of what is given.
    """

    source: str = one_of(REQUIRED, "embedded", "toy", "files")
    split_seed: int = within(0, 0)
    near_duplicate: float = within(0.5, high=1, above=0)
    align: int | None = within(None, 0)
    evaluation: int | None = within(None, 1)
    search: int | None = within(None, 1)
    files: dict[str, Any] = field(default_factory=dict)  #: set name -> path or hub source


@dataclass
class ModelConfig:
    """The model under study. ``source``: ``embedded``, ``tiny``, a folder, or a hub id."""

    name: str = REQUIRED
    source: str = REQUIRED
    revision: str | None = None
    dtype: str = one_of("float32", "float32", "bfloat16", "float16")
    attn_implementation: str = one_of("sdpa", "sdpa", "eager", "flash_attention_2")
    chat_template: str | None = one_of(None, "chatml")  #: null: the tokenizer's own
    accept_terms: bool = False  #: of a model that comes under terms of its makers' own
    #: ``aligning``: only how it is aligned is measured (notebook 06), and it is never attacked.
    use: str = one_of("everything", "everything", "aligning")
    #: Its ``model_type``; what is not of the paper's main family is shown beside Mistral as well.
    family: str = one_of("llama", *FAMILIES)
