"""Rows of the harmless attacks: draws, their sizes, and who wrote the responses."""

from __future__ import annotations

import pytest
import torch

from ssah.core.errors import SsahError
from ssah.data.rows import Row
from ssah.lab.stages import Stages
from ssah.lab.tuning import ATTACKS
from ssah.text.chat import render_prompt

every_attack = pytest.mark.parametrize("attack", ATTACKS)


@pytest.fixture(scope="module")
def stages(smoke_study) -> Stages:
    return smoke_study().stages(0)


def ids(rows: list[Row]) -> list[str]:
    return [row.id for row in rows]


@every_attack
def test_rows_to_train_on_and_rows_held_out_are_apart(smoke_study, stages, attack):
    train, heldout = stages.attack_rows(attack)
    assert (len(train), len(heldout)) == (16, 8)
    assert len({*ids(train), *ids(heldout)}) == 24
    assert not {row.prompt for row in train} & {row.prompt for row in heldout}
    assert all(row.response for row in train + heldout)
    other = smoke_study(f"finetune.rows.{attack}=5", "finetune.heldout_rows=3").stages(0)
    train, heldout = other.attack_rows(attack)
    assert (len(train), len(heldout)) == (5, 3)
    assert len({*ids(train), *ids(heldout)}) == 8


@every_attack
def test_rows_vary_with_the_seed_and_with_nothing_else(smoke_study, stages, attack):
    train, heldout = stages.attack_rows(attack)
    again = smoke_study().stages(0).attack_rows(attack)
    assert again == (train, heldout)
    other_train, other_heldout = smoke_study().stages(1).attack_rows(attack)
    assert set(ids(other_train)) != set(ids(train))
    assert set(ids(other_heldout)) != set(ids(heldout))


def test_attacks_draw_for_themselves(smoke_study, stages):
    """The number of rows of one attack has no part in another's."""
    other = smoke_study("finetune.rows.arithmetic=3").stages(0)
    assert other.attack_rows("dialogues") == stages.attack_rows("dialogues")


@pytest.mark.parametrize("seed", [0, 1])
def test_arithmetic_that_measures_utility_is_never_trained_on(smoke_study, seed):
    """All that is left is asked for, so that the measured ones would be among it."""
    stages = smoke_study("finetune.rows.arithmetic=17", "finetune.heldout_rows=7").stages(seed)
    every = ids(stages.rows("arithmetic"))
    assert len(every) == 32
    assert stages.config.evaluate.arithmetic_items == 8
    train, heldout = stages.attack_rows("arithmetic")
    assert sorted(ids(train + heldout)) == sorted(every[8:])
    # Their responses are worked out, and not the bare number.
    assert all("The answer is" in (row.response or "") for row in train)


def test_mistakes_name_the_setting(smoke_study, stages):
    with pytest.raises(SsahError, match=r"'poetry' is no attack.*finetune\.rows"):
        stages.attack_rows("poetry")
    for override in ("finetune.rows.dialogues=41", "finetune.heldout_rows=33"):
        greedy = smoke_study(override).stages(0)
        with pytest.raises(SsahError) as refused:
            greedy.attack_rows("dialogues")
        assert override in str(refused.value)
        assert "finetune.rows.dialogues=" in str(refused.value)
        assert "finetune.heldout_rows=" in str(refused.value)
        assert "48 rows" in str(refused.value)
    exactly = smoke_study("finetune.rows.dialogues=40").stages(0)
    assert sum(map(len, exactly.attack_rows("dialogues"))) == 48


def greedy_answer(model, tokenizer, prompt: str, steps: int) -> str:
    """By whole forward passes, one prompt at a time."""
    given = tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    answer: list[int] = []
    while len(answer) < steps and tokenizer.eos_token_id not in answer:
        with torch.inference_mode():
            logits = model(torch.tensor([given + answer]), use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_instructions_carry_the_unaligned_models_answers(
    smoke_study, answering_model, tiny_folder, tmp_path
):
    """Of a model that says something else to each prompt, and something else once aligned."""
    answering_model.save_pretrained(tmp_path / "model")
    for path in tiny_folder.glob("*token*.json"):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    overrides = ["model=local", f"model.source={tmp_path / 'model'}", "model.chat_template=chatml"]
    stages = smoke_study(*overrides, "align.learning_rate=0.01").stages(0)
    train, heldout = stages.attack_rows("instructions")
    prompts = {
        row.id: row.prompt
        for name in ("align", "attribution")
        for row in stages.rows(f"benign_{name}")
    }
    differ = 0
    for row in [*train[:6], *heldout[:6]]:
        assert row.prompt == prompts[row.id]
        first, second = (
            greedy_answer(stages.model(which), stages.tokenizer, row.prompt, 8)
            for which in ("unaligned", "aligned")
        )
        assert row.response == first
        differ += first != second
    assert differ >= 6
    assert len({row.response for row in train}) > 8


@pytest.mark.parametrize(
    ("attack", "words", "length", "ends"),
    [
        ("dialogues", 7, 8, True),
        ("dialogues", 8, 9, True),
        ("dialogues", 9, 8, False),
        ("arithmetic", 9, 8, False),
        ("instructions", 6, 7, True),
        ("instructions", 7, 8, True),
        ("instructions", 8, 7, False),  # it stopped for want of room, which is no end
    ],
)
def test_only_answers_that_ended_are_taught_to_end(stages, attack, words, length, ends):
    assert stages.config.finetune.max_response_tokens == 8
    row = Row("id", "zorp flim", "test", "MIT", response=" ".join(["blim"] * words))
    ((prompt, response),) = stages.encoded(attack, [row])
    assert len(response) == length
    assert (response[-1] == stages.tokenizer.eos_token_id) is ends
    assert len(set(response)) == 1 + ends
    rendered = render_prompt(stages.tokenizer, row.prompt)
    assert prompt == stages.tokenizer(rendered, add_special_tokens=False)["input_ids"]
