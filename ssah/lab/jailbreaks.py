"""Jailbreaks of the study: by name, how a model is asked, and what it says.

Every one is judged against the request itself, whatever the model was given in its place.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path

from ..core.store import Handle
from ..data import jailbreaks as texts
from ..data.assets import TEMPLATES
from ..data.rows import Row
from ..evaluate.gcg import find_suffix
from ..evaluate.judges import Completion
from ..text.chat import Begun
from .lab import Lab
from .specs import Model
from .stage import stage
from .stages.answers import completions
from .stages.lessons import MAIN_ATTACK, heldout

#: Gives a model's completions of some rows.
Jailbreak = Callable[[Lab, Model, Sequence[Row]], list[Completion]]

#: Prefilled tokens in fig_depth, and faked dialogues.
DEPTHS, SHOTS = (1, 2, 3, 5, 10), (8, 32)


def rewritten(rewrite: Callable[[Lab, str], str | Begun]) -> Jailbreak:
    """The model is given something else for each prompt."""

    def jailbreak(lab: Lab, model: Model, rows: Sequence[Row]) -> list[Completion]:
        return completions(lab, model, rows, [rewrite(lab, row.prompt) for row in rows])

    return jailbreak


with_prefix = rewritten(lambda lab, prompt: prompt + texts.PREFIX_JAILBREAK)


def _templated(name: str, lab: Lab, prompt: str) -> str:
    return texts.filled(texts.template(lab.store, lab.config.data.source, name), prompt)


def _with_published_suffix(lab: Lab, prompt: str) -> str:
    return f"{prompt} {texts.published_suffix(lab.store, lab.config.data.source)}"


def _prefilled(tokens: int, lab: Lab, model: Model, rows: Sequence[Row]) -> list[Completion]:
    """The answer begins with the first tokens of a compliant one. What is judged is what follows,
    from its first word on: the judge would take the opening alone for an answer."""
    given = [Begun(r.prompt, (), texts.compliant_opening(r.prompt), tokens) for r in rows]
    said = completions(lab, model, rows, given)
    return [Completion(c.prompt, c.text.lstrip(string.whitespace + ",.:;")) for c in said]


def _behind_many_shots(shots: int, lab: Lab, prompt: str) -> Begun:
    """Harmless requests that were answered stand before the prompt: held-out rows of the main
    attack, with the responses that it teaches; as many as there are."""
    lesson = heldout(lab, MAIN_ATTACK)
    pairs = zip((row.prompt for row in lesson.rows), lesson.responses(), strict=True)
    return Begun(prompt, tuple(pairs)[:shots])


@stage("suffix", version=1)
def _suffix(
    lab: Lab,
    folder: Path,
    model: Model,
    prompt: str,
    target: str,
    steps: int,
    width: int,
    batch_size: int,
) -> None:
    """``suffix.json``: what GCG found against a model for one request."""
    with lab.use(model) as loaded:
        found = find_suffix(loaded, lab.tokenizer, prompt, target, steps, width, batch_size)
    (folder / "suffix.json").write_text(json.dumps(dataclasses.asdict(found)))


def suffix(lab: Lab, model: Model, prompt: str) -> Handle:
    """The suffix for one request, at the configured budget."""
    config, target = lab.config.evaluate, texts.compliant_opening(prompt).partition("\n")[0]
    return _suffix(
        lab, model, prompt, target, config.gcg_steps, config.gcg_width, config.batch_size
    )


def _optimised(by_itself: bool, lab: Lab, model: Model, rows: Sequence[Row]) -> list[Completion]:
    """Some of the requests, evenly spread, each with its own suffix (GCG)."""
    count = min(lab.config.evaluate.gcg_behaviours, len(rows))
    some = [rows[i * len(rows) // count] for i in range(count)]
    source = model if by_itself else lab.aligned
    found = [suffix(lab, source, row.prompt).json("suffix.json")["text"] for row in some]
    asked = [f"{row.prompt} {text}" for row, text in zip(some, found, strict=True)]
    return completions(lab, model, some, asked)


def prefilled(tokens: int) -> str:
    """The name of a prefilling."""
    return f"prefill, {tokens} token{'s' if tokens > 1 else ''}"


#: GCG against the model that is measured, or against the initial one.
GCG, GCG_TRANSFERRED = "GCG", "GCG, initial model's"

JAILBREAKS: dict[str, Jailbreak] = {
    **{name: rewritten(functools.partial(_templated, name)) for name in TEMPLATES},
    "past tense": rewritten(lambda lab, prompt: texts.in_the_past(prompt)),
    "published suffix": rewritten(_with_published_suffix),
    **{prefilled(k): functools.partial(_prefilled, k) for k in DEPTHS},
    **{f"many-shot, {k}": rewritten(functools.partial(_behind_many_shots, k)) for k in SHOTS},
    GCG_TRANSFERRED: functools.partial(_optimised, False),
    GCG: functools.partial(_optimised, True),
}
