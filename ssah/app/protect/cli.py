"""The practitioner's commands. Without the study's packages they are all that ``ssah`` has."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ...core.errors import SsahError
from ...core.progress import show_progress
from .settings import DEFENCES, SHARE, Settings

#: Setting -> what its option says.
SAID = {
    "defence": f"{', '.join(DEFENCES)}.",
    "share": f"Refusals that mixing puts among the rows, as a fraction of them  [default: {SHARE}]",
    "epochs": "How often the rows are learned.",
    "learning_rate": "At the beginning; it falls to nothing  [default: 2e-5, with --lora 2e-4]",
    "batch_size": "Rows a step.",
    "max_tokens": "Of a row; the rest of its response is cut.",
    "seed": "Of what is drawn.",
    "lora": "Train LoRA adapters of this rank, which peft loads, in the model's place.",
}

#: The types of those that have no default to tell it by.
WITHOUT_DEFAULT = {"share": float, "learning_rate": float, "lora": int}

#: What memory is spent on, in a study and where a model of one's own is protected.
BATCHES = (
    "evaluate.batch_size and attribution.batch_size (with `ssah protect`: --batch-size and "
    "--max-tokens)"
)

#: Of a group of commands.
SETTINGS = {"help_option_names": ["-h", "--help"]}

COUNT = click.IntRange(min=0)
FOLDER = click.Path(path_type=Path, file_okay=False)


def _settings(function: Callable[..., None]) -> Callable[..., None]:
    """An option for each setting of a training."""
    for name in reversed(SAID):
        option = f"--{name.replace('_', '-')}"
        default = getattr(Settings, name)
        kind = WITHOUT_DEFAULT.get(name)
        function = click.option(
            option, type=kind, default=default, show_default=True, help=SAID[name]
        )(function)
    return function


def _measured(function: Callable[..., None]) -> Callable[..., None]:
    """Options of what is measured and where the report goes."""
    said = "Completions a set to put into the report (0)."
    show = click.option("--show", type=COUNT, default=0, help=said)
    said = "Prompts a set, at most (100): fewer are quicker and say less."
    prompts = click.option("--prompts", type=click.IntRange(min=8), default=100, help=said)
    return prompts(show(function))


@click.command()
@click.argument("model")
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("--out", type=FOLDER, help="Where checkpoint and report go (MODEL-protected).")
@click.option("--compare", is_flag=True, help="Fine-tune plainly as well, and set it beside.")
@click.option("--dry-run", is_flag=True, help="Everything but training, on a few prompts.")
@_settings
@_measured
def protect(model: str, rows: Path, out: Path | None, dry_run: bool, **options: Any) -> None:
    """Fine-tune MODEL on ROWS without losing its refusals, and report whether that worked.

    MODEL is a folder, a hub id, or smollm2 or qwen2_5_coder. ROWS is a JSONL, CSV or Parquet file
    of prompts and responses, Alpaca's columns, chat messages or ShareGPT's conversations.
    """
    from .protect import protect as run
    from .report import print_report

    folder = out or _beside(model, "protected")
    report = run(model, None, rows, out=folder, dry_run=dry_run, **options)
    print_report(report)
    if report.checkpoint is not None:
        click.echo(f"{folder}: the model; {folder / 'report.html'}: the report.")


@click.command()
@click.argument("model")
@click.option("--out", type=FOLDER, help="Where the card goes (MODEL-checked).")
@_measured
def check(model: str, out: Path | None, prompts: int, show: int) -> None:
    """What MODEL does with harmful requests, and with harmless ones that look dangerous."""
    from .protect import check as run
    from .report import print_report

    folder = out or _beside(model, "checked")
    print_report(run(model, out=folder, prompts=prompts, show=show))
    click.echo(folder / "report.html")


@click.command()
@click.option("--out", type=FOLDER, default=Path("ssah-demo"), help="Where the page goes.")
@click.option("--show", type=COUNT, default=0, help="Completions a set to put into it (0).")
def demo(out: Path, show: int) -> None:
    """The paper's claim in five minutes: few units carry the refusals of a small chat model."""
    from .demo import demo as run
    from .report import print_report

    print_report(run(out, show=show))
    click.echo(out / "report.html")


def _beside(model: str, what: str) -> Path:
    path = Path(model).expanduser()
    return Path(f"{path.resolve().name if path.exists() else path.name}-{what}")


@click.group(commands=[protect, check, demo], context_settings=SETTINGS)
def alone() -> None:
    """Fine-tune chat models without losing their refusals.

    Tables and figures of the paper need more packages: pip install 'ssah[study]'.
    """
    show_progress()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return call(alone, arguments)


def call(command: click.Command, arguments: Sequence[str] | None) -> int:
    """Run ``ssah`` with these words, or those of the process; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    sentence, status = "", 1
    try:
        # Called with no word at all, click takes it for a mistake.
        return command.main(words or ["--help"], prog_name="ssah", standalone_mode=False) or 0
    except SsahError as error:
        sentence = str(error)
    except click.ClickException as error:
        sentence = f"{error.format_message()} See ssah --help."
    except click.Abort:
        sentence, status = "interrupted; finished stages are kept, run the same again.", 130
    except MemoryError:
        sentence = f"out of memory: lower {BATCHES}."
    except Exception as error:
        sentence = _known(error)
        if not sentence:
            raise
    click.echo(f"ssah: {sentence}", err=True)
    return status


def _known(error: Exception) -> str:
    """A sentence for what libraries raise where memory or disk space ends; "" for anything else."""
    text = str(error)
    full = ("No space left on device", "PytorchStreamWriter failed writing", "Disk quota exceeded")
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
        t in text for t in full
    ):
        return (
            "no disk space is left: free some or point SSAH_HOME at another disk. What was "
            "finished is kept."
        )
    if isinstance(error, RuntimeError) and "out of memory" in text:
        return (
            f"the device is out of memory: lower {BATCHES}, or use runtime.device=cpu "
            "(CUDA_VISIBLE_DEVICES= where nothing else says it)."
        )
    return ""
