"""A study: one configuration, its seeds, what it measures, and the artefacts that it shows."""

from __future__ import annotations

import functools
import json
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from filelock import FileLock

from ..artefacts import ARTEFACTS, Artefact, Output, find
from ..claims.table import claims_table, styled
from ..core.errors import SsahError
from ..core.files import write_atomically
from ..core.paths import home, results_root
from ..core.progress import show_progress
from ..core.runtime import require_one_process
from ..core.store import Store, behind, digest
from ..lab import catalogue
from ..lab.config import Config, compose, joint
from ..lab.jobs import FIRST, Job, costs, jobs_of
from ..lab.lab import Lab
from ..lab.measure import Measure, measured
from ..lab.table import (
    merged,
    read_shown,
    read_table,
    same_subjects,
    typed,
    updated,
    write_table,
)
from .processes import run_jobs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The profile of a study that shows ``results/published``, of all its models, and computes nothing.
PUBLISHED = "published"

#: Measured for more seeds than the others where ``headline_seeds`` says so; of another family than
#: the paper's main one, Tables 12 and 14 show the same measures.
HEADLINE = ("table1", "table2", "table12", "table14")

#: What a results folder was made with, by model: profile and overrides of each run.
SETTINGS = "settings.json"

#: Overrides that say which seeds a run has.
SEEDS = ("seed", "n_seeds", "headline_seeds")


class Study:
    """Profile and Hydra overrides, composed; a lab for each seed; where results go.

    ``only`` restricts :meth:`show` to some artefacts (all where empty). Results go to
    ``results/<profile>``, or with overrides to ``results/<profile>/<overrides>``, so that runs of
    different settings never mix. The profile ``published`` shows what is in ``results/published``
    and computes nothing; it takes no overrides.
    """

    def __init__(
        self,
        profile: str = "laptop",
        overrides: Sequence[str] = (),
        only: Sequence[str] = (),
        results: Path | None = None,
    ):
        if "ipykernel" in sys.modules:  # a notebook's kernel
            show_progress()
            pd.set_option("display.max_colwidth", None)  # claims are sentences, and all are shown
            pd.set_option("display.max_rows", None)
        require_one_process()
        self.only = tuple(only)
        self.store = Store(home() / "runs")
        self.profile = profile
        #: Of what is computed; how it is run is left out, but for the precision.
        self.overrides = [o for o in overrides if not o.startswith("runtime.")]
        if profile == PUBLISHED:
            self._open_published()
            return
        self.config: Config = compose(profile, list(overrides))
        if self.labs[0].precision != "float32":
            self.overrides.append(f"runtime.precision={self.labs[0].precision}")
        name = self.config.model.name
        #: By model: what it is measured with, and the runs that asked for it.
        self.configs = {name: self.config}
        self.made = {name: [{"profile": profile, "overrides": self.overrides}]}
        catalogue.check(self.labs[0])
        self.results = results or results_root() / profile / slug(self.overrides)
        if self.config.runtime.threads:
            torch.set_num_threads(self.config.runtime.threads)

    def _open_published(self) -> None:
        self.results = results_root() / PUBLISHED
        if self.overrides:
            raise SsahError(
                "The profile 'published' shows what was measured and takes no overrides: choose "
                "profile=laptop to measure with others."
            )
        if not (self.results / SETTINGS).exists():
            raise SsahError(
                f"{self.results} is not there: the published results come with a clone of the "
                "repository."
            )
        whole = combined([self.results], self.results)
        self.config, self.configs, self.made = whole.config, whole.configs, whole.made

    @functools.cached_property
    def labs(self) -> list[Lab]:
        """One for each seed; those after the first ``n_seeds`` for the headline alone."""
        if self.profile == PUBLISHED:
            raise SsahError(
                "The profile 'published' computes nothing: open a notebook with it, or choose "
                "profile=laptop."
            )
        count = max(self.config.n_seeds, self.config.headline_seeds)
        return [Lab(self.config, self.store, self.config.seed + i) for i in range(count)]

    def asked(self, artefacts: Sequence[Artefact]) -> list[tuple[Lab, list[Measure]]]:
        """What some artefacts ask, seed by seed; the same question once."""
        found = []
        for lab in self.labs:
            wanted = [a for a in artefacts if not lab.only_headline or a.id in HEADLINE]
            measures = [measure for artefact in wanted for measure in artefact.ask(lab)]
            found.append((lab, list(dict.fromkeys(measures))))
        return found

    def jobs(self, artefacts: Iterable[str] = ARTEFACTS) -> list[Job]:
        """What there is to compute for some artefacts, in parts that can run apart: first those
        that others need, then those that need no other, and of the rest the largest first."""
        asked = self.asked([find(name) for name in artefacts])
        found = [job for lab, measures in asked for job in jobs_of(lab, measures)]
        return sorted(found, key=lambda job: (job.name != FIRST, job.waits, -job.asked))

    def collect(self, artefacts: Sequence[str] = tuple(ARTEFACTS)) -> None:
        """Compute what these artefacts ask, all of it together: each model is trained once."""
        run_jobs(self, artefacts)

    def write_costs(self) -> None:
        """What each finished job took, for the plans of others (``jobs.csv``)."""
        table = pd.DataFrame(costs(self.jobs()))
        write_atomically(self.results / "jobs.csv", lambda p: table.to_csv(p, index=False))

    def show(self, artefact: str) -> Any:
        """Compute (or read) an artefact, write its files, and return its table or figure.

        Returns None where ``only`` leaves the artefact out.
        """
        found = find(artefact)
        if self.only and artefact not in self.only:
            return None
        output = drawn(self, found) if self.profile == PUBLISHED else self._produce(found)
        return output.figure if output.figure is not None else output.table

    def _produce(self, artefact: Artefact) -> Output:
        start = time.monotonic()
        parts, used = [], set()
        for lab, measures in self.asked([artefact]):
            table, keys = measured(lab, measures)
            parts.append(table)
            used |= keys
        own = merged(parts) if any(len(part) for part in parts) else typed(pd.DataFrame())
        output = write_output(self, artefact, own)
        with FileLock(self.results / ".measurements.lock"):  # notebooks run side by side
            write_table(updated(read_table(self.results), own), self.results)
        write_times(self, artefact, used, time.monotonic() - start)
        return output

    def claims(self, artefact: str | None = None) -> Any:
        """The claims table, or its rows that rest on one artefact."""
        table = claims_table(self.results)
        return styled(table if artefact is None else table[table["artefact"] == artefact])

    @property
    def stamp(self) -> dict[str, Any]:
        """What this run is called."""
        return {
            "profile": self.config.name,
            "model": self.config.model.name,
            "overrides": shlex.join(self.overrides),
            "config": digest(asdict(self.config))[:10],
        }


