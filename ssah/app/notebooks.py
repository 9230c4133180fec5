"""Execute the notebooks with papermill: checked parameters, and no half-written copies."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..artefacts import ARTEFACTS
from ..core.errors import SsahError, suggestion
from ..core.paths import project_root

PARAMETERS = ("profile", "overrides", "only")


def available() -> list[str]:
    """Names of the notebooks that show artefacts, in reading order (the index comes last)."""
    return list(dict.fromkeys(a.notebook for a in ARTEFACTS.values()))


def execute_all(
    names: Sequence[str], results: Path, profile: str, overrides: Sequence[str]
) -> None:
    """Run several notebooks, as many at a time as there are cores; the first failure is raised when
    those that run have ended."""

    folder = results.resolve()  # papermill changes the directory of the process, for all threads

    def run(name: str) -> None:
        print(f"Executing {name} ...", file=sys.stderr)
        execute(name, folder, profile, overrides)

    # Kernels that share the cores: threads of each would wait for those of the others.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = [pool.submit(run, name) for name in names]
        try:
            for future in started:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def execute(
    name: str, results: Path, profile: str, overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> Path:
    """Run one notebook; the executed copy goes to ``results/notebooks``.

    A failure keeps ``<name>.failed.ipynb`` for inspection and raises :class:`SsahError`.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    source = project_root() / "notebooks" / f"{name}.ipynb"
    if not source.exists():
        valid = sorted(p.stem for p in source.parent.glob("*.ipynb"))
        raise SsahError(f"There is no notebook '{name}'{suggestion(name, valid)}")
    declared = set(papermill.inspect_notebook(str(source)))
    if declared != set(PARAMETERS):
        raise SsahError(
            f"The parameters cell of {source.name} declares {', '.join(sorted(declared))}: it must "
            f"declare {', '.join(PARAMETERS)} and nothing else."
        )
    _require_own_kernel()
    folder = (results / "notebooks").resolve()  # papermill changes the working directory
    folder.mkdir(parents=True, exist_ok=True)
    partial, failed = folder / f"{name}.partial.ipynb", folder / f"{name}.failed.ipynb"
    logging.getLogger("papermill").setLevel(logging.WARNING)
    try:
        papermill.execute_notebook(
            str(source),
            str(partial),
            parameters={"profile": profile, "overrides": list(overrides), "only": list(only)},
            kernel_name="python3",
            cwd=str(source.parent),
            progress_bar=False,
            stderr_file=sys.stderr,
            execution_timeout=12 * 3600,
            extra_arguments=["--log-level=40"],  # kernels warn of their own local ports
        )
    except BaseException as error:
        if partial.exists():
            partial.replace(failed)
        if isinstance(error, papermill.PapermillExecutionError):
            reason = f"{error.ename}: {error.evalue}"
        elif isinstance(error, (CellTimeoutError, DeadKernelError)):
            reason = str(error)
        else:
            raise
        raise SsahError(f"{name} failed: {reason} (see {failed})") from error
    failed.unlink(missing_ok=True)
    _tidy(partial)
    return partial.replace(folder / f"{name}.ipynb")


def _require_own_kernel() -> None:
    """Raise :class:`SsahError` where ``python3`` is a kernel of another environment, which may hold
    another version of this package, or none."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    remedy = f"{sys.executable} -m ipykernel install --sys-prefix"
    try:
        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel as error:
        raise SsahError(f"Jupyter has no kernel 'python3' here: {remedy}") from error
    # Interpreters of two environments may be links to one file; their folders are not.
    folder, own = Path(program).parent, Path(sys.executable).parent
    if Path(program).is_absolute() and not (folder.exists() and folder.samefile(own)):
        raise SsahError(
            f"Jupyter's kernel 'python3' is {program}, of another environment: remove it (jupyter "
            f"kernelspec remove python3), or install ours: {remedy}"
        )


def _tidy(path: Path) -> None:
    """Drop what belongs to the execution only: progress lines, folders and times."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    nbformat.write(notebook, path)
