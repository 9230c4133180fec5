"""Chat messages to text and to tokens: templates, and where a turn ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: Token ids of a prompt and of its response.
Pair = tuple[list[int], list[int]]

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


def chatml(tokenizer: PreTrainedTokenizerBase) -> str:
    """ChatML for a tokenizer, behind the token that it begins texts with (Gemma, Llama): templates
    hold all special tokens."""
    first = tokenizer("")["input_ids"][:1]
    begins = tokenizer.bos_token is not None and first == [tokenizer.bos_token_id]
    return "{{ bos_token }}" + CHATML if begins else CHATML


@dataclass(frozen=True)
class Begun:
    """A prompt in a dialogue that is under way, put there by whoever asks.

    ``before`` holds turns, each a prompt and its answer. The answer to ``prompt`` begins with the
    first ``opening_tokens`` tokens of ``opening``, or all of it where it has fewer.
    """

    prompt: str
    before: tuple[tuple[str, str], ...] = ()
    opening: str = ""
    opening_tokens: int = 0


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


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Begun,
    system: str = "",
    room: int | None = None,
) -> list[int]:
    """Token ids up to where a model goes on: in an answer that has begun, no token ends the turn.

    Of the turns before, the first are left out where all of them are more than ``room`` tokens.
    """
    begun = Begun(prompt) if isinstance(prompt, str) else prompt
    opening = encode(tokenizer, begun.opening)[: begun.opening_tokens]
    before = begun.before
    while True:
        ids = encode(tokenizer, render_prompt(tokenizer, begun.prompt, system, before)) + opening
        if not before or room is None or len(ids) <= room:
            return ids
        before = before[1:]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return cast(str, text)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens with which the chat template ends an answer: one, which is not always the
    tokenizer's end of text (Gemma, Phi-3), or the pieces of :func:`end_marker`."""
    after = encode(tokenizer, _behind_answer(tokenizer))
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return after[:1] if after and after[0] in special else after or [tokenizer.eos_token_id]


def end_marker(tokenizer: PreTrainedTokenizerBase) -> str:
    """What ends an answer where the template's marker is no token of this tokenizer but several
    (ChatML with a tokenizer that was made for another template); else ``""``.

    The first piece can be merged with the answer's last one, so it is looked for as text.
    """
    return _behind_answer(tokenizer) if len(end_of_turn(tokenizer)) > 1 else ""


def _behind_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template puts behind an answer."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
    _, answer, rest = text.rpartition(_ANSWER)
    return rest.strip() if answer else ""


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every single token that ends an answer: the template's, the tokenizer's, the model's own."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    template = end_of_turn(tokenizer)
    found = [*(template if len(template) == 1 else []), tokenizer.eos_token_id]
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
) -> Pair:
    """Ids of prompt and response apart; ``end`` appends the template's end of a turn.

    A response cut at ``max_response_tokens`` gets no end.
    """
    head = encode(tokenizer, render_prompt(tokenizer, prompt, system, before))
    body = encode(tokenizer, response)
    if max_response_tokens is not None and len(body) > max_response_tokens:
        return head, body[:max_response_tokens]
    return head, body + end_of_turn(tokenizer) * end
