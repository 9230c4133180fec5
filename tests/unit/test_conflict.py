"""Which units an attack would hurt refusals through: the prediction against a real step."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from ssah.lab.stages.attribution import encoded, own_answers
from ssah.lab.stages.criteria import conflict
from ssah.lab.stages.lessons import lesson

RATE = 1e-5


def losses(model, pairs) -> Iterator[torch.Tensor]:
    """The summed response loss of one dialogue after the other, by the library."""
    for prompt, response in pairs:
        ids = torch.tensor([prompt + response])
        labels = torch.tensor([[-100] * len(prompt) + response])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        yield torch.nn.functional.cross_entropy(logits[0], labels[0, 1:], reduction="sum")


def gradients(model, pairs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for loss in losses(model, pairs):
        loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def total_loss(model, pairs) -> float:
    return sum(loss.item() for loss in losses(model, pairs))


def test_it_predicts_what_a_step_of_one_unit_does_to_refusals(lab):
    learned = lesson(lab, "dialogues")
    found = conflict(lab, learned)
    rows, refusals = own_answers(lab, "safety", lab.aligned, 0)
    safety = encoded(lab, rows, refusals, lab.config.attribution)
    with lab.use(lab.aligned) as loaded:
        model = copy.deepcopy(loaded).double()
    sign = {n: g.sign() for n, g in gradients(model, learned.taught(lab)).items()}
    before = total_loss(model, safety)
    for block in lab.layout.blocks:
        units = found[block.name].abs().argsort(descending=True)[:2]
        for unit in units.tolist():
            stepped = copy.deepcopy(model)
            parameters = dict(stepped.named_parameters())
            with torch.no_grad():
                for part in block.slices:
                    lines = parameters[part.parameter].movedim(part.dim, 0)
                    step = sign[part.parameter].movedim(part.dim, 0)
                    lines[part.index[unit]] -= RATE * step[part.index[unit]]
            change = total_loss(stepped, safety) - before
            expected = RATE * found[block.name][unit].item()
            assert change == pytest.approx(expected, rel=0.05), (block.name, unit)


def test_the_aligned_model_is_left_as_it_was(lab):
    with lab.use(lab.aligned) as model:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        conflict(lab, lesson(lab, "arithmetic"))
        for name, parameter in model.named_parameters():
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])
