"""The arms of the study, by what they are for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..core.errors import require_known
from ..core.store import Handle
from ..scoring.selectors import RULES, Rank, matched_by, random_rank, sized
from ..training.ablation import Mode
from ..training.adapter import Adapter
from ..training.lora import rank_for
from ..training.part import EVERYTHING, Part
from ..units.layout import UnitLayout
from ..units.mask import UnitMask
from ..units.roles import Roles, Shares
from .arms import Arm
from .jailbreaks import JAILBREAKS
from .lab import Lab
from .metrics.behaviour import ASKED, PROMPTS
from .metrics.stability import COMPARISONS
from .specs import GIVEN, REFUSALS, Model
from .stages.attribution import activations, fitted, statistics, utility_scores
from .stages.criteria import safety_layers
from .stages.lessons import ATTACKS, MAIN_ATTACK, attack_rate, available_attacks
from .stages.roles import classified, roles, shares, utility_roles
from .units_of import CU6, ESU, EUU, RU, RULED, SAFETY_LAYERS, group, matched, selection

#: Attacks that the paper compares other papers' rules in.
RULED_ATTACKS = ("instructions", "arithmetic")

NOTHING = "nothing"
HEADS = "heads included"
MOVED = "moved most by alignment"
LOWER = "lower rate"

#: Share of all units at the second budget of the conditions: the paper's comparison with frozen
#: layers (Table 9) freezes ESU and 26.8 % of CU; all heads together hold a quarter of the weights.
WIDER = 0.25


def check(lab: Lab) -> None:
    """Raise :class:`SsahError` for a name in the experiment that means nothing."""
    from .defended import require_strengths  # which stands on this module

    experiment = lab.config.experiment
    require_strengths(experiment.defences)
    frozen = [name for names in experiment.frozen.values() for name in names]
    ruled = [name for names in experiment.ruled.values() for name in names]
    adapters = [name for names in experiment.adapters.values() for name in names]
    for key, names, valid in (
        ("removed", experiment.removed, [arm.units for arm in _all_removed(lab)]),
        ("removed_asked", experiment.removed_asked, ASKED),
        ("frozen_asked", experiment.frozen_asked, ASKED),
        ("aligned_asked", experiment.aligned_asked, ASKED),
        ("jailbreaks", experiment.jailbreaks, JAILBREAKS),
        ("jailbreak_prompts", [experiment.jailbreak_prompts], PROMPTS),
        ("instructed", experiment.instructed, ATTACKS),
        ("stability", experiment.stability, COMPARISONS),
        ("frozen", experiment.frozen, ATTACKS),
        ("ruled", experiment.ruled, RULED_ATTACKS),
        ("ruled", ruled, RULED),
        ("defended_in", experiment.defended_in, ATTACKS),
        ("defended_longer", experiment.defended_longer, [*experiment.defences]),
        ("adapters", experiment.adapters, ATTACKS),
        ("adapters", adapters, lab.config.adapters.methods),
        ("conditions", experiment.conditions, [arm.units for arm in _all_conditions(lab)]),
        ("aligned_through", experiment.aligned_through, [a.units for a in _all_budget_arms(lab)]),
    ):
        for name in names:
            require_known(name, valid, f"experiment.{key}: there is no")
    for name in (*frozen, *experiment.patched):
        if name not in RULES or name in experiment.patched:
            selection(name)


def whole(lab: Lab) -> Arm:
    """The aligned model."""
    return Arm(lambda: lab.aligned)


def unaligned(lab: Lab) -> list[Arm]:
    """The given model, where another one was made of it."""
    return [Arm(lambda: GIVEN, "unaligned")] if lab.config.align.enabled else []


def pair(lab: Lab) -> list[Arm]:
    """The aligned model, and what its direction is held against: the unaligned one or, where the
    model came aligned, itself without its ESU, which differs in these few units alone."""
    return [whole(lab), *(unaligned(lab) or [without(lab, ESU)])]


# --- removed (Table 1) -----------------------------------------------------------------------


def removed(
    lab: Lab, rule: str, mask: Callable[[], UnitMask], like: str = "", **columns: Any
) -> Arm:
    """The aligned model without some units."""
    return Arm(
        lambda: lab.aligned.ablated(mask()), method="removed", rule=rule, like=like, **columns
    )


def removals(lab: Lab) -> list[Arm]:
    """The arms that the experiment removes in Table 1, without random controls."""
    arms = _named(_all_removed(lab), lab.config.experiment.removed)
    apart = "attn" not in lab.config.roles.redundant_kinds  # else RU hold heads already
    return [arm for arm in arms if apart or arm.setting != HEADS]


def _all_removed(lab: Lab) -> list[Arm]:
    arms = [without(lab, name) for name in (ESU, EUU, RU)]
    arms += [silenced(lab, n, mode) for mode in ("mean", "resample") for n in (ESU, EUU, RU)]
    arms += [silenced(lab, name, "fitted") for name in (ESU, RU)]
    arms += [
        without_control(lab, "largest magnitude", ESU),
        without_control(lab, "smallest magnitude", RU),
        # Without the RU that there would be if heads could be redundant.
        removed(
            lab, RU, lambda: classified(lab, shares(lab), ["attn", "mlp"]).mask(RU), setting=HEADS
        ),
    ]
    return arms


def without(lab: Lab, rule: str) -> Arm:
    """Without a group of its units."""
    return removed(lab, rule, lambda: group(lab, rule))


#: What is put in a removed group's place: what it says on average, what it said at random tokens
#: of harmless answers, or the constant that does least harm to these. Mode -> setting, and source.
INSTEAD: dict[Mode, tuple[str, Callable[[Lab, UnitMask], Handle]]] = {
    "mean": ("mean", lambda lab, mask: statistics(lab, "utility")),
    "resample": ("resampled", lambda lab, mask: activations(lab)),
    "fitted": ("fitted", fitted),
}


def silenced(lab: Lab, rule: str, mode: Mode) -> Arm:
    """With something in a group's place that has nothing to do with the text."""
    setting, source = INSTEAD[mode]

    def make() -> Model:
        mask = group(lab, rule)
        return lab.aligned.ablated(mask, mode, source(lab, mask))

    return Arm(make, method="removed", rule=rule, setting=setting)


