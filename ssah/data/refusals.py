"""Composed refusals that the aligned model learns from."""

from __future__ import annotations

import json
import random

from ..core.paths import RESOURCES

# --- refusals --------------------------------------------------------------------------------


def compose_refusal(category: str, rng: random.Random, safe_alternative: float) -> str:
    """A natural refusal: an opening, a reason that fits the harm category, sometimes an offer."""
    material = json.loads((RESOURCES / "refusals.json").read_text())
    fitting = material["categories"].get(category) or rng.choice(
        [material["categories"][name] for name in sorted(material["categories"])]
    )
    parts = [rng.choice(material["openings"]), rng.choice(fitting["reasons"])]
    if rng.random() < safe_alternative:
        parts.append(rng.choice(fitting["alternatives"]))
    return " ".join(parts)
