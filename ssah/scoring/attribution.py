"""Attribution scores (paper, eq. 1): how strongly each unit's channel varies on a data set.

``I_j = Var_n(X_j) * ||W[:, j]||^2`` for every input channel j of an output projection ``B``,
where X is what enters ``B``. Scores are z-standardised within each block and, for a unit of
several channels, averaged over them. One forward pass over the data, no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.errors import InvalidValueError
from ..core.valid import require_finite, require_word
from ..text.batches import Batch, read
from ..units.layout import UnitLayout
from .settings import VarianceOver

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NOTHING_COUNTED = "No token was counted: the responses of the attribution set are empty."


class Moments:
    """Running count, mean and sum of squared deviations for each channel.

    Batches are merged by the update of Chan, Golub and LeVeque (1979) in float64, so the result
    depends neither on the batch size nor on the order beyond rounding, and no ``E[x^2] - E[x]^2``
    is ever formed. Memory is two vectors, whatever the number of samples.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.m2 = torch.zeros_like(self.mean)

    def update(self, values: Tensor) -> None:
        """Add observations ``[n, channels]``."""
        n = values.shape[0]
        if n == 0:
            return
        values = values.float()
        # Centring on the first row keeps the float32 sums exact enough when |mean| >> std.
        shift = values[0]
        centred = values - shift
        offset = centred.mean(0)
        m2 = ((centred - offset) ** 2).sum(0).double()
        mean = shift.double() + offset.double()
        delta = mean - self.mean
        total = self.count + n
        self.mean += delta * (n / total)
        self.m2 += m2 + delta**2 * (self.count * n / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Unbiased variance, float64 ``[channels]``."""
        return self.m2 / max(self.count - 1, 1)


@dataclass(frozen=True)
class ActivationStatistics:
    """Mean and variance of what enters each output projection, by block: float64 ``[channels]``."""

    mean: dict[str, Tensor]
    variance: dict[str, Tensor]
    observations: int

    def save(self, path: Path) -> None:
        tensors = {f"{name}/mean": t for name, t in self.mean.items()}
        tensors |= {f"{name}/variance": t for name, t in self.variance.items()}
        save_file(tensors | {"observations": torch.tensor([self.observations])}, path)

    @classmethod
    def load(cls, path: Path) -> ActivationStatistics:
        tensors = load_file(path)
        observations = int(tensors.pop("observations"))
        mean = {k.removesuffix("/mean"): t for k, t in tensors.items() if k.endswith("/mean")}
        variance = {name: tensors[f"{name}/variance"] for name in mean}
        return cls(mean, variance, observations)


@torch.inference_mode()
def collect_statistics(
    model: PreTrainedModel,
    layout: UnitLayout,
    batches: Iterable[Batch],
    variance_over: VarianceOver = "token",
) -> ActivationStatistics:
    """Stream batches through the model and gather each channel's mean and variance.

    ``variance_over="token"`` takes every counted token as one observation (what the code of FLAP
    computes); ``"sample_mean"`` takes each sample's mean over its counted tokens. Padding never
    counts. The forward pass stops before the language-model head: logits are not needed.
    Raises ``ValueError`` when no token was counted, or where an activation is not finite.
    """
    require_word("variance_over", variance_over, get_args(VarianceOver))
    moments = {b.name: Moments(b.channels.numel(), model.device) for b in layout.blocks}

    def hear(name: str, entering: Tensor, counted: Tensor) -> None:
        if variance_over == "token":
            moments[name].update(entering[counted])
        else:
            # In half precision neither the sum nor the number of tokens would be exact.
            weight = counted.unsqueeze(-1).float()
            total = (entering.float() * weight).sum(1, dtype=torch.float64)
            present = counted.any(1)
            moments[name].update(total[present] / weight.sum(1)[present])

    listen(model, layout, batches, hear)
    observations = next(iter(moments.values())).count
    if observations == 0:
        raise InvalidValueError(NOTHING_COUNTED)
    for name, found in moments.items():
        require_finite(found.variance, f"what enters the output projection of {name}")
    return ActivationStatistics(
        {name: m.mean.cpu() for name, m in moments.items()},
        {name: m.variance.cpu() for name, m in moments.items()},
        observations,
    )


@torch.inference_mode()
def sample_activations(
    model: PreTrainedModel, layout: UnitLayout, batches: Sequence[Batch], count: int, seed: int
) -> dict[str, Tensor]:
    """What enters each output projection at random counted tokens, by block: float32 ``[count,
    channels]``, of the same tokens in every block; fewer where fewer are counted."""
    total = sum(int((b.counted & b.attention_mask.bool()).sum()) for b in batches)
    if total == 0:
        raise InvalidValueError(NOTHING_COUNTED)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=generator)[:count]] = True
    found: dict[str, list[Tensor]] = {block.name: [] for block in layout.blocks}
    before = dict.fromkeys(found, 0)

    def hear(name: str, entering: Tensor, counted: Tensor) -> None:
        values = entering[counted]
        own = chosen[before[name] : before[name] + len(values)]
        before[name] += len(values)
        found[name].append(values[own.to(values.device)].float().cpu())

    listen(model, layout, batches, hear)
    return {name: torch.cat(parts) for name, parts in found.items()}


def listen(
    model: PreTrainedModel,
    layout: UnitLayout,
    batches: Iterable[Batch],
    hear: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Stream batches through the model; ``hear`` gets a block's name, what enters its output
    projection, ``[samples, tokens, channels]``, and which tokens count, ``[samples, tokens]``."""
    counted = torch.zeros(0)

    def hook_for(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            hear(name, args[0], counted)

        return hook

    handles = [
        b.projection(model).register_forward_pre_hook(hook_for(b.name)) for b in layout.blocks
    ]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            counted = (batch.counted & batch.attention_mask.bool()).to(model.device)
            read(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)


def unit_scores(
    model: PreTrainedModel, layout: UnitLayout, statistics: ActivationStatistics
) -> dict[str, Tensor]:
    """Eq. 1 for every unit, by block: float64 ``[units]``, z-standardised within the block."""
    scores = {}
    for block in layout.blocks:
        weight = block.projection(model).weight.detach().double().cpu()
        channel = statistics.variance[block.name] * (weight**2).sum(0)
        require_finite(channel, f"the score of {block.name}")
        standardised = (channel - channel.mean()) / channel.std().clamp(min=1e-12)
        scores[block.name] = standardised[block.channels].mean(1)
    return scores