def without_control(lab: Lab, rule: str, like: str, draw: int | None = None) -> Arm:
    """Without as many heads and neurons by another rule."""
    mask = functools.partial(_control, lab, rule, like, draw=draw)
    return removed(lab, rule, mask, like, draw=draw)


def _control(lab: Lab, rule: str, like: str, attack: str = "", draw: int | None = None) -> UnitMask:
    """As many heads and neurons as a group has, by a rule."""
    return matched(lab, rule, group(lab, like), attack, draw or 0)


def swept(lab: Lab, rule: str, share: float, draw: int | None = None) -> Arm:
    """Without a share of all units, by a group's own ranking or at random, as many as ESU."""

    def mask() -> UnitMask:
        ru = shares(lab).ru
        sizes = {EUU: Shares(ru, 0, share), RU: Shares(share, 0, 0)}
        found = classified(lab, sizes.get(rule, Shares(ru, share, 0)))
        if rule == "random":
            return matched(lab, rule, found.mask(ESU), draw=draw or 0)
        return found.mask(rule)

    return removed(lab, rule, mask, setting=f"{100 * share:g} %", draw=draw)


# --- fine-tuned, with frozen units (Tables 2, 3, 13; Figs 5, 8, 11-13) ----------------------


def fine_tuned(
    lab: Lab,
    attack: str,
    rule: str = NOTHING,
    mask: Callable[[], UnitMask] | None = None,
    *,
    like: str = "",
    draw: int | None = None,
    setting: str = "",
    epochs: int | None = None,
    rate: float = 1.0,
    **changes: Any,
) -> list[Arm]:
    """An arm for each epoch of a fine-tuning that freezes some units, or none; ``rate`` is a part
    of the attack's learning rate."""
    if epochs is not None:
        changes["epochs"] = epochs

    @functools.cache
    def trained() -> Model:
        part = Part(freeze=mask()) if mask is not None else EVERYTHING
        if rate != 1:
            changes["learning_rate"] = rate * attack_rate(lab)
        return lab.aligned.trained(attack, part, **changes)

    return _each_epoch(
        trained, epochs or lab.config.finetune.epochs,
        method="frozen", rule=rule, like=like, attack=attack, setting=setting, draw=draw,
    )  # fmt: skip


