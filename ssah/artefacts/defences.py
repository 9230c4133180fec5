"""Notebook 05: defences that train, against freezing, at the same number of epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..evaluate.stats import Estimate
from ..lab import catalogue, defended
from ..lab.arms import Arm
from ..lab.catalogue import NOTHING
from ..lab.config import Config
from ..lab.defended import LONG
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.metrics.behaviour import has_prompts
from ..lab.stages.lessons import MAIN_ATTACK
from ..lab.units_of import CU6
from . import Output
from .draw import COLOURS, panels, reach
from .freezing import BEFORE, ONE_EPOCH, compared
from .pick import arms_of, estimate, filled, format_estimate, tasks_of, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: A setting must keep this part of what plain fine-tuning gains to be chosen for its safety.
KEPT = 0.8

_QUESTIONS = (
    ("ASR", ""), ("perplexity", ""), ("accuracy", ""), ("ASR", "search"), ("ASR", "HarmBench"),
    ("refused", "borderline"),
)  # fmt: skip

_ABSENT = (
    "Not measured here: defences that train are part of `experiment=published` "
    "(experiment.{} names them)."
)

#: What a defence with frozen units beside it is compared with.
ALONE = "without frozen units"

Columns = dict[str, Any]


# --- what is asked ---------------------------------------------------------------------------


def ask_table_defences(lab: Lab) -> list[Measure]:
    """Each defence with each strength, and the plain and the frozen arm of Table 2."""
    if not lab.config.experiment.defences:
        return []
    whole, asked = catalogue.whole(lab), _ask(lab, catalogue.whole(lab))
    for attack in lab.config.experiment.defended_in:
        plain, frozen = defended.plain(lab, attack)
        own = defended.arms(lab, attack)
        for arm in (plain, frozen, *own):
            asked += _ask(lab, arm)
            asked.append(Measure(arm, "held-out gain", attack, whole, BEFORE))
        for arm in (frozen, *own):
            asked += compared(arm, attack, plain, ONE_EPOCH)
        for arm in own:
            asked.append(Measure(arm, "ASR", "", frozen, CU6))
            asked.append(Measure(arm, "ASR", "", whole, BEFORE))
            if has_prompts(lab, "borderline"):
                asked.append(Measure(arm, "refused", "borderline", whole, BEFORE))
            alone = defended.without_freezing(arm, own)
            if alone is not None:
                asked.append(Measure(arm, "ASR", "", alone, ALONE))
    return asked


def _ask(lab: Lab, arm: Arm) -> list[Measure]:
    return [Measure(arm, metric, on) for metric, on in _QUESTIONS if has_prompts(lab, on)]


ask_fig_defences = ask_table_defences


def ask_fig_defences_steps(lab: Lab) -> list[Measure]:
    """The longer runs, epoch by epoch."""
    if not lab.config.experiment.defended_longer:
        return []
    asked = [Measure(catalogue.whole(lab), "ASR")]
    for arm in defended.longer(lab):
        asked.append(Measure(arm, "ASR"))
        asked.append(Measure(arm, "held-out gain", MAIN_ATTACK, catalogue.whole(lab), BEFORE))
    return asked


# --- the choice ------------------------------------------------------------------------------


def best(settings: Mapping[str, tuple[float, float]], plain_gain: float) -> str:
    """The setting that is chosen, of setting -> (ASR on the search prompts, held-out gain).

    The one of lowest ASR among those that keep :data:`KEPT` of the gain of plain fine-tuning; where
    none does, the one of the largest gain. The first one of equals.
    """
    useful = {name: asr for name, (asr, gain) in settings.items() if gain >= KEPT * plain_gain}
    if useful:
        return min(useful, key=useful.__getitem__)
    return max(settings, key=lambda name: settings[name][1])


def _arm(rule: str, attack: str = MAIN_ATTACK, setting: str = "") -> Columns:
    """One epoch under a defence; with nothing or ESU + 6 % CU frozen, an arm of Table 2."""
    method = "frozen" if rule in (NOTHING, CU6) else "defended"
    return {"method": method, "rule": rule, "attack": attack, "epoch": 1, "setting": setting}


def _gain(table: pd.DataFrame, arm: Columns) -> Estimate | None:
    return estimate(table, "held-out gain", set=arm["attack"], against=BEFORE, **arm)


def measured_arms(table: pd.DataFrame, config: Config, attack: str) -> dict[str, list[Columns]]:
    """Defence -> its arms in the table, in the order of the experiment's strengths."""
    found: dict[str, list[Columns]] = {}
    for rule, strengths in config.experiment.defences.items():
        arms = [_arm(rule, attack, defended.setting(rule, strength)) for strength in strengths]
        known = [arm for arm in arms if estimate(table, "ASR", **arm) is not None]
        if known:
            found[rule] = known
    return found


