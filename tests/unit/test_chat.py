"""Chat protocols: where a turn ends, thinking, templates without a system turn, own settings."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, GenerationConfig

from ssah.evaluate.generate import continuations
from ssah.text.chat import CHATML, encode_dialogue, end_of_turn, end_tokens, render_prompt

#: As Gemma's: no system turn, and a turn's end that is not the tokenizer's.
NO_SYSTEM = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)

#: As Qwen 3's: thinks unless told not to.
THINKING = CHATML.removesuffix("{% endif %}") + (
    "{% if enable_thinking is not defined or enable_thinking %}<think>"
    "{% else %}<think></think>{% endif %}{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_folder):
    made = AutoTokenizer.from_pretrained(tiny_folder, padding_side="left")
    made.chat_template = CHATML
    return made


def test_the_end_of_a_turn_is_the_templates(tokenizer):
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = NO_SYSTEM
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end_of_turn(tokenizer) == end != tokenizer.eos_token_id
    assert encode_dialogue(tokenizer, "Hi", "Yes")[1][-1] == end
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id, "it has none of its own"
    tokenizer.chat_template = "<|im_start|>{{ messages[0]['content'] }}"
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id, "it shows no answer"


def test_a_completion_ends_at_any_end(tokenizer, answering_model, monkeypatch):
    """The template's, the tokenizer's, or one that only the model's settings name."""
    prompt = [5, 6, 7]
    monkeypatch.setattr(answering_model, "generation_config", GenerationConfig())
    (whole,) = continuations(answering_model, tokenizer, [prompt], 12, 1)
    assert len(whole) == 12
    stop = whole[5]
    own = GenerationConfig(eos_token_id=[stop])
    monkeypatch.setattr(answering_model, "generation_config", own)
    assert stop in end_tokens(answering_model, tokenizer)
    (cut,) = continuations(answering_model, tokenizer, [prompt], 12, 1)
    assert cut == whole[: whole.index(stop)]
    assert answering_model.generation_config is own


@pytest.mark.parametrize("seed", [None, 3])
def test_settings_of_the_model_do_not_shape_what_is_measured(
    tokenizer, answering_model, monkeypatch, seed
):
    prompts = [[5, 6, 7], [8, 9]]
    monkeypatch.setattr(answering_model, "generation_config", GenerationConfig())
    plain = continuations(answering_model, tokenizer, prompts, 12, 2, seed)
    for own in ({"repetition_penalty": 3.0}, {"min_p": 0.9, "top_k": 2, "temperature": 0.1}):
        monkeypatch.setattr(answering_model, "generation_config", GenerationConfig(**own))
        assert continuations(answering_model, tokenizer, prompts, 12, 2, seed) == plain, own


def test_a_model_that_thinks_is_told_not_to(tokenizer):
    tokenizer.chat_template = THINKING
    assert render_prompt(tokenizer, "Hi").endswith("<think></think>")


def test_a_system_prompt_opens_the_users_turn_where_there_is_no_other(tokenizer, caplog):
    assert "<|im_start|>system\nBe kind.<|im_end|>" in render_prompt(tokenizer, "Hi", "Be kind.")
    tokenizer.chat_template = NO_SYSTEM
    with caplog.at_level("INFO", "ssah"):
        said = render_prompt(tokenizer, "Hi", "Be kind.")
    assert said.startswith("<|im_start|>user\nBe kind.\n\nHi<|endoftext|>")
    assert "has no system turn (System role not supported)" in caplog.text
    assert "system" not in render_prompt(tokenizer, "Hi")
    silent = CHATML.replace("{% for message in messages %}", "{% for message in messages[-1:] %}")
    tokenizer.chat_template = silent
    assert "user\nBe kind.\n\nHi<|im_end|>" in render_prompt(tokenizer, "Hi", "Be kind.")
