"""Notebook 02: what the groups of units do (Tables 1 and 12, the share sweep), where they are, and
whether they are the same ones where they are found in another way."""

from __future__ import annotations

import functools
from typing import Any

import pandas as pd

from ..evaluate.stats import Estimate
from ..lab import catalogue
from ..lab.arms import units_name
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.metrics.behaviour import SYSTEM
from ..lab.metrics.stability import BY_SAFETY, ITSELF, OTHER_SEED
from ..lab.units_of import CU6, ESU, EUU, RU
from ..units.roles import GROUPS
from . import Output
from .draw import COLOURS, heat_map, panels, reach
from .pick import (
    arms_of,
    estimate,
    filled,
    is_of_others,
    other_family_unmeasured,
    paper,
    printed_model,
    rows_of,
    tasks_of,
    text,
)

CLAIMED = (ESU, EUU, RU)

#: Perplexity above which what a model writes is no language: at 400,000 (Qwen2.5-Coder with its EUU
#: resampled) sixteen completions were read.
NO_LANGUAGE = 10_000


# --- removing groups -------------------------------------------------------------------------

_SAFETY = ("ASR", "no refusal phrase", "incoherent", "perplexity")


def _ask(artefact: str, lab: Lab) -> list[Measure]:
    """The arms of the experiment, and as many random units as ESU and RU."""
    if is_of_others(artefact, lab.config):
        return []
    whole, experiment = catalogue.whole(lab), lab.config.experiment
    named = catalogue.removals(lab)
    removed = {arm.units: arm for arm in named if arm.units in CLAIMED}
    controls = [
        catalogue.without_control(lab, "random", name, draw)
        for name in (ESU, RU)
        if name in removed
        for draw in range(experiment.removed_draws)
    ]
    arms = [whole, *named, *controls, *catalogue.unaligned(lab)]
    asked = [Measure(arm, metric) for arm in arms for metric in _SAFETY]
    asked += [Measure(arm, "units") for arm in arms if arm.method == "removed"]
    for arm in (whole, *removed.values()):
        for metric in ("ASR", "no refusal phrase"):
            asked += [Measure(arm, metric, on) for on in experiment.removed_asked]
        asked.append(Measure(arm, "accuracy"))
    asked += [Measure(whole, "refused", on) for on in ("benign", "borderline")]
    asked.append(Measure(whole, "search"))
    for arm in removed.values():
        for metric in ("ASR", "perplexity", "accuracy"):
            asked.append(Measure(arm, metric, against=whole, than="whole"))
    for arm in controls:
        asked.append(Measure(removed[arm.like], "ASR", "", arm, f"random, draw {arm.draw}"))
    return asked


ask_table1, ask_table12 = (functools.partial(_ask, name) for name in ("table1", "table12"))


def _removal_table(artefact: str, table: pd.DataFrame, config: Config) -> Output:
    """Utility and attack success after removing each group, with matched controls (Table 1; of
    another family, Table 12)."""
    if is_of_others(artefact, config):
        columns = {
            ("units", "share_pct"): "units %",
            ("pruning", "wikitext2_ppl"): "perplexity",
            ("pruning", "utility_avg_acc"): "utility %",
            ("pruning", "asr_keyword_sys"): "no refusal phrase, system prompt",
            ("pruning", "asr_keyword_nosys"): "no refusal phrase",
        }
        return other_family_unmeasured(artefact, config, columns, "removed")
    printed = paper(artefact, printed_model(artefact))
    arms = arms_of(table, method="removed", attack="")
    arms = [arm for arm in arms if not arm["setting"].endswith("%")]  # those are the sweep's
    # Groups in their order, each followed by what it is compared with.
    arms.sort(key=lambda a: (CLAIMED.index(a["like"] or a["rule"]), bool(a["like"]), a["setting"]))
    rows = [_row(table, "nothing", {}, printed, "dense")]
    if not rows_of(table, "ASR", base="unaligned").empty:
        rows.append(_row(table, "nothing, before alignment", {"base": "unaligned"}, printed))
    for arm in arms:
        name = units_name(arm["rule"], arm["like"], arm["setting"])
        paper_name = "" if arm["like"] or arm["setting"] else arm["rule"]
        rows.append(_row(table, name, arm, printed, paper_name))
    return Output(_note(table, config, printed_model(artefact)), filled(pd.DataFrame(rows)))


table1, table12 = (functools.partial(_removal_table, name) for name in ("table1", "table12"))


