"""``python -m ssah``, and the command ``ssah``."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """The command line, or as much of it as what is installed allows; else what to install."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read where libraries are imported
    try:
        from .app.cli import main as command_line
    except ModuleNotFoundError as error:
        _require_foreign(error)
        try:
            from .app.protect.cli import main as command_line
        except ModuleNotFoundError as other:
            _require_foreign(other)
            print(
                f"ssah: the command line needs {other.name}: pip install 'ssah[protect]' for "
                "models of your own, 'ssah[study]' for the paper's tables and figures. The method "
                "itself (import ssah) does without.",
                file=sys.stderr,
            )
            return 1
    return command_line()


def _require_foreign(error: ModuleNotFoundError) -> None:
    """Raise the error again where a module of this package is missing: that is a defect."""
    if error.name is None or error.name.split(".")[0] == "ssah":
        raise error


if __name__ == "__main__":
    sys.exit(main())
