"""Notebook 02: the share sweep, and the map of roles."""

from __future__ import annotations

import pandas as pd

from ..lab import catalogue
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..units.roles import GROUPS
from . import Output
from .draw import COLOURS, new_figure, shares_norm, styled
from .pick import rows_of

CLAIMED = ("ESU", "EUU", "RU")


# --- share sweep -----------------------------------------------------------------------------


def ask_fig_share_sweep(lab: Lab) -> list[Measure]:
    """Safety and utility without ever more units of each group, and without random ones."""
    whole, experiment = catalogue.whole(lab), lab.config.experiment
    arms = [
        catalogue.swept(lab, group, share) for share in experiment.sweep_shares for group in CLAIMED
    ]
    arms += [
        catalogue.swept(lab, "random", share, draw)
        for share in experiment.sweep_shares
        for draw in range(experiment.sweep_draws)
    ]
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
    with styled():
        output.figure = new_figure(8, 3.4)
        asr, perplexity = output.figure.subplots(1, 2)
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
    import seaborn  # takes a second

    with styled():
        output.figure = new_figure(8, 3.6)
        panels = output.figure.subplots(2, 1, sharex=True)
        titles = {"attn": "Attention heads", "mlp": "MLP neurons"}
        for axes, (module, title) in zip(panels, titles.items(), strict=True):
            part = table[(table["set"] == module) & table["metric"].isin(GROUPS)]
            grid = part.pivot_table(index="metric", columns="block", values="value")
            seaborn.heatmap(
                grid.loc[list(GROUPS)].astype(float), ax=axes, norm=shares_norm(), cmap="cividis",
                cbar=False,
            )  # fmt: skip
            axes.grid(False)
            axes.tick_params(left=False, bottom=False, labelrotation=0)
            axes.set_title(title, loc="left")
            axes.set(xlabel="", ylabel="")
        panels[1].set_xlabel("layer")
        output.figure.colorbar(
            panels[0].collections[0], ax=panels, label="share of the layer's units, %",
            ticks=[0, 1, 5, 20, 50, 100],
        )  # fmt: skip
    return output
