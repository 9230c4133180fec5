"""The command line: ``ssah COMMAND [key=value ...]``; every figure and table is a command."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ..artefacts import ARTEFACTS
from ..core.errors import SsahError, suggestion
from ..core.paths import home
from ..core.progress import show_progress
from ..lab.config import GROUPS, check_keys, split_profile, with_absolute_paths
from .protect.cli import SETTINGS, call, check, demo, protect


class _Override(click.ParamType):
    """``key=value`` for Hydra, with a key that exists."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not _is_override(value):
            raise SsahError(
                f"'{value}' is not of the form key=value, and {ctx.info_name if ctx else 'this'} "
                "takes no other words."
            )
        check_keys([value])
        return with_absolute_paths(value)


def _is_override(word: str) -> bool:
    """Whether a word sets a key, or takes one away (``~experiment.defences.Lisa``)."""
    return "=" in word or word.startswith("~")


def _overrides(function: Callable[..., None]) -> Callable[..., None]:
    return click.argument("overrides", nargs=-1, type=_Override())(function)


def _artefact(name: str) -> click.Command:
    """The command of one artefact; more of them may follow, between overrides."""

    @click.argument("words", nargs=-1)
    @click.option("-m", "--multirun", is_flag=True, help="Sweep: seed=0,1,2 gives three runs.")
    def compute(words: Sequence[str], multirun: bool) -> None:
        from . import commands

        names = [name, *(word for word in words if not _is_override(word))]
        for other in names:
            _require_known(other, list(ARTEFACTS))
        overrides = [word for word in words if _is_override(word)]
        check_keys(overrides)
        commands.artefacts(names, *split_profile(overrides), sweep=multirun)

    return click.command(name, help=f"{ARTEFACTS[name].title}.")(compute)


def _require_known(name: str, valid: list[str]) -> None:
    if name not in valid:
        raise SsahError(f"Unknown artefact or command '{name}'{suggestion(name, valid)}")


class _Group(click.Group):
    """Commands, and behind them the artefacts."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in ARTEFACTS:
            return _artefact(cmd_name)
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        _require_known(args[0], [*ARTEFACTS, *self.commands])
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Artefacts"):
            formatter.write_dl([(a.id, a.title) for a in ARTEFACTS.values()])
        with formatter.section("Overrides"):
            formatter.write_text(
                f"profile=laptop|smoke|paper, seed=1, n_seeds=3, groups ({', '.join(GROUPS)}) and "
                "any key below them, such as attribution.tokens=all"
            )


@click.group(cls=_Group, commands=[protect, check, demo], context_settings=SETTINGS)
def ssah() -> None:
    """Runnable companion of Superficial Safety Alignment Hypothesis (ICLR 2026)."""
    show_progress()


@ssah.command()
@_overrides
def reproduce(overrides: Sequence[str]) -> None:
    """Execute every notebook, then print the claims table."""
    from . import commands

    commands.reproduce(*split_profile(list(overrides)))


@ssah.command()
@_overrides
def publish(overrides: Sequence[str]) -> None:
    """Reproduce with more arms and seeds and publish that."""
    from . import commands

    commands.reproduce(*split_profile(list(overrides)), publishing=True)


@ssah.command()
@_overrides
def plan(overrides: Sequence[str]) -> None:
    """What there is to compute, how long it takes, and what is there."""
    from . import commands
    from .study import Study

    commands.plan(Study(*split_profile(list(overrides))))


@ssah.command()
@click.argument("number", type=int)
@_overrides
def run(number: int, overrides: Sequence[str]) -> None:
    """Compute one job of the plan, by its number."""
    from . import commands

    commands.run_job(number, *split_profile(list(overrides)))


@ssah.command()
@_overrides
@click.option("--cluster", type=click.Choice(["local", "slurm"]), help="Default: SLURM if there.")
@click.option("--at-once", type=click.IntRange(min=1), help="Jobs side by side.")
@click.option("--set", "settings", multiple=True, help="submitit's, such as slurm_partition=gpu.")
def submit(
    overrides: Sequence[str], cluster: str | None, at_once: int | None, settings: Sequence[str]
) -> None:
    """Compute all jobs of the plan on a cluster, or as processes of this machine."""
    from . import commands

    chosen = dict(_setting(text) for text in settings)
    commands.submit(*split_profile(list(overrides)), cluster, at_once, chosen)


def _setting(text: str) -> tuple[str, int | str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise SsahError(f"--set {text} is not of the form name=value, such as slurm_partition=gpu.")
    return name, int(value) if value.isdigit() else value


@ssah.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Where it goes.")
def merge(folders: Sequence[Path], out: Path) -> None:
    """Put the measurements of several results folders into one."""
    from . import commands

    commands.merge(folders, out)


@ssah.command()
@_overrides
def claims(overrides: Sequence[str]) -> None:
    """Print the claims table of a finished run."""
    from .report import print_claims
    from .study import Study

    print_claims(Study(*split_profile(list(overrides))).results)


@ssah.command()
@click.argument("name")
@_overrides
def notebook(name: str, overrides: Sequence[str]) -> None:
    """Execute one notebook, such as 02_unit_roles."""
    from . import commands

    commands.notebook(name, *split_profile(list(overrides)))


@ssah.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--text", required=True, help="Column of the completions.")
@click.option(
    "--label",
    required=True,
    help="Column of the labels: refused, evaded, answered, incoherent; or refusal and compliance.",
)
@click.option("--prompt", help="Column of the prompts (default: prompt, if it exists).")
def judge(file: Path, text: str, label: str, prompt: str | None) -> None:
    """How the judges agree with the labels in a CSV or JSONL file."""
    from . import commands

    commands.judge(file, text, label, prompt)


@ssah.command()
@click.argument("arm", required=False)
@_overrides
@click.option("--n", "count", type=click.IntRange(min=1), default=20, help="How many (20).")
def read(arm: str | None, overrides: Sequence[str], count: int) -> None:
    """Print random completions of a headline arm with their verdicts; without one, all names.

    On a terminal only: they may be harmful.
    """
    from . import commands

    if arm is not None and _is_override(arm):  # no arm, an override
        check_keys([arm])
        overrides, arm = [arm, *overrides], None
    commands.read(arm, count, *split_profile(list(overrides)))


@ssah.command()
@click.option("--fetch", is_flag=True, help="Download all of it.")
def assets(fetch: bool) -> None:
    """List the embedded model and data."""
    from . import commands

    commands.assets(fetch_all=fetch)


@ssah.command()
@_overrides
def bench(overrides: Sequence[str]) -> None:
    """Time attribution and each way to train, and their memory, in a quarter of an hour."""
    from .bench import bench as measure

    click.echo(measure(*split_profile(list(overrides))).read_text("utf-8"))


@ssah.command(name="clean-cache")
@click.option("--yes", is_flag=True, help="Do not ask.")
def clean_cache(yes: bool) -> None:
    """Delete cached runs and downloads."""
    runs = home() / "runs"
    if not runs.exists():
        click.echo(f"There is no {runs}.")
    elif yes or click.confirm(f"Delete {runs}? Everything in it is computed again when needed."):
        shutil.rmtree(runs)
        click.echo(f"Deleted {runs}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return call(ssah, arguments)
