"""Lessons: draws, their sizes, and who wrote the responses."""

from __future__ import annotations

import pytest
import torch

from ssah.core.errors import SsahError
from ssah.data.rows import Row
from ssah.lab.specs import GIVEN, REFUSALS
from ssah.lab.stages.lessons import ATTACKS, Lesson, available_attacks, heldout, lesson
from ssah.text.chat import render_prompt

every_attack = pytest.mark.parametrize("attack", ATTACKS)


def ids(rows: tuple[Row, ...]) -> list[str]:
    return [row.id for row in rows]


@every_attack
def test_rows_to_train_on_and_rows_held_out_are_apart(smoke_lab, lab, attack):
    train, rest = lesson(lab, attack), heldout(lab, attack)
    assert (len(train.rows), len(rest.rows)) == (16, 8)
    assert len({*ids(train.rows), *ids(rest.rows)}) == 24
    assert not {row.prompt for row in train.rows} & {row.prompt for row in rest.rows}
    assert all(train.responses() + rest.responses())
    other = smoke_lab(f"finetune.rows.{attack}=5", "finetune.heldout_rows=3")
    assert (len(lesson(other, attack).rows), len(heldout(other, attack).rows)) == (5, 3)


@every_attack
def test_rows_vary_with_the_seed_and_with_nothing_else(smoke_lab, lab, attack):
    assert ids(lesson(smoke_lab(), attack).rows) == ids(lesson(lab, attack).rows)
    other = smoke_lab(seed=1)
    assert set(ids(lesson(other, attack).rows)) != set(ids(lesson(lab, attack).rows))
    assert set(ids(heldout(other, attack).rows)) != set(ids(heldout(lab, attack).rows))


def test_attacks_draw_for_themselves(smoke_lab, lab):
    """The number of rows of one attack has no part in another's."""
    other = smoke_lab("finetune.rows.arithmetic=3")
    assert lesson(other, "dialogues").rows == lesson(lab, "dialogues").rows


@pytest.mark.parametrize("seed", [0, 1])
def test_arithmetic_that_measures_utility_is_never_trained_on(smoke_lab, seed):
    """All that is left is asked for, so that the measured ones would be among it."""
    lab = smoke_lab("finetune.rows.arithmetic=17", "finetune.heldout_rows=7", seed=seed)
    every = ids(lab.rows("arithmetic"))
    assert (len(every), lab.config.evaluate.arithmetic_items) == (32, 8)
    rows = lesson(lab, "arithmetic").rows + heldout(lab, "arithmetic").rows
    assert sorted(ids(rows)) == sorted(every[8:])
    # Their responses are worked out, and not the bare number.
    assert all("The answer is" in (row.response or "") for row in rows)


def test_mistakes_name_the_setting(smoke_lab, lab):
    with pytest.raises(SsahError, match=r"'poetry' is no attack.*finetune\.rows"):
        lesson(lab, "poetry")
    for override in ("finetune.rows.dialogues=41", "finetune.heldout_rows=33"):
        with pytest.raises(SsahError) as refused:
            lesson(smoke_lab(override), "dialogues")
        assert override in str(refused.value)
        assert "finetune.rows.dialogues=" in str(refused.value)
        assert "finetune.heldout_rows=" in str(refused.value)
        assert "48 rows" in str(refused.value)
    exactly = smoke_lab("finetune.rows.dialogues=40")
    assert len(lesson(exactly, "dialogues").rows) == 40


def test_a_lesson_without_rows_is_left_out(lab, monkeypatch):
    assert available_attacks(lab) == ["instructions", "arithmetic", "dialogues"]
    monkeypatch.setattr(type(lab), "has", lambda self, name: name != "dialogues")
    assert available_attacks(lab) == ["instructions", "arithmetic"]


def greedy_answer(model, tokenizer, prompt: str, steps: int) -> str:
    """By whole forward passes, one prompt at a time."""
    given = tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    answer: list[int] = []
    while len(answer) < steps and tokenizer.eos_token_id not in answer:
        with torch.inference_mode():
            logits = model(torch.tensor([given + answer]), use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_instructions_carry_the_given_models_answers(
    smoke_lab, answering_model, tiny_folder, tmp_path
):
    """Of a model that says something else to each prompt, and something else once aligned."""
    answering_model.save_pretrained(tmp_path / "model")
    for path in tiny_folder.glob("*token*.json"):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    overrides = ["model=local", f"model.source={tmp_path / 'model'}", "model.chat_template=chatml"]
    lab = smoke_lab(*overrides, "align.learning_rate=0.01")
    train = lesson(lab, "instructions")
    differ = 0
    with lab.use(GIVEN) as given, lab.use(lab.aligned) as aligned:
        for row, said in list(zip(train.rows, train.responses(), strict=True))[:8]:
            first, second = (
                greedy_answer(model, lab.tokenizer, row.prompt, 8) for model in (given, aligned)
            )
            assert said == first
            differ += first != second
    assert differ >= 4
    assert len(set(train.responses())) > 8


@pytest.mark.parametrize(
    ("generated", "words", "length", "ends"),
    [
        (False, 7, 8, True),
        (False, 8, 9, True),
        (False, 9, 8, False),
        (True, 6, 7, True),
        (True, 7, 8, True),
        (True, 8, 7, False),  # it stopped for want of room, which is no end
    ],
)
def test_only_answers_that_ended_are_taught_to_end(lab, generated, words, length, ends):
    text = " ".join(["blim"] * words)
    row = Row("id", "zorp flim", "test", "MIT", response=None if generated else text)
    own = Lesson((row,), max_response_tokens=8)
    if generated:
        said = type("Said", (), {"json": lambda self, name: [text]})()
        own = Lesson((row,), said, 8)
    ((prompt, response),) = own.taught(lab)
    assert len(response) == length
    assert (response[-1] == lab.tokenizer.eos_token_id) is ends
    assert len(set(response)) == 1 + ends
    rendered = render_prompt(lab.tokenizer, row.prompt)
    assert prompt == lab.tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_refusals_are_composed_and_benign_rows_are_held(smoke_lab, lab):
    own = lesson(lab, REFUSALS)
    config = lab.config.align
    assert (len(own.rows), len(own.anchors)) == (config.harmful, config.benign)
    assert len({row.response for row in own.rows}) > 3
    assert set(ids(own.rows)) <= set(ids(lab.rows("harmful_align")))
    held = own.held(lab)
    assert len(held) == config.benign
    assert all(lab.tokenizer.eos_token_id not in said for _, said in held), "no end is taught"
    other = lesson(smoke_lab(seed=1), REFUSALS)
    assert ids(other.rows) != ids(own.rows)
    assert other.said.key != own.said.key
