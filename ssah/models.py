"""Load models and tokenizers: the embedded one, the tiny one, a folder, or a hub id."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from .assets import fetch
from .attribution import Batch
from .config import ModelConfig
from .errors import SsahError
from .paths import require_space
from .store import Run, Store, file_digest
from .toy import build_tiny_model

#: ChatML without a default system prompt. SmolLM2's own template inserts one whenever the
#: conversation has none, so "without a system prompt" could not be measured with it.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's files are and what identifies them in a run's key."""

    path: str
    identity: str
    revision: str | None = None


def locate(store: Store, config: ModelConfig) -> Checkpoint:
    """The unaligned (or, with ``align=none``, the given) model, built first if it is embedded."""
    if config.source == "embedded":
        run = _embedded(store)
    elif config.source == "tiny":
        run = store.get("model", "tiny", {"version": 1}, build_tiny_model)
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
    return Checkpoint(str(run.folder), run.key)


def _embedded(store: Store) -> Run:
    asset = fetch(store, "smollm2")
    gguf = next(asset.path("files").glob("*.gguf"))

    def build(folder: Path) -> None:
        """De-quantise once; later loads read plain safetensors."""
        require_space(1.5, folder)
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

    return store.get("model", "smollm2", {"version": 1, "asset": asset.key}, build)


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the library's progress bars and load reports."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


# --- text to tokens --------------------------------------------------------------------------


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str = "") -> str:
    """The chat template's text up to where the answer begins."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return cast(str, text)


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool = False
) -> list[int]:
    """Token ids of rendered text; the template already holds every special token.

    Text that went through no template needs ``special_tokens``: those that the tokenizer adds by
    itself, such as the first token of Llama and Gemma.
    """
    return tokenizer(text, add_special_tokens=special_tokens)["input_ids"]


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    response: str,
    *,
    end: bool = True,
    max_response_tokens: int | None = None,
) -> tuple[list[int], list[int]]:
    """Ids of prompt and response apart; ``end`` appends the end-of-turn token.

    A response cut at ``max_response_tokens`` gets no end token.
    """
    head = encode(tokenizer, render_prompt(tokenizer, prompt))
    body = encode(tokenizer, response)
    if max_response_tokens is not None and len(body) > max_response_tokens:
        return head, body[:max_response_tokens]
    return head, body + [tokenizer.eos_token_id] * end


def pad(sequences: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Pad integer sequences to a rectangle, ``[len(sequences), longest]``."""
    width = max(len(s) for s in sequences)
    rows = []
    for sequence in sequences:
        fill = [value] * (width - len(sequence))
        rows.append([*fill, *sequence] if side == "left" else [*sequence, *fill])
    return torch.tensor(rows)


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of positions, shortest first, so that little is padded; ties keep their order."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def dialogue_batches(
    pairs: Sequence[tuple[list[int], list[int]]],
    batch_size: int,
    *,
    tokens: str = "response",
    drop_first: bool = False,
    side: str = "right",
) -> Iterator[Batch]:
    """Padded batches of (prompt ids, response ids), longest first.

    Counted are the positions that carry a response token (``tokens="response"``) or every real
    token (``"all"``, with ``drop_first`` without the first, an attention sink).
    """
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    for start in range(0, len(order), batch_size):
        chosen = [pairs[i] for i in order[start : start + batch_size]]
        counted = []
        for prompt, response in chosen:
            if tokens == "response":
                counted.append([0] * len(prompt) + [1] * len(response))
            else:
                total = len(prompt) + len(response)
                counted.append([int(not drop_first)] + [1] * (total - 1))
        yield Batch(
            pad([[*p, *r] for p, r in chosen], 0, side),
            pad([[1] * (len(p) + len(r)) for p, r in chosen], 0, side),
            pad(counted, 0, side).bool(),
        )
