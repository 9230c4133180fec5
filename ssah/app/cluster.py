"""Run the jobs of a study through submitit: on a SLURM cluster, or as processes of this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ..core.errors import SsahError
from ..core.paths import home
from .commands import prepared, run_job


def submit(
    profile: str,
    overrides: list[str],
    cluster: str | None,
    at_once: int | None,
    settings: dict[str, Any],
) -> None:
    """Run all jobs that are not done: first those that others need, then the rest side by side.

    Waits for the end. What a job computed before it was killed stays, so that the next call goes on
    from there. Machines must share ``SSAH_HOME``. ``cluster`` None takes SLURM where there is one;
    ``at_once`` None means all jobs on SLURM, and one after the other on this machine, whose memory
    they share; ``settings`` are submitit's (``timeout_min``, ``slurm_partition`` ...).
    """
    try:
        import submitit
        from submitit.core.utils import FailedJobError
    except ImportError as error:
        raise SsahError("ssah submit needs submitit: pip install 'ssah[cluster]'.") from error
    try:
        executor = submitit.AutoExecutor(folder=str(home() / "jobs"), cluster=cluster)
    except RuntimeError as error:  # no srun
        raise SsahError(
            f"This machine is no part of a {cluster} cluster ({error}): submit from a login node, "
            "or run the jobs as processes of this machine with --cluster local."
        ) from error
    executor.update_parameters(**{"name": "ssah", "timeout_min": 24 * 60, **settings})
    for first in (True, False):
        jobs = prepared(profile, overrides).jobs()
        numbers = [n for n, j in enumerate(jobs) if j.waits != first and j.missing()]
        width = at_once or (1 if executor.cluster == "local" else len(numbers) or 1)
        failed = []
        for group in (numbers[i : i + width] for i in range(0, len(numbers), width)):
            print(f"Jobs {', '.join(map(str, group))} of {len(jobs)} ...", file=sys.stderr)
            try:
                with executor.batch():
                    running = [executor.submit(run_job, n, profile, overrides) for n in group]
            except FailedJobError as error:
                raise SsahError(
                    f"{executor.cluster} took no job: {_last_line(error)}. Mend it, or run the "
                    "jobs as processes of this machine with --cluster local."
                ) from error
            failed += [_last_line(error) for error in (j.exception() for j in running) if error]
        if failed:
            raise SsahError(
                f"{len(failed)} of {len(numbers)} jobs failed, the first one with: {failed[0]} "
                f"(logs in {home() / 'jobs'}). What they computed is kept: submit again."
            )


def _last_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
