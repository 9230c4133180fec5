"""Utility: multiple choice, exact match and perplexity, batched; and lm-eval as the reference.

The batched scorer computes what lm-evaluation-harness computes for the same items (a test compares
them) in a fraction of the time: logits only where an answer is scored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Row
from ..errors import SsahError
from ..models import by_length, encode, encode_dialogue, pad
from .generate import complete


def question_text(row: Row) -> str:
    """Prompt of a multiple-choice or arithmetic item; the lm-eval task files use the same."""
    return f"Question: {row.prompt}\nAnswer:"


def label_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Vocabulary logits of chosen hidden states ``[n, hidden]`` -> ``[n, vocabulary]``."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.inference_mode()
def continuation_losses(
    model: PreTrainedModel,
    pairs: Sequence[tuple[list[int], list[int]]],
    batch_size: int,
) -> list[float]:
    """Negative log-likelihood (nats, summed) of each continuation given its context."""
    losses = [0.0] * len(pairs)
    for chosen in by_length([len(c) + len(t) for c, t in pairs], batch_size):
        batch = [pairs[i] for i in chosen]
        ids = pad([[*c, *t] for c, t in batch], 0).to(model.device)
        attention = pad([[1] * (len(c) + len(t)) for c, t in batch], 0).to(model.device)
        target = pad([[0] * len(c) + [1] * len(t) for c, t in batch], 0).bool().to(model.device)
        hidden = model.base_model(
            input_ids=ids, attention_mask=attention, use_cache=False
        ).last_hidden_state
        scored = target[:, 1:]
        logits = label_logits(model, hidden[:, :-1][scored]).float()
        token_loss = nn.functional.cross_entropy(logits, ids[:, 1:][scored], reduction="none")
        rows = scored.nonzero()[:, 0]
        sums = torch.zeros(len(chosen), device=rows.device).index_add_(0, rows, token_loss)
        for i, value in zip(chosen, sums.tolist(), strict=True):
            losses[i] = value
    return losses


@torch.inference_mode()
def choice_losses(
    model: PreTrainedModel,
    items: Sequence[tuple[list[int], list[list[int]]]],
    batch_size: int,
) -> list[list[float]]:
    """The same for several continuations of each context, which is read once for all of them.

    At most ``batch_size`` continuations are in memory at a time, or those of one context.
    """
    step = max(batch_size // max((len(texts) for _, texts in items), default=1), 1)
    found: list[list[float]] = [[]] * len(items)
    for chosen in by_length([len(context) for context, _ in items], step):
        contexts = [items[i][0] for i in chosen]
        texts = [text for i in chosen for text in items[i][1]]
        owner = torch.tensor([n for n, i in enumerate(chosen) for _ in items[i][1]])
        owner = owner.to(model.device)
        ids = pad(contexts, 0, "left").to(model.device)
        attention = pad([[1] * len(c) for c in contexts], 0, "left").to(model.device)
        read = model.base_model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=(attention.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
        )
        cache = read.past_key_values
        cache.batch_select_indices(owner)
        tails = pad(texts, 0).to(model.device)
        known = pad([[1] * len(t) for t in texts], 0).to(model.device)
        hidden = model.base_model(
            input_ids=tails,
            attention_mask=torch.cat([attention[owner], known], 1),
            position_ids=attention.sum(1)[owner, None] + known.cumsum(1) - 1,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        predicting = torch.cat([read.last_hidden_state[owner, -1:], hidden[:, :-1]], 1)
        scored = known.bool()
        logits = label_logits(model, predicting[scored]).float()
        token_loss = nn.functional.cross_entropy(logits, tails[scored], reduction="none")
        sums = torch.zeros(len(texts), device=model.device)
        sums.index_add_(0, scored.nonzero()[:, 0], token_loss)
        for n, i in enumerate(chosen):
            found[i] = sums[owner == n].tolist()
    return found


@torch.inference_mode()
def divergences(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    pairs: Sequence[tuple[list[int], list[int]]],
    batch_size: int,
) -> list[float]:
    """KL(reference || model) in nats per continuation token, by pair; 0 where there is none."""
    found = [0.0] * len(pairs)
    for chosen in by_length([len(c) + len(t) for c, t in pairs], batch_size):
        batch = [pairs[i] for i in chosen]
        ids = pad([[*c, *t] for c, t in batch], 0)
        attention = pad([[1] * (len(c) + len(t)) for c, t in batch], 0)
        scored = pad([[0] * len(c) + [1] * len(t) for c, t in batch], 0).bool()[:, 1:]
        wanted, given = (
            label_logits(
                m,
                m.base_model(
                    input_ids=ids.to(m.device),
                    attention_mask=attention.to(m.device),
                    use_cache=False,
                ).last_hidden_state[:, :-1][scored.to(m.device)],
            )
            .float()
            .log_softmax(-1)
            for m in (reference, model)
        )
        by_token = (wanted.exp() * (wanted - given)).sum(-1).cpu()
        sums = torch.zeros(len(batch)).index_add_(0, scored.nonzero()[:, 0], by_token)
        for i, mean in zip(chosen, (sums / scored.sum(1).clamp(min=1)).tolist(), strict=True):
            found[i] = mean
    return found


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int,
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
    found = re.findall(r"-?\d+", text.split("\n\n")[0].replace(",", ""))
    return found[-1] if found else None


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int,
    max_new_tokens: int = 16,
) -> list[bool]:
    """Per arithmetic item: is the last number of a greedy answer the right one?"""
    texts = [question_text(row) for row in rows]
    answers = complete(model, tokenizer, texts, max_new_tokens, batch_size, special_tokens=True)
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
        task: [bool(sample["acc"]) for sample in sorted(items, key=lambda s: s["doc_id"])]
        for task, items in output["samples"].items()
    }
