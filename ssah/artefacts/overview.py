"""Notebook 08: what removing, freezing and mixing do, in one figure. The front page shows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..lab.catalogue import NOTHING
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.stages.lessons import MAIN_ATTACK
from ..lab.units_of import ALL_CU, CU6, ESU
from . import Output
from .defences import ask_table_defences
from .draw import COLOURS, new_figure, styled
from .freezing import ask_table2
from .pick import estimate
from .table1 import ask_table1


def _tuned(rule: str, like: str = "") -> dict[str, Any]:
    return {
        "method": "frozen", "rule": rule, "like": like, "attack": MAIN_ATTACK, "epoch": 1,
    }  # fmt: skip


#: What is done to the aligned model, and the columns of its arm.
_SHOWN: list[tuple[str, dict[str, Any]]] = [
    ("as it was aligned", {}),
    ("ESU removed", {"method": "removed", "rule": ESU}),
    ("random units removed", {"method": "removed", "rule": "random", "like": ESU}),
    ("fine-tuned on harmless rows", _tuned(NOTHING)),
    (f"the same, {CU6} frozen", _tuned(CU6)),
    ("the same, random units frozen", _tuned("random", CU6)),
    (f"the same, {ALL_CU} frozen", _tuned(ALL_CU)),
    ("the same, random units frozen", _tuned("random", ALL_CU)),
    (
        "the same, a tenth of the rows refusals",
        _tuned("mixing") | {"method": "defended", "setting": "10 %"},
    ),
]


def ask_fig_overview(lab: Lab) -> list[Measure]:
    """What Tables 1 and 2 and the table of defences ask."""
    return ask_table1(lab) + ask_table2(lab) + ask_table_defences(lab)


def fig_overview(table: pd.DataFrame, config: Config) -> Output:
    """ASR of the aligned model, and of what is made of it."""
    found = [(name, columns, estimate(table, "ASR", **columns)) for name, columns in _SHOWN]
    known = [(name, columns.get("rule"), e) for name, columns, e in found if e is not None]
    output = Output(
        "ASR: share of the held-out harmful prompts that are answered. Black: controls with "
        "equally many heads and neurons, drawn at random, as the line above. Fine-tuned: one epoch "
        f"on {MAIN_ATTACK}. Bars: 95 % intervals, over prompts and, where there are several, seeds."
    )
    with styled():
        output.figure = new_figure(7, 1.0 + 0.28 * len(known))
        axes = output.figure.subplots()
        for row, (_, rule, e) in enumerate(known):
            control = rule == "random"
            axes.errorbar(
                e.value, row, xerr=np.array([[e.value - e.low], [e.high - e.value]]),
                fmt="x" if control else "o", ms=6, capsize=2, lw=1.2,
                color=COLOURS["random" if control else "ESU"],
            )  # fmt: skip
        axes.set_yticks(range(len(known)), [name for name, *_ in known])
        axes.invert_yaxis()
        axes.set(xlabel="answered, % of the harmful prompts", xlim=(-2, 102))
    return output
