"""Defences: each does what its paper defines, frozen units stay frozen, and a run can go on."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers import (
    Interrupted,
    Interruption,
    assert_frozen,
    dialogues,
    frozen_entries,
    small_training,
    weights,
)
from ssah.core.paths import conf_dir
from ssah.training import defences, supervised
from ssah.training.defences import DEFENCES, Defence
from ssah.training.defences.base import Step, trained
from ssah.training.loss import add_gradient, collate, summed_loss
from ssah.training.slicing import freeze_units
from ssah.training.supervised import supervised_finetune
from ssah.units.layout import UnitLayout
from ssah.units.mask import UnitMask

PAIRS, REFUSALS = dialogues(16), dialogues(12, seed=9)

every_defence = pytest.mark.parametrize("name", DEFENCES)


@pytest.fixture
def pair(families) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model in double precision, and one that it moved away from."""
    model, before = families("llama").double(), families("llama").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, before


def step_of(model: PreTrainedModel, number: int = 0, max_norm: float = 1e9) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Step(model, optimizer, number, rows=4, at_once=3, max_norm=max_norm)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in found.values()])


# --- the package -----------------------------------------------------------------------------


def test_each_module_is_a_defence_and_the_published_study_has_it():
    folder = Path(defences.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "base"}
    assert {kind.__module__.rpartition(".")[2] for kind in DEFENCES.values()} == modules
    assert len(DEFENCES) == len(modules) == 8
    published = (conf_dir() / "experiment" / "published.yaml").read_text()
    assert all(f"\n    {name}: [" in published for name in DEFENCES)


def test_no_defence_does_nothing(pair):
    model, _ = pair
    add_gradient(model, PAIRS, 99)
    before, gradient = weights(model), gradients(model)
    none = Defence()
    none.begin(model)
    none.before_step(step_of(model))
    none.after_step(step_of(model))
    none.finish(model)
    assert none.lesson(PAIRS, random.Random(0)) == (PAIRS, ())
    assert none.settings(small_training()) == small_training()
    assert all(torch.equal(weights(model)[name], before[name]) for name in before)
    assert torch.equal(flat(gradients(model)), flat(gradient))
    assert none.state == {}


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strength", "rows", "mixed"),
    [(0.03, 48, 2), (0.05, 48, 3), (0.1, 48, 5), (0.03, 5, 1), (0.1, 50, 5), (0.25, 48, 12)],
)
def test_mixing_puts_refusals_in_the_place_of_rows(strength, rows, mixed):
    taught = dialogues(rows, seed=3)
    mixing = DEFENCES["mixing"](strength, REFUSALS)
    learned, held = mixing.lesson(taught, random.Random(0))
    assert held == ()
    assert len(learned) == rows, "no more steps than without"
    own = [pair for pair in learned if pair in REFUSALS]
    assert len(own) == mixed
    assert [p for p in learned if p not in own] == [p for p in taught if p in learned]
    assert mixing.lesson(taught, random.Random(0))[0] == learned
    assert mixing.lesson(taught, random.Random(1))[0] != learned
    assert mixing.text(strength) == f"{100 * strength:g} %"


def test_replay_holds_the_model_on_a_tenth_of_the_rows():
    replay = DEFENCES["replay"](3.0, REFUSALS)
    learned, held = replay.lesson(dialogues(40), random.Random(0))
    assert (len(learned), len(held)) == (36, 4)
    assert all(pair in REFUSALS for pair in held)
    assert replay.anchor_weight == 3


def test_replay_adds_the_divergence_to_the_loss(pair):
    """By hand: strength x KL(before || now), summed over response tokens."""
    model, before = pair
    rows = [{"prompt": p, "response": r, "anchored": True} for p, r in REFUSALS[:2]]
    replay = DEFENCES["replay"](3.0, REFUSALS, before)
    loss, tokens = summed_loss(model, collate(rows), before, replay.anchor_weight)
    expected = 0.0
    for prompt, response in REFUSALS[:2]:
        span = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        ids = torch.tensor([prompt + response])
        ours, theirs = (m(ids).logits[0, span].log_softmax(-1) for m in pair)
        expected += 3 * (theirs.exp() * (theirs - ours)).sum().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert tokens == sum(len(response) for _, response in REFUSALS[:2])


def test_a_lower_rate_is_lower():
    settings = DEFENCES["lower_rate"](0.25).settings(small_training(learning_rate=0.4))
    assert settings == small_training(learning_rate=0.1)


# --- the loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_constrained_gradients_are_those_of_the_papers_loss(pair, strength):
    """Eq. 3 of arXiv 2406.05946, with its betas, by automatic differentiation."""
    model, before = pair
    constrained = DEFENCES["constrained"](strength, reference=before)
    rows = [{"prompt": p, "response": r} for p, r in PAIRS]
    total, _ = summed_loss(model, collate(rows), before, token_weights=constrained.token_weights)
    total.backward()
    found = gradients(model)
    model.zero_grad()
    for prompt, response in PAIRS:
        span = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        ids, said = torch.tensor([prompt + response]), torch.tensor(response)[:, None]
        own, theirs = (m(ids).logits[0, span].log_softmax(-1).gather(1, said)[:, 0] for m in pair)
        beta = torch.tensor([0.5, 2, 2, 2, 2] + [0.1] * 20)[: len(response)] * strength
        loss = -(2 / beta * nn.functional.logsigmoid(beta * (own - theirs.detach()))).sum()
        loss.backward()
    # The loss is worked out in single precision, and 2 / beta enlarges its rounding.
    torch.testing.assert_close(flat(found), flat(gradients(model)), rtol=1e-3, atol=1e-4)


