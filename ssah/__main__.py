"""``python -m ssah``, and the command ``ssah``."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """The command line, where what it needs is installed; else a sentence that says what to do."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read where libraries are imported
    try:
        from .app.cli import main as command_line
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "ssah":
            raise
        print(
            f"ssah: the command line needs {error.name}: pip install 'ssah[study]'. The method "
            "itself (import ssah) does without.",
            file=sys.stderr,
        )
        return 1
    return command_line()


if __name__ == "__main__":
    sys.exit(main())
