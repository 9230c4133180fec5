"""The process: seeds, device, versions, memory."""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.metadata
import os
import platform
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import numpy as np
import torch

from .errors import SsahError
from .paths import PACKAGE

REPORTED_PACKAGES = ("ssah", "torch", "transformers", "datasets", "accelerate", "numpy")

#: Parameters of glibc's ``mallopt`` (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch. Stages call it at their start, so order does not matter."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@functools.cache
def reuse_memory() -> None:
    """Make training quicker, once a process and without another number.

    Freed memory stays with the process (glibc returns large blocks, and a training step of a small
    model then spends a quarter of its time on the pages that it gets anew), and garbage collection,
    which accelerate asks for at the start of each training, passes over what was imported.
    """
    gc.collect()
    gc.freeze()
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)


def pick_device(wanted: str) -> torch.device:
    """``auto`` is CUDA where there is one; asking for an absent device is an error."""
    if wanted != "cpu" and torch.cuda.device_count() > 1:
        raise SsahError(
            f"{torch.cuda.device_count()} GPUs are visible and a study uses one: choose it with "
            "CUDA_VISIBLE_DEVICES=0, or send each model to a device of its own with `ssah submit`."
        )
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise SsahError(
            "runtime.device=cuda but PyTorch sees no CUDA device: install a CUDA build of PyTorch "
            "or use runtime.device=cpu."
        )
    # Others, such as mps, lack float64, which sums are in.
    if re.fullmatch(r"cpu|cuda(:\d+)?", wanted) is None:
        raise SsahError(f"runtime.device={wanted} cannot be used: choose auto, cpu or cuda.")
    return torch.device(wanted)


#: What factors of matrix products are rounded to; everything else is float32 always.
Precision = Literal["float32", "bfloat16"]


def pick_precision(wanted: str, device: torch.device) -> Precision:
    """``auto`` is bfloat16 where the device multiplies faster in it; asking for it where it does
    not is an error. A fact of the hardware decides and not a measurement, since it is part of what
    results are cached under."""
    if device.type == "cuda":
        able, what = torch.cuda.is_bf16_supported(including_emulation=False), "this GPU"
    else:
        # Of an old PyTorch, which lacks the question, and of other processors nothing is known.
        known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        able, what = bool(known.get("avx512_bf16") or known.get("amx_bf16")), "this processor"
    if wanted == "bfloat16" and not able:
        raise SsahError(
            f"runtime.precision=bfloat16 but {what} has no instructions for it: choose float32, "
            "or auto, which is bfloat16 where it helps."
        )
    if wanted == "auto":
        return "bfloat16" if able else "float32"
    return cast(Precision, wanted)


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Inside the block factors of matrix products are rounded to this precision; sums and results
    are float32. On a GPU PyTorch takes TF32, which rounds less, for bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "bfloat16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def require_one_process() -> None:
    """Raise :class:`SsahError` in a process of torchrun or accelerate: they would all wait for the
    locks of the first."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise SsahError(
            "A study is one process (WORLD_SIZE is "
            f"{os.environ['WORLD_SIZE']}): start it without torchrun or accelerate, or use "
            "`ssah submit` for one job a model."
        )


def peak_memory_mib() -> int:
    """Largest resident memory of this process so far; 0 where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 if sys.platform != "darwin" else 1024**2)


@functools.cache
def commit() -> str:
    """Commit of the clone, with ``+`` where files differ from it; ``""`` outside of a clone."""
    try:
        command = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty=+", "--abbrev=10"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@functools.cache
def is_known(name: str) -> bool:
    """Whether a commit, as :func:`commit` writes it, is one of the clone's history."""
    command = ["git", "-C", str(PACKAGE), "merge-base", "--is-ancestor", name, "HEAD"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@functools.cache
def provenance() -> dict[str, Any]:
    """What made a result: recorded with every run, never part of its key."""
    there = {found.name for found in importlib.metadata.distributions()}
    versions = {
        name: importlib.metadata.version(name) for name in REPORTED_PACKAGES if name in there
    }
    # The GPU, where there is one: its rounding is not a processor's.
    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "command": " ".join(sys.argv),
        "commit": commit(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads{card}",
        "versions": versions,
    }
