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
    return f"{attribution(profile, overrides)}\n{fine_tuning(profile, overrides)}"


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


def fine_tuning(profile: str, overrides: Sequence[str], rounds: int = 3, steps: int = 3) -> str:
    """Seconds a step and peak memory of each way to train, each in a process of its own.

    The ways take turns, and a ratio compares neighbours of one round.
    """
    results: dict[str, list[tuple[float, int, int]]] = {name: [] for name in WAYS}
    context = multiprocessing.get_context("spawn")
    for _ in range(rounds):
        for name in WAYS:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                job = pool.submit(_steps, name, profile, list(overrides), steps)
                results[name].append(job.result())
    lines = [f"one AdamW step on {ROWS} x {TOKENS} tokens, {rounds} rounds of {steps} steps"]
    base = [seconds for seconds, _, _ in results["full"]]
    for name, found in results.items():
        ratios = [seconds / b for (seconds, _, _), b in zip(found, base, strict=True)]
        lines.append(
            f"  {name:<32} {statistics.median(s for s, _, _ in found):6.3f} s  "
            f"x{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})  "
            f"optimizer state {found[0][1] / 2**20:5.0f} MiB  "
            f"peak {max(memory for _, _, memory in found)} MiB"
        )
    return "\n".join(lines)


def _steps(name: str, profile: str, overrides: list[str], steps: int) -> tuple[float, int, int]:
    """Median seconds of a step, bytes of optimizer state, and peak memory in MiB."""
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
        model = replaced or model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        times = []
        for _ in range(steps + 1):  # the first one allocates
            start = time.perf_counter()
            logits = scored_logits(model, inputs, scored)
            nn.functional.cross_entropy(logits, ids[:, 1:][scored]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        tensors = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    on_device = torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else 0
    size = sum(t.numel() * t.element_size() for t in tensors)
    return statistics.median(times[1:]), size, on_device or peak_memory_mib()


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
