"""What is shown while things run: stages as they start, and not the libraries' own bars."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator


class _Clock(logging.Handler):
    """Writes to what ``sys.stderr`` is now: notebooks and tests replace it."""

    def __init__(self) -> None:
        super().__init__()
        self._begin = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        passed = time.monotonic() - self._begin
        print(f"[{passed:6.0f} s] {record.getMessage()}", file=sys.stderr, flush=True)


def show_progress() -> None:
    """Print the package's messages on stderr; calling it again changes nothing."""
    logger = logging.getLogger("ssah")
    if logger.handlers:
        return
    logger.addHandler(_Clock())
    logger.propagate = False
    logger.setLevel(logging.INFO)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the library's progress bars and load reports."""
    from transformers.utils import logging as hf_logging  # takes seconds to import

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
