"""Values out of range: one sentence that names the key and what may stand there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import MISSING

from ssah.app.study import Study
from ssah.core.errors import InvalidValueError, SsahError
from ssah.core.valid import all_within, check, one_of, within
from ssah.data.settings import REQUIRED
from ssah.lab.config import compose, known_keys
from ssah.text.batches import dialogue_batches
from ssah.training.ablation import ablate
from ssah.training.slicing import freeze_units, train_only
from ssah.units.layout import UnitLayout
from ssah.units.roles import Shares, classify


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("attribution.tokens=responses", "attribution.tokens='responses' is unknown: did you mean"),
        ("attribution.variance_over=tokens", "did you mean 'token'"),
        ("attribution.unit_kind=heads", "did you mean 'head'"),
        ("evaluate.utility=lm-eval", "did you mean 'lm_eval'"),
        ("model.dtype=bf16", "model.dtype='bf16' is unknown: did you mean 'bfloat16'"),
        ("model.name='a/b'", "model.name='a/b' is part of folder names"),
        ("model.chat_template=own", "model.chat_template='own' is unknown"),
        ("data.source=file", "did you mean 'files'"),
        ("roles.redundant_kinds=[attention]", "did you mean 'attn'"),
        ("roles.redundant_kinds=[]", "roles.redundant_kinds is empty: name at least 1"),
        ("roles.esu_shares=[]", "roles.esu_shares is empty"),
        ("roles.ru_shares=[1.2]", "roles.ru_shares=1.2 is out of range: it must be 0 or more and"),
        ("roles.ru_shares=[0.9]", "are 105% of all units together"),
        ("finetune.batch_size=10", "finetune.batch_size=10 is no multiple of"),
        ("finetune.learning_rate=0", "it must be more than 0."),
        ("finetune.learning_rate=nan", "finetune.learning_rate=nan is out of range"),
        (
            "finetune.rows.dialogues=0",
            "finetune.rows.dialogues=0 is out of range: it must be 1 or more.",
        ),
        ("attribution.samples=0", "attribution.samples=0 is out of range: it must be 2 or more."),
        ("n_seeds=0", "n_seeds=0 is out of range"),
        ("seed=-1", "seed=-1 is out of range"),
        ("runtime.threads=0", "runtime.threads=0 is out of range"),
        ("runtime.threads=100000", "it must be 1 or more and at most 1024"),
        ("align=false", "Cannot compose the configuration"),
        ("runtime.device=mps", "runtime.device=mps cannot be used"),
        ("runtime.device=gpu", "runtime.device=gpu cannot be used: choose auto, cpu or cuda"),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_name(override, says):
    with pytest.raises(SsahError) as refused:
        Study("smoke", [override])
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_batches_that_can_be_divided_are_not_refused():
    compose("smoke", ["finetune.batch_size=16"])
    compose("smoke", ["finetune.batch_size=4"])  # less than what fits at once


VALUES = st.one_of(
    st.integers(-(10**6), 10**6),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["''", "null", "true", "[]", "{}", "[-1]", "[a, b]", "x", "{a: 1}", "1e999"]),
    st.text("abcdefgh_ -.%", max_size=8),
)


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([k for k in known_keys() if k != "runtime.threads"]), VALUES)
@example("experiment.frozen", "null")
@example("experiment.frozen.instructions", "null")
@example("data.files", "null")
@example("experiment", "x")
@example("profile", "[-1]")
def test_no_single_override_ends_in_a_traceback(key, value):
    """Whatever stands there, the study is made or refused in a sentence."""
    text = f"{value:g}" if isinstance(value, float) else value
    try:
        said = "" if Study("smoke", [f"{key}={text}"]).labs else "no seed"
    except SsahError as error:
        said = str(error)
    assert "\n" not in said


def test_every_field_of_a_dataclass_is_checked_and_those_in_it():
    @dataclasses.dataclass
    class Inner:
        word: str = one_of("a", "a", "b")

    @dataclasses.dataclass
    class Outer:
        inner: Inner = dataclasses.field(default_factory=Inner)
        number: int | None = within(None, 1, 3)
        numbers: list[int] = all_within([1], 0, fewest=1)

    check(Outer())
    check(Outer(number=3))
    for wrong, named in (
        (Outer(Inner("c")), "inner.word='c' is unknown: choose from a, b."),
        (Outer(number=4), "number=4 is out of range: it must be 1 or more and at most 3."),
        (Outer(numbers=[]), "numbers is empty"),
        (Outer(numbers=[2, -1]), "numbers=-1 is out of range"),
    ):
        with pytest.raises(InvalidValueError, match=r".") as refused:
            check(wrong)
        assert named in str(refused.value)


# --- the library -----------------------------------------------------------------------------


def test_misspelt_choices_of_the_library_are_refused(tiny_model):
    layout = UnitLayout.of(tiny_model)
    mask = layout.none()
    for block in (train_only, freeze_units):
        entered = block(tiny_model, mask, shared_rows="Frozen")
        with pytest.raises(ValueError, match="did you mean 'frozen'"):
            entered.__enter__()
    with (
        pytest.raises(ValueError, match="did you mean 'mean'"),
        ablate(tiny_model, layout, mask, mode="Mean"),
    ):
        pass
    with pytest.raises(ValueError, match="did you mean 'head'"):
        UnitLayout.of(tiny_model, "heads")
    with pytest.raises(ValueError, match="did you mean 'response'"):
        next(dialogue_batches([([1], [2])], 1, tokens="responses"))


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ("CU:0.06", "'CU:0.06' is no group of units: write a group, or a group and a percentage"),
        ("CU:-6%", "'CU:-6%' is no group of units"),
        ("CU:", "'CU:' is no group of units"),
        ("CU:six%", "'CU:six%' is no group of units"),
        ("cu", "group='cu' is unknown: choose from RU, ESU, EUU, CU"),
        ("CU:99%", "is more than CU has"),
    ],
)
def test_a_group_that_is_none_is_refused(tiny_model, group, says):
    layout = UnitLayout.of(tiny_model)
    scores = [layout.split(torch.rand(layout.units)) for _ in range(2)]
    roles = classify(layout, *scores, Shares(0.1, 0.1, 0.1))
    assert roles.select("CU:6%").count() == round(0.06 * layout.units)
    with pytest.raises(ValueError, match=r".") as refused:
        roles.select(group)
    assert says in str(refused.value)


def test_what_has_to_be_given_is_marked_as_hydra_marks_it():
    assert REQUIRED == MISSING
