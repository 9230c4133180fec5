"""``python -m ssah``: artefacts by name, with Hydra overrides."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import GROUPS, check_keys, split_profile, suggestion, sweep_points
from .errors import SsahError
from .paths import home, results_root
from .progress import show_progress

COMMANDS = {
    "reproduce": "execute every notebook, then print the claims table",
    "publish": "reproduce with more arms and seeds and publish that; or add to it what is named",
    "plan": "what there is to compute, how long it takes, and what is cached",
    "claims": "print the claims table of a finished run",
    "notebook": "execute one notebook: ssah notebook 02_unit_roles",
    "judge": "how the judges agree with labels: ssah judge FILE.csv --text T --label L",
    "read": "print random completions of an arm with their verdicts: ssah read ESU --n 20",
    "assets": "list (with --fetch: download) the embedded model and data",
    "bench": "time attribution and each way to train, and their memory, in a quarter of an hour",
    "clean-cache": "delete cached runs and downloads",
}

#: What the published run of a profile measures beyond everybody's.
PUBLISHED = {
    "laptop": (
        "headline_seeds=3", "finetune=wide", "evaluate=wide", "probes=wide", "budget=wide",
    )
}  # fmt: skip


def usage() -> str:
    from .artefacts import ARTEFACTS

    lines = ["usage: python -m ssah ARTEFACT... [key=value...] [-m]", "", "artefacts:"]
    lines += [f"  {a.id:<18} {a.title}" for a in ARTEFACTS.values()]
    lines += ["", "commands:", *(f"  {name:<18} {text}" for name, text in COMMANDS.items())]
    lines += [
        "",
        f"overrides: profile=laptop|smoke|paper, seed=1, n_seeds=3, groups ({', '.join(GROUPS)})",
        "and any key below them, such as attribution.tokens=all; -m sweeps: -m seed=0,1,2",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Known errors become one sentence on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(arguments)
    except SsahError as error:
        print(f"ssah: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print("ssah: no disk space is left: free some or point SSAH_HOME at another disk.",
              file=sys.stderr)  # fmt: skip
    except MemoryError:
        print("ssah: out of memory: lower evaluate.batch_size and attribution.batch_size.",
              file=sys.stderr)  # fmt: skip
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        print("ssah: the device is out of memory: lower evaluate.batch_size and "
              "attribution.batch_size, or use runtime.device=cpu.", file=sys.stderr)  # fmt: skip
    except KeyboardInterrupt:
        print("ssah: interrupted; finished stages are kept, run the same again.", file=sys.stderr)
        return 130
    return 1


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] in (["judge"], ["read"]):  # these have options of their own
        from . import commands

        return getattr(commands, arguments[0])(arguments[1:])
    flags = [a for a in arguments if a.startswith("-")]
    words = [a for a in arguments if "=" not in a and not a.startswith("-")]
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    if not words or "-h" in flags or "--help" in flags:
        print(usage())
        return 0
    check_keys(overrides)
    unknown = set(flags) - {"-m", "--multirun", "--fetch"}
    if unknown:
        raise SsahError(f"Unknown option {', '.join(sorted(unknown))}: see python -m ssah --help.")
    profile, overrides = split_profile(overrides)
    show_progress()
    command = words[0]
    if command not in COMMANDS:
        return _artefacts(words, profile, overrides, sweep=bool({"-m", "--multirun"} & set(flags)))
    if command == "notebook":
        if len(words) != 2:
            raise SsahError("Name one notebook: python -m ssah notebook 02_unit_roles.")
        _notebook(words[1], profile, overrides)
    elif command in ("reproduce", "publish"):
        if command == "publish" and len(words) > 1:
            _publish_part(words[1:], profile, overrides)
        else:
            _reproduce(profile, overrides, publish=command == "publish")
    elif command == "plan":
        _plan(profile, overrides)
    elif command == "claims":
        from .report import print_claims

        print_claims(_results(profile, overrides))
    elif command == "assets":
        _assets(fetch_all="--fetch" in flags)
    elif command == "bench":
        _bench(profile, overrides)
    else:
        shutil.rmtree(home() / "runs", ignore_errors=True)
        print(f"Deleted {home() / 'runs'}.")
    return 0


def _artefacts(names: list[str], profile: str, overrides: list[str], *, sweep: bool) -> int:
    from .artefacts import ARTEFACTS, find
    from .study import Study

    for name in names:
        if name not in ARTEFACTS:
            valid = [*ARTEFACTS, *COMMANDS]
            raise SsahError(f"Unknown artefact or command '{name}'{suggestion(name, valid)}")

    def run(overrides: list[str]) -> None:
        _prepare(profile, overrides)
        study = Study(profile, overrides)
        for name in names:
            print(f"{name}: {find(name).title}. {_duration(name, study)}", file=sys.stderr)
            study.show(name)
            print("\n".join(str(p) for p in sorted(study.results.glob(f"*/{name}.*"))))

    for chosen in sweep_points(overrides) if sweep else [overrides]:
        run(chosen)
    return 0


def _duration(name: str, study) -> str:
    from .report import timings

    known = timings().get(name)
    if known is None or study.config.name != "laptop":
        return "No duration is on record for this profile."
    minutes = known.alone * len(study.seeds) / 60
    return f"About {minutes:.0f} min on 2 cores where nothing is cached."


def _bench(profile: str, overrides: list[str]) -> None:
    from .bench import bench

    print(bench(profile, overrides).read_text("utf-8"))


def _results(profile: str, overrides: list[str]) -> Path:
    from .study import Study

    return Study(profile, overrides).results


def _notebook(name: str, profile: str, overrides: list[str]) -> None:
    from .notebooks import execute

    _prepare(profile, overrides)
    print(execute(name, _results(profile, overrides), profile, overrides))


def _prepare(profile: str, overrides: list[str]) -> None:
    """Find bad input before hours of work: compose, fetch, locate the model, look for sets."""
    from .study import Study

    study = Study(profile, overrides)
    _ = study.earlier
    stages = study.all_stages[0]
    stages.check_model()
    _ = stages.sets


def _reproduce(profile: str, overrides: list[str], *, publish: bool) -> None:
    from . import report
    from .notebooks import available, execute

    if publish:
        _require_meaning(profile)
        overrides = [*PUBLISHED.get(profile, ()), *overrides]
    _prepare(profile, overrides)
    _plan(profile, overrides)
    results = _results(profile, overrides)
    for name in [*available(), "00_index"]:
        print(f"Executing {name} ...", file=sys.stderr)
        execute(name, results, profile, overrides)
    report.write_index(results)
    if publish:
        report.publish(results)
        results = results_root() / "published"
    report.print_claims(results)


def _publish_part(names: list[str], profile: str, overrides: list[str]) -> None:
    """Publish some notebooks or artefacts beside what is published, and keep its numbers for arms
    and seeds that are not measured now."""
    from . import report
    from .artefacts import ARTEFACTS
    from .notebooks import available, execute
    from .study import Study

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
            _bench(profile, overrides)
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


def _plan(profile: str, overrides: list[str]) -> None:
    from .artefacts import ARTEFACTS
    from .report import timings
    from .study import Study

    study = Study(profile, overrides)
    known = timings() if profile == "laptop" else {}
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


def _assets(*, fetch_all: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from .assets import ASSETS, fetch, inventory
    from .store import Store

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
