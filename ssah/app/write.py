"""Write artefacts: tables as csv, md and tex, figures as png and svg, and how long they took."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from filelock import FileLock

from ..core.files import write_atomically
from ..core.store import behind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..artefacts import Artefact, Output
    from .study import Study


#: What a results folder was made with, by model: profile and overrides of each run.
SETTINGS = "settings.json"


def write_output(study: Study, artefact: Artefact, table: pd.DataFrame) -> Output:
    """View the measurements of one artefact, and write all its files to the results folder.

    The last line of what is written names the seeds and commits behind it.
    """
    output = artefact.view(table, study.configs)
    text = json.dumps(study.made)
    write_atomically(study.results / SETTINGS, lambda p: p.write_text(text, "utf-8"))
    path = study.results / "tables" / artefact.id
    line = _origin(study, artefact, table)
    write_atomically(path.with_suffix(".csv"), lambda p: _to_csv(table, p))
    if output.table is not None:
        shown = output.table
        text = f"{shown.to_markdown(index=False)}\n\n{output.note}\n\n{line}\n"
        write_atomically(path.with_suffix(".md"), lambda p: p.write_text(text, encoding="utf-8"))
        latex = shown.to_latex(index=False, escape=True)
        write_atomically(
            path.with_suffix(".tex"), lambda p: p.write_text(f"% {line}\n{latex}", "utf-8")
        )
    if output.figure is not None:
        _write_figure(output.figure, study.results / "figures" / artefact.id, line, output.note)
    return output


def _origin(study: Study, artefact: Artefact, table: pd.DataFrame) -> str:
    stamp, models = study.stamp, ", ".join(table["model"].unique()) or study.config.model.name
    seeds = " ".join(map(str, sorted(set(table["seed"])))) or "none"
    commits = sorted({commit for text in table["commits"] for commit in text.split()})
    measured = f"measured at commit {', '.join(commits) or 'unknown'}"
    begin = f"{artefact.title}. Profile {stamp['profile']}, model {models}, seeds {seeds}"
    if sum(map(len, study.made.values())) > 1:
        return f"{begin}, {measured}, in the runs that {SETTINGS} lists."
    return (
        f"{begin}, {stamp['overrides'] or 'no overrides'}, config {stamp['config']}, {measured}. "
        f"Command: ssah {artefact.id} profile={stamp['profile']} {stamp['overrides']}".rstrip()
    )


def _to_csv(frame: pd.DataFrame, path: Path) -> None:
    frame.to_csv(path, index=False, float_format="%.6g")  # more digits than mean anything


def _write_figure(figure: Figure, path: Path, line: str, note: str) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": path.name}):
        for kind in ("png", "svg"):
            # Without a date, equal figures are equal files.
            metadata = {"Description": line} | ({"Date": None} if kind == "svg" else {})
            write_atomically(
                path.with_suffix(f".{kind}"),
                functools.partial(figure.savefig, format=kind, metadata=metadata),
            )
            figure.set_layout_engine("none")  # what was found for the first holds for the others
    write_atomically(
        path.with_suffix(".md"), lambda p: p.write_text(f"{note}\n\n{line}\n", encoding="utf-8")
    )


def write_times(study: Study, artefact: Artefact, used: set[str], warm: float) -> None:
    """Seconds of all runs behind an artefact and of what they were made from, and of the rest:
    what it takes where everything is cached."""
    path, records = study.results / "times.csv", study.store.records()
    row = {
        "artefact": artefact.id,
        "cold_seconds": round(sum(records[key]["seconds"] for key in behind(records, used))),
        "warm_seconds": round(warm, 1),
        "seeds": len(study.labs),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        known = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(row))
        rest = known[known["artefact"] != artefact.id]
        frame = pd.concat([rest, pd.DataFrame([row])], ignore_index=True)
        write_atomically(path, lambda p: _to_csv(frame, p))
