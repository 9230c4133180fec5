"""What a defence can do while a model is fine-tuned."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ...core.valid import Within
from ..loss import Dialogues
from ..settings import TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What a defence may need: refusals of the model before, that model, and the one before alignment.
Source = Literal["refusals", "reference", "unaligned"]


@dataclass(frozen=True)
class Step:
    """The optimizer's step that is being taken."""

    model: PreTrainedModel
    optimizer: Optimizer
    number: int  #: of steps that were taken before
    rows: int  #: that it learns from
    at_once: int  #: of them in memory
    max_norm: float  #: that gradients are clipped to


class Defence:
    """No defence: nothing is done at any of these points.

    ``strength`` is what a study varies. A subclass names what it looks at, and gets that:
    ``refusals`` are (prompt ids, response ids), ``reference`` is the model before the fine-tuning
    and ``unaligned`` the one before its alignment. ``state`` is what must survive an interruption:
    tensors by name, kept in every checkpoint.
    """

    name: ClassVar[str] = ""
    looks_at: ClassVar[tuple[Source, ...]] = ()
    valid: ClassVar[Within] = Within(above=0)  #: strengths
    weighs_tokens: ClassVar[bool] = False  #: whether :meth:`token_weights` is asked

    def __init__(
        self,
        strength: float = 1.0,
        refusals: Dialogues = (),
        reference: PreTrainedModel | None = None,
        unaligned: PreTrainedModel | None = None,
    ):
        self.strength, self.refusals = strength, refusals
        self.reference, self.unaligned = reference, unaligned
        self.state: dict[str, Tensor] = {}

    @classmethod
    def text(cls, strength: float) -> str:
        """A strength as tables say it."""
        return f"{strength:g}"

    # --- before ------------------------------------------------------------------------------

    def settings(self, config: TrainingConfig) -> TrainingConfig:
        """The settings that are trained with."""
        return config

    def lesson(self, taught: Dialogues, rng: random.Random) -> tuple[Dialogues, Dialogues]:
        """The rows that are trained on, and rows on which the model is held to the distribution of
        the reference: together as many as ``taught``, so that no defence has more steps."""
        return taught, ()

    @property
    def anchor_weight(self) -> float:
        """Of the divergence on rows on which the model is held."""
        return 1.0

    def begin(self, model: nn.Module) -> None:
        """Called before the first step; the state of a run that goes on is read after it."""

    # --- during ------------------------------------------------------------------------------

    def token_weights(self, own: Tensor, reference: Tensor, position: Tensor) -> Tensor:
        """Weights of response tokens (:data:`ssah.training.loss.TokenWeights`)."""
        return torch.ones_like(own)

    def before_step(self, step: Step) -> None:
        """Called when gradients are there, and clipped."""

    def after_step(self, step: Step) -> None:
        """Called when the optimizer has changed the weights."""

    # --- what comes out ----------------------------------------------------------------------

    def outcome(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Weights that come out in the place of those that were trained, by parameter.

        A weight that is frozen must have its old value.
        """
        return {}

    @contextmanager
    def coming_out(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model has the weights that come out; the training goes on with its
        own."""
        found = self.outcome(model)
        own = {name: model.get_parameter(name).detach().clone() for name in found}
        _write(model, found)
        try:
            yield
        finally:
            _write(model, own)

    def finish(self, model: nn.Module) -> None:
        """Leave the model with the weights that come out."""
        _write(model, self.outcome(model))

    # --- checkpoints -------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the state beside the optimizer's."""
        if self.state:
            save_file(self.state, folder / "defence.safetensors")

    def load(self, folder: Path, device: torch.device) -> None:
        """Read what :meth:`save` wrote."""
        if self.state:
            self.state = load_file(folder / "defence.safetensors", device=str(device))

    # --- for subclasses ----------------------------------------------------------------------

    def in_their_place(
        self, fraction: float, taught: Dialogues, rng: random.Random
    ) -> tuple[Dialogues, Dialogues]:
        """Refusals in the place of a fraction of the rows, rounded up: the rows that are left, in
        their order, and the refusals, all of which are taken before any is taken again."""
        count = min(math.ceil(round(fraction * len(taught), 6)), len(taught))
        kept = sorted(rng.sample(range(len(taught)), len(taught) - count))
        drawn = rng.sample(list(self.refusals), min(count, len(self.refusals)))
        return [taught[i] for i in kept], [drawn[i % len(drawn)] for i in range(count)]

    def refusals_for(self, step: Step) -> Dialogues:
        """As many as the step has rows: for every step others, and again the same ones where a run
        is repeated or goes on."""
        count = min(step.rows, len(self.refusals))
        return random.Random(step.number).sample(list(self.refusals), count)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _write(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, new in weights.items():
        own = model.get_parameter(name)
        # Equal numbers keep their bits: an average of -0.0 and -0.0 may be 0.0.
        own.copy_(torch.where(new == own, own, new.to(own)))
