"""What models say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...core.store import Handle
from ...data.rows import Row
from ...evaluate.generate import continuations
from ...evaluate.judges import Completion
from ...text.chat import Begun, prompt_ids
from ..lab import Lab
from ..specs import Model
from ..stage import stage


@stage("answers", version=2)
def answers(
    lab: Lab,
    folder: Path,
    model: Model,
    prompts: Sequence[str | Begun],
    max_new_tokens: int,
    batch_size: int,
    system: str = "",
    sample_seed: int | None = None,
) -> None:
    """``answers.json``: a model's answer to each prompt; greedy, unless ``sample_seed`` asks for a
    draw from its whole distribution. Of an answer that has begun it is what follows."""
    tokenizer = lab.tokenizer
    with lab.use(model) as loaded:
        room = loaded.config.get_text_config().max_position_embeddings - max_new_tokens
        ids = [prompt_ids(tokenizer, prompt, system, room) for prompt in prompts]
        found = continuations(loaded, tokenizer, ids, max_new_tokens, batch_size, sample_seed)
    said = tokenizer.batch_decode(found, skip_special_tokens=True)
    (folder / "answers.json").write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")


def answers_to(
    lab: Lab, model: Model, rows: Sequence[Row], max_new_tokens: int, sample_seed: int | None = None
) -> Handle:
    """A model's answers to the prompts of some rows, to learn from or to score units on."""
    prompts = [row.prompt for row in rows]
    batch_size = lab.config.evaluate.batch_size
    return answers(lab, model, prompts, max_new_tokens, batch_size, sample_seed=sample_seed)


def completions(
    lab: Lab,
    model: Model,
    rows: Sequence[Row],
    given: Sequence[str | Begun] | None = None,
    *,
    system: bool = False,
) -> list[Completion]:
    """A model's completions at the length that is judged. What was asked is the row's own prompt,
    even where the model is ``given`` something else for it."""
    config = lab.config.evaluate
    asked = [row.prompt for row in rows] if given is None else given
    said = answers(
        lab, model, asked, config.max_new_tokens, config.batch_size, config.system_prompt * system
    ).json("answers.json")
    return [Completion(row.prompt, text) for row, text in zip(rows, said, strict=True)]
