"""What the commands do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..artefacts import ARTEFACTS, find
from ..core.errors import SsahError, suggestion
from ..core.paths import home, results_root
from ..core.store import Store
from ..data.assets import ASSETS, fetch, inventory
from ..evaluate import judges
from ..evaluate.labels import agreement, confusion, judged, read_labelled
from ..lab.config import sweep_points
from ..lab.reading import headline_arms, random_completions
from . import report
from .bench import bench
from .notebooks import available, execute
from .study import Study

#: What the published run of a profile measures beyond everybody's.
PUBLISHED = {
    "laptop": (
        "headline_seeds=3", "finetune=wide", "evaluate=wide", "probes=wide", "budget=wide",
    )
}  # fmt: skip


def artefacts(names: Sequence[str], profile: str, overrides: list[str], *, sweep: bool) -> None:
    """Compute some artefacts, with the values of a sweep one after the other."""
    for name in names:
        find(name)

    def run(overrides: list[str]) -> None:
        _prepare(profile, overrides)
        study = Study(profile, overrides)
        for name in names:
            print(f"{name}: {find(name).title}. {_duration(name, study)}", file=sys.stderr)
            study.show(name)
            print("\n".join(str(p) for p in sorted(study.results.glob(f"*/{name}.*"))))

    for chosen in sweep_points(overrides) if sweep else [overrides]:
        run(chosen)


def _duration(name: str, study: Study) -> str:
    known = report.timings().get(name)
    if known is None or study.config.name != "laptop":
        return "No duration is on record for this profile."
    minutes = known.alone * len(study.seeds) / 60
    return f"About {minutes:.0f} min on 2 cores where nothing is cached."


def results_of(profile: str, overrides: list[str]) -> Path:
    """Where a run's results are."""
    return Study(profile, overrides).results


def notebook(name: str, profile: str, overrides: list[str]) -> None:
    """Execute one notebook and print where it is."""
    _prepare(profile, overrides)
    print(execute(name, results_of(profile, overrides), profile, overrides))


def _prepare(profile: str, overrides: list[str]) -> None:
    """Find bad input before hours of work: compose, fetch, locate the model, look for sets."""
    study = Study(profile, overrides)
    _ = study.earlier
    stages = study.all_stages[0]
    stages.check_model()
    _ = stages.sets


def reproduce(profile: str, overrides: list[str], *, publishing: bool = False) -> None:
    """Execute every notebook, then print the claims table; or publish that run."""
    if publishing:
        _require_meaning(profile)
        overrides = [*PUBLISHED.get(profile, ()), *overrides]
    _prepare(profile, overrides)
    plan(profile, overrides)
    results = results_of(profile, overrides)
    for name in [*available(), "00_index"]:
        print(f"Executing {name} ...", file=sys.stderr)
        execute(name, results, profile, overrides)
    report.write_index(results)
    if publishing:
        report.publish(results)
        results = results_root() / "published"
    report.print_claims(results)


def publish_part(names: list[str], profile: str, overrides: list[str]) -> None:
    """Publish some notebooks or artefacts beside what is published, and keep its numbers for arms
    and seeds that are not measured now."""
    _require_meaning(profile)
    valid = [*available(), *ARTEFACTS, "bench"]
    for name in names:
        if name not in valid:
            raise SsahError(f"There is no notebook or artefact '{name}'{suggestion(name, valid)}")
    overrides = [*PUBLISHED.get(profile, ()), *overrides, "add_to=published"]
    artefacts = [a for a in ARTEFACTS.values() if {a.id, a.notebook} & set(names)]
    _prepare(profile, overrides)
    study = Study(profile, overrides)
    for name in names:
        print(f"Computing {name} ...", file=sys.stderr)
        if name == "bench":
            bench(profile, overrides)
        elif name in ARTEFACTS:
            study.show(name)
        else:
            execute(name, study.results, profile, overrides)
    notebooks = [name for name in names if name in available()]
    ids = [*(a.id for a in artefacts), *(["bench"] if "bench" in names else [])]
    report.publish_part(study.results, ids, notebooks)
    published = results_root() / "published"
    execute("00_index", published, profile, ["n_seeds=0"])  # no run, only what is published
    report.print_claims(published)


def _require_meaning(profile: str) -> None:
    if profile == "smoke":
        raise SsahError("The smoke profile's numbers mean nothing: publish another one.")


def plan(profile: str, overrides: list[str]) -> None:
    """Print what there is to compute, how long it takes, and what is there."""
    study = Study(profile, overrides)
    known = report.timings() if profile == "laptop" else {}
    total = 0.0
    print(f"Profile {profile}, seeds {study.seeds}, results in {study.results}")
    for artefact in ARTEFACTS.values():
        cost = "unknown"
        if artefact.id in known:
            minutes = known[artefact.id].added * len(study.seeds) / 60
            total += minutes
            cost = f"{minutes:5.1f} min"
        done = any(study.results.glob(f"*/{artefact.id}.*"))
        state = "done" if done else "to do"
        print(f"  {artefact.id:<18} {cost:>10}  {state:<6} {artefact.title}")
    if known:
        print(f"  {'all':<18} {total:5.1f} min  at most: the published run has more arms; 2 cores")


def assets(*, fetch_all: bool) -> None:
    """List what is embedded, or download all of it first."""
    store = Store(home() / "runs")
    if fetch_all:
        for name in ASSETS:
            fetch(store, name)
    table = Table(title=f"Assets in {store.root}")
    rows = inventory(store)
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


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
    stages = Study(profile, overrides).all_stages[0]
    if arm is None:
        print("\n".join(headline_arms(stages)))
        return
    for completion in random_completions(stages, arm, count):
        phrase = "no refusal phrase" if judges.not_refused([completion])[0] else "-"
        verdict = judges.judge(completion)
        print(f"[{verdict}; {phrase}] {completion.prompt}\n    {completion.text}\n")