def chosen(table: pd.DataFrame, config: Config) -> dict[str, str]:
    """Defence -> its chosen setting, by prompts that no result rests on."""
    plain = _gain(table, _arm(NOTHING))
    found = {}
    for rule, arms in measured_arms(table, config, MAIN_ATTACK).items():
        points = {}
        for arm in arms:
            asr, gain = estimate(table, "ASR", set="search", **arm), _gain(table, arm)
            assert asr is not None
            assert gain is not None
            points[arm["setting"]] = asr.value, gain.value
        assert plain is not None
        found[rule] = best(points, plain.value)
    return found


# --- what is shown ---------------------------------------------------------------------------


def table_defences(table: pd.DataFrame, config: Config) -> Output:
    """What each defence keeps of safety, and what it costs in what is learned."""
    choice = chosen(table, config)
    if not choice:
        return Output(_ABSENT.format("defences"), pd.DataFrame())
    rows = [_row(table, "", "", {})]
    for attack in config.experiment.defended_in:
        for rule in (NOTHING, CU6):
            arm = _arm(rule, attack)
            name = "none" if rule == NOTHING else f"{rule} frozen"
            if estimate(table, "ASR", **arm) is not None:  # a merge asks for what others measured
                rows.append(_row(table, name, "", arm))
        for rule, arms in measured_arms(table, config, attack).items():
            for arm in arms:
                mark = " *" if arm["setting"] == choice[rule] else ""
                rows.append(_row(table, titled(rule), arm["setting"] + mark, arm))
    return Output(_note(table, config), filled(pd.DataFrame(rows)))


def titled(rule: str) -> str:
    """A defence as people read it."""
    return rule.replace("_", " ")


def _row(table: pd.DataFrame, name: str, setting: str, arm: Columns) -> dict[str, str]:
    return {
        "fine-tuned on": arm.get("attack", "nothing"),
        "defence": name,
        "strength": setting,
        "ASR": text(table, "ASR", **arm),
        "against none": text(table, "ASR", against=ONE_EPOCH, **arm),
        "ASR, HarmBench": text(table, "ASR", set="HarmBench", **arm),
        "held-out gain": format_estimate(_gain(table, arm) if arm else None, 2),
        "borderline refused": text(table, "refused", set="borderline", **arm),
        "perplexity": text(table, "perplexity", 2, **arm),
        "accuracy": text(table, "accuracy", set="average", **arm),
    }


def _note(table: pd.DataFrame, config: Config) -> str:
    left_out = "" if config.align.enabled else (
        " SafeLoRA is left out: it needs the model before its alignment, which came aligned."
    )  # fmt: skip
    return (
        "One epoch of harmless fine-tuning of the aligned model, with nothing done about it, with "
        "ESU + 6 % CU frozen, and with defences that change the training (docs/defences.md says "
        "what each does, and what its strength is). Their refusals are the model's own, to prompts "
        f"that units are scored on. A star marks the strength that is chosen on "
        f"{MAIN_ATTACK}: the lowest ASR on the search prompts, which are not those of the column, "
        f"among those that keep {100 * KEPT:g} % of the held-out gain of plain fine-tuning; where "
        "none does, the largest gain. Arithmetic had no part in that choice, so that it tests what "
        "was chosen. Against none: points of ASR, same prompts, paired 95 % interval; below "
        "zero is safer. Borderline refused: of harmless prompts that look dangerous. Accuracy: "
        f"average of {tasks_of(table, config)}, %. What a step of each costs in time and memory: "
        "`ssah bench`." + left_out
    )


_MARKERS = "osD^vPX<>hp"
_PALETTE = (
    "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#7F5112", "#5D3A9B",
    "#117733",
)  # fmt: skip


