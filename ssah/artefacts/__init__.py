"""Every figure and table by one id, which is also its make target, command and file stem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from ..core.errors import SsahError, suggestion

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from ..lab.config import Config
    from ..lab.lab import Lab
    from ..lab.measure import Measure


@dataclass
class Output:
    """What a view makes of the measurements: a table or a figure, and what a reader must know."""

    note: str
    table: pd.DataFrame | None = None
    figure: Figure | None = None


@dataclass(frozen=True)
class Artefact:
    """A figure or table of the paper, or one that it lacks.

    Its module holds ``ask_<id>(lab)``, the measures that it needs, and ``<id>(table, config)``, a
    view of the table of measurements.
    """

    id: str
    title: str
    notebook: str
    module: str  #: of this package; it holds a function named like the artefact

    def ask(self, lab: Lab) -> list[Measure]:
        """What has to be measured for it, in one seed."""
        if self._left_out(lab.config):
            return []
        return getattr(self._module, f"ask_{self.id}")(lab)

    def _left_out(self, config: Config) -> str:
        """Why nothing is measured of a model that is for aligning alone; empty where it is."""
        if config.model.use == "everything" or self.notebook == BUDGET:
            return ""
        return (
            f"Not measured here: {config.model.name} is for aligning alone (model.use=aligning), "
            f"which is notebook {BUDGET}."
        )

    def view(self, table: pd.DataFrame, configs: Mapping[str, Config]) -> Output:
        """The figure or table, of what was measured; of several models (each with its
        configuration) one below the other."""
        models = [name for name in configs if (table["model"] == name).any()]
        first = next(iter(configs.values()))
        if not models and (reason := self._left_out(first)):
            return self.empty(reason)
        if len(models) < 2:
            return self._view(table, configs[models[0]] if models else first)
        from .several import below_each_other

        return below_each_other(self._view, table, {name: configs[name] for name in models})

    def _view(self, table: pd.DataFrame, config: Config) -> Output:
        """Of one model; where a view says why there is nothing to show, this stands there."""
        view = getattr(self._module, self.id)
        if self.is_table:
            from .pick import fewer_seeds, mostly_neither

            output = view(table, config)
            output.note += mostly_neither(table) + fewer_seeds(table)
            return output
        from .draw import styled

        with styled():
            output = view(table, config)
        return output if output.figure else self.empty(output.note)

    @property
    def is_table(self) -> bool:
        return self.id.startswith("table")

    def empty(self, reason: str) -> Output:
        """What stands in its place where there is nothing to show."""
        import pandas as pd

        from .draw import written_figure

        if self.is_table:
            return Output(reason, pd.DataFrame({"not measured": [reason]}))
        return Output(reason, figure=written_figure(reason))

    @property
    def _module(self) -> ModuleType:
        """Imported only now, to keep the command line quick."""
        return import_module(f".{self.module}", __name__)


REASONING, ROLES = "01_reasoning_direction", "02_unit_roles"
TRANSFER, FREEZING = "03_attribute_transfer", "04_freezing"
RIVALS, BUDGET = "05_rivals", "06_alignment_budget"
JAILBREAKS, BEYOND, VERDICTS = "07_jailbreaks", "08_beyond_the_paper", "09_verdicts"

#: All artefacts, in the order of the notebooks.
ARTEFACTS = {
    artefact.id: artefact
    for artefact in (
        Artefact("table11", "The two models of the pair", REASONING, "reasoning"),
        Artefact("fig2", "Reasoning direction by token", REASONING, "reasoning"),
        Artefact("fig3", "Reasoning direction by block", REASONING, "reasoning"),
        Artefact("fig4", "Beyond content and words", REASONING, "reasoning"),
        Artefact("fig7", "Other harmful prompts", REASONING, "reasoning"),
        Artefact("fig_margin", "The model's own choice", REASONING, "reasoning"),
        Artefact("fig_readout", "Read-out before any word", REASONING, "reasoning"),
        Artefact("fig_share_sweep", "Ablation sweep", ROLES, "unit_roles"),
        Artefact("fig_roles_map", "Where the units are", ROLES, "unit_roles"),
        Artefact("fig_stability", "Are they the same units again?", ROLES, "unit_roles"),
        Artefact("table1", "Ablating groups of units", ROLES, "unit_roles"),
        Artefact("table12", "Ablating groups, another family", ROLES, "unit_roles"),
        Artefact("fig5", "Flow of units between groups", TRANSFER, "transfer"),
        Artefact("fig11", "Attribute transfer, all units", TRANSFER, "transfer"),
        Artefact("fig12", "Transfer, heads and neurons", TRANSFER, "transfer"),
        Artefact("fig13", "What becomes of the ESU", TRANSFER, "transfer"),
        Artefact("table2", "Freezing, instructions", FREEZING, "freezing"),
        Artefact("table13", "Freezing, arithmetic", FREEZING, "freezing"),
        Artefact("table3", "Utility after fine-tuning", FREEZING, "freezing"),
        Artefact("fig8", "How much to freeze", FREEZING, "freezing_figures"),
        Artefact("fig_conditions", "When freezing works", FREEZING, "freezing_figures"),
        Artefact("fig_sufficiency", "Units of the aligned model", FREEZING, "freezing_figures"),
        Artefact("table14", "Freezing, another family, instructions", FREEZING, "freezing"),
        Artefact("table15", "Freezing, another family, arithmetic", FREEZING, "freezing"),
        Artefact("table5", "Adapters and safety", RIVALS, "adapters"),
        Artefact("table7", "Safety neurons, instructions", RIVALS, "rules"),
        Artefact("table8", "Safety neurons, arithmetic", RIVALS, "rules"),
        Artefact("table9", "Safety layers, instructions", RIVALS, "rules"),
        Artefact("table10", "Safety layers, arithmetic", RIVALS, "rules"),
        Artefact("table_defences", "Defences that train", RIVALS, "defences"),
        Artefact("fig_defences", "Safety against what is learned", RIVALS, "defences"),
        Artefact("fig_defences_steps", "Prevented or delayed?", RIVALS, "defences"),
        Artefact("table4", "Aligning through redundant units", BUDGET, "alignment"),
        Artefact("table_instructions", "Harmless rows through RU alone", BUDGET, "alignment"),
        Artefact("fig_budget", "The tax against safety", BUDGET, "alignment"),
        Artefact("fig6", "From UU and RU to four groups", BUDGET, "transfer"),
        Artefact("fig9", "The same as a matrix", BUDGET, "transfer"),
        Artefact("fig10", "The same, heads and neurons", BUDGET, "transfer"),
        Artefact("table16", "Jailbreaks after instructions", JAILBREAKS, "jailbreaks"),
        Artefact("table17", "Jailbreaks after dialogues and arithmetic", JAILBREAKS, "jailbreaks"),
        Artefact("fig_depth", "How deep refusals are", JAILBREAKS, "jailbreaks"),
        Artefact("fig_overview", "Removed, frozen, mixed", BEYOND, "overview"),
        Artefact("fig_verdicts", "What becomes of the prompts", VERDICTS, "overview"),
        Artefact("table_judges", "Agreement of the judges with labels", VERDICTS, "overview"),
    )
}


def find(name: str) -> Artefact:
    """The artefact of that id; :class:`SsahError` with the nearest one otherwise."""
    if name not in ARTEFACTS:
        raise SsahError(f"Unknown artefact '{name}'{suggestion(name, list(ARTEFACTS))}")
    return ARTEFACTS[name]