def _each_epoch(trained: Callable[[], Model], epochs: int, **columns: Any) -> list[Arm]:
    """An arm for each epoch of one training."""
    return [
        Arm(functools.partial(lambda e: trained().at(e), epoch), epoch=epoch, **columns)
        for epoch in range(1, epochs + 1)
    ]


def unfrozen(lab: Lab, attack: str) -> list[Arm]:
    """Nothing is frozen: for as long as frozen arms in the main attack, where they are compared
    epoch by epoch, else for as long as the paper's rule needs, one epoch."""
    return fine_tuned(lab, attack, epochs=None if attack == MAIN_ATTACK else 1)


def with_frozen(lab: Lab, attack: str, rule: str) -> list[Arm]:
    """A group of units is frozen; or by another rule as many as ESU + 6 % CU."""
    if rule in RULES:
        return with_frozen_control(lab, attack, rule, CU6)
    return fine_tuned(lab, attack, rule, lambda: group(lab, rule))


def with_frozen_control(
    lab: Lab, attack: str, rule: str, like: str, draw: int | None = None
) -> list[Arm]:
    """As many heads and neurons are frozen, by another rule."""
    mask = functools.partial(_control, lab, rule, like, attack, draw)
    return fine_tuned(lab, attack, rule, mask, like=like, draw=draw)


def frozen_groups(lab: Lab, attack: str) -> list[str]:
    """The groups among what the experiment freezes during an attack."""
    return [name for name in lab.config.experiment.frozen.get(attack, []) if name not in RULES]


def by_the_papers_rule(arms: list[Arm]) -> Arm:
    """One epoch where nothing is frozen, twice as many for the rest (paper, section 4.2)."""
    return arms[0] if arms[0].rule == NOTHING else arms[-1]


# --- what other papers' rules select is frozen, at the sizes of Tables 7 to 10 ---------------


def ruled(lab: Lab, attack: str, name: str) -> list[Arm]:
    """What a rule of :data:`ssah.lab.units_of.RULED` selects is frozen."""
    rule, size = RULED[name]

    def mask() -> UnitMask:
        target = _as_large(lab, size)
        return target if size is None else matched(lab, rule, target, attack)

    return fine_tuned(lab, attack, rule, mask, setting=_setting(size))


def ruled_control(lab: Lab, attack: str, name: str, draw: int) -> list[Arm]:
    """As many random heads and neurons are frozen: the same for all rules of one size."""

    def mask() -> UnitMask:
        return matched(lab, "random", _as_large(lab, RULED[name][1]), draw=draw)

    rule, like, setting = control_name(name)
    return fine_tuned(lab, attack, rule, mask, like=like, draw=draw, setting=setting)


def control_name(name: str) -> tuple[str, str, str]:
    """What a rule's random controls are called: rule, like and setting."""
    _, size = RULED[name]
    return "random", SAFETY_LAYERS if size is None else "", _setting(size)


def ours(lab: Lab, attack: str, name: str) -> list[Arm]:
    """What the paper sets against a rule: ESU + 6 % CU; against safety layers the ESU, and CU until
    there are as many units."""
    if name != SAFETY_LAYERS:
        return with_frozen(lab, attack, CU6)

    def mask() -> UnitMask:
        return esu_and_cu(lab, _as_large(lab, None).count())

    return fine_tuned(lab, attack, "ESU + CU", mask, like=SAFETY_LAYERS)


def esu_and_cu(lab: Lab, count: int) -> UnitMask:
    """The ESU, and CU by I_S - I_U until there are so many units."""
    found = roles(lab)
    esu = found.mask(ESU)
    return esu | found.top("CU", max(count - esu.count(), 0) / lab.layout.units)


def _as_large(lab: Lab, size: float | None) -> UnitMask:
    """Some mask of a size: that share of heads and of neurons, or all units of safety layers."""
    if size is not None:
        return sized(lab.layout, size, size)
    _, layers = safety_layers(lab)
    chosen = [torch.full((b.units,), b.layer in layers) for b in lab.layout.blocks]
    return lab.layout.mask(torch.cat(chosen))


