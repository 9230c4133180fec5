"""Notebook 02: are the groups the same ones where they are found in another way?"""

from __future__ import annotations

import pandas as pd

from ..lab import catalogue
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.metrics.stability import BY_SAFETY, ITSELF, OTHER_SEED
from ..lab.units_of import CU6
from . import Output
from .draw import COLOURS, new_figure, styled
from .pick import estimate

_GROUPS = ("ESU", "EUU", "RU", CU6, BY_SAFETY)


def ask_fig_stability(lab: Lab) -> list[Measure]:
    """The comparisons of the experiment; with another seed where there is a next one."""
    config = lab.config
    last = config.seed + max(config.n_seeds, config.headline_seeds) - 1
    asked = []
    for name in config.experiment.stability:
        if name == ITSELF:
            asked.append(Measure(catalogue.attacked_longest(lab), "stability", name))
        elif name != OTHER_SEED or lab.seed < last:
            asked.append(Measure(catalogue.whole(lab), "stability", name))
    return asked


def fig_stability(table: pd.DataFrame, config: Config) -> Output:
    """Overlap (IoU) of each group with itself as it is found in another way."""
    output = Output(
        "Units that are in both groups over units that are in either (IoU); 1: the same units. "
        "Grey bars: what equally many heads and neurons drawn at random would give. *Other "
        "prompts*: the same model, scored on other prompts of the same kind, which is as alike as "
        "two samples get. *After the attack*: the same model after fine-tuning on instructions "
        "with nothing frozen, scored on the same prompts. Sizes are always those of the search. "
        f"{BY_SAFETY}: as many heads and neurons as ESU by I_S alone, without subtracting I_U. "
        "Whiskers: smallest to largest over seeds. `experiment=published` compares more "
        "(experiment.stability)."
    )
    arms = {ITSELF: catalogue.ATTACKED_LONGEST | {"epoch": config.finetune.epochs}}
    known = [
        name
        for name in config.experiment.stability
        if estimate(table, "overlap", set="ESU", at=name, **arms.get(name, {})) is not None
    ]
    with styled():
        output.figure = new_figure(8.5, 3.2)
        axes = output.figure.subplots()
        width = 0.8 / max(len(known), 1)
        markers = dict(zip(known, "os^Dv", strict=False))
        for number, name in enumerate(known):
            places = [i - 0.4 + (number + 0.5) * width for i in range(len(_GROUPS))]
            found, chance = (
                [estimate(table, m, set=g, at=name, **arms.get(name, {})) for g in _GROUPS]
                for m in ("overlap", "overlap by chance")
            )
            axes.bar(places, [e.value for e in chance if e], width, color=COLOURS["RU"], alpha=0.4)
            values = [e for e in found if e]
            axes.errorbar(
                places, [e.value for e in values],
                yerr=[[e.value - e.low for e in values], [e.high - e.value for e in values]],
                fmt=markers[name], ms=5, capsize=2, lw=1, label=name,
            )  # fmt: skip
        axes.set_xticks(range(len(_GROUPS)), _GROUPS)
        axes.set(ylabel="overlap (IoU)", ylim=(0, 1.02))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return output
