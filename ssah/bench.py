"""What attribution and masked fine-tuning cost, as ratios taken in one run."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attribution import collect_statistics
from .baselines import magnitude_units, random_units, sized
from .finetune import scored_logits
from .models import dialogue_batches, encode_dialogue
from .runtime import peak_memory_mib, seed_everything
from .slicing import freeze_units, train_only
from .stages import Stages
from .study import Study
from .units import UnitLayout, UnitMask

ROWS, TOKENS = 8, 128


def report(profile: str, overrides: Sequence[str]) -> str:
    steps = fine_tuning(profile, overrides)
    return f"{attribution(profile, overrides)}\n{steps}"


def attribution(profile: str, overrides: Sequence[str], repetitions: int = 7) -> str:
    """Median ratio of attribution to plain forward time over alternating repetitions.

    Both run the same batches without the language-model head; the statistics' memory depends on
    the model's width alone.
    """
    stages = Study(profile, overrides).all_stages[0]
    rows = stages.rows("heldout_text")[:32]
    pairs = [encode_dialogue(stages.tokenizer, r.prompt, r.response or "") for r in rows]
    batches = list(dialogue_batches(pairs, stages.config.attribution.batch_size))
    model = stages.model("unaligned")
    layout = stages.layout_of(model)

    def plain() -> None:
        with torch.inference_mode():
            for b in batches:
                model.base_model(
                    input_ids=b.input_ids.to(model.device),
                    attention_mask=b.attention_mask.to(model.device),
                    use_cache=False,
                )

    def attributed() -> None:
        collect_statistics(model, layout, batches)

    times: dict[str, list[float]] = {"plain": [], "attribution": []}
    plain()
    for _ in range(repetitions):
        for name, work in (("plain", plain), ("attribution", attributed)):
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    ratios = [a / p for a, p in zip(times["attribution"], times["plain"], strict=True)]
    channels = sum(block.channels.numel() for block in layout.blocks)
    tokens = sum(int(b.attention_mask.sum()) for b in batches)
    return (
        f"attribution / forward passes: median {statistics.median(ratios):.3f} "
        f"(min {min(ratios):.3f}, max {max(ratios):.3f}; {repetitions} pairs, {tokens} tokens, "
        f"forward {statistics.median(times['plain']):.2f} s)\n"
        f"statistics: {channels} channels x 2 float64 = {channels * 16 / 2**20:.2f} MiB, "
        "whatever the number of samples"
    )


# --- fine-tuning steps -----------------------------------------------------------------------


def fine_tuning(profile: str, overrides: Sequence[str], pairs: int = 5) -> str:
    """Seconds a step, relative to full fine-tuning, and memory of each way to train.

    A way's steps alternate with full steps of a second model, so that a ratio compares neighbours
    whatever else the machine does; its memory is that of a process of its own.
    """
    lines = [f"one AdamW step on {ROWS} x {TOKENS} tokens, {pairs} pairs with a full step each"]
    context = multiprocessing.get_context("spawn")
    memory = {}
    for name in WAYS:  # before this process grows: a child's peak begins with its parent's
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            memory[name] = pool.submit(_memory, name, profile, list(overrides)).result()
    for name, (size, peak) in memory.items():
        cost = "" if name == "full" else _ratio(name, profile, overrides, pairs)
        lines.append(
            f"  {name:<32} {cost:<36} optimizer state {size / 2**20:4.0f} MiB, peak {peak} MiB"
        )
    return "\n".join(lines)


def _ratio(name: str, profile: str, overrides: Sequence[str], pairs: int) -> str:
    """Median ratio of neighbouring steps, its range, and the median seconds of a full step."""
    ratios, full = [], []
    full_way, own_way = (_training(way, profile, overrides) for way in ("full", name))
    with full_way as (plain, _), own_way as (own, _):
        for i in range(pairs + 1):  # the first pair allocates
            steps = [_seconds(plain), _seconds(own)]
            if i:
                full.append(steps[0])
                ratios.append(steps[1] / steps[0])
    middle, base = statistics.median(ratios), statistics.median(full)
    return f"x{middle:.3f} ({min(ratios):.3f}-{max(ratios):.3f}) of {base:.2f} s"


def _memory(name: str, profile: str, overrides: Sequence[str]) -> tuple[int, int]:
    """Bytes of optimizer state, and peak memory in MiB, after two steps."""
    with _training(name, profile, overrides) as (step, optimizer):
        step()
        step()
        tensors = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    on_device = torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else 0
    return sum(t.numel() * t.element_size() for t in tensors), on_device or peak_memory_mib()


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@contextmanager
def _training(
    name: str, profile: str, overrides: Sequence[str]
) -> Iterator[tuple[Callable[[], None], torch.optim.Optimizer]]:
    """A step of one way to train, on a model of its own, and the optimizer."""
    stages = Study(profile, overrides).all_stages[0]
    seed_everything(0)
    model = stages.model("unaligned").train()
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)
    ids = torch.randint(3, model.config.vocab_size, (ROWS, TOKENS), device=model.device)
    scored = torch.zeros(ROWS, TOKENS - 1, dtype=torch.bool, device=model.device)
    scored[:, TOKENS // 2 :] = True  # half prompt, half response
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with WAYS[name](stages, model) as replaced:
        trained = replaced or model
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad])

        def step() -> None:
            logits = scored_logits(trained, inputs, scored)
            nn.functional.cross_entropy(logits, ids[:, 1:][scored]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if trained.device.type == "cuda":
                torch.cuda.synchronize()

        yield step, optimizer


def _redundant(stages: Stages, model: PreTrainedModel) -> tuple[UnitLayout, UnitMask]:
    """A fifth of the neurons, by one ranking over all layers, as RU are."""
    layout = stages.layout_of(model)
    return layout, magnitude_units(model, layout, sized(layout, 0, 0.2), largest=False)


def _safety(stages: Stages, model: PreTrainedModel) -> tuple[UnitLayout, UnitMask]:
    """As many units as the paper's ESU and 6 % CU."""
    layout = stages.layout_of(model)
    return layout, random_units(layout, sized(layout, 0.073, 0.073), seed=0)


