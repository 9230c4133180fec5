"""Constrained fine-tuning: the first tokens of a response move little (Qi et al. 2025, arXiv
2406.05946, eq. 3)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Defence


class Constrained(Defence):
    """The loss of a token is ``-(2 / beta) log sigmoid(beta (log pi - log pi_before))``.

    Its gradient is that of cross-entropy times ``2 (1 - sigmoid(beta (log pi - log pi_before)))``,
    which is 1 at the model before and falls to 0 as the token becomes likelier. ``strength``
    scales the paper's betas.
    """

    name = "constrained"
    looks_at = ("reference",)
    weighs_tokens = True

    #: beta at the first token, at the second to the fifth, and after them.
    betas: ClassVar[tuple[float, float, float]] = (0.5, 2.0, 0.1)

    def token_weights(self, own: Tensor, reference: Tensor, position: Tensor) -> Tensor:
        first, early, late = (self.strength * beta for beta in self.betas)
        beta = torch.full_like(own, late)
        beta[position <= 5] = early
        beta[position == 1] = first
        return 2 * torch.sigmoid(beta * (reference - own))
