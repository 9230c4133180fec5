"""What a training needs of memory and disk, looked at before it begins."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from ...core.errors import SsahError
from ...core.paths import require_space
from .subject import Sizes, Subject

#: Weights, gradients and AdamW's two averages, all in float32.
BYTES_A_PARAMETER = 16

#: Of a device's memory, what a training may plan with.
USABLE = 0.9


def training_gb(sizes: Sizes, tokens: int, lora: int | None = None) -> float:
    """Gigabytes that a step over a batch of so many tokens needs.

    16 bytes a parameter that trains (all, or with ``lora`` those of adapters of that rank), 4 of
    one that does not, and of activations, 4 bytes each: 9.1 x hidden + 4 x feed-forward a token
    and block, and 3 x vocabulary a token for logits, their logarithms and their gradient. The two
    factors of a block were measured: tensors that autograd saves of Llama and Qwen 2 models of
    twelve shapes, with SDPA and without checkpointing, which they describe to 2 %.
    """
    block = 9.1 * sizes.hidden + 4 * sizes.feed_forward
    activations = 4 * tokens * (sizes.blocks * block + 3 * sizes.vocabulary)
    adapters = (lora or 0) * sizes.blocks * (11 * sizes.hidden + 3 * sizes.feed_forward)
    still, moving = (sizes.parameters, adapters) if lora else (0, sizes.parameters)
    return (4 * still + BYTES_A_PARAMETER * moving + activations) / 1e9


def memory_gb(device: torch.device) -> tuple[float, float]:
    """Memory that is free now where the model computes, and all of it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return free / 1e9, total / 1e9


def micro_batch(subject: Subject, batch_size: int, longest: int, lora: int | None = None) -> int:
    """Rows of ``longest`` tokens to have in memory at once: the most that divide the batch and that
    the device has room for when nothing else is on it, so that a later call takes as many.

    Raises :class:`SsahError` where they, or one row, do not fit into what is free.
    """
    free, total = memory_gb(subject.device)
    fitting = [
        n
        for n in range(batch_size, 0, -1)
        if batch_size % n == 0 and training_gb(subject.sizes, n * longest, lora) <= USABLE * total
    ]
    at_once = fitting[0] if fitting else 1
    needed = training_gb(subject.sizes, at_once * longest, lora)
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
    subject: Subject, cache: Path, out: Path | None, trainings: int, lora: int | None
) -> None:
    """Raise :class:`SsahError` unless the cache has room for checkpoints (two at a time: weights
    and AdamW's averages of what trains) and for each trained model, and ``out`` for one of them."""
    float32 = 4 * subject.sizes.parameters / 1e9
    saved = subject.saved_in.itemsize * subject.sizes.parameters / 1e9
    require_space(2 * (1 if lora else 3) * float32 + trainings * saved, cache)
    if out is not None:
        require_space(saved, out)
