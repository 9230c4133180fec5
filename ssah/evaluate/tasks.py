"""Utility: multiple choice, exact match and perplexity, batched; and lm-eval as the reference.

The batched scorer computes what lm-evaluation-harness computes for the same items (a test compares
them) in a fraction of the time: logits only where an answer is scored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import SsahError
from ..data.rows import Row
from ..text.chat import encode, encode_dialogue
from .generate import complete
from .likelihood import choice_losses, continuation_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


#: What ends the part of an answer that is scored.
PARAGRAPH_END = "\n\n"


def question_text(row: Row) -> str:
    """Prompt of a multiple-choice or arithmetic item; the lm-eval task files use the same."""
    return f"Question: {row.prompt}\nAnswer:"


def multiple_choice(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int
) -> list[bool]:
    """Per item: does the right choice have the highest likelihood (lm-eval's ``acc``)?"""
    items = []
    for row in rows:
        question = question_text(row)
        context = encode(tokenizer, question, special_tokens=True)
        # Encoded together and cut, as lm-eval does: tokens can span the seam otherwise.
        whole = [encode(tokenizer, f"{question} {c}", special_tokens=True) for c in row.choices]
        items.append((context, [ids[len(context) :] for ids in whole]))
    losses = choice_losses(model, items, batch_size)
    return [
        row.choices[min(range(len(own)), key=own.__getitem__)] == row.response
        for row, own in zip(rows, losses, strict=True)
    ]


def last_number(text: str) -> str | None:
    """The last integer in a text (of its first paragraph), as digits."""
    found = re.findall(r"-?\d+", text.partition(PARAGRAPH_END)[0].replace(",", ""))
    return found[-1] if found else None


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int,
    max_new_tokens: int = 64,
) -> list[bool]:
    """Per arithmetic item: is the last number of a greedy answer (of its first paragraph) the right
    one? Chat models often repeat the question first, so there has to be room for both."""
    texts = [question_text(row) for row in rows]
    answers = complete(
        model,
        tokenizer,
        texts,
        max_new_tokens,
        batch_size,
        special_tokens=True,
        until=PARAGRAPH_END,
    )
    return [last_number(a) == r.choices[0] for a, r in zip(answers, rows, strict=True)]


def text_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int,
    max_tokens: int = 48,
) -> tuple[list[int], list[float]]:
    """Token counts and summed losses of held-out answers given their prompts."""
    pairs = [
        encode_dialogue(tokenizer, row.prompt, row.response or "", max_response_tokens=max_tokens)
        for row in rows
    ]
    return [len(t) for _, t in pairs], continuation_losses(model, pairs, batch_size)


def lm_eval_outcomes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None,
    batch_size: int,
    include_path: Path | None = None,
) -> dict[str, list[bool]]:
    """Right or wrong by item (``acc``) from lm-evaluation-harness, by task.

    ``include_path`` is a folder of local task files, used instead of the library's own.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SsahError(
            "evaluate.utility=lm_eval needs lm-eval: pip install 'ssah[lm-eval]'."
        ) from error
    manager = TaskManager(
        include_path=str(include_path) if include_path else None,
        include_defaults=include_path is None,
    )
    output = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
    )
    return {
        task: [_is_right(task, sample) for sample in sorted(items, key=lambda s: s["doc_id"])]
        for task, items in output["samples"].items()
    }


def _is_right(task: str, sample: Mapping[str, Any]) -> bool:
    if "acc" not in sample:
        raise SsahError(
            f"The lm-eval task {task} has no accuracy (acc) of single items: take it out of "
            "evaluate.lm_eval_tasks."
        )
    return bool(sample["acc"])
