"""Rows to fine-tune on: every shape that is known, and what is said of one that is not."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from ssah.core.errors import SsahError
from ssah.data.dialogues import Dialogue, find_dialogues, near
from ssah.data.split import content_words, similarity
from ssah.text.chat import encode_dialogue, render_prompt

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


def turns(*said: tuple[str, str], who: str = "role", what: str = "content") -> list[dict]:
    return [{who: role, what: text} for role, text in said]


CHAT = [
    (SYSTEM, "Be kind."),
    (USER, "Hi"),
    (ASSISTANT, "Hello"),
    (USER, "How?"),
    (ASSISTANT, "So."),
]
SHAREGPT = [("human", "Hi"), ("gpt", "Hello"), ("human", "Bye")]


@pytest.mark.parametrize(
    ("record", "expected", "shape"),
    [
        (
            {"prompt": " Hi ", "response": "Hello"},
            Dialogue("Hi", "Hello"),
            "prompts and responses (columns prompt, response)",
        ),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            Dialogue("Add\n\n1 2", "3"),
            "prompts and responses (columns instruction, input, output)",
        ),
        (
            {"instruction": "Sing", "context": "", "response": "La", "category": "x"},
            Dialogue("Sing", "La"),
            "prompts and responses (columns instruction, context, response)",
        ),
        (
            {"system": "Be kind.", "question": "Hi", "answer": "Hello"},
            Dialogue("Hi", "Hello", "Be kind."),
            "prompts and responses (columns question, answer)",
        ),
        (
            {"messages": turns(*CHAT)},
            Dialogue("How?", "So.", "Be kind.", (("Hi", "Hello"),)),
            "chats (column messages)",
        ),
        (
            {"conversations": turns(*SHAREGPT, who="from", what="value")},
            Dialogue("Hi", "Hello"),
            "chats (column conversations)",
        ),
        (
            {"prompt": turns((USER, "Hi")), "completion": turns((ASSISTANT, "Hello"))},
            Dialogue("Hi", "Hello"),
            "prompts and responses (columns prompt, completion)",
        ),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_shape_is_recognised_in_every_kind_of_file(tmp_path, record, expected, shape, ending):
    path = tmp_path / f"rows.{ending}"
    frame = pd.DataFrame([record] * 20)
    if ending == "parquet":
        frame.to_parquet(path)
    elif ending == "csv":
        if isinstance(record.get("prompt"), list):
            pytest.skip("two cells of messages are no table's")
        frame.map(lambda cell: json.dumps(cell) if isinstance(cell, list) else cell).to_csv(path)
    else:
        frame.to_json(path, orient="records", lines=ending == "jsonl")
    found = find_dialogues(path)
    assert found.dialogues == (expected,) * 20
    assert found.shape == shape
    assert found.broken == 0


def test_pairs_and_records_do_without_a_file():
    pairs = [("a", "b")] * 20
    assert find_dialogues(pairs).dialogues == (Dialogue("a", "b"),) * 20
    assert find_dialogues([{"query": "a", "response": "b"}] * 20).shape.endswith("query, response)")
    with pytest.raises(SsahError, match="a \\(prompt, response\\) pair or a dictionary"):
        find_dialogues(["a"] * 20)


def test_a_prompt_of_messages_may_have_an_answer_of_text():
    asked = turns((USER, "a"))
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    for prompt in (asked, parts):
        found = find_dialogues([{"prompt": prompt, "completion": "b"}] * 20)
        assert found.dialogues == (Dialogue("a", "b"),) * 20
    with pytest.raises(SsahError, match="row 1 has no prompt"):
        find_dialogues([{"prompt": {"text": "a"}, "completion": "b"}] * 20)


def test_separators_of_unicode_stay_in_a_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    record = json.dumps({"prompt": "a\u2028b", "response": "c\x85d"}, ensure_ascii=False)
    path.write_text("\n".join([record] * 20), encoding="utf-8")
    assert find_dialogues(path).dialogues[0] == Dialogue("a\u2028b", "c\x85d")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (turns((USER, "a"), (USER, "b"), (ASSISTANT, "c")), "does not go from user to assistant"),
        (turns((USER, "a")), "does not go from user to assistant"),
        (turns((USER, "a"), (ASSISTANT, " ")), "has an empty message"),
        (turns(("tool", "a"), (ASSISTANT, "b")), "has a message of 'tool'"),
        ("no messages", "holds no list of messages"),
    ],
)
def test_what_is_wrong_with_a_chat_is_said(messages, said):
    good = {"messages": turns((USER, "a"), (ASSISTANT, "b"))}
    with pytest.raises(SsahError, match=rf"4 of 24 rows cannot be used \(row 21 {said}"):
        find_dialogues([good] * 20 + [{"messages": messages}] * 4)
    some = find_dialogues([good] * 20 + [{"messages": messages}] * 2)
    assert len(some.dialogues) == 20
    assert "2 without a prompt or a response, which are left out" in str(some)


def test_earlier_turns_are_part_of_what_is_answered(text_tokenizer):
    text = render_prompt(text_tokenizer, "How?", "Be kind.", [("Hi", "Hello")])
    messages = turns(*CHAT[:-1])
    assert text == text_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    head, body = encode_dialogue(
        text_tokenizer, "How?", "So.", system="Be kind.", before=[("Hi", "Hello")]
    )
    assert head == text_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert body == encode_dialogue(text_tokenizer, "How?", "So.")[1]


def test_near_is_the_similarity_that_sets_are_divided_by():
    prompts = ["Write a song about rivers", "Explain how a lake freezes", "the of", ""]
    others = ["Write a poem about rivers", "Explain how lakes freeze", "Sing"]
    for threshold in (0.2, 0.5, 0.7):
        expected = [
            any(similarity(content_words(p), content_words(o)) >= threshold for o in others)
            for p in prompts
        ]
        assert near(prompts, others, threshold) == expected
