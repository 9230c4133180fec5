"""Run the jobs of a study in this process, or side by side in several."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

import torch

from ..core.errors import SsahError
from ..core.progress import show_progress
from ..core.runtime import pick_device
from ..lab.config import Config
from ..lab.measure import collect

if TYPE_CHECKING:
    from .study import Study

#: Memory that a process may need while it trains the embedded model, in GiB.
_NEEDED = 6


def side_by_side(config: Config) -> int:
    """How many processes share the work: as configured, else what memory and cores allow.

    Matrices of a small model keep several threads of one process waiting for each other. Of other
    models nobody knows what they need, so they run one at a time, as on a GPU.
    """
    if config.runtime.processes:
        return config.runtime.processes
    if config.model.source != "embedded" or pick_device(config.runtime.device).type != "cpu":
        return 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(torch.get_num_threads(), int(memory // _NEEDED)))


def run_jobs(study: Study, artefacts: Sequence[str], numbers: Sequence[int]) -> None:
    """Compute jobs of :meth:`ssah.app.study.Study.jobs`, by their numbers."""
    count = min(side_by_side(study.config), len(numbers))
    if count <= 1:
        jobs = study.jobs(artefacts)
        for number in numbers:
            collect(jobs[number].lab, jobs[number].measures)
        return
    threads = max(1, torch.get_num_threads() // count)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, show_progress) as pool:
        overrides = (*study.overrides, f"runtime.device={study.config.runtime.device}")
        made = (study.config.name, overrides, tuple(artefacts))
        running = [pool.submit(_run, *made, number, threads) for number in numbers]
        try:
            for done in as_completed(running):
                done.result()
        except BrokenProcessPool as error:
            raise SsahError(
                "A process was killed, most likely for want of memory: what was finished is kept; "
                "go on with runtime.processes=1."
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run(
    profile: str, overrides: tuple[str, ...], artefacts: tuple[str, ...], number: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    job = _study(profile, overrides).jobs(artefacts)[number]
    collect(job.lab, job.measures)


@functools.cache
def _study(profile: str, overrides: tuple[str, ...]) -> Study:
    """One for all jobs of a process, so that models stay loaded."""
    from .study import Study

    return Study(profile, overrides)
