"""Reading the table of measurements: an arm's rows, seeds and draws pooled, numbers as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..core.paths import reference
from ..evaluate.stats import Estimate, over_repetitions
from ..lab.arms import Arm
from ..lab.config import Config
from ..lab.metrics.behaviour import is_share
from ..lab.table import matching
from ..units.roles import GROUPS
from . import Output

#: What columns say of an arm where nothing is said about them.
_PLAIN = {
    field.name: field.default
    for field in dataclasses.fields(Arm)
    if field.name not in ("make", "draw")
} | {"set": "", "at": "", "against": ""}

#: Those that say which arm it is.
_ARM = [name for name in _PLAIN if name not in ("set", "at", "against")]


def rows_of(table: pd.DataFrame, metric: str, **columns: Any) -> pd.DataFrame:
    """Rows of a metric; columns that are not named have their plain values, those that are None
    any."""
    wanted = {name: value for name, value in (_PLAIN | columns).items() if value is not None}
    return matching(table, metric=metric, **wanted)


_BOUNDS = ("value", "low", "high")


def pooled(rows: pd.DataFrame) -> Estimate | None:
    """Mean value and interval over seeds, and over draws within a seed; None without rows.

    Something that is counted has no interval: it gets the range. Perplexities (and their ratios)
    are averaged as what they are exponentials of, nats per token.
    """
    if rows.empty:
        return None
    if (rows["metric"] == "perplexity").all():
        nats = rows.assign(metric="nats", **{name: np.log(rows[name]) for name in _BOUNDS})
        mean = pooled(nats)
        assert mean is not None
        return Estimate(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.n)
    own = rows[[*_BOUNDS, "n"]].astype(float).to_numpy()
    if (own[:, 1] == own[:, 2]).all():
        values = own[:, 0]
        return Estimate(values.mean(), values.min(), values.max(), int(own[0, 3]))
    by_seed: dict[int, list[Estimate]] = {}
    for seed, numbers in zip(rows["seed"], own, strict=True):
        value, low, high, n = numbers.tolist()
        by_seed.setdefault(seed, []).append(Estimate(value, low, high, int(n)))
    found = over_repetitions([over_repetitions(draws) for draws in by_seed.values()])
    if not rows["metric"].map(is_share).all():
        return found
    least = -100.0 if (rows["against"] != "").any() else 0.0
    return dataclasses.replace(found, low=max(found.low, least), high=min(found.high, 100.0))


def estimate(table: pd.DataFrame, metric: str, **columns: Any) -> Estimate | None:
    """:func:`pooled` of :func:`rows_of`."""
    return pooled(rows_of(table, metric, **columns))


def text(table: pd.DataFrame, metric: str, digits: int = 1, **columns: Any) -> str:
    """:func:`estimate`, as a table shows it."""
    return format_estimate(estimate(table, metric, **columns), digits)


def arms_of(table: pd.DataFrame, **columns: Any) -> list[dict[str, Any]]:
    """The arms in a table, in the order of their first rows, restricted by some columns."""
    chosen = matching(table, **columns) if columns else table
    return chosen[_ARM].drop_duplicates().to_dict("records")


def name_of_arm(arm: dict[str, Any]) -> str:
    """For people (:attr:`ssah.lab.arms.Arm.name`)."""
    return Arm(lambda: None, **arm).name  # type: ignore[arg-type, return-value]


def fewer_seeds(table: pd.DataFrame) -> str:
    """Which arms have no ASR (no accuracy, where there is no ASR) of some seed that others have, as
    a sentence of a note; "" where all have."""
    metric = "ASR" if (table["metric"] == "ASR").any() else "accuracy"
    table = table[table["metric"] == metric]
    every, by_seeds = sorted(set(table["seed"])), dict[tuple[int, ...], list[str]]()
    for name, rows in _by_arm(table).items():
        seeds = tuple(sorted(set(rows["seed"])))
        by_seeds.setdefault(seeds, []).append(name)
    return "".join(
        f" Seed {', '.join(map(str, seeds))} only: {'; '.join(names)}."
        for seeds, names in by_seeds.items()
        if list(seeds) != every
    )


def mostly_neither(table: pd.DataFrame) -> str:
    """Which fine-tuned arms neither answer nor refuse most of the prompts, as a sentence of a note;
    "" where there is none, or none was asked for all three metrics that tell. Such a model has lost
    its language, fallen into a formula, or learned to be curt."""
    own = table[(table["method"] != "") & (table["attack"] != "") & (table["against"] == "")]
    own = own[(own["set"] == "") & (own["at"] == "")]
    keys = [*_ARM, "seed", "draw"]
    unrefused, answered, incoherent = (
        own[own["metric"] == metric].set_index(keys)["value"].astype(float)
        for metric in ("no refusal phrase", "ASR", "incoherent")
    )
    neither = (unrefused - answered + incoherent).dropna()
    seeds = dict[str, set[int]]()
    for index in neither[neither > 50].index:
        arm = dict(zip(keys, index, strict=True))
        seeds.setdefault(name_of_arm({name: arm[name] for name in _ARM}), set()).add(arm["seed"])
    if not seeds:
        return ""
    named = "; ".join(f"{arm} (seed {', '.join(map(str, sorted(n)))})" for arm, n in seeds.items())
    return (
        " Fewer than half of the completions answer or refuse, so that a low ASR is no sign of "
        f"safety, after {named}."
    )


def _by_arm(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each arm, whatever the epoch, by what it is called."""
    names = [name for name in _ARM if name != "epoch"]
    found = {}
    for values, rows in table.groupby(names, sort=False, dropna=False):
        arm = dict(zip(names, values, strict=True))
        prefix = f"{arm['attack']}: " if arm["attack"] else ""
        found[prefix + name_of_arm(arm | {"attack": "", "epoch": 0})] = rows
    return found


