"""Stages as they start, with the seconds since the process began to show them."""

from __future__ import annotations

import logging
import sys
import time


class _Clock(logging.Formatter):
    def __init__(self) -> None:
        super().__init__()
        self._begin = time.monotonic()

    def format(self, record: logging.LogRecord) -> str:
        return f"[{time.monotonic() - self._begin:6.0f} s] {record.getMessage()}"


class _CurrentStderr(logging.Handler):
    """Writes to what ``sys.stderr`` is now: notebooks and tests replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def show_progress() -> None:
    """Print the package's messages on stderr; calling it again changes nothing."""
    logger = logging.getLogger("ssah")
    if logger.handlers:
        return
    handler = _CurrentStderr()
    handler.setFormatter(_Clock())
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    return "ipykernel" in sys.modules