def _setting(size: float | None) -> str:
    return "" if size is None else f"{100 * size:g} %"


# --- patched (fig_sufficiency) ---------------------------------------------------------------


#: Its columns, but for the epoch.
ATTACKED_LONGEST = {"method": "frozen", "rule": NOTHING, "attack": MAIN_ATTACK}


def attacked_longest(lab: Lab) -> Arm:
    """The main attack with nothing frozen, after its last epoch: what is patched."""
    return unfrozen(lab, MAIN_ATTACK)[-1]


def patched(lab: Lab, name: str) -> Arm:
    """The attacked model, in which a group of units says what it says in the aligned one."""
    return _patched(lab, name, lambda: group(lab, name))


def patched_control(lab: Lab, like: str, draw: int) -> Arm:
    """The same with equally many random heads and neurons."""
    mask = functools.partial(_control, lab, "random", like, draw=draw)
    return _patched(lab, "random", mask, like, draw)


def _patched(
    lab: Lab, rule: str, mask: Callable[[], UnitMask], like: str = "", draw: int | None = None
) -> Arm:
    before = attacked_longest(lab)
    columns = {"method": "patched", "rule": rule, "like": like, "draw": draw}
    return Arm(lambda: before.model.patched(mask(), lab.aligned), **(before.columns() | columns))


# --- aligned through a part (Table 4; Figs 6, 9, 10) -----------------------------------------


def redundant(lab: Lab, share: float) -> UnitMask:
    """The RU of the given model."""
    return utility_roles(lab, GIVEN, share).mask(RU)


def _through_part(
    rule: str, part: Callable[[], Part], like: str = "", setting: str = "", **changes: Any
) -> Arm:
    """The given model, aligned through a part of it."""
    return Arm(
        lambda: GIVEN.trained(REFUSALS, part(), **changes),
        "unaligned", "trained", rule, like, setting=setting,
    )  # fmt: skip


def _through(
    rule: str, mask: Callable[[], UnitMask], like: str = "", setting: str = "", **changes: Any
) -> Arm:
    """The same through the units of a mask."""
    return _through_part(rule, lambda: Part(train=mask()), like, setting, **changes)


def attacked(lab: Lab, arm: Arm) -> Arm:
    """An arm after one epoch of the main attack."""

    def make() -> Model:
        whole = arm.model == lab.aligned  # of which Table 2 has the longer run
        changes: dict[str, Any] = {} if whole else {"epochs": 1}
        return arm.model.trained(MAIN_ATTACK, EVERYTHING, 1, **changes)

    columns = arm.columns() | {"attack": MAIN_ATTACK, "epoch": 1}
    return Arm(make, **columns)


def budget_arms(lab: Lab) -> list[Arm]:
    """The arms that the experiment aligns: through all units (this is the aligned model of
    everything else), redundant ones, as many random ones, and what a reviewer asks beside them."""
    experiment = lab.config.experiment
    return _named(_all_budget_arms(lab), experiment.aligned_through) + [
        _through(f"{RU} {100 * share:g} %", functools.partial(redundant, lab, share))
        for share in experiment.ru_shares
    ]


def _named(arms: list[Arm], names: list[str]) -> list[Arm]:
    """The arms of these names, in the order of the names."""
    found = {arm.units: arm for arm in arms}
    return [found[name] for name in names]


ALL_UNITS = "all units"
ALIGNED_ESU = "ESU of the aligned model"

#: As long again: the paper trains RU for twice the epochs.
LONGER = "twice the epochs"

#: In as many epochs: fewer weights may need larger steps.
FASTER = "3 x the rate"


