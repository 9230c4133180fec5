"""Write artefacts: tables as csv, md and tex, figures as png and svg, metrics as tidy rows."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import pandas as pd
from filelock import FileLock
from matplotlib.figure import Figure

from ..core.files import write_atomically
from ..evaluate.stats import Estimate

if TYPE_CHECKING:
    from ..app.study import Study
    from . import Artefact, Output


STYLE = str(Path(__file__).with_name("style.mplstyle"))


class ShownFigure(Figure):
    """A figure that notebooks display by itself, without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


#: Okabe-Ito colours: told apart by colour-blind readers; markers and line styles differ as well.
COLOURS = {
    "ESU": "#D55E00",
    "EUU": "#0072B2",
    "CU": "#009E73",
    "UU": "#56B4E9",
    "RU": "#999999",
    "random": "#000000",
}


def format_estimate(e: Estimate | None, digits: int = 1) -> str:
    """``12.0 [7.0, 19.8]``."""
    if e is None:
        return ""
    return f"{e.value:.{digits}f} [{e.low:.{digits}f}, {e.high:.{digits}f}]"


def write_output(study: Study, artefact: Artefact, output: Output) -> None:
    """All files of one artefact under the study's results folder."""
    stamp, frame = study.stamp, output.frame(study, artefact.id)
    seeds = sorted(set(frame["seed"].astype(str).str.split(".").str[0]), key=int)
    line = (
        f"{artefact.title}. Profile {stamp['profile']}, model {stamp['model']}, seeds "
        f"{' '.join(seeds) or stamp['seeds']}, {stamp['overrides'] or 'no overrides'}, config "
        f"{stamp['config']}, commit {stamp['commit'] or 'unknown'}. Command: python -m ssah "
        f"{artefact.id} profile={stamp['profile']} {stamp['overrides']}".rstrip()
    )
    if study.earlier is not None:
        line += ". Arms and seeds beyond that: earlier runs, each named in metrics.csv."
    frame.insert(0, "artefact", artefact.id)
    table, numbers = study.results / "tables" / artefact.id, frame.drop(columns=list(stamp))
    write_atomically(table.with_suffix(".csv"), lambda p: _to_csv(numbers, p))
    if output.table is not None:
        shown = output.table
        text = f"{shown.to_markdown(index=False)}\n\n{output.note}\n\n{line}\n"
        write_atomically(table.with_suffix(".md"), lambda p: p.write_text(text, encoding="utf-8"))
        latex = shown.to_latex(index=False, escape=True)
        write_atomically(
            table.with_suffix(".tex"), lambda p: p.write_text(f"% {line}\n{latex}", "utf-8")
        )
    if output.figure is not None:
        _write_figure(output.figure, study.results / "figures" / artefact.id, line, output.note)
    merge_rows(study.results / "metrics.csv", frame, artefact.id)


def _to_csv(frame: pd.DataFrame, path: Path) -> None:
    frame.to_csv(path, index=False, float_format="%.6g")  # more digits than mean anything


def write_times(study: Study, artefact: Artefact, runs: dict[str, float], warm: float) -> None:
    """Seconds of the runs behind an artefact, of those that no earlier one uses, and of the rest.

    ``runs`` are keys and seconds; ``warm`` is what the artefact takes where all of them are cached.
    """
    path, times = study.results / ".runs.json", study.results / "timings.csv"
    with FileLock(path.with_name(f"{path.name}.lock")):
        known = json.loads(path.read_text()) if path.exists() else {}
        known[artefact.id] = runs
        write_atomically(path, lambda p: p.write_text(json.dumps(known)))
        row = {
            "artefact": artefact.id,
            "seconds": round(sum(runs.values())),
            "added_seconds": 0,
            "warm_seconds": round(warm, 1),
            **study.stamp,
        }
        merge_rows(times, pd.DataFrame([row]), artefact.id)
        frame = _share_out(pd.read_csv(times, dtype={"seeds": str}), known)
        write_atomically(times, lambda p: frame.to_csv(p, index=False))


def _share_out(frame: pd.DataFrame, known: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Count every run's seconds for the first artefact that uses it, in the artefacts' order."""
    from . import ARTEFACTS

    counted: set[str] = set()
    for name in ARTEFACTS:
        runs = known.get(name, {})
        added = sum(seconds for key, seconds in runs.items() if key not in counted)
        frame.loc[frame["artefact"] == name, "added_seconds"] = round(added)
        counted.update(runs)
    return frame


def _write_figure(figure: Figure, path: Path, line: str, note: str) -> None:
    with mpl.rc_context({"svg.hashsalt": path.name}):
        for kind in ("png", "svg"):
            # Without a date, equal figures are equal files.
            metadata = {"Description": line} | ({"Date": None} if kind == "svg" else {})
            write_atomically(
                path.with_suffix(f".{kind}"),
                functools.partial(figure.savefig, format=kind, metadata=metadata),
            )
    write_atomically(
        path.with_suffix(".md"), lambda p: p.write_text(f"{note}\n\n{line}\n", encoding="utf-8")
    )


def merge_rows(path: Path, rows: pd.DataFrame, artefact: str) -> None:
    """Replace one artefact's rows in a shared csv; others' stay. Safe for several processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            old = pd.read_csv(path, dtype={"seed": str})
            rows = pd.concat([old[old["artefact"] != artefact], rows], ignore_index=True)
        write_atomically(path, lambda p: _to_csv(rows, p))
