"""How much attribution costs beside the forward passes that it needs anyway."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from .attribution import collect_statistics
from .models import dialogue_batches, encode_dialogue
from .study import Study


def report(profile: str, overrides: Sequence[str], repetitions: int = 7) -> str:
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

    def attribution() -> None:
        collect_statistics(model, layout, batches)

    times: dict[str, list[float]] = {"plain": [], "attribution": []}
    plain()
    for _ in range(repetitions):
        for name, work in (("plain", plain), ("attribution", attribution)):
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
