"""Several models in one artefact: a block of the table or a row of panels for each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import pandas as pd

from ..lab.config import Config
from . import Output
from .draw import stacked

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def below_each_other(
    view: Callable[[pd.DataFrame, Config], Output],
    table: pd.DataFrame,
    configs: Mapping[str, Config],
) -> Output:
    """One output of the views of every model, in this order."""
    draw = {
        name: functools.partial(view, table[table["model"] == name], config)
        for name, config in configs.items()
    }
    outputs = {name: make() for name, make in draw.items()}
    found = Output(_notes({name: output.note for name, output in outputs.items()}))
    tables = {n: output.table for n, output in outputs.items() if output.table is not None}
    if tables:
        found.table = _blocks(tables)
    if all(output.figure is not None for output in outputs.values()):
        found.figure = stacked({name: _figure_of(make) for name, make in draw.items()})
    return found


def _figure_of(make: Callable[[], Output]) -> Callable[[], Figure]:
    return lambda: cast("Figure", make().figure)


def _notes(notes: Mapping[str, str]) -> str:
    """The first model's, and of the others what they say beside it."""
    first, *others = notes
    known = set(notes[first].split(". "))
    found = [notes[first]]
    for name in others:
        new = [sentence for sentence in notes[name].split(". ") if sentence not in known]
        if new:
            found.append(f"{name}: {'. '.join(new)}")
    return " ".join(found)


def _blocks(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The tables one below the other, with a column that says of which model each row is; a row
    that is in all of them, such as the paper's, stands once."""
    parts = []
    for name, table in tables.items():
        parts.append(table if "model" in table else table.assign(model=name))
    whole = pd.concat(parts, ignore_index=True).fillna("").drop_duplicates(ignore_index=True)
    return whole[["model", *(column for column in whole if column != "model")]]
