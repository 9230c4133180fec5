"""Notebooks hold text and calls, run as they are committed, and are executed without leftovers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from helpers import copy_project, environment
from ssah.app import notebooks
from ssah.app.notebooks import PARAMETERS, available, execute, execute_all
from ssah.artefacts import ARTEFACTS
from ssah.claims.table import claims
from ssah.core.errors import SsahError
from ssah.core.paths import project_root

FILES = sorted((project_root() / "notebooks").glob("*.ipynb"))
EVERY = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)

#: A notebook names what it shows. What loops, defines or branches belongs into the package.
FORBIDDEN = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.For,
    ast.While,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.Try,
    ast.With,
    ast.If,
)
OPENERS = {"open", "read_csv", "read_json", "read_text", "read_bytes", "Path", "load", "savefig"}


def code_cells(path: Path) -> list:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def trees(path: Path) -> list[ast.Module]:
    return [ast.parse(cell.source) for cell in code_cells(path)]


def calls(path: Path, name: str) -> list[ast.Call]:
    """Calls of a function or method of that name."""
    return [
        node
        for tree in trees(path)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (getattr(node.func, "attr", None) or getattr(node.func, "id", None)) == name
    ]


def test_copies_go_to_the_folder_that_was_named(tmp_path, monkeypatch):
    """Also where that is relative: papermill changes the working directory."""

    def stop(source: str, target: str, **rest: object) -> None:
        assert target == str(tmp_path / "own" / "notebooks" / "09_verdicts.partial.ipynb")
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("papermill.execute_notebook", stop)
    with pytest.raises(KeyboardInterrupt):
        execute("09_verdicts", Path("own"), "smoke")


def test_the_published_index_shows_every_claim():
    path = project_root() / "results" / "published" / "notebooks" / "00_index.ipynb"
    (shown,) = [output for cell in code_cells(path) for output in cell.outputs]
    assert shown["data"]["text/html"].count("<tr") == 1 + len(claims())


def test_there_is_a_notebook_for_every_artefact_and_an_index():
    names = {path.stem for path in FILES}
    assert set(available()) <= names
    assert names - set(available()) == {"00_index"}


@EVERY
def test_notebooks_are_valid(path):
    nbformat.validate(nbformat.read(path, as_version=4))


@EVERY
def test_notebooks_hold_calls_only(path):
    for cell, tree in zip(code_cells(path), trees(path), strict=True):
        assert not [n for n in ast.walk(tree) if isinstance(n, FORBIDDEN)], cell.source
        assert len(cell.source.splitlines()) <= 12, cell.source


@EVERY
def test_notebooks_do_not_depend_on_where_they_run(path):
    for cell in code_cells(path):
        assert "sys.path" not in cell.source
        assert "chdir" not in cell.source
        assert not [line for line in cell.source.splitlines() if line.lstrip()[:1] in ("%", "!")]
    for name in OPENERS:
        assert not calls(path, name), f"{name}() opens a file"


@EVERY
def test_parameters_are_the_three_with_their_defaults(path):
    tagged = [c for c in code_cells(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    body = ast.parse(tagged[0].source).body
    assert all(isinstance(node, ast.Assign) for node in body)
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in body}
    assert values == {"profile": "smoke", "overrides": [], "only": []}
    assert tuple(values) == PARAMETERS
    assert code_cells(path)[0] == tagged[0], "parameters come before what uses them"


@EVERY
def test_parameters_are_used(path):
    created = calls(path, "Study")
    assert len(created) == 1
    assert [argument.id for argument in created[0].args] == list(PARAMETERS)


@pytest.mark.parametrize("path", [p for p in FILES if p.stem != "00_index"], ids=lambda p: p.stem)
def test_notebooks_are_committed_without_outputs(path):
    command = [sys.executable, "-m", "nbstripout", "--verify", "--keep-id", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [c for c in code_cells(path) if c.outputs or c.execution_count is not None]


@pytest.mark.parametrize("name", available())
def test_a_notebook_shows_its_artefacts_and_no_others(name):
    path = project_root() / "notebooks" / f"{name}.ipynb"
    shown = [ast.literal_eval(call.args[0]) for call in calls(path, "show")]
    assert len(shown) == len(set(shown))
    assert set(shown) == {a.id for a in ARTEFACTS.values() if a.notebook == name}


def test_the_index_links_to_every_notebook_and_names_every_artefact():
    cells = nbformat.read(project_root() / "notebooks" / "00_index.ipynb", as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for name in available():
        assert f"({name}.ipynb)" in text
    for artefact in ARTEFACTS:
        assert artefact in text


def test_every_notebook_runs_as_it_is(tmp_path, smoke_home):
    """On the smoke profile, in a copy so that no results are touched."""
    project = copy_project(tmp_path / "project")
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env"]
    command += ["-p", "no:cacheprovider", "--nbval-cell-timeout=600", "-q", "notebooks/"]
    done = subprocess.run(
        command,
        cwd=project,
        env=environment(project, smoke_home),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    made = {p.stem for p in (project / "results" / "smoke").glob("*/*") if p.suffix == ".csv"}
    assert made >= set(ARTEFACTS)


# --- the runner ------------------------------------------------------------------------------


def test_where_the_copies_go_is_settled_before_any_notebook_runs(tmp_path, monkeypatch):
    """Two run side by side, and papermill changes the working directory of both."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    seen = []

    def run(name, results, *_):
        seen.append(results)
        monkeypatch.chdir(tmp_path / "elsewhere")

    monkeypatch.setattr("ssah.app.notebooks.execute", run)
    execute_all(["a", "b", "c"], Path("results"), "smoke", [])
    assert seen == [tmp_path / "results"] * 3