def test_constrained_weights_begin_at_one_and_fall():
    weigh = DEFENCES["constrained"](1.0).token_weights
    position = torch.tensor([1, 2, 5, 6])
    same = torch.full((4,), -2.0)
    assert weigh(same, same, position).tolist() == [1, 1, 1, 1]
    likelier = weigh(same + 1, same, position)
    wanted = [2 / (1 + torch.tensor(beta).exp().item()) for beta in (0.5, 2, 2, 0.1)]
    assert likelier.tolist() == pytest.approx(wanted)


# --- the step --------------------------------------------------------------------------------


def test_lisa_draws_back_and_aligns_every_fourth_step(pair):
    model, _ = pair
    lisa = DEFENCES["Lisa"](2.0, REFUSALS)
    lisa.begin(model)
    start = {name: p.detach().clone() for name, p in trained(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    add_gradient(model, PAIRS, 99)
    task = gradients(model)
    lisa.before_step(step_of(model))
    for name, gradient in gradients(model).items():
        pull = 2 * (model.get_parameter(name).detach() - start[name])
        torch.testing.assert_close(gradient, task[name] + pull)

    before = weights(model)
    for number in (0, 1, 2):
        lisa.after_step(step_of(model, number))
    assert all(torch.equal(weights(model)[name], before[name]) for name in before)
    at = step_of(model, 3)
    model.zero_grad()
    add_gradient(model, lisa.refusals_for(at), 99)
    expected = {n: before[n] - 0.1 * g for n, g in gradients(model).items()}
    lisa.after_step(at)
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), weight)
        assert torch.equal(lisa.state[name], model.get_parameter(name))


def test_few_refusals_are_learned_more_than_once():
    learned, _ = DEFENCES["mixing"](1.0, REFUSALS).lesson(PAIRS, random.Random(0))
    assert sorted(learned.count(refusal) for refusal in REFUSALS) == [1] * 8 + [2] * 4


@pytest.mark.parametrize("against", [True, False])
def test_safegrad_takes_out_what_works_against_refusals(pair, against):
    model, before = pair
    safegrad = DEFENCES["SafeGrad"](0.5, REFUSALS, before)
    at = step_of(model)
    add_gradient(model, safegrad.refusals_for(at), 99, before)
    alignment = gradients(model)
    model.zero_grad()
    add_gradient(model, PAIRS, 99)
    for name, a in alignment.items():  # a task that surely conflicts, or surely does not
        model.get_parameter(name).grad.add_(a, alpha=-50.0 if against else 50.0)
    task = flat(gradients(model))
    a = flat(alignment)
    assert (task @ a < 0) == against
    safegrad.before_step(at)
    kept = task - (task @ a) / (a @ a) * a if against else task
    found = flat(gradients(model))
    torch.testing.assert_close(found, kept + 0.5 * a, rtol=1e-5, atol=1e-7)
    if against:
        assert abs((found - 0.5 * a) @ a) < 1e-6 * (a @ a)
    add_gradient(model, PAIRS, 99)
    safegrad.before_step(step_of(model, max_norm=0.25))
    assert flat(gradients(model)).norm() == pytest.approx(0.25, rel=1e-4)


def test_a_gradient_is_the_same_in_parts(pair):
    model, before = pair
    for reference in (None, before):
        found = []
        for at_once in (99, 5):
            model.zero_grad()
            add_gradient(model, PAIRS, at_once, reference)
            found.append(flat(gradients(model)))
        torch.testing.assert_close(*found)


def test_refusals_differ_by_step_and_are_the_same_again():
    defence = Defence(1.0, REFUSALS)
    at = [SimpleNamespace(number=number, rows=4) for number in (0, 1)]
    first, second = (defence.refusals_for(step) for step in at)
    assert len(first) == 4
    assert first != second
    assert defence.refusals_for(at[0]) == first
    assert len(defence.refusals_for(SimpleNamespace(number=0, rows=99))) == len(REFUSALS)


# --- what comes out --------------------------------------------------------------------------


def test_an_average_of_weights_comes_out(pair):
    model, _ = pair
    ema = DEFENCES["EMA"](0.75)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    ema.begin(model)
    for number in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.after_step(step_of(model, number))
        for name, parameter in model.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * parameter.detach()
    own = weights(model)
    with ema.coming_out(model):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name])
    assert all(torch.equal(weights(model)[name], own[name]) for name in own)
    ema.finish(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name])


