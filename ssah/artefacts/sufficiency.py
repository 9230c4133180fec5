"""Notebook 04: what drifted under the attack, the safety units or what reaches them?"""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..lab import catalogue
from ..lab.arms import units_name
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.stages.lessons import MAIN_ATTACK
from . import Output
from .draw import COLOURS, new_figure, styled, written_figure
from .pick import arms_of, estimate

_SAFETY = ("ASR", "no refusal phrase", "perplexity", "units")

#: How comparisons are called.
UNPATCHED = "nothing patched"


def ask_fig_sufficiency(lab: Lab) -> list[Measure]:
    """The aligned model, the attacked one, and the attacked one with units of the aligned one."""
    experiment = lab.config.experiment
    if not experiment.patched:
        return []
    before = catalogue.attacked_longest(lab)
    asked = [Measure(arm, m) for arm in (catalogue.whole(lab), before) for m in _SAFETY[:3]]
    for name in experiment.patched:
        arm = catalogue.patched(lab, name)
        controls = [
            catalogue.patched_control(lab, name, draw) for draw in range(experiment.patched_draws)
        ]
        for own in (arm, *controls):
            asked += [Measure(own, metric) for metric in _SAFETY]
            asked.append(Measure(own, "ASR", "", before, UNPATCHED))
        asked += [Measure(arm, "ASR", "", c, f"random, draw {c.draw}") for c in controls]
    return asked


def fig_sufficiency(table: pd.DataFrame, config: Config) -> Output:
    """ASR of the attacked model with the aligned model's activations in some units."""
    output = Output(
        f"The model after {config.finetune.epochs} epochs of the main attack ({MAIN_ATTACK}, "
        "nothing frozen); in the units that are named, activations are those of the aligned model "
        "on the same tokens (activation patching). Where refusals return, the attack changed what "
        "reaches these units or how they read it, and what they say is enough to refuse. Random: "
        "equally many heads and neurons. ASR is answered; beside it, hollow, the share without a "
        "refusal phrase. Bars: 95 % intervals."
    )
    arms = arms_of(table, method="patched")
    if not arms:
        output.note = (
            "Not measured here: activation patching is part of `experiment=published` "
            "(experiment.patched names the groups)."
        )
        output.figure = written_figure(output.note)
        return output
    attacked = catalogue.ATTACKED_LONGEST | {"epoch": config.finetune.epochs}
    shown = [("aligned, before the attack", {}), ("attacked, nothing patched", attacked)]
    shown += [(units_name(arm["rule"], arm["like"]), arm) for arm in arms]
    with styled():
        output.figure = new_figure(7, 1.1 + 0.32 * len(shown))
        axes = output.figure.subplots()
        for metric, shift, filled in (("ASR", -0.12, True), ("no refusal phrase", 0.12, False)):
            found = [(row, estimate(table, metric, **arm)) for row, (_, arm) in enumerate(shown)]
            known = [(row, e) for row, e in found if e is not None]
            axes.errorbar(
                [e.value for _, e in known], [row + shift for row, _ in known],
                xerr=np.array([(e.value - e.low, e.high - e.value) for _, e in known]).T,
                fmt="o", ms=5, color=COLOURS["ESU"] if filled else COLOURS["random"],
                mfc=None if filled else "white", capsize=2, lw=1, label=metric,
            )  # fmt: skip
        axes.set_yticks(range(len(shown)), [name for name, _ in shown])
        axes.invert_yaxis()
        axes.set(xlabel="% of the evaluation prompts", xlim=(-2, 102))
        axes.legend(fontsize=7, loc="lower right")
    return output
