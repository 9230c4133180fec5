"""The model that is protected or checked: a folder, a hub id, a name, or one in memory."""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...core.errors import SsahError, suggestion
from ...core.progress import quiet
from ...core.runtime import pick_device
from ...core.store import Handle, Store, digest
from ...data.assets import MODELS
from ...data.settings import ModelConfig
from ...lab.load import Checkpoint, load_model, load_tokenizer, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sizes:
    """What memory, disk and time depend on."""

    parameters: int
    blocks: int
    hidden: int
    feed_forward: int
    vocabulary: int
    positions: int  #: tokens that the model can read


@dataclass(frozen=True)
class Subject:
    """A model before anything is done to it. It is always computed with in float32."""

    name: str
    config: ModelConfig
    checkpoint: Checkpoint
    store: Store
    device: torch.device

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.checkpoint, self.config)

    @functools.cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without weights."""
        from transformers import AutoConfig, AutoModelForCausalLM

        path = self.checkpoint.path
        try:
            with quiet(), torch.device("meta"):
                config = AutoConfig.from_pretrained(path, revision=self.checkpoint.revision)
                return AutoModelForCausalLM.from_config(config)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise SsahError(f"The configuration in {path} cannot be read: {reason}") from error

    @property
    def sizes(self) -> Sizes:
        text = self.skeleton.config.get_text_config()
        return Sizes(
            sum(p.numel() for p in self.skeleton.parameters()),
            text.num_hidden_layers,
            text.hidden_size,
            text.intermediate_size,
            text.vocab_size,
            text.max_position_embeddings,
        )

    @property
    def saved_in(self) -> torch.dtype:
        """What its weights are stored in, and what is made of it will be."""
        dtype = self.skeleton.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """This model, or one that was made of it, in evaluation mode."""
        return load_model(checkpoint, self.config, self.device)


def named(store: Store, model: str) -> Subject:
    """A folder, a hub id, or an embedded model by name.

    Raises :class:`SsahError` for what is none of them.
    """
    folder = Path(model).expanduser()
    if model in MODELS:
        config = ModelConfig(name=model, source="embedded")
    else:
        if model.startswith((".", "/", "~")) and not folder.exists():
            raise SsahError(f"There is no folder {model}: MODEL is a folder, a hub id or a name.")
        if "/" not in model and not folder.exists():
            raise SsahError(
                f"'{model}' is no folder and no model's name{suggestion(model, MODELS)}"
            )
        label = re.sub(r"[^\w.-]+", "_", folder.resolve().name if folder.exists() else model)
        config = ModelConfig(name=label, source=model)
    return Subject(model, config, locate(store, config), store, pick_device("auto"))


def in_memory(
    store: Store, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Subject:
    """A loaded model: it is saved once into the cache, and left as it is."""
    if tokenizer is None:
        raise SsahError("A loaded model needs its tokenizer beside it.")
    key = {
        "version": 1,
        "weights": _digest_of(model),
        "config": model.config.to_diff_dict(),
        "vocabulary": digest(tokenizer.get_vocab()),
        "template": tokenizer.chat_template,
    }

    def save(folder: Path) -> None:
        with quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    run = Handle(store, "model", "given", key, save)
    config = ModelConfig(name="given", source="given")
    name = getattr(model, "name_or_path", "") or "the given model"
    return Subject(name, config, Checkpoint(run, run.key), store, pick_device("auto"))


def _digest_of(model: PreTrainedModel) -> str:
    """sha256 of the raw bits of all weights."""
    found = hashlib.sha256()
    tensors: dict[str, Any] = model.state_dict()
    for name in sorted(tensors):
        found.update(name.encode())
        bits = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(bits.numpy())
    return found.hexdigest()
