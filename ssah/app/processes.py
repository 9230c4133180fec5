"""Run the jobs of a study in this process, or side by side in several."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

import psutil
import torch

from ..core.errors import SsahError
from ..core.progress import show_progress
from ..core.runtime import pick_device
from ..lab.config import Config
from ..lab.jobs import FIRST
from ..lab.measure import collect

if TYPE_CHECKING:
    from .study import Study

#: Memory that a process may need while it trains a model, in GiB, where that was measured.
_NEEDED = {"smollm2": 6}


def side_by_side(config: Config) -> int:
    """How many processes share the work: as configured, else what memory and cores allow.

    Matrices of a small model keep several threads of one process waiting for each other. Of other
    models nobody knows what they need, so they run one at a time, as on a GPU.
    """
    if config.runtime.processes:
        return config.runtime.processes
    needed = _NEEDED.get(config.model.name)
    known = needed is not None and config.model.source == "embedded"
    if not known or pick_device(config.runtime.device).type != "cpu":
        return 1
    memory = psutil.virtual_memory().total / 2**30
    return max(1, min(torch.get_num_threads(), int(memory // needed)))


def run_jobs(study: Study, artefacts: Sequence[str]) -> None:
    """Compute the jobs of some artefacts that are not done (:meth:`ssah.app.study.Study.jobs`)."""
    jobs = study.jobs(artefacts)
    numbers = [number for number, job in enumerate(jobs) if job.missing()]
    count = min(side_by_side(study.config), len(numbers))
    if count <= 1:
        for number in numbers:
            collect(jobs[number].lab, jobs[number].measures)
        return
    threads = max(1, torch.get_num_threads() // count)
    context = multiprocessing.get_context("spawn")
    overrides = (*study.overrides, f"runtime.device={study.config.runtime.device}")
    with ProcessPoolExecutor(count, context, show_progress) as pool:
        made = (study.config.name, overrides, tuple(artefacts), threads)

        def start(number: int) -> Future[None]:
            return pool.submit(_run, *made, number)

        waiting = [number for number in numbers if jobs[number].waits]
        started = {start(n): jobs[n].name for n in numbers if not jobs[n].waits}
        running = set(started)
        try:
            while running or waiting:
                if not any(started.get(future) == FIRST for future in running):
                    running |= {start(number) for number in waiting}
                    waiting = []
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise SsahError(
                "A process was killed, most likely because memory ran out. What was finished is "
                "kept: go on with runtime.processes=1."
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run(
    profile: str, overrides: tuple[str, ...], artefacts: tuple[str, ...], threads: int, number: int
) -> None:
    torch.set_num_threads(threads)
    job = _study(profile, overrides).jobs(artefacts)[number]
    collect(job.lab, job.measures)


@functools.cache
def _study(profile: str, overrides: tuple[str, ...]) -> Study:
    """One for all jobs of a process, so that models stay loaded."""
    from .study import Study

    return Study(profile, overrides)
