"""Rules that select units: each takes as many heads and neurons as its target, by its own rank."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from ssah.core.errors import SsahError
from ssah.lab.units_of import group, matched
from ssah.scoring.selectors import RULES, magnitude, matched_by, moved
from ssah.units.layout import UnitLayout
from ssah.units.mask import UnitMask


class Planted:
    """Evidence of two models that are equal until something is planted."""

    target: UnitMask

    def __init__(self, families, model_type: str, seed: int = 0):
        self.before = families(model_type)
        self.after = copy.deepcopy(self.before)
        self.layout = UnitLayout.of(self.before)
        self.seed = seed

    def weights(self, which: str) -> dict[str, Tensor]:
        return dict({"given": self.before, "aligned": self.after}[which].named_parameters())

    def magnitude(self) -> dict[str, Tensor]:
        return magnitude(self.layout, self.weights("aligned"))

    def moved(self) -> dict[str, Tensor]:
        return moved(self.layout, self.weights("given"), self.weights("aligned"))

    def _drawn(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return self.layout.split(torch.randn(self.layout.units, generator=generator))

    def difference(self) -> dict[str, Tensor]:
        return self._drawn(10)

    def conflict(self) -> dict[str, Tensor]:
        return self._drawn(11)

    def places(self, prompts: str) -> dict[str, Tensor]:
        return self._drawn({"safety": 12, "utility": 13}[prompts])

    def impact(self) -> dict[str, Tensor]:
        return self._drawn(14)

    def fisher(self) -> dict[str, Tensor]:
        return self._drawn(15)


def target_of(layout: UnitLayout, heads: int, neurons: int) -> UnitMask:
    """The first heads and neurons of the first layer."""
    mask = layout.none()
    mask["layers.0.attn"][:heads] = True
    mask["layers.0.mlp"][:neurons] = True
    return mask


def chosen(evidence: Planted, rule: str, target: UnitMask) -> UnitMask:
    evidence.target = target
    with torch.no_grad():
        return matched_by(evidence.layout, target, RULES[rule](evidence))


def moved_most(evidence: Planted, heads: int, neurons: int) -> dict[str, list[int]]:
    target = target_of(evidence.layout, heads, neurons)
    mask = chosen(evidence, "moved most by alignment", target)
    return {name: part.nonzero().flatten().tolist() for name, part in mask.items() if part.any()}


@torch.no_grad()
def test_the_units_that_alignment_moved_most_are_found(families):
    """Planted in every kind of weight that belongs to a unit, biases among them."""
    evidence = Planted(families, "qwen2")
    after, layer = evidence.weights("aligned"), "model.layers.{}."
    after[layer.format(1) + "self_attn.q_proj.weight"][4:8] -= 0.1  # head 1
    after[layer.format(0) + "self_attn.o_proj.weight"][:, 12:16] += 0.1  # head 3
    after[layer.format(1) + "self_attn.q_proj.bias"][8] += 1  # head 2
    after[layer.format(0) + "mlp.gate_proj.weight"][5] += 0.1
    after[layer.format(0) + "mlp.down_proj.weight"][:, 7] -= 0.1
    after[layer.format(1) + "mlp.up_proj.weight"][11] += 0.1
    after["model.embed_tokens.weight"] += 5  # belongs to no unit, and neither do norms
    after["model.norm.weight"] -= 5
    assert moved_most(evidence, 3, 3) == {
        "layers.0.attn": [3],
        "layers.0.mlp": [5, 7],
        "layers.1.attn": [1, 2],
        "layers.1.mlp": [11],
    }


@torch.no_grad()
def test_rows_that_heads_share_count_for_each_of_them(families):
    evidence = Planted(families, "llama")
    after = evidence.weights("aligned")
    after["model.layers.1.self_attn.k_proj.weight"][4:] += 0.1  # the second of two KV heads
    after["model.layers.0.self_attn.v_proj.weight"][0] += 0.01  # the first, but less
    assert moved_most(evidence, 2, 0) == {"layers.1.attn": [2, 3]}
    assert moved_most(evidence, 4, 0) == {"layers.0.attn": [0, 1], "layers.1.attn": [2, 3]}


@torch.no_grad()
def test_all_weights_of_a_unit_count_by_their_squares(families):
    evidence = Planted(families, "llama")
    after = evidence.weights("aligned")
    after["model.layers.0.mlp.up_proj.weight"][3, 0] += 0.5  # one weight far: 0.25
    # Sixteen weights a little, which is more in sum but not in squares: 0.16.
    after["model.layers.1.mlp.gate_proj.weight"][9] -= 0.1
    assert moved_most(evidence, 0, 1) == {"layers.0.mlp": [3]}
    after["model.layers.1.mlp.down_proj.weight"][:, 9] += 0.1  # now 0.32
    assert moved_most(evidence, 0, 1) == {"layers.1.mlp": [9]}


@pytest.mark.parametrize("size", [(3, 5), (0, 7)])
def test_all_rules_take_as_much_and_something_else(families, size):
    evidence = Planted(families, "llama")
    with torch.no_grad():
        for parameter in evidence.after.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    target = target_of(evidence.layout, *size)
    masks = [chosen(evidence, rule, target) for rule in RULES]
    assert all((mask.count("attn"), mask.count("mlp")) == size for mask in masks)
    assert all(masks[i] != masks[j] for i in range(len(masks)) for j in range(i))


def test_ranks_are_what_their_rules_say(families):
    evidence = Planted(families, "llama")
    target, neurons = target_of(evidence.layout, 0, 7), ["layers.0.mlp", "layers.1.mlp"]

    def split(rule: str, rank: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        mask = chosen(evidence, rule, target)
        inside, outside = (
            [rank[n][mask[n] == wanted] for n in neurons] for wanted in (True, False)
        )
        return torch.cat(inside), torch.cat(outside)

    for rule, rank, highest in (
        ("lowest I_S - I_U", evidence.difference(), False),
        ("highest I_S - I_U", evidence.difference(), True),
        ("gradient conflict", evidence.conflict(), True),
        ("SN-Tune", evidence.places("safety"), False),
        ("ESI", evidence.impact(), True),
        ("Fisher on refusals", evidence.fisher(), True),
    ):
        inside, outside = split(rule, rank)
        assert (inside.min() > outside.max()) if highest else (inside.max() < outside.min()), rule
    norms = {n: evidence.weights("aligned")[f"model.{n}.down_proj.weight"].norm(dim=0)
             for n in neurons}  # fmt: skip
    inside, outside = split("largest magnitude", norms)
    assert inside.min() > outside.max()
    inside, outside = split("smallest magnitude", norms)
    assert inside.max() < outside.min()


def test_draws_differ_by_seed_and_are_repeated(families):
    target = target_of(UnitLayout.of(families("llama")), 3, 5)
    masks = [chosen(Planted(families, "llama", seed), "random", target) for seed in range(4)]
    assert all(masks[i] != masks[j] for i in range(4) for j in range(i))
    assert chosen(Planted(families, "llama", 2), "random", target) == masks[2]


# --- of a lab --------------------------------------------------------------------------------


def test_groups_are_named_as_in_tables(smoke_lab):
    lab = smoke_lab()
    esu, cu6, cu12 = (group(lab, name) for name in ("ESU", "ESU + 6 % CU", "ESU + 12 % CU"))
    assert [mask.count() for mask in (esu, cu6, cu12)] == [7, 7 + 8, 7 + 16]
    assert (esu - cu6).count() == (cu6 - cu12).count() == 0
    assert group(lab, "ESU + 0 % CU") == esu
    whole = group(lab, "ESU + all CU") | group(lab, "RU") | group(lab, "EUU")
    assert whole.count() == lab.layout.units


def test_controls_differ_by_draw_and_seed_of_the_lab(smoke_lab):
    target = group(smoke_lab(), "ESU + 6 % CU")
    drawn = [
        matched(smoke_lab(seed=seed), "random", target, draw=draw)
        for seed in (0, 1)
        for draw in range(3)
    ]
    assert all(drawn[i] != drawn[j] for i in range(6) for j in range(i))
    with pytest.raises(SsahError, match="no rule 'randon': did you mean 'random'"):
        matched(smoke_lab(), "randon", target)
