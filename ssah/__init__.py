"""Runnable companion of *Superficial Safety Alignment Hypothesis* (Li & Kim, ICLR 2026).

Fine-tune a chat model while the units that carry its refusals keep their bits::

    mask = ssah.find_units(model, tokenizer, safety, utility).select("ESU", "CU:6%")
    with ssah.freeze_units(model, mask):
        Trainer(model, ...).train()
    model.save_pretrained(out)
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Roles": "units.roles",
    "Shares": "units.roles",
    "Study": "app.study",
    "UnitLayout": "units.layout",
    "UnitMask": "units.mask",
    "ablate": "training.ablation",
    "check": "app.protect.protect",
    "find_conflicts": "scoring.find",
    "find_units": "scoring.find",
    "freeze_units": "training.slicing",
    "protect": "app.protect.protect",
    "train_only": "training.slicing",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import on first use: ``import ssah`` alone stays quick."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ssah' has no attribute '{name}'")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