def _row(
    table: pd.DataFrame,
    name: str,
    arm: dict[str, Any],
    printed: dict[tuple[str, str], float],
    paper_name: str = "",
) -> dict:
    found = {"removed": name}
    units = estimate(table, "units", **arm)
    found["units %"] = f"{units.value:.1f}" if units else ""
    speechless = _is_speechless(table, arm)
    for column, metric, on, digits in (
        ("perplexity", "perplexity", "", 1),
        ("utility %", "accuracy", "average", 1),
        ("ASR", "ASR", "", 1),
        ("ASR, system prompt", "ASR", SYSTEM, 1),
        ("no refusal phrase", "no refusal phrase", "", 1),
        ("incoherent %", "incoherent", "", 0),
    ):
        judged = metric in ("ASR", "no refusal phrase", "incoherent")
        found[column] = "-" if judged and speechless else text(table, metric, digits, set=on, **arm)
    if (paper_name, "wikitext2_ppl") in printed:
        asr, perplexity = (printed[paper_name, m] for m in ("asr_keyword_nosys", "wikitext2_ppl"))
        found["paper: no refusal phrase, perplexity"] = f"{asr:.0f}, {perplexity:.1f}"
    return found


def _is_speechless(table: pd.DataFrame, arm: dict[str, Any]) -> bool:
    perplexity = estimate(table, "perplexity", **arm)
    return perplexity is not None and perplexity.value > NO_LANGUAGE


def _note(table: pd.DataFrame, config: Config, printed: str) -> str:
    return (
        "ASR: share of the held-out harmful prompts that are answered, within "
        f"{config.evaluate.max_new_tokens} tokens; no refusal phrase: the share that gets coherent "
        "text without one, whether or not it answers, which is what the paper measures (its "
        "numbers are "
        f"for {printed}). docs/judging.md says how both judges agree with labels. "
        f"Perplexity: held-out answers given their prompts, not WikiText. Utility: the average "
        f"accuracy in {tasks_of(table, config)}. "
        "Values are followed by 95 % intervals (Wilson; bootstrap for perplexity); with several "
        "seeds they cover prompts and seeds (perplexity is averaged in nats). Random and magnitude "
        "controls have as many heads and as many neurons, hence as many weights, as the group that "
        "they are named after."
        + (_IN_THEIR_PLACE if table["setting"].isin(["mean", "resampled", "fitted"]).any() else "")
        + (_SYSTEM_PROMPT if SYSTEM in set(table["set"]) else "")
        + (_SPEECHLESS if any(_is_speechless(table, arm) for arm in arms_of(table)) else "")
        + _unmet_criteria(table)
    )


#: What those rows mean, where they were measured.
_IN_THEIR_PLACE = (
    " *mean*: what the units say on average is put in their place; *resampled*: at each token, "
    "what they said at a random token of an answer to a harmless prompt; *fitted*: the constant "
    "with which the model's own answers to harmless prompts are likeliest (optimal ablation)."
)

#: What that column means, where it was measured.
_SYSTEM_PROMPT = (
    " System prompt: evaluate.system_prompt in a turn of its own or, where the chat template "
    "has none (Gemma's), at the head of the user's."
)


_SPEECHLESS = (
    f" Nothing is said of what a model answers whose perplexity is above {NO_LANGUAGE:,}: it "
    "writes words in no order, which the judge takes for answers (docs/judging.md)."
)


def _unmet_criteria(table: pd.DataFrame) -> str:
    """A warning for each group of which no share did in the search what the group means."""
    unmet = []
    for name in CLAIMED:
        found = rows_of(table, f"{name} criterion met")
        seeds = ", ".join(map(str, found[found["value"] == 0]["seed"]))
        unmet += [f"{name} (seed {seeds})"] if seeds else []
    if not unmet:
        return ""
    return f" No share met the search's criterion for {', '.join(unmet)}; the smallest was taken."


# --- share sweep -----------------------------------------------------------------------------


def ask_fig_share_sweep(lab: Lab) -> list[Measure]:
    """Safety and utility without ever more units of each group, and without random ones."""
    whole, experiment = catalogue.whole(lab), lab.config.experiment
    shares, draws = experiment.sweep_shares, range(experiment.sweep_draws)
    arms = [catalogue.swept(lab, group, share) for share in shares for group in CLAIMED]
    arms += [catalogue.swept(lab, "random", share, draw) for share in shares for draw in draws]
    asked = [Measure(whole, "search")]
    for arm in arms:
        asked.append(Measure(arm, "ASR", "search"))
        asked.append(Measure(arm, "perplexity", against=whole, than="whole"))
    return asked


