"""Safety layers: states, angles and blocks by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helpers import dialogues
from ssah.scoring.safety_layers import angular_gap, last_states, where_it_grows
from ssah.text.batches import dialogue_batches


def towards(*degrees: float) -> Tensor:
    """Plane vectors of these directions and of lengths 1, 2 ..., ``[texts, 2]``."""
    angles = [math.radians(d) for d in degrees]
    return torch.tensor(
        [[n * math.cos(a), n * math.sin(a)] for n, a in enumerate(angles, 1)], dtype=torch.float64
    )


def test_the_gap_is_between_the_mean_angles_of_pairs():
    """Block 1: all alike. Block 2: 75 degrees to the harmful one, 30 between the harmless. Block
    3: as far from the harmful ones as from each other. Block 4: nearer to the harmful one."""
    harmless = torch.stack([towards(0, 0), towards(0, 30), towards(0, 60), towards(0, 90)], 1)
    harmful = torch.stack([towards(0), towards(90), towards(120), towards(45)], 1)
    assert angular_gap(harmless, harmful).tolist() == pytest.approx([0, 45, 30, -45], abs=1e-5)


def test_each_pair_of_harmless_texts_counts_once():
    harmless, harmful = towards(0, 30, 90)[:, None], towards(0, 0)[:, None]
    assert angular_gap(harmless, harmful).tolist() == pytest.approx([40 - 60], abs=1e-5)


def test_a_gap_needs_two_texts_and_one():
    two, none = torch.ones(2, 3, 4), torch.ones(0, 3, 4)
    for harmless, harmful in ((two[:1], two), (two, none)):
        with pytest.raises(ValueError, match="two harmless texts and a harmful one"):
            angular_gap(harmless, harmful)


@pytest.mark.parametrize(
    ("width", "start"),
    [(1, 3), (2, 2), (3, 2), (4, 1), (6, 0)],
)
def test_the_blocks_are_those_over_which_the_gap_grows_most(width, start):
    gap = torch.tensor([0.5, 1.0, 10.0, 30.0, 35.0, 20.0])
    assert where_it_grows(gap, width) == range(start, start + width)


def test_before_the_first_block_there_is_no_gap():
    assert where_it_grows(torch.tensor([5.0, 6.0, 8.0]), 1) == range(1)


def test_states_are_those_at_the_last_token_of_each_text(families):
    model = families("gemma2")
    pairs = sorted(dialogues(5), key=lambda pair: -len(pair[0]) - len(pair[1]))
    model.train()  # dropout, where a model has it, is off while states are read
    found = last_states(model, dialogue_batches(pairs, 2, tokens="all", side="left"))
    assert model.training
    assert found.shape == (5, 2, 16)
    model.eval()
    for states, (prompt, response) in zip(found, pairs, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([prompt + response]), output_hidden_states=True)
        for block, wanted in zip(states, hidden.hidden_states[1:], strict=True):
            torch.testing.assert_close(block, wanted[0, -1], rtol=1e-4, atol=1e-5)
