"""Find the roles of a model's units in one call: the front door for your own model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..text.batches import dialogue_batches
from ..text.chat import encode_dialogue
from ..units.families import UnitKind
from ..units.layout import UnitLayout
from ..units.mask import UnitMask
from ..units.roles import Roles, Shares, classify
from .attribution import collect_statistics, unit_scores
from .conflict import gradient_conflict
from .selectors import matched_by, sized

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
    encoded = [[encode_dialogue(tokenizer, *pair) for pair in pairs] for pairs in (safety, utility)]
    return roles_of(model, *encoded, shares=shares, unit_kind=unit_kind, batch_size=batch_size)


def roles_of(
    model: PreTrainedModel,
    safety: Sequence[tuple[list[int], list[int]]],
    utility: Sequence[tuple[list[int], list[int]]],
    *,
    shares: Shares = PAPER_SHARES,
    unit_kind: UnitKind = "head",
    batch_size: int = 8,
) -> Roles:
    """:func:`find_units` from (prompt ids, response ids), whatever template they went through."""
    layout = UnitLayout.of(model, unit_kind)

    def scores(pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        batches = dialogue_batches(pairs, batch_size)
        return unit_scores(model, layout, collect_statistics(model, layout, batches))

    return classify(layout, scores(safety), scores(utility), shares)


def find_conflicts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    safety: Sequence[tuple[str, str]],
    training: Sequence[tuple[str, str]],
    *,
    fraction: float = 0.073,
    unit_kind: UnitKind = "head",
    batch_size: int = 8,
) -> UnitMask:
    """The units through which training on these rows would hurt refusals most.

    ``safety`` are harmful prompts with refusals, ``training`` the rows (about a hundred suffice)
    that the model is to be fine-tuned on. Taken are ``fraction`` of the heads and of the neurons,
    by :func:`ssah.scoring.conflict.gradient_conflict`; its default is what the paper freezes. Costs
    one forward and backward pass over both; the model is left as it was.
    """
    layout = UnitLayout.of(model, unit_kind)
    batches = [
        dialogue_batches([encode_dialogue(tokenizer, *pair) for pair in pairs], batch_size)
        for pairs in (training, safety)
    ]
    conflict = gradient_conflict(model, layout, *batches)
    size = sized(layout, fraction, fraction)
    return matched_by(layout, size, {name: -part for name, part in conflict.items()})
