"""What attribution and each way to train cost: ratios of seconds taken in one run, and memory."""

from __future__ import annotations

import copy
import functools
import itertools
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..core.files import write_atomically
from ..core.runtime import commit, peak_memory_mib, products_in, provenance, seed_everything
from ..lab.load import load_model
from ..scoring.attribution import collect_statistics
from ..scoring.selectors import magnitude, matched_by, random_rank, sized
from ..text.batches import dialogue_batches, read
from ..text.chat import encode_dialogue
from ..training.defences import DEFENCES, Defence
from ..training.defences.base import Step
from ..training.lora import adapters, rank_for
from ..training.loss import as_rows, collate, summed_loss
from ..training.slicing import freeze_units, train_only
from ..units.layout import UnitLayout
from ..units.mask import UnitMask
from .study import Study

ROWS, TOKENS = 8, 128

#: Steps of each way, each beside a full one.
PAIRS = 5


def bench(profile: str, overrides: Sequence[str]) -> Path:
    """Write what everything costs to ``tables/bench.csv`` and ``.md`` of the results folder."""
    study = Study(profile, list(overrides))
    table = study.results / "tables" / "bench"
    costs, stamp = training_costs(profile, overrides), study.stamp
    on_gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if on_gpu else provenance()["machine"]
    note = (
        f"One AdamW step on {ROWS} x {TOKENS} tokens. Ratios: median and range of {PAIRS} pairs "
        "with a full step beside it; peak memory: of a process of its own. Of defences: what a "
        "step costs (Lisa: every fourth one is two); what SafeLoRA does at the end is left out.\n\n"
        f"{attribution(profile, overrides)}\n\n"
        f"Profile {stamp['profile']}, model {stamp['model']}, "
        f"{stamp['overrides'] or 'no overrides'}, commit {commit()}, {machine}."
    )
    write_atomically(table.with_suffix(".csv"), lambda p: costs.to_csv(p, index=False))
    text = f"{costs.to_markdown(index=False)}\n\n{note}\n"
    write_atomically(table.with_suffix(".md"), lambda p: p.write_text(text, encoding="utf-8"))
    return table.with_suffix(".md")


def attribution(profile: str, overrides: Sequence[str]) -> str:
    """Median ratio of attribution to plain forward time over seven alternating repetitions.

    Both run the same batches without the language-model head; the statistics' memory depends on
    the model's width alone.
    """
    lab = Study(profile, overrides).labs[0]
    rows = lab.rows("heldout_text")[:32]
    pairs = [encode_dialogue(lab.tokenizer, r.prompt, r.response or "") for r in rows]
    batches = list(dialogue_batches(pairs, lab.config.attribution.batch_size))
    model, layout = load_model(lab.given, lab.config.model, lab.device), lab.layout

    @torch.inference_mode()
    def plain() -> None:
        for b in batches:
            read(model, b)

    alone, ratios = [], []
    with products_in(lab.precision):
        plain()
        for _ in range(7):
            alone.append(_seconds(plain))
            attributed = _seconds(lambda: collect_statistics(model, layout, batches))
            ratios.append(attributed / alone[-1])
    channels = sum(block.channels.numel() for block in layout.blocks)
    tokens = sum(int(b.attention_mask.sum()) for b in batches)
    return (
        f"Attribution / forward passes: median {statistics.median(ratios):.3f} "
        f"(min {min(ratios):.3f}, max {max(ratios):.3f}; {len(ratios)} pairs, {tokens} tokens, "
        f"forward {statistics.median(alone):.2f} s). Its statistics: {channels} channels "
        f"x 2 float64 = {channels * 16 / 2**20:.2f} MiB, whatever the number of samples."
    )


# --- fine-tuning steps -----------------------------------------------------------------------


def training_costs(profile: str, overrides: Sequence[str]) -> pd.DataFrame:
    """Seconds of a step, relative to full fine-tuning, and memory of each way to train.

    A way's steps alternate with full steps of a second model, so that a ratio compares neighbours
    whatever else the machine does; its memory is that of a process of its own.
    """
    context = multiprocessing.get_context("spawn")
    rows: dict[str, dict[str, Any]] = {}
    shown = functools.partial(tqdm, WAYS, leave=False, disable=not sys.stderr.isatty())
    for name in shown(desc="memory"):  # before this process grows: a child's peak begins with it
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            rows[name] = pool.submit(_memory, name, profile, list(overrides)).result()
    for name in shown(desc="steps"):
        if name != FULL:
            rows[name] |= _ratio(name, profile, overrides)
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("way to train").reset_index()
    return frame.fillna("").round(1)


def _ratio(name: str, profile: str, overrides: Sequence[str]) -> dict[str, str]:
    """Median ratio of neighbouring steps, its range, and the median seconds of a full step."""
    ratios, full = [], []
    full_way, own_way = (_training(way, profile, overrides) for way in (FULL, name))
    with full_way as plain, own_way as own:
        for i in range(PAIRS + 1):  # the first pair allocates
            steps = [_seconds(plain.step), _seconds(own.step)]
            if i:
                full.append(steps[0])
                ratios.append(steps[1] / steps[0])
    return {
        "step, x full": f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})",
        "full step, s": f"{statistics.median(full):.2f}",
    }


