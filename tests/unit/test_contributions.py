"""Safety neurons: what a unit adds to its block's output, and its places on texts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from helpers import Dialogues, dialogues
from ssah.scoring.contributions import contributions, places
from ssah.scoring.selectors import RULES, matched_by
from ssah.text.batches import dialogue_batches
from ssah.units.layout import UnitLayout


def outputs(model, projection: str, text: list[int]) -> Tensor:
    """What comes out of an output projection at each token of one text alone."""
    heard: list[Tensor] = []
    hook = model.get_submodule(projection).register_forward_hook(lambda *a: heard.append(a[2][0]))
    with torch.no_grad():
        model(torch.tensor([text]))
    hook.remove()
    return heard[0]


def by_removal(model, block, unit: int, pairs: Dialogues) -> list[float]:
    """The mean change of a block's output at response tokens where a unit's columns are zero."""
    weight = model.get_submodule(block.output).weight
    whole = [outputs(model, block.output, p + r) for p, r in pairs]
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[:, block.channels[unit]] = 0
    found = []
    for before, (prompt, response) in zip(whole, pairs, strict=True):
        change = outputs(model, block.output, prompt + response) - before
        found.append(change[len(prompt) :].norm(dim=1).mean().item())
    with torch.no_grad():
        weight.copy_(kept)
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("model_type", "unit_kind"),
    [("llama", "head"), ("llama", "kv_group"), ("qwen3", "channel"), ("gemma2", "head")],
)
def test_it_is_what_a_removal_changes(families, model_type, unit_kind, side):
    """In the first layer, where the input of the projection does not change with it."""
    model, pairs = families(model_type), dialogues(5)
    layout = UnitLayout.of(model, unit_kind)
    # One batch, or the order of the texts would be that of their lengths.
    pairs.sort(key=lambda pair: -len(pair[0]) - len(pair[1]))
    found = contributions(model, layout, dialogue_batches(pairs, 3, side=side))
    for block in layout.blocks[:2]:
        assert found[block.name].shape == (5, block.units)
        for unit in range(0, block.units, 3):
            wanted = by_removal(model, block, unit, pairs)
            assert found[block.name][:, unit].tolist() == pytest.approx(wanted, rel=1e-4)


def test_a_text_without_counted_tokens_is_left_out(tiny_model):
    layout = UnitLayout.of(tiny_model)
    pairs = [([3, 4, 5], [6, 7]), ([3, 4, 5], [])]
    found = contributions(tiny_model, layout, dialogue_batches(pairs, 2))
    assert {len(part) for part in found.values()} == {1}
    with pytest.raises(ValueError, match="No token was counted"):
        contributions(tiny_model, layout, dialogue_batches(pairs[1:], 2))


def test_a_units_place_is_its_last_one_over_all_texts():
    """Unit 0 is first on one text and last on the other; unit 2 is second on both."""
    found = places({"a": torch.tensor([[9.0, 1.0, 5.0, 4.0], [0.0, 6.0, 5.0, 4.0]])})["a"]
    assert found.long().tolist() == [3, 3, 1, 2]
    assert found.argsort().tolist() == [2, 3, 0, 1], "0 and 1: the mean places are 1.5 and 1.5"
    nearer = places({"a": torch.tensor([[1.0, 9.0, 5.0], [1.0, 0.0, 5.0], [1.0, 9.0, 5.0]])})["a"]
    assert nearer.long().tolist() == [2, 2, 1]
    assert nearer[1] < nearer[0], "of one last place, but of a lower mean one"


def test_the_first_k_places_are_the_intersection_of_the_first_k():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, 30, generator=generator)
    found = places({"a": values})["a"]
    for k in range(31):
        sets = [set(row.argsort(descending=True)[:k].tolist()) for row in values]
        assert set((found < k).nonzero().flatten().tolist()) == set.intersection(*sets)


def test_robust_safety_neurons_are_no_foundation_neurons(tiny_model):
    """Two of 48 neurons, one of eight heads: those that are first on harmless prompts are out."""
    layout = UnitLayout.of(tiny_model)
    target = layout.none()
    target["layers.0.attn"][0] = True
    target["layers.0.mlp"][:2] = True

    def ranked(heads: list[int], neurons: list[int]) -> dict[str, Tensor]:
        """Units of the second layer, the first ones; all others come behind."""
        rank = layout.split(torch.full((layout.units,), 20.0).double())
        for place, unit in enumerate(heads):
            rank["layers.1.attn"][unit] = place
        for place, unit in enumerate(neurons):
            rank["layers.1.mlp"][unit] = place
        return rank

    found = {"safety": ranked([3, 1], [5, 7, 9]), "utility": ranked([3], [7, 8])}
    evidence = SimpleNamespace(layout=layout, target=target, places=found.__getitem__)

    def chosen(rule: str) -> dict[str, list[int]]:
        mask = matched_by(layout, target, RULES[rule](evidence))
        return {n: part.nonzero().flatten().tolist() for n, part in mask.items() if part.any()}

    assert chosen("SN-Tune") == {"layers.1.attn": [3], "layers.1.mlp": [5, 7]}
    assert chosen("RSN-Tune") == {"layers.1.attn": [1], "layers.1.mlp": [5, 9]}
    # Where everything is wanted, foundation neurons are not missing.
    evidence.target = target = ~layout.none()
    assert matched_by(layout, target, RULES["RSN-Tune"](evidence)) == target
