"""Several models in one artefact: a block of the table or a row of panels for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd

from ..lab.config import Config
from . import Output
from .draw import stacked


def below_each_other(
    view: Callable[[pd.DataFrame, Config], Output],
    table: pd.DataFrame,
    configs: Mapping[str, Config],
) -> Output:
    """One output of the views of every model, in this order."""

    def make(name: str) -> Output:
        return view(table[table["model"] == name], configs[name])

    outputs = {name: make(name) for name in configs}
    note = _notes({name: output.note for name, output in outputs.items()})
    tables = {name: o.table for name, o in outputs.items() if o.table is not None}
    if tables:
        return Output(note, _blocks(tables))
    sizes = {name: o.figure.get_size_inches() for name, o in outputs.items() if o.figure}
    return Output(note, figure=stacked(sizes, make))


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
    parts = [t if "model" in t else t.assign(model=name) for name, t in tables.items()]
    whole = pd.concat(parts, ignore_index=True).fillna("").drop_duplicates(ignore_index=True)
    return whole[["model", *whole.columns.drop("model")]]
