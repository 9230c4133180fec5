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
    """What the notes of all models say, and behind it what those of some say, by model."""
    sentences = {name: note.removesuffix(".").split(". ") for name, note in notes.items()}
    first, *others = sentences.values()
    shared = [one for one in first if all(one in other for other in others)]
    parts = {"": shared} | {
        f"{name}: ": [one for one in own if one not in shared] for name, own in sentences.items()
    }
    return " ".join(f"{name}{'. '.join(own)}." for name, own in parts.items() if own)


def _blocks(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The tables one below the other, with a column that says of which model each row is; a row
    that is in all of them, such as the paper's, stands once."""
    parts = [t if "model" in t else t.assign(model=name) for name, t in tables.items()]
    whole = pd.concat(parts, ignore_index=True).fillna("").drop_duplicates(ignore_index=True)
    return whole[["model", *whole.columns.drop("model")]]