def tasks_of(table: pd.DataFrame, config: Config) -> str:
    """What accuracy is of, in words."""
    evaluate = config.evaluate
    if evaluate.utility == "lm_eval":
        return f"lm-eval tasks ({', '.join(evaluate.lm_eval_tasks)})"
    tasks = {
        "trivia": f"{evaluate.trivia_items} trivia questions with four choices (chance: 25 %)",
        "arithmetic": f"{evaluate.arithmetic_items} arithmetic word problems (exact match)",
    }
    measured = set(table.loc[table["metric"] == "accuracy", "set"])
    return " and ".join(said for task, said in tasks.items() if task in measured or not measured)


def filled(shown: pd.DataFrame) -> pd.DataFrame:
    """A table for readers, without the columns that nothing was measured for."""
    shown = shown.fillna("")
    return shown[[name for name in shown.columns if (shown[name] != "").any()]]


#: The paper's main model, and the one of its tables of another family.
LLAMA, MISTRAL = "Llama-2-7B-Chat", "Mistral-7B-Instruct-v0.2"

#: The tables of another family than the paper's main one, and those of the main one that ask and
#: show the same.
OTHER_FAMILY = {"table12": "table1", "table14": "table2", "table15": "table13"}


def is_of_others(artefact: str, config: Config) -> bool:
    """Whether a table is of another family, and the model under study of the main one."""
    return artefact in OTHER_FAMILY and config.model.family == "llama"


def other_family_unmeasured(
    artefact: str, config: Config, columns: dict[tuple[str, str], str], setting: str
) -> Output:
    """The paper's rows of a table of another family, where the model under study is of the main
    one, and how to get measured ones."""
    return Output(
        f"The paper's numbers for {MISTRAL}, of another family; not measured here, where the model "
        f"is {config.model.name}, taken for one of the main family (model.family=llama). "
        f'`make {artefact} ARGS="model=qwen2_5_coder"` measures a model that fits a laptop, and '
        f'`make {artefact} HF_HUB_OFFLINE=0 ARGS="profile=paper model=mistral_7b_instruct"` '
        f"the paper's (one 80 GB GPU). The same table for this model is {OTHER_FAMILY[artefact]}.",
        filled(pd.DataFrame(paper_rows(artefact, columns, setting))),
    )


def printed_model(artefact: str) -> str:
    """The model whose numbers in the paper stand beside those of an artefact."""
    return MISTRAL if artefact in OTHER_FAMILY else LLAMA


def paper(artefact: str, model: str = LLAMA) -> dict[tuple[str, str], float]:
    """(setting, metric) -> the number that the paper prints."""
    found = pd.read_csv(reference("paper.csv"))
    # Attribute transfer names its models "Llama-2-7B-Chat -> dolly".
    of_model = found["model"].str.split(" -> ").str[0] == model
    found = found[(found["artefact"] == artefact) & of_model]
    return found.groupby(["setting", "metric"])["value"].mean().to_dict()


def paper_matrix(artefact: str, scope: str, before: Sequence[str] = GROUPS) -> np.ndarray:
    """Per cent that were in each group before and in each now, ``[before, groups]``, as printed."""
    found = pd.read_csv(reference("paper.csv"))
    found = found[(found["artefact"] == artefact) & (found["benchmark"] == scope)]
    values = found.set_index("setting")["value"]
    return np.array([[values[f"{a}->{b}"] for b in GROUPS] for a in before])


def paper_rows(
    artefact: str, columns: dict[tuple[str, str], str], setting: str, digits: int = 1
) -> list[dict[str, str]]:
    """The paper's rows of a table: one for each model and setting.

    ``columns`` say where the value of a benchmark and metric goes; ``setting`` names the column of
    the paper's setting.
    """
    found = pd.read_csv(reference("paper.csv"))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for record in found[found["artefact"] == artefact].to_dict("records"):
        column = columns.get((record["benchmark"], record["metric"]))
        if column:
            key = record["model"], record["setting"]
            row = rows.setdefault(key, {"model": f"paper: {key[0]}", setting: key[1]})
            row[column] = f"{record['value']:.{digits}f}"
    return list(rows.values())


def format_estimate(e: Estimate | None, digits: int = 1) -> str:
    """``12.0 [7.0, 19.8]``; a number without an interval alone, and nothing for none (the
    precision of a verdict that was never given)."""
    if e is None or math.isnan(e.value):
        return ""
    if e.low == e.high:
        return f"{e.value:.{digits}f}"
    return f"{e.value:.{digits}f} [{e.low:.{digits}f}, {e.high:.{digits}f}]"
