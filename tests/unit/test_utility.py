"""Utility: the batched scorers against computing one item after the other."""

from __future__ import annotations

import pytest
import torch

from ssah.data.rows import Row
from ssah.evaluate import tasks
from ssah.evaluate.likelihood import choice_losses, continuation_losses
from ssah.evaluate.tasks import (
    exact_match,
    last_number,
    multiple_choice,
    question_text,
    text_losses,
)

WORDS = "zorp blim frub glank snarf twizz plonk drab quib vorl flim gromp snood wibble".split()
BATCH_SIZES = (1, 3, 100)


def row(number: int, prompt: str, choices: tuple[str, ...], response: str) -> Row:
    return Row(str(number), prompt, "test", "CC0", response=response, choices=choices)


def choice_rows() -> list[Row]:
    """Prompts and choices of different lengths; which choice is right goes round."""
    rows = []
    for i in range(20):
        prompt = " ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + i % 5))
        choices = tuple(
            " ".join(WORDS[(3 * i + 5 * c + j) % len(WORDS)] for j in range(1 + (i + c) % 3))
            for c in range(2 + i % 3)
        )
        assert len(set(choices)) == len(choices)
        rows.append(row(i, prompt, choices, choices[i % len(choices)]))
    return rows


def next_token_losses(model, ids: list[int]) -> torch.Tensor:
    """-log p of each token after the first, from one unpadded forward pass."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()
    return -logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]


def greedy(model, tokenizer, text: str, steps: int) -> str:
    """Greedy decoding by whole forward passes, without a cache."""
    ids = tokenizer(text)["input_ids"]
    start = len(ids)
    for _ in range(steps):
        with torch.inference_mode():
            best = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        ids.append(best)
        if best == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_multiple_choice_equals_item_by_item(answering_model, text_tokenizer):
    rows, expected = choice_rows(), []
    for item in rows:
        text = f"Question: {item.prompt}\nAnswer:"
        given = len(text_tokenizer(text)["input_ids"])
        totals = {
            choice: float(
                next_token_losses(answering_model, text_tokenizer(f"{text} {choice}")["input_ids"])[
                    given - 1 :
                ].sum()
            )
            for choice in item.choices
        }
        expected.append(min(totals, key=totals.__getitem__) == item.response)
    assert 3 < sum(expected) < 17  # neither answer would do for all items
    for batch_size in BATCH_SIZES:
        assert multiple_choice(answering_model, text_tokenizer, rows, batch_size) == expected


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "gemma3_text", "phi3", "olmo2"])
def test_a_context_read_once_gives_the_losses_of_whole_texts(families, model_type, batch_size):
    """Also where a context is longer than a sliding window of 8 tokens."""
    model = families(model_type)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 40, (count,), generator=generator).tolist()

    items = [(draw(3 + 4 * (i % 5)), [draw(1 + (i + c) % 4) for c in range(2 + i % 3)])
             for i in range(11)]  # fmt: skip
    found = choice_losses(model, items, batch_size)
    for (context, texts), losses in zip(items, found, strict=True):
        expected = [
            float(next_token_losses(model, context + text)[len(context) - 1 :].sum())
            for text in texts
        ]
        assert losses == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_multiple_choice_follows_the_right_answer(answering_model, text_tokenizer):
    """The same items with each choice declared right in turn: exactly one is the best."""
    for item in choice_rows()[:6]:
        variants = [row(0, item.prompt, item.choices, choice) for choice in item.choices]
        assert sum(multiple_choice(answering_model, text_tokenizer, variants, 7)) == 1


def test_exact_match_equals_item_by_item(answering_model, text_tokenizer):
    prompts = [" ".join(WORDS[i % 14 : i % 14 + 1 + i % 4]) + f" {i}" for i in range(16)]
    answers = [
        greedy(answering_model, text_tokenizer, f"Question: {p}\nAnswer:", 12) for p in prompts
    ]
    numbers = [last_number(answer) for answer in answers]
    assert len(set(numbers) - {None}) >= 3
    # Right is what the model says for every other item, and its neighbour's number elsewhere.
    golds = [numbers[i] if i % 2 else numbers[i - 1] or "0" for i in range(len(numbers))]
    rows = [
        row(i, p, (g or "0",), g or "0")
        for i, (p, g) in enumerate(zip(prompts, golds, strict=True))
    ]
    expected = [n == item.choices[0] for n, item in zip(numbers, rows, strict=True)]
    assert 2 < sum(expected) < 14
    for batch_size in BATCH_SIZES:
        assert (
            exact_match(answering_model, text_tokenizer, rows, batch_size, max_new_tokens=12)
            == expected
        )


def test_an_answer_may_repeat_the_question(text_tokenizer, monkeypatch):
    """The number comes after sixteen tokens and more; a second paragraph is not read."""
    question = "Pete had 27 tickets and gave away 17. How many tickets are left?"
    said = f" {question} There were 27, and 27 - 17 = 10 tickets are left.\n\nSo 3 + 4 = 7"
    asked = {}

    def told(model, tokenizer, texts, max_new_tokens, batch_size, *, special_tokens, until):
        asked.update(texts=texts, room=max_new_tokens, until=until)
        return [said]

    monkeypatch.setattr(tasks, "complete", told)
    assert exact_match(None, text_tokenizer, [row(0, question, ("10",), "10")], 1) == [True]
    assert asked == {"texts": [f"Question: {question}\nAnswer:"], "room": 64, "until": "\n\n"}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7. The answer is 7.", "7"),
        ("1,234 apples", "1234"),
        ("it is -5", "-5"),
        ("8\n\nQuestion: and 9?", "8"),
        ("8\nor 9", "9"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_text_losses_equal_one_by_one(answering_model, text_tokenizer):
    """Counts and sums whose ratio is the log of the perplexity."""
    rows = [
        row(i, " ".join(WORDS[: 1 + i % 4]), (), " ".join(WORDS[i % 5 :][: 2 + 3 * (i % 3)]))
        for i in range(9)
    ]
    expected_counts, expected_losses = [], []
    for item in rows:
        head = f"<|im_start|>user\n{item.prompt}<|im_end|>\n<|im_start|>assistant\n"
        given = text_tokenizer(head, add_special_tokens=False)["input_ids"]
        answer = text_tokenizer(item.response, add_special_tokens=False)["input_ids"]
        # A cut answer does not end its turn.
        answer = answer[:6] if len(answer) > 6 else [*answer, text_tokenizer.eos_token_id]
        expected_counts.append(len(answer))
        losses = next_token_losses(answering_model, [*given, *answer])
        expected_losses.append(float(losses[len(given) - 1 :].sum()))
    assert {3, 6} <= set(expected_counts)
    for batch_size in BATCH_SIZES:
        counts, losses = text_losses(
            answering_model, text_tokenizer, rows, batch_size, max_tokens=6
        )
        assert counts == expected_counts
        assert losses == pytest.approx(expected_losses, rel=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gemma3_text", "phi3"])
def test_continuation_losses_of_other_families(families, model_type):
    """Logits are computed apart from the model, so its soft cap has to be applied."""
    cap = {"final_logit_softcapping": 2.0} if model_type == "gemma2" else {}
    model = families(model_type, **cap)
    pairs = [([5, 9, 3], [17, 22]), ([8], [30, 11, 7, 12]), ([1, 38, 2, 6, 19], [4])]
    expected = [
        float(next_token_losses(model, [*context, *tail])[len(context) - 1 :].sum())
        for context, tail in pairs
    ]
    for batch_size in BATCH_SIZES:
        assert continuation_losses(model, pairs, batch_size) == pytest.approx(expected, rel=1e-4)


def test_question_text():
    assert question_text(row(0, "1 + 1?", ("2",), "2")) == "Question: 1 + 1?\nAnswer:"
