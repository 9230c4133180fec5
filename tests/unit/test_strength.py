"""How hard the attack is: chosen on the arm that freezes nothing, before any other."""

from __future__ import annotations

import pytest

from ssah.lab import catalogue
from ssah.lab.metrics import METRICS
from ssah.lab.specs import Model
from ssah.lab.stages import lessons
from ssah.lab.stages.lessons import attack_rate, rises

RATES = "finetune.rates=[0.001,0.01,0.1]"


@pytest.fixture
def asr(monkeypatch) -> dict[float, float]:
    """ASR by the rate of the attack; 10 before it."""
    found: dict[float, float] = {}

    def of_model(lab, model: Model) -> float:
        return found.get(getattr(model.step, "changes", {}).get("learning_rate"), 10.0)

    monkeypatch.setattr(lessons, "_asr", of_model)
    return found


@pytest.mark.parametrize(
    ("after", "tried", "chosen"),
    [
        ({0.001: 39.9, 0.01: 40, 0.1: 99}, [29.9, 30], 0.01),
        ({0.001: 90}, [80], 0.001),
        ({0.001: 5, 0.01: 10, 0.1: 12}, [-5, 0, 2], 0.1),
    ],
    ids=["the second is enough", "the first is", "none is: the last"],
)
def test_the_first_rate_that_does_enough_is_every_attacks(smoke_lab, asr, after, tried, chosen):
    asr |= after
    lab = smoke_lab(RATES)
    assert list(rises(lab).values()) == pytest.approx(tried)
    assert attack_rate(lab) == chosen
    for arms in (catalogue.unfrozen(lab, "instructions"), catalogue.unfrozen(lab, "arithmetic")):
        assert lab.settings_of(arms[0].model.step).learning_rate == chosen
    fixed = lab.aligned.trained("instructions", learning_rate=0.5)
    assert lab.settings_of(fixed.step).learning_rate == 0.5, "it names its own"
    rows = {c["metric"]: e.value for c, e, _ in METRICS["strength"](lab, lab.aligned, "").rows()}
    assert rows["attack rate"] == chosen
    assert rows["rise at rate 0.001"] == pytest.approx(tried[0])


def test_the_trial_is_the_arm_that_freezes_nothing(smoke_lab, asr):
    """It is not trained a second time."""
    asr[0.001] = 90
    lab = smoke_lab(RATES)
    trial = lab.aligned.trained("instructions", epoch=1, learning_rate=0.001)
    (arm, *_) = catalogue.unfrozen(lab, "instructions")
    assert lab.training(trial).key == lab.training(arm.model).key


def test_without_rates_nothing_is_tried(smoke_lab, monkeypatch):
    monkeypatch.setattr(lessons, "_asr", lambda *_: pytest.fail("a model was asked"))
    lab = smoke_lab()
    assert attack_rate(lab) == lab.config.finetune.learning_rate
    assert not rises(lab)


def test_a_lower_rate_is_a_part_of_the_one_that_was_chosen(smoke_lab):
    lab = smoke_lab(RATES, "experiment.conditions=['nothing, lower rate']")
    (arm,) = catalogue.conditions(lab)
    assert lab.settings_of(arm.model.step).learning_rate == 0.4 * attack_rate(lab)