def _memory(name: str, profile: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What trains, the optimizer's state, and peak memory after two steps."""
    with _training(name, profile, overrides) as training:
        training.step()
        training.step()
    parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
    trained, states = sum(p.numel() for p in parameters), training.optimizer.state.values()
    state = sum(t.nbytes for kept in states for t in kept.values() if torch.is_tensor(t)) / 2**20
    on_device = torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else 0
    return {
        "trained, M": trained / 1e6,
        "optimizer, MiB": state,
        "peak, MiB": on_device or peak_memory_mib(),
    }


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Training:
    """One way to train a model of its own."""

    model: PreTrainedModel
    step: Callable[[], None]
    optimizer: torch.optim.Optimizer


@contextmanager
def _training(name: str, profile: str, overrides: Sequence[str]) -> Iterator[Training]:
    """Inside the block the model can be trained that way."""
    lab = Study(profile, overrides).labs[0]
    seed_everything(0)
    model = load_model(lab.given, lab.config.model, lab.device).train()
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)
    ids = torch.randint(3, model.config.vocab_size, (2 * ROWS, TOKENS)).tolist()
    half = TOKENS // 2 + 1  # half prompt, half response
    dialogues = [(row[:half], row[half:]) for row in ids]
    with products_in(lab.precision), WAYS[name](lab.layout, model) as found:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        defence = Defence() if found is None else found
        defence.refusals = dialogues[ROWS:]
        rows, anchors = defence.lesson(dialogues[:ROWS], random.Random(0))
        batch = {k: part.to(model.device) for k, part in collate(as_rows(rows, anchors)).items()}
        weigh = defence.token_weights if defence.weighs_tokens else None
        defence.begin(model)
        numbers = itertools.count()

        def step() -> None:
            total, tokens = summed_loss(
                model, batch, defence.reference, defence.anchor_weight, weigh
            )
            (total / tokens).backward()
            at = Step(model, optimizer, next(numbers), ROWS, ROWS, max_norm=1.0)
            defence.before_step(at)
            optimizer.step()
            defence.after_step(at)
            optimizer.zero_grad(set_to_none=True)
            if model.device.type == "cuda":
                torch.cuda.synchronize()

        yield Training(model, step, optimizer)


def _redundant(layout: UnitLayout, model: PreTrainedModel, share: float = 0.2) -> UnitMask:
    """As many neurons as RU are, a share of all units, by one ranking over all layers."""
    neurons = share * layout.units / (~layout.none()).count("mlp")
    rank = magnitude(layout, dict(model.named_parameters()))
    return matched_by(layout, sized(layout, 0, neurons), rank)


def _safety(layout: UnitLayout) -> UnitMask:
    """As many units as the paper's ESU and 6 % CU."""
    return matched_by(layout, sized(layout, 0.073, 0.073), random_rank(layout, seed=0))


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


def _lora(layout: UnitLayout, model: PreTrainedModel, *, inside: bool) -> Any:
    """Adapters with as many parameters as RU have weights."""
    redundant = _redundant(layout, model)
    rank = rank_for(layout, round(layout.weights(redundant)))
    return adapters(model, rank, redundant if inside else None)


def _defended(kind: type[Defence], model: PreTrainedModel) -> AbstractContextManager[Defence]:
    """A defence at a strength that all can have; of what they cost little depends on it."""
    reference = copy.deepcopy(model) if "reference" in kind.looks_at else None
    return nullcontext(kind(0.1, reference=reference))


FULL = "all units"

#: Way to train -> a context in which the model trains that way.
WAYS: dict[str, Callable[[UnitLayout, PreTrainedModel], Any]] = {
    FULL: lambda layout, model: nullcontext(),
    "RU 20 %": lambda layout, model: train_only(model, _redundant(layout, model)),
    "RU 20 %, gradient masking": lambda layout, model: _gradient_masking(
        model, layout, _redundant(layout, model)
    ),
    "RU 10 %": lambda layout, model: train_only(model, _redundant(layout, model, 0.1)),
    "RU 40 %": lambda layout, model: train_only(model, _redundant(layout, model, 0.4)),
    "all heads": lambda layout, model: train_only(model, sized(layout, heads=1, neurons=0)),
    "LoRA, as many weights as RU": lambda layout, model: _lora(layout, model, inside=False),
    "LoRA inside RU": lambda layout, model: _lora(layout, model, inside=True),
    "all but ESU + 6 % CU": lambda layout, model: freeze_units(model, _safety(layout)),
    "all but ESU + 6 % CU, gradient masking": lambda layout, model: _gradient_masking(
        model, layout, ~_safety(layout)
    ),
    **{
        f"all units, {name}": functools.partial(lambda kind, _, model: _defended(kind, model), kind)
        for name, kind in DEFENCES.items()
    },
}