PARAMETERS_CELL = 'profile = "smoke"\noverrides = []\nonly = []'


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder whose notebooks a test writes."""
    monkeypatch.setattr(notebooks, "project_root", lambda: tmp_path)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def write_notebook(project: Path, name: str, code: str, parameters: str = PARAMETERS_CELL) -> None:
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells.append(nbformat.v4.new_code_cell(code))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(notebook, project / "notebooks" / f"{name}.ipynb")


def names(results: Path) -> set[str]:
    return {path.name for path in (results / "notebooks").iterdir()}


def test_an_unknown_notebook_is_refused_with_the_nearest(project):
    write_notebook(project, "02_unit_roles", "1")
    with pytest.raises(SsahError, match="did you mean '02_unit_roles'"):
        execute("02_unit_role", project / "results", "smoke")
    assert not (project / "results").exists()


@pytest.mark.parametrize("parameters", ["profile = 'smoke'", f"{PARAMETERS_CELL}\nextra = 1"])
def test_a_notebook_with_other_parameters_is_refused(project, parameters):
    write_notebook(project, "tiny", "1", parameters)
    with pytest.raises(SsahError, match=r"tiny\.ipynb declares .* it must declare"):
        execute("tiny", project / "results", "smoke")
    assert not (project / "results").exists()


def test_a_failure_is_kept_and_the_next_success_removes_it(project):
    results = project / "results"
    write_notebook(project, "tiny", "raise ValueError('no good')")
    with pytest.raises(SsahError, match="tiny failed: ValueError: no good"):
        execute("tiny", results, "smoke")
    assert names(results) == {"tiny.failed.ipynb"}
    failed = nbformat.read(results / "notebooks" / "tiny.failed.ipynb", as_version=4)
    assert any("no good" in str(cell.get("outputs", "")) for cell in failed.cells)

    write_notebook(project, "tiny", "print(profile, overrides, only)")
    done = execute("tiny", results, "laptop", ["seed=1"], ["table1"])
    assert done == results / "notebooks" / "tiny.ipynb"
    assert names(results) == {"tiny.ipynb"}, "neither a failed nor a partial copy stays"
    outputs = [str(cell.get("outputs", "")) for cell in nbformat.read(done, as_version=4).cells]
    assert any("laptop ['seed=1'] ['table1']" in text for text in outputs)


def test_a_failure_leaves_the_last_good_copy(project):
    results = project / "results"
    (results / "notebooks").mkdir(parents=True)
    (results / "notebooks" / "tiny.ipynb").write_text("good")
    write_notebook(project, "tiny", "1 / 0")
    with pytest.raises(SsahError, match="ZeroDivisionError"):
        execute("tiny", results, "smoke")
    assert (results / "notebooks" / "tiny.ipynb").read_text() == "good"
    assert names(results) == {"tiny.ipynb", "tiny.failed.ipynb"}


def test_an_executed_copy_holds_results_and_no_traces_of_the_run(project):
    """Progress lines, folders and times would make two equal runs differ."""
    code = "import sys; print('a result'); print('a', 'stage', file=sys.stderr)"
    write_notebook(project, "tiny", code)
    text = execute("tiny", project / "results", "smoke").read_text()
    assert "a result" in text
    for trace in ("a stage", "papermill", "iopub", str(project)):
        assert trace not in text


def test_figures_are_shown_as_images(project):
    code = "from ssah.artefacts.draw import new_figure\nnew_figure(1, 1)"
    write_notebook(project, "tiny", code)
    notebook = nbformat.read(execute("tiny", project / "results", "smoke"), as_version=4)
    assert "image/png" in notebook.cells[-1].outputs[0].data
