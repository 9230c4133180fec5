"""Completions, batched by length; what they mean is for the judges to say."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from tqdm.auto import tqdm

from ..text.batches import by_length, pad
from ..text.chat import encode, end_tokens

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    sample_seed: int | None = None,
    special_tokens: bool = False,
) -> list[str]:
    """Continuation of each rendered prompt as text, by :func:`continuations`.

    Texts that went through no chat template need ``special_tokens``
    (:func:`ssah.text.chat.encode`).
    """
    ids = [encode(tokenizer, text, special_tokens=special_tokens) for text in texts]
    answers = continuations(model, tokenizer, ids, max_new_tokens, batch_size, sample_seed)
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


@torch.inference_mode()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    sample_seed: int | None = None,
) -> list[list[int]]:
    """Token ids that follow each prompt's, in the order given, without the end-of-turn token:
    greedy, or sampled from the model's whole distribution (temperature 1) with ``sample_seed``.

    Prompts are padded on the left and batched by length, so that equal prompts get equal batch
    shapes in every arm that is compared. Generation stops at any token that ends a turn
    (:func:`ssah.text.chat.end_tokens`). What else the model's own generation settings say, such as
    a penalty for repetition, has no part in it.
    """
    from transformers import GenerationConfig

    ends = end_tokens(model, tokenizer)
    answers: list[list[int]] = [[]] * len(ids)
    if sample_seed is not None:
        torch.manual_seed(sample_seed)
    batches = list(by_length([len(prompt) for prompt in ids], batch_size))
    for chosen in tqdm(batches, desc="completions", leave=False, disable=not sys.stderr.isatty()):
        batch = [ids[i] for i in chosen]
        prompt = pad(batch, tokenizer.pad_token_id, "left").to(model.device)
        attention = pad([[1] * len(b) for b in batch], 0, "left").to(model.device)
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=sample_seed is not None,
            **({} if sample_seed is None else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
        )
        with _only(model, settings):
            output = cast(Any, model).generate(input_ids=prompt, attention_mask=attention)
        for i, row in zip(chosen, output[:, prompt.shape[1] :].tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in ends), len(row))
            answers[i] = row[:end]
    return answers


@contextmanager
def _only(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Generation settings in place of the model's own, which fill what an argument leaves open."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own
