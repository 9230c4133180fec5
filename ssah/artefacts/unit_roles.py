"""Notebook 02: which units carry safety. Table 1, the share sweep, and the map of roles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..evaluate.stats import Estimate, proportion
from ..scoring.selectors import random_units
from ..units.mask import UnitMask
from ..units.roles import GROUPS, Shares
from . import Output
from .render import COLOURS, STYLE, ShownFigure

if TYPE_CHECKING:
    from ..app.study import Study

CLAIMED = ("ESU", "EUU", "RU")


# --- share sweep -----------------------------------------------------------------------------


def fig_share_sweep(study: Study) -> Output:
    """ASR and perplexity against the share of units removed, by group, with random controls.

    It shows why the shares were chosen; measured on the search prompts, never on the evaluation
    prompts.
    """
    output = Output(
        note="Solid: the group's top units by its own ranking. Dashed: random units, as many heads "
        "and neurons as ESU of that share. Shaded: smallest to largest over seeds (and draws). "
        "Dotted verticals: the shares that this run's ablation search kept, one for each seed. An "
        "incoherent answer is no success, so ASR may fall again where more units are removed. "
        "Prompts: the search part, which no table reports on. `evaluate=wide` sweeps over more."
    )
    for stages in study.all_stages:
        for share in study.config.evaluate.sweep_shares:
            masks = {
                "ESU": stages.classify(Shares(stages.shares.ru, share, 0)).mask("ESU"),
                "EUU": stages.classify(Shares(stages.shares.ru, 0, share)).mask("EUU"),
                "RU": stages.classify(Shares(share, 0, 0)).mask("RU"),
            }
            for group, mask in masks.items():
                _sweep_point(stages, output, group, share, mask, stages.seed)
            for draw in range(study.config.evaluate.sweep_random_draws):
                mask = random_units(stages.layout, masks["ESU"], 1000 * stages.seed + draw)
                _sweep_point(stages, output, "random", share, mask, f"{stages.seed}.{draw}")
    output.figure = _draw_sweep(output.frame(study, "fig_share_sweep"), study)
    return output


def _sweep_point(stages, output: Output, group: str, share: float, mask: UnitMask, seed) -> None:
    effect = stages.effect(mask)
    n = stages.config.data.search
    output.add(f"{group} {share:.1%}", "asr", seed, proportion_of(effect.asr, n).scaled(100))
    ratio = effect.perplexity_ratio
    output.add(f"{group} {share:.1%}", "perplexity_ratio", seed, Estimate(ratio, ratio, ratio, n))


def proportion_of(rate: float, n: int) -> Estimate:
    """The estimate behind a rate of ``n`` outcomes."""
    hits = round(rate * n)
    return proportion([True] * hits + [False] * (n - hits))


def _draw_sweep(frame: pd.DataFrame, study: Study) -> Figure:
    frame[["group", "share"]] = frame["arm"].str.split(" ", expand=True)
    frame["share"] = frame["share"].str.rstrip("%").astype(float)
    with plt.style.context(STYLE):
        figure = ShownFigure(figsize=(8, 3.4))
        asr, perplexity = figure.subplots(1, 2)
        for axes, metric in ((asr, "asr"), (perplexity, "perplexity_ratio")):
            for marker, group in zip("osD^", ("ESU", "EUU", "RU", "random"), strict=True):
                part = frame[(frame["group"] == group) & (frame["metric"] == metric)]
                spread = part.groupby("share")["value"].agg(["mean", "min", "max"])
                style = "--" if group == "random" else "-"
                colour = COLOURS[group]
                axes.plot(
                    spread.index, spread["mean"], style, marker=marker, ms=4, color=colour,
                    label=group,
                )  # fmt: skip
                axes.fill_between(
                    spread.index, spread["min"], spread["max"], color=colour, alpha=0.15, lw=0
                )
            for stages in study.all_stages:
                for group in CLAIMED:
                    kept = 100 * getattr(stages.shares, group.lower())
                    axes.axvline(kept, color=COLOURS[group], ls=":", lw=1)
            axes.set_xscale("log")
            ticks = sorted(frame["share"].unique())
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.minorticks_off()
            axes.set_xlabel("units removed, % of all")
        asr.set(ylabel="attack success rate, %", ylim=(-3, 103), title="Safety")
        perplexity.set(ylabel="perplexity / whole model's", yscale="log", title="Utility")
        perplexity.legend(loc="upper left")
    return figure


# --- map of roles ----------------------------------------------------------------------------


def fig_roles_map(study: Study) -> Output:
    """Share of each group among a layer's heads and neurons: where the units are."""
    output = Output(
        note="Each cell: the share of that layer's heads (attention) or neurons (MLP) that belong "
        "to the group, averaged over seeds."
    )
    for stages in study.all_stages:
        for group in GROUPS:
            mask = stages.roles.mask(group)
            for block in stages.layout.blocks:
                share = proportion(mask[block.name].tolist()).scaled(100)
                output.add(group, block.name, stages.seed, share)
    frame = output.frame(study, "fig_roles_map")
    frame["layer"] = frame["metric"].str.extract(r"layers\.(\d+)").astype(int)
    frame["module"] = frame["metric"].str.rsplit(".", n=1).str[-1]
    output.figure = _draw_map(frame)
    return output


def _draw_map(frame: pd.DataFrame) -> Figure:
    titles = {"attn": "Attention heads", "mlp": "MLP neurons"}
    with plt.style.context(STYLE):
        figure = ShownFigure(figsize=(8, 3.6))
        panels = figure.subplots(2, 1, sharex=True)
        for axes, module in zip(panels, ("attn", "mlp"), strict=True):
            part = frame[frame["module"] == module]
            grid = part.pivot_table(index="arm", columns="layer", values="value").loc[list(GROUPS)]
            # A square-root scale keeps groups of about one per cent visible beside CU.
            image = axes.imshow(
                np.sqrt(grid.to_numpy() / 100), aspect="auto", cmap="cividis", vmin=0, vmax=1
            )
            axes.set_yticks(range(len(GROUPS)), GROUPS)
            axes.set_title(titles[module], loc="left")
            axes.grid(False)
        panels[1].set_xlabel("layer")
        bar = figure.colorbar(image, ax=panels, label="share of the layer's units, %")
        marks = [0, 1, 5, 20, 50, 100]
        bar.set_ticks(list(np.sqrt(np.array(marks) / 100)), labels=[str(m) for m in marks])
    return figure
