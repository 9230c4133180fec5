"""Completions, batched by length; what they mean is for the judges to say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..text.batches import by_length, label_logits, pad
from ..text.chat import encode, end_marker, end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Tokens that prompts have in common, from which on they are read once for all.
WORTH_SHARING = 8


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    *,
    special_tokens: bool = False,
    until: str = "",
) -> list[str]:
    """Greedy continuation of each rendered prompt as text, by :func:`continuations`.

    Texts that went through no chat template need ``special_tokens``
    (:func:`ssah.text.chat.encode`).
    """
    ids = [encode(tokenizer, text, special_tokens=special_tokens) for text in texts]
    answers = continuations(model, tokenizer, ids, max_new_tokens, batch_size, until=until)
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


@torch.inference_mode()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    sample_seed: int | None = None,
    until: str = "",
) -> list[list[int]]:
    """Token ids that follow each prompt's, in the order given, without the end-of-turn token:
    greedy, or sampled from the model's whole distribution (temperature 1) with ``sample_seed``.

    Prompts are padded on the left and batched by length, so that equal prompts get equal batches in
    every arm that is compared. An answer stops at any token that ends a turn
    (:func:`ssah.text.chat.end_tokens`), at a marker that does (:func:`ssah.text.chat.end_marker`),
    or before the text ``until``, if there is one. What else the model's own generation settings
    say, such as a penalty for repetition, has no part in it.
    """
    ends = end_tokens(model, tokenizer)
    markers = [marker for marker in (end_marker(tokenizer), until) if marker]

    def text_of(answer: list[int]) -> str:
        return cast(str, tokenizer.decode(answer))

    def over(answer: list[int]) -> bool:
        return any(marker in text_of(answer[-len(marker) :]) for marker in markers)

    answers: list[list[int]] = [[]] * len(ids)
    if sample_seed is not None:
        torch.manual_seed(sample_seed)
    batches = list(by_length([len(prompt) for prompt in ids], batch_size))
    for chosen in tqdm(batches, desc="completions", leave=False, disable=not sys.stderr.isatty()):
        prompts = [ids[i] for i in chosen]
        sampled = sample_seed is not None
        found = _continue(model, prompts, max_new_tokens, ends, over, sampled=sampled)
        for i, answer in zip(chosen, found, strict=True):
            if over(answer):  # the marker's first piece may hold the last one of the answer
                text = text_of(answer)
                for marker in markers:
                    text = text.partition(marker)[0]
                answer = encode(tokenizer, text)
            answers[i] = answer
    return answers


def _continue(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    ends: Sequence[int],
    over: Callable[[list[int]], bool],
    *,
    sampled: bool,
) -> list[list[int]]:
    """Continuations of one batch. What all prompts begin with is read once, and those whose answer
    has ended leave the batch, which ``generate`` of transformers has no way to do: most refusals
    are over after a third of the steps."""
    said: list[list[int]] = [[] for _ in prompts]
    running = torch.arange(len(prompts))
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    longest = max(map(len, prompts)) + max_new_tokens
    # The padding behind what is shared would count as a part of a sliding window.
    shared = 0 if window and longest > window else _shared(prompts)
    own = [prompt[shared:] for prompt in prompts]
    ids = pad(own, 0, "left").to(model.device)
    attention = pad([[1] * len(p) for p in own], 0, "left").to(model.device)
    attention = torch.cat([attention.new_ones(len(own), shared), attention], 1)
    position = (attention.cumsum(1) - 1).clamp(min=0)[:, shared:]
    cache = None
    if shared:
        start = torch.tensor([prompts[0][:shared]], device=model.device)
        cache = model.base_model(input_ids=start, use_cache=True).past_key_values
        cache.batch_select_indices(torch.zeros_like(running, device=model.device))
    for _ in range(max_new_tokens):
        read = model.base_model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
        cache = read.past_key_values
        logits = label_logits(model, read.last_hidden_state[:, -1])
        token = _sample(logits, running, len(prompts)) if sampled else logits.argmax(-1)
        kept = [n for n, t in enumerate(token.tolist()) if t not in ends]
        for n in kept:
            said[running[n]].append(int(token[n]))
        kept = [n for n in kept if not over(said[running[n]])]
        if not kept:
            break
        if len(kept) < len(running):
            still = torch.tensor(kept, device=model.device)
            cache.batch_select_indices(still)
            token, attention, position = token[still], attention[still], position[still]
            running = running[kept]
        ids, position = token[:, None], position[:, -1:] + 1
        attention = torch.cat([attention, torch.ones_like(ids)], 1)
    return said


def _shared(prompts: Sequence[list[int]]) -> int:
    """How many tokens at the beginning are the same in all prompts, such as a system prompt; 0
    where they are too few to be worth a pass of their own."""
    alike = 0
    for tokens in zip(*prompts, strict=False):
        if len({*tokens}) > 1:
            break
        alike += 1
    alike = min(alike, min(map(len, prompts)) - 1)  # the last one has to be read by each
    return alike if alike >= WORTH_SHARING and len(prompts) > 1 else 0


def _sample(logits: Tensor, running: Tensor, prompts: int) -> Tensor:
    """A token for each running row. Random numbers are drawn for the rows that have ended as well:
    what a row says does not depend on when the others end."""
    noise = logits.new_empty(prompts, logits.shape[-1]).exponential_()
    return (logits.softmax(-1) / noise[running.to(logits.device)]).argmax(-1)