def combined(folders: Sequence[Path], results: Path) -> Study:
    """A study that draws what several results folders hold: of each model, all that its runs
    asked."""
    made: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        for model, runs in _runs(folder).items():
            known = made.setdefault(model, [])
            known += [run for run in runs if run not in known]
    first = next(iter(made.values()))[0]
    study = Study(first["profile"], _without_seeds(first["overrides"]), results=results)
    study.made = made
    study.configs = {
        model: joint([compose(run["profile"], _without_seeds(run["overrides"])) for run in runs])
        for model, runs in made.items()
    }
    return study


def _runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By model, the runs that a results folder holds."""
    try:
        found: dict[str, list[dict[str, Any]]] = json.loads((folder / SETTINGS).read_text("utf-8"))
        if all(isinstance(runs, list) for runs in found.values()):
            return found
    except (OSError, ValueError, AttributeError):
        pass
    raise SsahError(
        f"{folder / SETTINGS} does not say which runs made the results: it is missing, damaged, or "
        "from an earlier version. Run the same command again; what is cached is not computed anew."
    )


def _without_seeds(overrides: Sequence[str]) -> list[str]:
    return [override for override in overrides if override.split("=")[0] not in SEEDS]


def drawn(study: Study, artefact: Artefact) -> Output:
    """An artefact as a results folder has it; where that lacks it, the paper's numbers alone."""
    table, path = read_table(study.results), study.results / "tables" / f"{artefact.id}.csv"
    if path.exists():
        return artefact.view(same_subjects(table, read_shown(path)), study.configs)
    if artefact.id.startswith("table"):
        return artefact.view(table[:0], study.configs)
    return artefact.empty(f"{artefact.id} is not in the results of {study.results.name}.")


def slug(overrides: Sequence[str]) -> str:
    """A folder name for some overrides; one that is long, or that no folder can have, is cut and
    hashed, so that no two share it."""
    text = ",".join(sorted(overrides))
    # papermill reads braces in a path as a place for a parameter; Windows has no : " * ? < > |.
    name = text.translate({ord(" "): None, ord("{"): "(", ord("}"): ")"})
    name = re.sub(r'[/\\:"*?<>|]', "-", name)
    return text if name == text and len(text) <= 80 else f"{name[:60]}-{digest(text)[:10]}"


# --- what is written: tables as csv, md and tex, figures as png and svg, and how long they took ---


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