def fig_share_sweep(table: pd.DataFrame, config: Config) -> Output:
    """ASR and perplexity against the share of units removed, by group, with random controls.

    It shows why the shares were chosen; measured on the search prompts, never on the evaluation
    prompts.
    """
    output = Output(
        "Solid: the group's top units by its own ranking. Dashed: random units, with equally many "
        "heads and neurons as ESU of that share. Shaded: smallest to largest over seeds (and "
        "draws). Dotted verticals: the shares that this run's ablation search kept, one for each "
        "seed. An incoherent answer is no success, so ASR may fall again where more units are "
        "removed. Prompts: the search part, which no table reports on. `experiment=published` "
        "sweeps over more."
    )
    swept = table[(table["method"] == "removed") & table["setting"].str.endswith(" %")]
    swept = swept.assign(share=swept["setting"].str.removesuffix(" %").astype(float))
    output.figure, (asr, perplexity) = panels(8, 3.4, 1, 2)
    for axes, metric in ((asr, "ASR"), (perplexity, "perplexity")):
        for marker, group in zip("osD^", (*CLAIMED, "random"), strict=True):
            part = swept[(swept["rule"] == group) & (swept["metric"] == metric)]
            spread = part.groupby("share")["value"].agg(["mean", "min", "max"])
            style, colour = "--" if group == "random" else "-", COLOURS[group]
            axes.plot(
                spread.index, spread["mean"], style, marker=marker, ms=4, color=colour,
                label=group,
            )  # fmt: skip
            axes.fill_between(
                spread.index, spread["min"], spread["max"], color=colour, alpha=0.15, lw=0
            )
        for group in CLAIMED:
            for kept in rows_of(table, f"{group} share")["value"]:
                axes.axvline(kept, color=COLOURS[group], ls=":", lw=1)
        ticks = sorted(swept["share"].unique())
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("units removed, % of all")
    asr.set(ylabel="attack success rate, %", ylim=(-3, 103), title="Safety")
    perplexity.set(ylabel="perplexity / whole model's", yscale="log", title="Utility")
    perplexity.legend(loc="upper left")
    return output


# --- map of roles ----------------------------------------------------------------------------


def ask_fig_roles_map(lab: Lab) -> list[Measure]:
    """Roles by layer."""
    return [Measure(catalogue.whole(lab), "roles")]


def fig_roles_map(table: pd.DataFrame, config: Config) -> Output:
    """Share of each group among a layer's heads and neurons: where the units are."""
    output = Output(
        "Each cell: the share of that layer's heads (attention) or neurons (MLP) that belong to "
        "the group, averaged over seeds."
    )
    output.figure, both = panels(8, 3.6, 2, 1, sharex=True)
    titles = {"attn": "Attention heads", "mlp": "MLP neurons"}
    for axes, (module, title) in zip(both, titles.items(), strict=True):
        part = table[(table["set"] == module) & table["metric"].isin(GROUPS)]
        grid = part.pivot_table(index="metric", columns="block", values="value")
        heat_map(axes, grid.loc[list(GROUPS)].astype(float))
        axes.set_title(title, loc="left")
        axes.set(xlabel="", ylabel="")
    both[1].set_xlabel("layer")
    output.figure.colorbar(
        both[0].collections[0], ax=both, label="share of the layer's units, %",
        ticks=[0, 1, 5, 20, 50, 100],
    )  # fmt: skip
    return output


# --- found in another way --------------------------------------------------------------------

_FOUND_AGAIN = ("ESU", "EUU", "RU", CU6, BY_SAFETY)


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

    def overlaps(name: str, metric: str) -> list[Estimate | None]:
        columns = {"at": name, **arms.get(name, {})}
        return [estimate(table, metric, set=group, **columns) for group in _FOUND_AGAIN]

    known = [name for name in config.experiment.stability if overlaps(name, "overlap")[0]]
    output.figure, axes = panels(8.5, 3.2)
    width = 0.8 / max(len(known), 1)
    markers = dict(zip(known, "os^Dv", strict=False))
    for number, name in enumerate(known):
        places = [i - 0.4 + (number + 0.5) * width for i in range(len(_FOUND_AGAIN))]
        chance = [e.value for e in overlaps(name, "overlap by chance") if e]
        axes.bar(places, chance, width, color=COLOURS["RU"], alpha=0.4)
        values = [e for e in overlaps(name, "overlap") if e]
        axes.errorbar(
            places, [e.value for e in values], yerr=reach(*values), fmt=markers[name], ms=5,
            capsize=2, lw=1, label=name,
        )  # fmt: skip
    axes.set_xticks(range(len(_FOUND_AGAIN)), _FOUND_AGAIN)
    axes.set(ylabel="overlap (IoU)", ylim=(0, 1.02))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return output