@pytest.mark.parametrize("strength", [0.01, 0.5, 1.0])
def test_safe_lora_projects_the_updates_that_are_least_like_the_alignment(families, strength):
    """By hand, with V V' / |V| for each of the fourteen linear layers of two blocks."""
    unaligned, before, model = (families("llama") for _ in range(3))
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for own, old in zip(model.parameters(), before.parameters(), strict=True):
            own.copy_(old + 0.1 * torch.randn_like(old))
    cosines, wanted = {}, {}
    for name, layer in before.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            v = layer.weight - unaligned.get_submodule(name).weight
            update = model.get_submodule(name).weight - layer.weight
            new = v @ v.T @ update / v.square().sum().sqrt()
            cosines[name] = ((new * update).sum() / new.norm() / update.norm()).item()
            wanted[f"{name}.weight"] = (layer.weight + new).detach()
    assert len(cosines) == 14
    own = weights(model)
    DEFENCES["SafeLoRA"](strength, (), before, unaligned).finish(model)
    count = {0.01: 1, 0.5: 7, 1.0: 14}[strength]
    chosen = {f"{name}.weight" for name in sorted(cosines, key=cosines.get)[:count]}
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, wanted[name] if name in chosen else own[name])


# --- whole trainings -------------------------------------------------------------------------


@pytest.fixture
def run(families):
    """Trains with a defence, some units frozen or none; the model, and what each epoch saw."""

    def train(
        name: str, folder: Path, mask: UnitMask | None = None
    ) -> tuple[PreTrainedModel, dict[int, dict[str, Tensor]]]:
        model, reference, unaligned = (families("llama") for _ in range(3))
        with torch.no_grad():
            for parameter in unaligned.parameters():
                parameter.mul_(0.9)
        seen = {}
        defence = DEFENCES[name](0.5, REFUSALS, reference, unaligned)
        config = small_training(weight_decay=0.1)
        with nullcontext() if mask is None else freeze_units(model, mask):
            supervised_finetune(
                model, PAIRS, config, 5, folder, constant_rate=True, defence=defence,
                on_epoch=lambda done: seen.update({done: weights(model)}),
            )  # fmt: skip
        return model, seen

    return train


def frozen_mask(model: PreTrainedModel, way: str) -> UnitMask:
    """Much is frozen, so that layers are sliced; or little, so that bits are put back."""
    mask = UnitLayout.of(model).none()
    for block in UnitLayout.of(model).blocks:
        share = 0.75 if way == "sliced" else 0.25
        mask[block.name][: round(share * block.units)] = True
    return mask


@every_defence
@pytest.mark.parametrize("way", ["sliced", "restored"])
def test_frozen_units_stay_frozen_under_a_defence(families, tmp_path, run, name, way):
    """Also -0.0, which many ways to average turn into 0.0."""
    start = families("llama")
    mask, before = frozen_mask(start, way), weights(start)
    model, seen = run(name, tmp_path, mask)
    entries = frozen_entries(model, UnitLayout.of(model), mask)
    assert_frozen(model, before, entries)
    for saved in seen.values():
        for key, weight in saved.items():
            moved = weight.view(torch.int32) != before[key].view(torch.int32)
            assert key not in entries or not moved[entries[key]].any(), key


def test_negative_zeros_that_are_frozen_keep_their_sign(families):
    model = families("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0].fill_(-0.0)
    ema = DEFENCES["EMA"](0.5)
    ema.begin(model)
    ema.after_step(step_of(model))
    ema.finish(model)
    assert model.model.layers[0].mlp.up_proj.weight[0].signbit().all()


@every_defence
def test_a_defended_run_goes_on_where_it_was_interrupted(
    families, tmp_path, run, monkeypatch, name
):
    whole, expected = run(name, tmp_path / "whole")
    assert sorted(expected) == [1, 2]
    for key, weight in weights(whole).items():
        assert torch.equal(weight, expected[2][key]), "what the last epoch sees is what comes out"

    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(supervised, "ResponseTrainer", Interrupted)
        with pytest.raises(Interruption):
            run(name, folder)
    state = folder / "checkpoints" / "checkpoint-4" / "defence.safetensors"
    assert state.exists() == (name in ("EMA", "Lisa"))
    if state.exists():
        start = weights(families("llama"))
        assert any(not part.equal(start[key]) for key, part in load_file(state).items())
    resumed, seen = run(name, folder)
    assert list(seen) == [2]
    for key, weight in weights(whole).items():
        assert torch.equal(resumed.state_dict()[key], weight), key


@every_defence
def test_a_defence_changes_what_comes_out(families, tmp_path, run, name):
    model, _ = run(name, tmp_path / "defended")
    plain = families("llama")
    config = small_training(weight_decay=0.1)
    supervised_finetune(plain, PAIRS, config, 5, tmp_path / "plain", constant_rate=True)
    assert any(not torch.equal(plain.state_dict()[k], w) for k, w in weights(model).items())


def test_a_defence_and_anchors_of_somebody_else_do_not_go_together(families, tmp_path):
    model = families("llama")
    with pytest.raises(ValueError, match="brings its own anchors and reference"):
        supervised_finetune(
            model, PAIRS, small_training(), 5, tmp_path, PAIRS, model, defence=Defence()
        )
    assert not list(tmp_path.iterdir())
