"""What every command line does: known errors become one sentence on stderr."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

import click

from ..core.errors import SsahError

#: What memory is spent on, in a study and where a model of one's own is protected.
BATCHES = (
    "evaluate.batch_size and attribution.batch_size (with `ssah protect`: --batch-size and "
    "--max-tokens)"
)


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
