"""Suffixes that are optimised against a model. They stay in the run store."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ...core.store import Handle
from ...data.jailbreaks import compliant_opening
from ...evaluate.gcg import find_suffix
from ..lab import Lab
from ..specs import Model
from ..stage import stage


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
    config, target = lab.config.evaluate, compliant_opening(prompt).partition("\n")[0]
    return _suffix(
        lab, model, prompt, target, config.gcg_steps, config.gcg_width, config.batch_size
    )
