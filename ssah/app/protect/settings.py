"""Settings of a protected fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import InvalidValueError
from ...core.valid import one_of, within
from ...training.settings import LISA_PERIOD

#: Defence -> what it does, as a report says it.
DEFENCES = {
    "Lisa": "after every fourth step on the rows it takes one on its own refusals",
    "mixing": "some of the model's own refusals are among the rows that it learns from",
    "freeze": "the units that carry most of its refusals are frozen (ESU and 6 % CU)",
    "freeze+mixing": "its own refusals are among the rows, and the units that carry most of them "
    "are frozen (ESU and 6 % CU)",
    "none": "no defence: plain fine-tuning",
}

#: Refusals that mixing puts among the rows where nothing is said, as a fraction of them.
SHARE = 0.1


@dataclass
class Settings:
    """How the model is fine-tuned. AdamW; the rate falls linearly to nothing."""

    defence: str = one_of("mixing", *DEFENCES)
    #: refusals that are mixed in, as a fraction of the rows; where none is given :data:`SHARE`
    share: float | None = within(None, high=1, above=0)
    epochs: int = within(1, 1)
    #: at the beginning; where none is given 2e-5, and 2e-4 for adapters
    learning_rate: float | None = within(None, above=0)
    batch_size: int = within(8, 1)
    max_tokens: int = within(512, 16)  #: of a row; the rest of its response is cut
    seed: int = within(0, 0)
    lora: int | None = within(None, 1)  #: rank of the adapters that train in the model's place

    def __post_init__(self) -> None:
        if self.share is not None and not self.mixes:
            raise InvalidValueError(
                f"share says how many refusals are mixed in, and defence={self.defence} mixes none "
                "in: leave it out, or use defence=mixing."
            )
        if self.lora is not None and self.freezes:
            raise InvalidValueError(
                "lora and a defence that freezes units do not go together: adapters leave all "
                "weights as they are. Use defence=mixing."
            )

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or (2e-5 if self.lora is None else 2e-4)

    @property
    def refusals_a_row(self) -> float:
        """How many of its own refusals the model learns from for each row."""
        if self.alternates:
            return 1 / LISA_PERIOD
        return (self.share or SHARE) * self.mixes

    @property
    def alternates(self) -> bool:
        return self.defence == "Lisa"

    @property
    def kept_a_parameter(self) -> int:
        """Numbers that a training keeps of each parameter that trains, beside its gradient: the
        weight, AdamW's two averages, and with Lisa the weight that it draws back to."""
        return 4 if self.alternates else 3

    @property
    def mixes(self) -> bool:
        return self.defence.endswith("mixing")

    @property
    def freezes(self) -> bool:
        return self.defence.startswith("freeze")