@contextmanager
def _gradient_masking(
    model: PreTrainedModel, layout: UnitLayout, trained: UnitMask
) -> Iterator[None]:
    """What one would write by hand: the whole gradient, times a mask."""
    masks: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for block in layout.blocks:
        for part in block.slices:
            mask = masks.setdefault(part.parameter, torch.zeros_like(parameters[part.parameter]))
            mask.index_fill_(part.dim, part.selected(trained[block.name]).to(mask.device), 1)
    for name, mask in masks.items():
        parameters[name].requires_grad_(True)

        def apply(parameter: Tensor, mask: Tensor = mask) -> None:
            assert parameter.grad is not None
            parameter.grad.mul_(mask)

        parameters[name].register_post_accumulate_grad_hook(apply)
    yield


@contextmanager
def _lora(stages: Stages, model: PreTrainedModel) -> Iterator[Any]:
    from peft import LoraConfig, get_peft_model

    yield get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")).get_base_model()


def _mask_by_hand(choose: Callable, *, keep: bool) -> Callable:
    def way(stages: Stages, model: PreTrainedModel):
        layout, mask = choose(stages, model)
        return _gradient_masking(model, layout, mask if keep else ~mask)

    return way


#: Way to train -> a context in which the model trains that way.
WAYS: dict[str, Callable[[Stages, PreTrainedModel], Any]] = {
    "full": lambda stages, model: nullcontext(),
    "RU 20 % trained": lambda stages, model: train_only(model, _redundant(stages, model)[1]),
    "RU 20 %, gradient masking": _mask_by_hand(_redundant, keep=True),
    "ESU + 6 % CU frozen": lambda stages, model: freeze_units(model, _safety(stages, model)[1]),
    "ESU + 6 % CU, gradient masking": _mask_by_hand(_safety, keep=False),
    "LoRA (rank 16, all linear)": _lora,
}
