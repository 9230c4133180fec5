"""Every figure and table by one id, which is also its make target, command and file stem."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..core.errors import SsahError, suggestion

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from ..app.study import Study
    from ..evaluate.stats import Estimate


@dataclass
class Output:
    """What an artefact's function returns.

    ``table`` is for reading (formatted); ``metrics`` are the numbers, one row each, with arm,
    metric, seed, value, low, high and n.
    """

    note: str
    table: pd.DataFrame | None = None
    figure: Figure | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def add(self, arm: str, metric: str, seed: int | str, estimate: Estimate) -> None:
        self.metrics.append({"arm": arm, "metric": metric, "seed": seed, **asdict(estimate)})

    def frame(self, study: Study, artefact: str) -> pd.DataFrame:
        """The metrics, with their origin (:attr:`Study.stamp`).

        With ``add_to``, those of the earlier run that were not measured now for an arm and seed
        come behind them, with the origin that they have there. Another profile's or model's
        numbers are an :class:`SsahError`.
        """
        import pandas as pd

        own = pd.DataFrame(self.metrics, columns=COLUMNS).assign(**study.stamp)
        if study.earlier is None:
            return own
        earlier = study.earlier[study.earlier["artefact"] == artefact].drop(columns="artefact")
        for what in ("profile", "model"):
            others = set(earlier[what]) - {study.stamp[what]}
            if others:
                raise SsahError(
                    f"add_to={study.config.add_to} holds {artefact} of {what} {min(others)}, which "
                    f"cannot be added to that of {study.stamp[what]}."
                )
        known = earlier[~_measurement(earlier).isin(_measurement(own))]
        return pd.concat([own.astype({"seed": str}), known], ignore_index=True)


#: Of :attr:`Output.metrics`.
COLUMNS = ["arm", "metric", "seed", "value", "low", "high", "n"]


def _measurement(frame: pd.DataFrame) -> pd.Series:
    """What a row measures: arm, metric and seed, whatever the random draw."""
    seed = frame["seed"].astype(str).str.split(".").str[0]
    return frame["arm"] + "\n" + frame["metric"] + "\n" + seed


@dataclass(frozen=True)
class Artefact:
    """A figure or table of the paper, or one that it lacks."""

    id: str
    title: str
    notebook: str
    module: str  #: of this package; it holds a function named like the artefact

    def compute(self, study: Study) -> Output:
        """Call the function; its module is imported only now, to keep the command line quick."""
        return getattr(import_module(f".{self.module}", __name__), self.id)(study)


REASONING, ROLES = "01_reasoning_direction", "02_unit_roles"
TRANSFER, FREEZING = "03_attribute_transfer", "04_freezing"
BUDGET, VERDICTS = "06_alignment_budget", "09_verdicts"

#: All artefacts, in the order of the notebooks.
ARTEFACTS = {
    artefact.id: artefact
    for artefact in (
        Artefact("table11", "The two models of the pair", REASONING, "table11"),
        Artefact("fig2", "Reasoning direction by token", REASONING, "reasoning"),
        Artefact("fig3", "Reasoning direction by block", REASONING, "reasoning"),
        Artefact("fig4", "Beyond content and words", REASONING, "reasoning"),
        Artefact("fig7", "Other harmful prompts", REASONING, "reasoning"),
        Artefact("fig_margin", "The model's own choice", REASONING, "choice"),
        Artefact("fig_readout", "Read-out before any word", REASONING, "choice"),
        Artefact("fig_share_sweep", "Ablation sweep", ROLES, "unit_roles"),
        Artefact("fig_roles_map", "Where the units are", ROLES, "unit_roles"),
        Artefact("table1", "Ablating groups of units", ROLES, "table1"),
        Artefact("fig5", "Flow of units between groups", TRANSFER, "transfer"),
        Artefact("fig11", "Attribute transfer, all units", TRANSFER, "transfer"),
        Artefact("fig12", "Transfer, heads and neurons", TRANSFER, "transfer"),
        Artefact("fig13", "What becomes of the ESU", TRANSFER, "transfer"),
        Artefact("table2", "Freezing, instructions", FREEZING, "freezing"),
        Artefact("table13", "Freezing, arithmetic", FREEZING, "freezing"),
        Artefact("table3", "Utility after fine-tuning", FREEZING, "table3"),
        Artefact("fig8", "How much to freeze", FREEZING, "freezing_figures"),
        Artefact("fig_conditions", "When freezing works", FREEZING, "freezing_figures"),
        Artefact("table14", "Freezing in Mistral, instructions", FREEZING, "freezing"),
        Artefact("table15", "Freezing in Mistral, arithmetic", FREEZING, "freezing"),
        Artefact("table4", "Aligning through redundant units", BUDGET, "alignment"),
        Artefact("fig_budget", "The tax against safety", BUDGET, "alignment"),
        Artefact("fig6", "From UU and RU to four groups", BUDGET, "budget_transfer"),
        Artefact("fig9", "The same as a matrix", BUDGET, "budget_transfer"),
        Artefact("fig10", "The same, heads and neurons", BUDGET, "budget_transfer"),
        Artefact("fig_verdicts", "What becomes of the prompts", VERDICTS, "verdicts"),
        Artefact("table_judges", "Agreement of the judges with labels", VERDICTS, "verdicts"),
    )
}


def find(name: str) -> Artefact:
    """The artefact of that id; :class:`SsahError` with the nearest one otherwise."""
    if name not in ARTEFACTS:
        raise SsahError(f"Unknown artefact '{name}'{suggestion(name, list(ARTEFACTS))}")
    return ARTEFACTS[name]