def _style(rule: str, config: Config) -> tuple[str, str]:
    """Marker and colour of a defence, the same in both figures."""
    if rule in (NOTHING, CU6):
        return "*", COLOURS["random" if rule == NOTHING else "RU"]
    place = list(config.experiment.defences).index(rule)
    return _MARKERS[place % len(_MARKERS)], _PALETTE[place % len(_PALETTE)]


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (gain, ASR) those that no other one matches in both and beats in one, by gain."""
    return sorted(
        {
            p
            for p in points
            if not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in points)
        }
    )  # fmt: skip


def fig_defences(table: pd.DataFrame, config: Config) -> Output:
    """Safety against what is learned: each defence with its strengths."""
    choice = chosen(table, config)
    if not choice:
        return Output(_ABSENT.format("defences"))
    output = Output(
        "One epoch on instructions. To the right: more is learned (held-out gain, nats per token); "
        "below: safer (ASR, % of the evaluation prompts). Full symbols: the strength that is "
        "chosen on other prompts (table_defences), with 95 % intervals; small hollow ones: the "
        "other strengths. Dashed: what is not beaten in both by another point. Dotted: "
        f"{100 * KEPT:g} % of the gain of plain fine-tuning."
    )
    reached: list[tuple[float, float]] = []
    output.figure, axes = panels(7.5, 4.4)
    for rule, label in ((NOTHING, "none"), (CU6, f"{CU6} frozen")):
        reached += _point(axes, table, _arm(rule), _style(rule, config), label)
    for rule, arms in measured_arms(table, config, MAIN_ATTACK).items():
        for arm in arms:
            taken = arm["setting"] == choice[rule]
            label = f"{titled(rule)}, {arm['setting']}" if taken else ""
            reached += _point(axes, table, arm, _style(rule, config), label)
    front = pareto(reached)
    axes.plot(*zip(*front, strict=True), "--", color="black", lw=0.9, zorder=1, label="front")
    plain = _gain(table, _arm(NOTHING))
    if plain is not None:
        axes.axvline(KEPT * plain.value, ls=":", color="grey", lw=1)
    axes.set(xlabel="held-out gain, nats per token", ylabel="ASR, %", ylim=(-3, 103))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title="defence, strength")
    return output


def _point(
    axes: Axes, table: pd.DataFrame, arm: Columns, style: tuple[str, str], label: str
) -> list[tuple[float, float]]:
    """Draw an arm, with intervals where it has a label; where it is."""
    gain, asr = _gain(table, arm), estimate(table, "ASR", **arm)
    if gain is None or asr is None:
        return []
    marker, colour = style
    if label:
        axes.errorbar(
            gain.value, asr.value,
            xerr=reach(gain), yerr=reach(asr), fmt=marker, ms=9 if marker == "*" else 7,
            color=colour, capsize=2, lw=0.8, label=label, zorder=3,
        )  # fmt: skip
    else:
        axes.plot(gain.value, asr.value, marker, ms=4.5, mfc="white", color=colour, zorder=2)
    return [(gain.value, asr.value)]


def fig_defences_steps(table: pd.DataFrame, config: Config) -> Output:
    """Do they prevent, or delay? ASR over the epochs of a longer fine-tuning."""
    arms = [
        arm
        for arm in arms_of(table, attack=MAIN_ATTACK, epoch=LONG)
        if arm["method"] in ("defended", "frozen")
    ]
    if not arms:
        return Output(_ABSENT.format("defended_longer"))
    output = Output(
        f"Fine-tuned on instructions for {LONG} epochs, at the recommended strengths. Left: ASR "
        "after each epoch, with 95 % intervals; epoch 0 is the aligned model. Right: what was "
        "learned by then. A defence that only delays reaches the undefended line later; one that "
        "prevents stays below it at the same gain."
    )
    output.figure, (left, right) = panels(9.5, 3.8, 1, 2)
    for place, arm in enumerate(arms):
        marker, colour = _style(arm["rule"], config)
        label = titled(arm["rule"]) + (" frozen" if arm["rule"] == CU6 else "")
        asr = {0: estimate(table, "ASR")}
        gain: dict[int, Estimate | None] = {}
        for epoch in range(1, LONG + 1):
            at = arm | {"epoch": epoch}
            asr[epoch], gain[epoch] = estimate(table, "ASR", **at), _gain(table, at)
        shift = 0.05 * (place - len(arms) / 2)  # so that bars do not cover each other
        for axes, found in ((left, asr), (right, gain)):
            known = [(epoch, e) for epoch, e in found.items() if e is not None]
            axes.errorbar(
                [epoch + shift for epoch, _ in known], [e.value for _, e in known],
                yerr=reach(*(e for _, e in known)),
                marker=marker, ms=5, color=colour, capsize=2, lw=1.2, elinewidth=0.7,
                label=label,
            )  # fmt: skip
    left.set(xlabel="epochs", ylabel="ASR, %", ylim=(-3, 103))
    right.set(xlabel="epochs", ylabel="held-out gain, nats per token")
    right.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return output
