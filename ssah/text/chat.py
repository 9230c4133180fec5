"""Chat messages to text and to tokens: templates, and where a turn ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: ChatML without a default system prompt. SmolLM2's own template inserts one whenever the
#: conversation has none, so "without a system prompt" could not be measured with it.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


#: Put before a template that prints the date: a prompt must not change overnight.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}\n"

#: Stands for an answer where only what follows it is looked for.
_ANSWER = "ANSWER"


# --- text to tokens --------------------------------------------------------------------------


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    system: str = "",
    before: Sequence[tuple[str, str]] = (),
) -> str:
    """The chat template's text up to where the answer begins, behind earlier turns.

    A template that can make the model think first is told not to. Where it knows no system turn
    (Gemma's), the system prompt opens the user's.
    """
    from jinja2 import TemplateError

    turns = [
        {"role": role, "content": content}
        for turn in before
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    turns.append({"role": "user", "content": prompt})
    if system:
        try:
            text = _rendered(tokenizer, [{"role": "system", "content": system}, *turns])
            if system.strip() in text:
                return text
            reason = "it is left out"
        except TemplateError as error:
            reason = str(error)
        logger.info("The template has no system turn (%s): it opens the user's.", reason)
        turns[0] = {"role": "user", "content": f"{system}\n\n{turns[0]['content']}"}
    return _rendered(tokenizer, turns)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return cast(str, text)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which the chat template ends an answer: not always the tokenizer's end of
    text (Gemma, Phi-3)."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
    _, answer, rest = text.rpartition(_ANSWER)
    after = encode(tokenizer, rest.lstrip()) if answer else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return after[0] if after and after[0] in special else tokenizer.eos_token_id


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the template's, the tokenizer's, and the model's own."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    found = [end_of_turn(tokenizer), tokenizer.eos_token_id]
    found += own if isinstance(own, list) else [own]
    return sorted({token for token in found if token is not None})


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
    system: str = "",
    before: Sequence[tuple[str, str]] = (),
    end: bool = True,
    max_response_tokens: int | None = None,
) -> tuple[list[int], list[int]]:
    """Ids of prompt and response apart; ``end`` appends the template's end-of-turn token.

    A response cut at ``max_response_tokens`` gets no end token.
    """
    head = encode(tokenizer, render_prompt(tokenizer, prompt, system, before))
    body = encode(tokenizer, response)
    if max_response_tokens is not None and len(body) > max_response_tokens:
        return head, body[:max_response_tokens]
    return head, body + [end_of_turn(tokenizer)] * end
