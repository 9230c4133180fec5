"""The model that is protected or checked: a folder, a hub id, a name, or one in memory; and what a
training of it needs."""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from ...core.errors import SsahError, suggestion
from ...core.paths import require_space
from ...core.progress import quiet
from ...core.runtime import pick_device
from ...core.store import Handle, Store, digest
from ...data.assets import MODELS
from ...data.settings import ModelConfig
from ...lab.load import Checkpoint, load_model, load_tokenizer, locate
from .settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Of a device's memory, what a training may plan with.
USABLE = 0.9


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
    generation = getattr(model, "generation_config", None)
    key = {
        "version": 1,
        "weights": _digest_of(model),
        "config": model.config.to_diff_dict(),
        "generation": generation.to_diff_dict() if generation is not None else None,
        "vocabulary": digest(tokenizer.get_vocab()),
        "special_tokens": {name: str(t) for name, t in tokenizer.special_tokens_map.items()},
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


# --- what a training needs of memory and disk, looked at before it begins --------------------


def training_gb(sizes: Sizes, tokens: int, settings: Settings) -> float:
    """Gigabytes that a step over a batch of so many tokens needs.

    What is kept of a parameter that trains (all, or with ``lora`` those of adapters of that rank),
    its gradient, the weight of one that does not, and activations, 4 bytes each: 9.1 x hidden + 4 x
    feed-forward a token and block, and 3 x vocabulary a token for logits, their logarithms and
    their gradient. The two factors of a block were measured: tensors that autograd saves of Llama
    and Qwen 2 models of twelve shapes, with SDPA and without checkpointing, which they describe to
    2 %.
    """
    block = 9.1 * sizes.hidden + 4 * sizes.feed_forward
    activations = 4 * tokens * (sizes.blocks * block + 3 * sizes.vocabulary)
    rank = settings.lora or 0
    adapters = rank * sizes.blocks * (11 * sizes.hidden + 3 * sizes.feed_forward)
    still, moving = (sizes.parameters, adapters) if rank else (0, sizes.parameters)
    return (4 * still + 4 * (settings.kept_a_parameter + 1) * moving + activations) / 1e9


def memory_gb(device: torch.device) -> tuple[float, float]:
    """Memory that is free now where the model computes, and all of it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return free / 1e9, total / 1e9


def micro_batch(subject: Subject, settings: Settings, longest: int) -> int:
    """Rows of ``longest`` tokens to have in memory at once: the most that divide the batch and that
    the device has room for when nothing else is on it, so that a later call takes as many.

    Raises :class:`SsahError` where they, or one row, do not fit into what is free.
    """
    free, total = memory_gb(subject.device)
    rows = settings.batch_size
    fitting = [
        n
        for n in range(rows, 0, -1)
        if rows % n == 0 and training_gb(subject.sizes, n * longest, settings) <= USABLE * total
    ]
    at_once = fitting[0] if fitting else 1
    needed = training_gb(subject.sizes, at_once * longest, settings)
    if needed <= free:
        return at_once
    raise SsahError(
        f"Training {subject.name} ({subject.sizes.parameters / 1e9:.3g} billion parameters) on "
        f"{at_once} rows of up to {longest} tokens needs {needed:.1f} GB of memory, and "
        f"{_place(subject)} has {free:.1f} GB free: free some, take a smaller batch_size or "
        "max_tokens, adapters (lora), a smaller model or a larger machine."
    )


def require_room(subject: Subject) -> None:
    """Raise :class:`SsahError` unless the model's weights fit, and a tenth of them more."""
    needed, (free, _) = 1.1 * 4 * subject.sizes.parameters / 1e9, memory_gb(subject.device)
    if needed > free:
        raise SsahError(
            f"{subject.name} needs {needed:.1f} GB of memory, and {_place(subject)} has "
            f"{free:.1f} GB free: take a smaller model or a larger machine."
        )


def _place(subject: Subject) -> str:
    return "the GPU" if subject.device.type == "cuda" else "this machine"


def require_disk(
    subject: Subject, cache: Path, out: Path | None, trainings: int, settings: Settings
) -> None:
    """Raise :class:`SsahError` unless the cache has room for checkpoints (two at a time: the
    weights, and what is kept of those that train) and for each trained model, and ``out`` for one
    of them."""
    float32 = 4 * subject.sizes.parameters / 1e9
    saved = subject.saved_in.itemsize * subject.sizes.parameters / 1e9
    kept = 1 if settings.lora else settings.kept_a_parameter
    require_space(2 * kept * float32 + trainings * saved, cache)
    if out is not None:
        require_space(saved, out)
