"""Chat messages to text and to tokens: templates, and where a turn ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import (
        PreTrainedTokenizerBase,
    )


#: ChatML without a default system prompt. SmolLM2's own template inserts one whenever the
#: conversation has none, so "without a system prompt" could not be measured with it.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# --- text to tokens --------------------------------------------------------------------------


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str = "") -> str:
    """The chat template's text up to where the answer begins."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return cast(str, text)


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool = False
) -> list[int]:
    """Token ids of rendered text; the template already holds every special token.

    Text that went through no template needs ``special_tokens``: those that the tokenizer adds by
    itself, such as the first token of Llama and Gemma.
    """
    return tokenizer(text, add_special_tokens=special_tokens)["input_ids"]


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    response: str,
    *,
    end: bool = True,
    max_response_tokens: int | None = None,
) -> tuple[list[int], list[int]]:
    """Ids of prompt and response apart; ``end`` appends the end-of-turn token.

    A response cut at ``max_response_tokens`` gets no end token.
    """
    head = encode(tokenizer, render_prompt(tokenizer, prompt))
    body = encode(tokenizer, response)
    if max_response_tokens is not None and len(body) > max_response_tokens:
        return head, body[:max_response_tokens]
    return head, body + [tokenizer.eos_token_id] * end
