"""Find the roles of a model's units in one call: the front door for your own model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .attribution import collect_statistics, unit_scores
from .models import dialogue_batches, encode_dialogue
from .roles import Roles, Shares, classify
from .units import UnitKind, UnitLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: What the paper found for Llama-2-7B-Chat (Table 1).
PAPER_SHARES = Shares(ru=0.148, esu=0.013, euu=0.133)


def find_units(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    safety: Sequence[tuple[str, str]],
    utility: Sequence[tuple[str, str]],
    *,
    shares: Shares = PAPER_SHARES,
    unit_kind: UnitKind = "head",
    batch_size: int = 8,
) -> Roles:
    """Roles of all units from (prompt, response) pairs (eq. 1, section 3.2 of the paper).

    ``safety`` are harmful prompts with refusals, best the model's own; ``utility`` are harmless
    ones with helpful answers. About a hundred of each suffice. The tokenizer's chat template is
    applied. Two passes of forward computation, no gradients; the model is left as it was.
    """
    layout = UnitLayout.of(model, unit_kind)

    def scores(pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        encoded = [encode_dialogue(tokenizer, *pair) for pair in pairs]
        batches = dialogue_batches(encoded, batch_size)
        return unit_scores(model, layout, collect_statistics(model, layout, batches))

    return classify(layout, scores(safety), scores(utility), shares)
