"""What is known of a model's units: how many an arm is about, their roles, and how roles change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...evaluate.stats import paired_difference, paired_p_value, proportion
from ...training.part import Part
from ...units.families import BlockKind
from ...units.layout import UnitLayout
from ...units.roles import GROUPS, Roles, transfer
from ..lab import Lab
from ..samples import Alone, Found, Sample, counted, exact
from ..specs import GIVEN, Ablate, Model, Patch, Train
from ..stages.criteria import safety_layers
from ..stages.roles import Rule, roles, roles_after, shares, trials, utility_roles

#: Which units a count is of, by the name that it has in tables.
SCOPES: dict[str, BlockKind | None] = {"all units": None, "heads": "attn", "neurons": "mlp"}

RULES: tuple[Rule, ...] = ("thresholds", "quantiles")

#: ``on`` of the noise floor: the same model, scored on other prompts of the same kind.
OTHER_PROMPTS = "other prompts"

#: Rows that are shares of the units that were ESU before.
OF_ESU = "of the ESU"

#: Groups of a model that was not aligned yet: what it uses, and what it does not.
BEFORE_ALIGNMENT = {"UU": "CU", "RU": "RU"}


def _units(lab: Lab, model: Model, on: str) -> Sample:
    """How much the arm is about: per cent of units and of weights, heads and neurons."""
    step = model.step
    mask = step.mask if isinstance(step, (Ablate, Patch)) else None
    if isinstance(step, Train) and isinstance(step.part, Part):
        mask = step.part.freeze if step.part.freeze is not None else step.part.train
    layout = lab.layout if mask is None else lab.layout_of(mask.unit_kind)
    mask = layout.none() if mask is None else mask
    weights = layout.weights(mask) / layout.parameters
    found = {
        "units": 100 * mask.share(), "weights": 100 * weights,
        "heads": mask.count("attn"), "neurons": mask.count("mlp"),
    }  # fmt: skip
    return Alone("Counted", counted, {name: (n, layout.units) for name, n in found.items()})


def _search(lab: Lab, model: Model, on: str) -> Sample:
    """What the ablation search found: sizes of the groups, and whether they do what they should."""
    steps, sizes = trials(lab), shares(lab)
    found = {
        f"{g.upper()} share": (100 * size, lab.layout.units) for g, size in vars(sizes).items()
    }
    for step in steps:
        name = f"{step.group} criterion met"
        met = step.accepted or found.get(name, (0.0, 0))[0] > 0
        found[name] = (float(met), len(steps))
    return Alone("Counted", counted, found)


def _role_map(layout: UnitLayout, found: Roles) -> Found:
    """The share of each group among a block's units."""
    for group in GROUPS:
        mask = found.mask(group)
        for block in layout.blocks:
            share = proportion(mask[block.name].tolist()).scaled(100)
            yield {"metric": group, "set": block.kind, "block": block.layer}, share, None


@dataclass(frozen=True)
class Moves:
    """Which group each unit was in, and which it is in now by each rule."""

    before: Roles
    after: Mapping[Rule, Roles]
    sources: Mapping[str, str]  #: name of a group before -> its label

    def rows(self) -> Found:
        for rule, now in self.after.items():
            for scope, kind in SCOPES.items():
                counts = transfer(self.before, now, kind)
                total = int(counts.sum())
                for name, label in self.sources.items():
                    for j, target in enumerate(GROUPS):
                        moved = int(counts[GROUPS.index(label), j])
                        share = proportion([i < moved for i in range(total)]).scaled(100)
                        yield {"metric": f"{name}->{target}", "set": scope, "at": rule}, share, None
            for target in GROUPS if "ESU" in self.sources else ():
                share = proportion(self._among_esu(rule, target)).scaled(100)
                yield {"metric": f"ESU->{target}", "set": OF_ESU, "at": rule}, share, None

    def against(self, other: Moves) -> Found:
        for rule in self.after:
            own, others = (moves._among_esu(rule, "ESU") for moves in (self, other))
            change = paired_difference(own, others).scaled(100)
            columns = {"metric": "ESU->ESU", "set": OF_ESU, "at": rule}
            yield columns, change, paired_p_value(own, others)

    def _among_esu(self, rule: Rule, target: str) -> Sequence[bool]:
        """For each unit that was ESU: is it of that group now?"""
        was, now = self.before.mask("ESU"), self.after[rule].mask(target)
        return torch.cat([now[name][was[name]] for name in was]).tolist()


def _transfer(lab: Lab, model: Model, on: str) -> Sample:
    """Groups before and after, from the aligned model's own."""
    again = int(on == OTHER_PROMPTS)
    after = {rule: roles_after(lab, model, rule, again) for rule in RULES}
    return Moves(roles(lab), after, {group: group for group in GROUPS})


def _transfer_of_alignment(lab: Lab, model: Model, on: str) -> Sample:
    """Groups of the given model, as many RU as the search kept, and those after an alignment."""
    before = utility_roles(lab, GIVEN, shares(lab).ru)
    after = roles(lab) if model == lab.aligned else roles_after(lab, model, "quantiles")
    return Moves(before, {"quantiles": after}, BEFORE_ALIGNMENT)


def _layers(gap: Sequence[float], chosen: range) -> Found:
    """The angular gap after each block, and the blocks that are safety layers."""
    for block, degrees in enumerate(gap, 1):
        yield {"metric": "angular gap", "block": block}, exact(degrees, len(gap)), None
    ends = {FIRST_LAYER: chosen[0], LAST_LAYER: chosen[-1]}  # from 0
    yield from counted({name: (block + 1, len(gap)) for name, block in ends.items()})


#: Which blocks are safety layers, counted from 1.
FIRST_LAYER, LAST_LAYER = "first safety layer", "last safety layer"


UNITS: dict[str, Callable[[Lab, Model, str], Sample]] = {
    "units": _units,
    "search": _search,
    "safety layers": lambda lab, model, on: Alone("Layers", _layers, *safety_layers(lab)),
    "roles": lambda lab, model, on: Alone("RoleMap", _role_map, lab.layout, roles(lab)),
    "transfer": _transfer,
    "transfer of alignment": _transfer_of_alignment,
}