def _all_budget_arms(lab: Lab) -> list[Arm]:
    """Every arm of Table 4 that has a name."""
    config = lab.config.align
    ru = functools.cache(lambda: redundant(lab, lab.config.experiment.ru_share))

    def highest() -> UnitMask:
        rank = {name: -part for name, part in utility_scores(lab, GIVEN).items()}
        return matched_by(lab.layout, ru(), rank)

    def rank() -> int:
        return rank_for(lab.layout, round(lab.layout.weights(ru())))

    settings: dict[str, dict[str, Any]] = {
        "": {}, LONGER: {"epochs": 2 * config.epochs},
        FASTER: {"learning_rate": 3 * config.learning_rate},
    }  # fmt: skip
    arms = [Arm(lambda: lab.aligned, "unaligned", "trained", ALL_UNITS)]
    for setting, changes in settings.items():
        arms.append(_through(RU, ru, "", setting, **changes))
        arms.append(
            _through("random", lambda: matched(lab, "random", ru()), RU, setting, **changes)
        )
    return [
        *arms,
        _through("highest I_U", highest, RU),
        _through(ALIGNED_ESU, lambda: group(lab, ESU)),
        _through("all heads", lambda: sized(lab.layout, heads=1, neurons=0)),
        _through_part("LoRA", lambda: Part(rank=rank()), RU),
        _through_part("LoRA inside RU", lambda: Part(train=ru(), rank=rank()), RU),
    ]


# --- adapters, while the model's own weights stay as they are (Table 5) ----------------------


def adapted(lab: Lab, attack: str) -> list[Arm]:
    """The aligned model after one epoch of an attack through each adapter that the experiment
    names, at each of its rates; those that peft lacks for its family are left out."""
    found: list[Arm] = []
    size = lab.config.adapters.batch_size
    for name in lab.config.experiment.adapters.get(attack, []):
        config = lab.config.adapters.methods[name]
        adapter = Adapter(config.peft, config.blocks)
        for rate in config.rates if adapter.fits(lab.skeleton) else ():
            times = rate / config.rates[0]
            make = functools.partial(
                lab.aligned.trained, attack, adapter, epochs=1, learning_rate=rate, batch_size=size
            )
            setting = "" if times == 1 else f"{times:g} x the rate"
            arm = Arm(make, method="adapted", rule=name, attack=attack, epoch=1, setting=setting)
            found.append(arm)
    return found


# --- conditions (fig_conditions) -------------------------------------------------------------


def conditions(lab: Lab) -> list[Arm]:
    """The arms that the experiment adds to those of Table 2.

    What the alignment moved is not known of a model that came aligned.
    """
    arms = _named(_all_conditions(lab), lab.config.experiment.conditions)
    return [arm for arm in arms if arm.rule != MOVED or lab.config.align.enabled]


def _all_conditions(lab: Lab) -> list[Arm]:
    """One epoch of the main attack each: other rules at two budgets, and other settings.

    ``setting`` says the budget, or what is unusual.
    """

    def narrow() -> UnitMask:
        return group(lab, CU6)

    def wide() -> UnitMask:
        return roles(lab).select(ESU, f"CU:{100 * (WIDER - shares(lab).esu)}%")

    def arm(
        rule: str, mask: Callable[[], UnitMask] | None, setting: str = "", like: str = "", **c: Any
    ) -> Arm:
        (found,) = fine_tuned(
            lab, MAIN_ATTACK, rule, mask, like=like, setting=setting, epochs=1, **c
        )
        return found

    ranked = ["lowest I_S - I_U", "largest magnitude", MOVED]

    def by_rule(rule: str, target: Callable[[], UnitMask]) -> Callable[[], UnitMask]:
        return lambda: matched(lab, rule, target(), MAIN_ATTACK)

    wider = f"{100 * WIDER:g} %"
    arms = [arm(rule, by_rule(rule, narrow), like=CU6) for rule in ranked]
    arms.append(arm("ESU + CU", wide, wider))
    arms += [
        arm(rule, by_rule(rule, wide), wider, "ESU + CU")
        for rule in ("random", *ranked, "gradient conflict")
    ]
    arms.append(arm("all heads", lambda: sized(lab.layout, heads=1, neurons=0)))
    unusual: dict[str, dict[str, Any]] = {
        "embeddings trained": {"train_embeddings": True}, LOWER: {"rate": 0.4},
    }  # fmt: skip
    for setting, changes in unusual.items():
        arms.append(arm(NOTHING, None, setting, **changes))
        arms.append(arm(CU6, narrow, setting, **changes))

    def rescored(**changes: Any) -> Roles:
        return classified(lab, shares(lab), **changes)

    every = functools.cache(lambda: rescored(tokens="all").select(ESU, "CU:6%"))
    arms.append(arm(CU6, every, "scored on all tokens"))
    channels = functools.cache(lambda: rescored(unit_kind="channel"))
    arms.append(arm(CU6, lambda: channels().select(ESU, "CU:6%"), "channels as units"))
    arms += [arm(rule, mask, "channels") for rule, mask in _value_path(lab, channels).items()]
    return arms


