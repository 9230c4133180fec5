"""What the commands do."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from ..artefacts import ARTEFACTS
from ..core.errors import SsahError, require_known
from ..core.paths import home, results_root
from ..core.store import Store
from ..data.assets import EMBEDDED, fetch, inventory
from ..evaluate import judges
from ..evaluate.labels import agreement, confusion, judged, read_labelled
from ..lab.catalogue import headline
from ..lab.config import sweep_points, with_absolute_paths
from ..lab.measure import Measure, collect
from ..lab.metrics.behaviour import said
from ..lab.table import merged, read_shown, read_table, same_subjects, write_table
from . import report
from .notebooks import available, execute, execute_all
from .processes import side_by_side
from .study import PUBLISHED, Study, combined, write_output


def artefacts(names: Sequence[str], profile: str, overrides: list[str], *, sweep: bool) -> None:
    """Compute some artefacts, with the values of a sweep one after the other."""
    for point in sweep_points(overrides) if sweep else [overrides]:
        own = [with_absolute_paths(override) for override in point]
        study = prepared(profile, own)
        study.collect(names)
        for name in names:
            print(f"{name}: {ARTEFACTS[name].title}.", file=sys.stderr)
            study.show(name)
            print("\n".join(str(p) for p in sorted(study.results.glob(f"*/{name}.*"))))
        report.write_reports(study.results)


def prepared(profile: str, overrides: list[str]) -> Study:
    """A study whose input was looked at: bad input is found before hours of work."""
    study = Study(profile, overrides)
    _look_at(study)
    return study


def _look_at(study: Study) -> None:
    lab = study.labs[0]
    _ = lab.layout, lab.sets.path("")


def notebook(name: str, profile: str, overrides: list[str]) -> None:
    """Execute one notebook and print where it is."""
    study = prepared(profile, overrides)
    study.collect([a.id for a in ARTEFACTS.values() if a.notebook == name])
    print(execute(name, study.results, profile, overrides))


def reproduce(profile: str, overrides: list[str], *, publishing: bool = False) -> None:
    """Compute everything, execute every notebook, then print the claims table; or publish that."""
    if publishing and profile == "smoke":
        raise SsahError(
            "The smoke profile's numbers mean nothing: choose another profile to publish."
        )
    study = Study(profile, overrides)
    plan(study)
    _look_at(study)
    study.collect()
    study.write_costs()
    execute_all(available(), study.results, profile, overrides)
    execute_all(["00_index"], study.results, profile, overrides)  # shows what the others wrote
    report.write_reports(study.results)
    results = study.results
    if publishing:
        report.publish(results)
        results = results_root() / "published"
    report.print_claims(results)


def plan(study: Study) -> None:
    """Print the jobs of a study: what each asks, how much of it is not there yet, and how long
    that took, and how much memory, in the published run."""
    path = results_root() / "published" / "jobs.csv"
    same_model = study.config.name == "laptop" and study.config.model.name == "smollm2"
    known = pd.read_csv(path) if same_model and path.exists() else pd.DataFrame({"job": []})
    took = known.groupby("job").max(numeric_only=True)
    table = Table(title=f"Profile {study.config.name}, results in {study.results}")
    for column in ("job", "seed", "model", "questions", "to do", "minutes", "GB"):
        table.add_column(column, justify="left" if column == "model" else "right")
    jobs, total = study.jobs(), 0.0
    for number, job in enumerate(jobs):
        missing = job.missing()
        minutes = memory = ""
        if job.name in took.index:
            left = took.loc[job.name, "seconds"] / 60 * missing / job.asked
            total += left
            minutes, memory = f"{left:.0f}", f"{took.loc[job.name, 'peak_memory_mib'] / 1024:.1f}"
        row = (number, job.lab.seed, job.name, job.asked, missing, minutes, memory)
        table.add_row(*map(str, row))
    report.show(table)
    if total:
        count = side_by_side(study.config)
        beside = f"{count} processes side by side" if count > 1 else "one process"
        print(f"About {total / count:.0f} minutes are left for {beside}, by the published run.")


def run_job(number: int, profile: str, overrides: list[str]) -> None:
    """Compute one job of a plan."""
    jobs = prepared(profile, overrides).jobs()
    if not 0 <= number < len(jobs):
        raise SsahError(f"There is no job {number}: the plan has 0 to {len(jobs) - 1}.")
    collect(jobs[number].lab, jobs[number].measures)


def submit(
    profile: str,
    overrides: list[str],
    cluster: str | None,
    at_once: int | None,
    settings: dict[str, Any],
) -> None:
    """Run all jobs that are not done through submitit, on a SLURM cluster or as processes of this
    machine: first those that others need, then the rest side by side.

    Waits for the end. What a job computed before it was killed stays, so that the next call goes on
    from there. Machines must share ``SSAH_HOME``. ``cluster`` None takes SLURM where there is one;
    ``at_once`` None means all jobs on SLURM, and one after the other on this machine, whose memory
    they share; ``settings`` are submitit's (``timeout_min``, ``slurm_partition`` ...).
    """
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ImportError as error:
        raise SsahError("ssah submit needs submitit: pip install 'ssah[cluster]'.") from error
    try:
        executor = submitit.AutoExecutor(folder=str(home() / "jobs"), cluster=cluster)
    except RuntimeError as error:  # no srun
        raise SsahError(
            f"This machine is no part of a {cluster} cluster ({error}): submit from a login node, "
            "or run the jobs as processes of this machine with --cluster local."
        ) from error
    executor.update_parameters(**{"name": "ssah", "timeout_min": 24 * 60, **settings})
    for first in (True, False):
        jobs = prepared(profile, overrides).jobs()
        numbers = [n for n, j in enumerate(jobs) if j.waits != first and j.missing()]
        width = at_once or (1 if executor.cluster == "local" else len(numbers) or 1)
        failed = []
        for group in (numbers[i : i + width] for i in range(0, len(numbers), width)):
            print(f"Jobs {', '.join(map(str, group))} of {len(jobs)} ...", file=sys.stderr)
            try:
                with executor.batch():
                    running = [executor.submit(run_job, n, profile, overrides) for n in group]
            except FailedJobError as error:
                raise SsahError(
                    f"{executor.cluster} took no job: {_last_line(error)}. Mend it, or run the "
                    "jobs as processes of this machine with --cluster local."
                ) from error
            failed += [_last_line(error) for error in (j.exception() for j in running) if error]
        if failed:
            raise SsahError(
                f"{len(failed)} of {len(numbers)} jobs failed, the first one with: {failed[0]} "
                f"(logs in {home() / 'jobs'}). What they computed is kept: submit again."
            )


def _last_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def merge(folders: Sequence[Path], target: Path) -> None:
    """Put the measurements of several results folders (seeds or models) into one, and draw
    everything anew there. Into the published results only numbers of known commits go, and README
    and docs follow.

    The first folder that has a model says how its numbers are drawn.
    """
    tables = [read_table(folder) for folder in folders]
    for folder, table in zip(folders, tables, strict=True):
        if table.empty:
            raise SsahError(
                f"{folder} holds no measurements.parquet: name results folders of runs."
            )
    whole = merged(tables)
    study = combined(folders, target)
    publishing = target.resolve() == (results_root() / "published").resolve()
    if publishing:
        report.require_known_commits(whole)
    for artefact in ARTEFACTS.values():
        parts = [p for f in folders if (p := f / "tables" / f"{artefact.id}.csv").exists()]
        if parts:
            shown = pd.concat([read_shown(part) for part in parts])
            write_output(study, artefact, same_subjects(whole, shown))
    write_table(whole, target)
    if publishing:
        report.refresh_published()
        execute_all([*available(), "00_index"], target, PUBLISHED, [])
    else:
        report.write_reports(target)


def assets(*, fetch_all: bool) -> None:
    """List what is embedded, or download all of it first."""
    store = Store(home() / "runs")
    if fetch_all:
        for name in EMBEDDED:
            fetch(store, name)
    table = Table(title=f"Assets in {store.root}")
    rows = inventory(store)
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    report.show(table)


def judge(file: Path, text: str, label: str, prompt: str | None) -> None:
    """Agreement of the judges with somebody's labels, on standard output."""
    completions, labels = read_labelled(file, text, label, prompt)
    verdicts = judged(completions)
    print(agreement(labels, verdicts).to_string(index=False, float_format="{:.3f}".format))
    print()
    print(confusion(labels, verdicts).to_string())
    if not any(c.prompt for c in completions):
        print("\nThere are no prompts, so answered and evaded cannot be told apart: name --prompt.")


def read(arm: str | None, count: int, profile: str, overrides: list[str]) -> None:
    """Random completions of an arm with their verdicts, or the names of all arms."""
    lab = Study(profile, overrides).labs[0]
    arms = {own.name: own for own in headline(lab)}
    if arm is None:
        print("\n".join(arms))
        return
    require_known(arm, arms, "There is no arm")
    collect(lab, [Measure(arms[arm], "ASR")])
    found = said(lab, arms[arm].model, "")
    for completion in random.sample(found, min(count, len(found))):
        phrase = "no refusal phrase" if judges.not_refused([completion])[0] else "-"
        verdict = judges.judge(completion)
        print(f"[{verdict}; {phrase}] {completion.prompt}\n    {completion.text}\n")
