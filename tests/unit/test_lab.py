"""Labs: what tells models apart, that each is trained once, and that frozen means frozen."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from helpers import assert_frozen, frozen_entries, weights
from ssah.core.store import NotBuilt
from ssah.lab import catalogue
from ssah.lab import lab as lab_module
from ssah.lab.arms import Arm
from ssah.lab.lab import LOADED
from ssah.lab.measure import Measure, collect, measured
from ssah.lab.specs import GIVEN, REFUSALS, Model
from ssah.lab.stages.lessons import MAIN_ATTACK
from ssah.lab.units_of import ALL_CU, CU6, ESU, group
from ssah.training.part import Part, changed_outside
from ssah.training.supervised import supervised_finetune
from ssah.units.mask import UnitMask


@pytest.fixture
def trainings() -> Callable[[], list[str]]:
    """Names of the training runs that were begun since the last call."""
    names: list[str] = []

    class Beginnings(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            names.append(record.getMessage().removeprefix("Building "))

    logger, handler = logging.getLogger("ssah.core.store"), Beginnings()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def since() -> list[str]:
        found = [name for name in names if name.startswith("train")]
        names.clear()
        return found

    yield since
    logger.removeHandler(handler)
    logger.setLevel(level)


# --- what tells models apart -----------------------------------------------------------------


def test_identities_tell_models_apart_and_train_none(smoke_lab, lab, trainings):
    mask = group(lab, CU6)
    trainings()
    one_more = UnitMask({name: part.clone() for name, part in mask.items()})
    one_more["layers.1.attn"][2] = True
    base = lab.aligned
    models = [
        GIVEN,
        base,
        base.ablated(mask),
        base.ablated(one_more),
        GIVEN.ablated(mask),
        base.ablated(mask, "mean", lab.sets),
        base.ablated(mask, "resample", lab.sets),
        base.ablated(mask, "fitted", lab.sets),
        base.patched(mask, GIVEN),
        base.patched(mask, base),
        base.trained(MAIN_ATTACK),
        base.trained("arithmetic"),
        GIVEN.trained(MAIN_ATTACK),
        base.trained(MAIN_ATTACK, epoch=1),
        base.trained(MAIN_ATTACK, epochs=1),
        base.trained(MAIN_ATTACK, learning_rate=2e-3),
        base.trained(MAIN_ATTACK, train_embeddings=True),
        base.trained(MAIN_ATTACK, Part(freeze=mask)),
        base.trained(MAIN_ATTACK, Part(freeze=one_more)),
        base.trained(MAIN_ATTACK, Part(train=mask)),
        GIVEN.trained(REFUSALS, Part(train=mask)),
        GIVEN.trained(REFUSALS, Part(train=mask, rank=2)),
        GIVEN.trained(REFUSALS, Part(rank=2)),
        GIVEN.trained(REFUSALS, Part(rank=3)),
        GIVEN.trained(REFUSALS, Part(train=mask), epochs=3),
        GIVEN.trained(REFUSALS, Part(train=mask)).trained(MAIN_ATTACK),
    ]
    identities = [lab.identity(model) for model in models]
    for overrides, seed in (
        ((), 1),
        (("finetune.rows.instructions=15",), 0),
        (("finetune.max_response_tokens=7",), 0),
        (("finetune.learning_rate=3e-3",), 0),
        (("align.harmful=7",), 0),
        (("align.anchor_weight=3",), 0),
    ):
        other = smoke_lab(*overrides, seed=seed)
        identities.append(other.identity(other.aligned.trained(MAIN_ATTACK)))
    assert len(set(identities)) == len(identities)
    assert trainings() == []


def test_equal_models_have_one_identity(smoke_lab, lab):
    mask = group(lab, CU6)
    copied = UnitMask({name: part.clone() for name, part in mask.items()})
    rate = lab.config.finetune.learning_rate
    base = lab.aligned
    wanted = lab.identity(base.trained(MAIN_ATTACK, Part(freeze=mask)))
    for same in (
        base.trained(MAIN_ATTACK, Part(freeze=copied)),
        base.trained(MAIN_ATTACK, Part(freeze=mask), epoch=2),
        base.trained(MAIN_ATTACK, Part(freeze=mask), learning_rate=rate),
    ):
        assert lab.identity(same) == wanted
    # What is only measured differently is the same model.
    other = smoke_lab("evaluate.max_new_tokens=5", "experiment.removed_draws=1")
    assert other.identity(base.trained(MAIN_ATTACK, Part(freeze=mask))) == wanted


def test_a_training_changes_settings_of_trainings_alone(lab):
    with pytest.raises(ValueError, match="cannot change heldout_rows"):
        lab.identity(lab.aligned.trained(MAIN_ATTACK, heldout_rows=3))


# --- trained once, measured for everybody ----------------------------------------------------


def asked_of(arms: list[Arm]) -> list[Measure]:
    return [Measure(arm, metric) for arm in arms for metric in ("ASR", "perplexity", "units")]


def test_each_model_is_trained_once_measured_and_dropped(smoke_lab, trainings):
    seed = 5  # which no other test has trained
    lab = smoke_lab(seed=seed)
    arms = [
        *catalogue.unfrozen(lab, MAIN_ATTACK),
        *catalogue.with_frozen(lab, MAIN_ATTACK, CU6),
    ]
    collect(lab, asked_of(arms))
    begun = trainings()
    assert len(begun) == len(set(begun)) == 3, "the aligned model and two fine-tuned ones"
    for arm in arms:
        assert not lab.training(arm.model).has(f"epoch-{arm.epoch}")
    assert lab.training(lab.aligned).has("epoch-1")

    later = smoke_lab(seed=seed)
    again = [
        *catalogue.unfrozen(later, MAIN_ATTACK),
        *catalogue.with_frozen(later, MAIN_ATTACK, CU6),
    ]
    first, _ = measured(lab, asked_of(arms))
    second, _ = measured(later, asked_of(again))
    assert first.equals(second)
    assert trainings() == []
    assert later._loaded == {}, "what is measured already loads no model"


def test_an_attacked_model_is_trained_from_its_base_before_that_is_dropped(smoke_lab, trainings):
    lab = smoke_lab(seed=6)
    (arm,) = [a for a in catalogue.budget_arms(lab) if a.units == "RU"]
    attacked = catalogue.attacked(lab, arm)
    collect(lab, [Measure(attacked, "ASR"), Measure(arm, "ASR"), Measure(arm, "drift")])
    begun = trainings()
    assert len(begun) == len(set(begun)) == 2
    assert not lab.training(arm.model).has("epoch-1")
    assert not lab.training(attacked.model).has("epoch-1")


def test_only_the_last_models_stay_in_memory(lab, smoke_lab):
    own = smoke_lab()
    models = [GIVEN, lab.aligned] + [
        lab.aligned.trained("arithmetic", learning_rate=rate) for rate in (1e-3, 2e-3)
    ]
    for model in models:
        with own.use(model) as loaded:
            assert not loaded.training
    assert len(own._loaded) == LOADED
    assert own.identity(GIVEN) not in own._loaded
    for model in models[2:]:
        own.forget(model)
    assert set(own._loaded) == {own.identity(lab.aligned)}


def test_a_plan_computes_and_loads_nothing(smoke_lab, monkeypatch):
    monkeypatch.setattr(lab_module, "load_model", lambda *_: pytest.fail("a model was loaded"))
    lab = smoke_lab(seed=77)
    arms = catalogue.with_frozen(lab, MAIN_ATTACK, CU6)
    with lab.store.only_reading(), pytest.raises(NotBuilt):
        measured(lab, asked_of(arms))


# --- frozen means frozen ---------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["nothing", CU6, ALL_CU])
def test_frozen_weights_are_those_of_the_aligned_model(lab, rule):
    if rule == "nothing":
        arms, mask = catalogue.unfrozen(lab, MAIN_ATTACK), lab.layout.none()
    else:
        arms, mask = catalogue.with_frozen(lab, MAIN_ATTACK, rule), group(lab, rule)
    with lab.use(lab.aligned) as model:
        before = weights(model)
    assert [arm.epoch for arm in arms] == [1, 2]
    for arm in arms:
        with lab.use(arm.model) as model:
            assert_frozen(model, before, frozen_entries(model, lab.layout, mask))


def test_one_epoch_of_a_longer_training_is_a_training_of_one_epoch(lab):
    short = lab.aligned.trained(MAIN_ATTACK, epochs=1)
    long = lab.aligned.trained(MAIN_ATTACK, epoch=1)
    assert lab.identity(short) != lab.identity(long)
    with lab.use(short) as one, lab.use(long) as other:
        for name, weight in weights(one).items():
            assert torch.equal(weight, weights(other)[name]), name


def test_aligning_through_a_part_changes_nothing_else(lab):
    mask = catalogue.redundant(lab, 0.2)
    for part in (Part(train=mask), Part(train=mask, rank=2)):
        model = GIVEN.trained(REFUSALS, part)
        with lab.use(GIVEN) as given, lab.use(model) as aligned:
            before, after = given.state_dict(), aligned.state_dict()
            assert changed_outside(lab.layout, mask, before, after) == 0
            assert changed_outside(lab.layout, lab.layout.none(), before, after) > 0


def test_an_ablation_is_over_when_the_block_is(lab):
    model = lab.aligned.ablated(group(lab, ESU))
    with lab.use(lab.aligned) as whole:
        before = weights(whole)
    with lab.use(model) as ablated:
        silent = weights(ablated)
    assert any(not torch.equal(silent[name], before[name]) for name in before)
    with lab.use(lab.aligned) as whole:
        assert all(torch.equal(part, before[name]) for name, part in weights(whole).items())
    assert isinstance(model, Model)


def test_a_frozen_weight_that_changed_is_an_error(lab, monkeypatch):
    """The check is there for the day on which the freezing has a mistake."""

    def slip(model, *arguments, **settings):
        record = supervised_finetune(model, *arguments, **settings)
        with torch.no_grad():
            model.get_parameter("model.embed_tokens.weight")[3, 3] += 1
        return record

    monkeypatch.setattr("ssah.training.supervised.supervised_finetune", slip)
    part = Part(train=catalogue.redundant(lab, 0.2))
    for model in (
        GIVEN.trained(REFUSALS, part, learning_rate=2.1e-3),
        lab.aligned.trained(MAIN_ATTACK, part, learning_rate=2.1e-3),
    ):
        with pytest.raises(RuntimeError, match="frozen weight"):
            lab.checkpoint(model).path  # noqa: B018 - it is trained when it is read
        assert not lab.training(model).has()


@pytest.mark.parametrize("rank", [None, 2], ids=["sliced", "LoRA"])
def test_what_is_trained_again_has_the_same_bits(smoke_lab, lab, rank):
    """Or else the numbers of one arm would be those of two models."""
    part = Part(train=catalogue.redundant(lab, 0.2), rank=rank)
    model = GIVEN.trained(REFUSALS, part, learning_rate=2.4e-3)
    with lab.use(model) as loaded:
        first = weights(loaded)
    lab.forget(model)
    torch.manual_seed(12345)  # as another process would, whatever it drew before
    later = smoke_lab()
    with later.use(model) as loaded:
        for name, weight in weights(loaded).items():
            assert torch.equal(weight, first[name]), name