def _value_path(lab: Lab, channels: Callable[[], Roles]) -> dict[str, Callable[[], UnitMask]]:
    """Attention's value-output path, whole and by halves: what a head's score averages away.

    Chosen are value rows, each with its columns of the output projection in all heads that share
    it, by the mean of these channels; so all halves hold the same number of weights.
    """

    def layout() -> UnitLayout:
        return lab.layout_of("channel")

    def half(rank: Callable[[], Rank], sign: int) -> Callable[[], UnitMask]:
        def mask() -> UnitMask:
            found = _by_value_row(layout(), rank())
            turned = {name: sign * part for name, part in found.items()}
            return matched_by(layout(), sized(layout(), heads=0.5, neurons=0), turned)

        return mask

    def difference() -> Rank:
        return channels().difference

    return {
        "value-output path": lambda: sized(layout(), heads=1, neurons=0),
        "half of it, highest I_S - I_U": half(difference, -1),
        "half of it, random": half(lambda: random_rank(layout(), 1000 * lab.seed), 1),
        "half of it, lowest I_S - I_U": half(difference, 1),
    }


def _by_value_row(layout: UnitLayout, rank: Rank) -> Rank:
    """The rank of attention's channels, averaged over those that share a value row."""
    shared = dict(rank)
    for block in layout.blocks:
        if block.kind == "attn":
            rows = next(part for part in block.slices if part.dim == 0).index.flatten()
            sums = torch.zeros(int(rows.max()) + 1).index_add_(0, rows, rank[block.name].float())
            shared[block.name] = (sums / rows.bincount().clamp(min=1))[rows]
    return shared


#: The paper's alignment, as a setting: the unaligned model learns the rows of an attack.
LEARNS = "learns harmless rows"


def instruction_arms(lab: Lab, attack: str) -> tuple[Arm, Arm, Arm]:
    """The paper's alignment: the given model learns from harmless rows through all units for one
    epoch, and through RU or as many random units for as many as are configured."""
    ru = functools.cache(lambda: redundant(lab, lab.config.experiment.ru_share))

    def arm(rule: str, like: str, part: Callable[[], Part], epochs: int) -> Arm:
        def trained() -> Model:
            changes: dict[str, Any] = {"epochs": epochs} if epochs == 1 else {}
            return GIVEN.trained(attack, part(), **changes).at(epochs)

        return Arm(
            trained, base="unaligned", method="trained", rule=rule, like=like, attack=attack,
            epoch=epochs, setting=LEARNS,
        )  # fmt: skip

    long = lab.config.finetune.epochs
    return (
        arm(ALL_UNITS, "", lambda: EVERYTHING, 1),
        arm(RU, "", lambda: Part(train=ru()), long),
        arm("random", RU, lambda: Part(train=matched(lab, "random", ru())), long),
    )


# --- of all of these, those whose verdicts are counted and whose completions are read ---------


def headline(lab: Lab) -> list[Arm]:
    """Every headline arm of Tables 1, 2, 4 and 13."""
    arms = [whole(lab), *unaligned(lab)]
    if lab.config.model.use == "everything":
        arms += _changed(lab)
    if lab.config.align.enabled:
        through = budget_arms(lab)
        arms += [arm for arm in through if arm.rule != ALL_UNITS and not arm.setting]
    return arms


def _changed(lab: Lab) -> list[Arm]:
    """The aligned model without some units, and after each attack."""
    arms = [without(lab, name) for name in (ESU, RU, EUU)]
    arms.append(without_control(lab, "random", ESU, 0))
    for attack in available_attacks(lab):
        arms += unfrozen(lab, attack)
        for name in frozen_groups(lab, attack):
            arms += with_frozen(lab, attack, name)
        if attack == MAIN_ATTACK:
            arms += with_frozen_control(lab, attack, "random", CU6, 0)
    return arms
