"""The shape of the project: floors, sizes, pins, and names that agree with each other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from ssah import __version__
from ssah.app.cli import ssah
from ssah.artefacts import ARTEFACTS
from ssah.core.paths import project_root

ROOT = project_root()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()

TOP = [
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "conf",
    "docs",
    "environment.yml",
    "notebooks",
    "pyproject.toml",
    "requirements.lock",
    "results/reference/paper.csv",
    "ssah",
    "tests",
]


@pytest.mark.parametrize("name", TOP)
def test_top_level_names_exist(name):
    assert (ROOT / name).exists()


def test_the_version_is_the_same_everywhere():
    """The distribution takes it from the package; papers and people read the other two."""
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "ssah/__init__.py"
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    changed = re.search(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changed is not None
    assert __version__ == cited == changed[1]


def test_floors_import_only_downwards():
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", done.stdout)


def test_every_module_is_on_a_floor():
    layers = " ".join(PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"])
    placed = set(re.findall(r"ssah\.(\w+)", layers))
    modules = {p.stem if p.is_file() else p.name for p in (ROOT / "ssah").iterdir()}
    code = {m for m in modules if not m.startswith("__")} - {"resources", "conf"}
    assert code == placed


def test_importing_the_package_imports_nothing_heavy():
    loaded = "import ssah, sys; print(*(m for m in ('torch', 'transformers') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == b""


# --- dependencies ----------------------------------------------------------------------------


def pins() -> dict[str, Version]:
    """Package -> version of ``requirements.lock``, whatever else a line says."""
    found = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;\\]+)", line.strip())
        if match:
            found[canonicalize_name(match[1])] = Version(match[2])
    return found


def declared() -> list[Requirement]:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *(text for extra in extras.values() for text in extra)]
    found = [Requirement(text) for text in texts]
    return [requirement for requirement in found if requirement.name != project["name"]]


def test_every_line_of_the_lock_is_an_exact_pin():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    entries = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    options = [line for line in entries if line.lstrip().startswith("-")]
    assert len(entries) - len(options) == len(pins()) > 50


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_every_dependency_is_pinned_within_its_range(requirement):
    pinned = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned, prereleases=True), pinned


def test_the_extras_are_those_that_are_promised():
    extras = set(PYPROJECT["project"]["optional-dependencies"])
    assert extras == {"protect", "study", "cluster", "lm-eval", "docs", "dev"}


_METHOD = """
for name, module in ssah._PUBLIC.items():
    if not module.startswith("app."):
        getattr(ssah, name)
"""

_PROTECT = """
import ssah.app.protect.cli, ssah.app.protect.demo, ssah.training.supervised
ssah.protect, ssah.check
"""


def imported_by(code: str) -> tuple[list[str], set[str]]:
    """Files of this package that some code imports, and what else they import at their top."""
    show = "print(*(m.__file__ for name, m in sys.modules.items() if name.startswith('ssah.')))"
    whole = f"import sys, ssah\n{code}\n{show}"
    done = subprocess.run(
        [sys.executable, "-c", whole], capture_output=True, text=True, cwd=ROOT, check=True
    )
    files = done.stdout.split()
    found = set()
    for file in files:
        for node in ast.parse(Path(file).read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).split(".")[0])
    return files, found - set(sys.stdlib_module_names)


def test_the_method_imports_no_extra():
    """What ``pip install ssah`` brings is enough for it; anything else is imported where it is
    used."""
    files, found = imported_by(_METHOD)
    assert any(file.endswith("slicing.py") for file in files)
    assert any(file.endswith("attribution.py") for file in files)
    assert not [file for file in files if "/lab/" in file or "/app/" in file]
    needed = {Requirement(text).name for text in PYPROJECT["project"]["dependencies"]}
    assert found <= needed


def test_what_protects_a_model_imports_no_other_extra():
    """Of the lab only what loads models, and none of the packages that only the study needs."""
    files, found = imported_by(_PROTECT)
    assert any(file.endswith("demo.py") for file in files)
    lab = {Path(file).name for file in files if "/lab/" in file}
    assert lab == {"__init__.py", "load.py"}
    project = PYPROJECT["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["protect"]]
    names = {Requirement(text).name for text in texts}
    assert found <= (names - {"pyyaml"}) | {"yaml"}


def test_without_the_extras_the_command_says_what_to_install():
    code = "import sys; sys.modules['click'] = None; import ssah.__main__ as m; sys.exit(m.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "needs click: pip install 'ssah[protect]'" in done.stderr


def test_the_conda_environment_uses_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "ssah"
    python = next(d for d in environment["dependencies"] if str(d).startswith("python="))
    requires = Requirement(f"python{PYPROJECT['project']['requires-python']}").specifier
    assert requires.contains(python.split("=")[1])
    by_pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert "-r requirements.lock" in by_pip
    assert any(line.endswith("-e .") for line in by_pip)
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    assert not {re.split("[=<>]", d)[0] for d in conda} & {r.name for r in declared()}


# --- make ------------------------------------------------------------------------------------


def targets() -> set[str]:
    rule = re.compile(r"^((?:[a-z][a-z-]*|\$\([A-Z]+\))(?: (?:[a-z][a-z-]*))*):(?!=)", re.MULTILINE)
    names = {name for match in rule.findall(MAKEFILE) for name in match.split()}
    return {name for name in names if not name.startswith("$(")}


@pytest.fixture(scope="module")
def help_text() -> str:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_make_knows_every_artefact(help_text):
    listed = re.search(r"^artefacts: +(.*)$", help_text, re.MULTILINE)
    assert listed
    assert listed[1].split() == list(ARTEFACTS)


def test_make_help_names_every_target(help_text):
    expected = targets() - {"help", "env"}  # env is what the others depend on
    assert {"setup", "reproduce", "smoke", "test"} <= expected
    assert set(re.findall(r"^make ([a-z-]+)", help_text, re.MULTILINE)) >= expected
    for name in [*ARTEFACTS, *(p.stem for p in (ROOT / "notebooks").glob("*.ipynb"))]:
        assert name in help_text


def test_the_targets_that_are_commands_are_commands():
    rule = re.search(r"^([a-z -]+): env\n\t\$\(SSAH\) \$@", MAKEFILE, re.MULTILINE)
    assert rule
    assert set(rule[1].split()) <= set(ssah.commands)


def test_no_artefact_hides_a_command_or_a_target():
    assert not set(ARTEFACTS) & (set(ssah.commands) | targets())


# --- texts -----------------------------------------------------------------------------------

BINARY = {".png", ".pdf", ".pyc", ".safetensors", ".gguf"}


def texts() -> list[Path]:
    """Files that git has or would add; every file where this is no clone."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        hidden = {".venv", ".git", ".mypy_cache", ".ruff_cache", ".pytest_cache", "__pycache__"}
        paths = [p for p in ROOT.rglob("*") if not hidden & set(p.relative_to(ROOT).parts)]
    return [p for p in paths if p.is_file() and p.suffix not in BINARY]


def test_nothing_depends_on_a_registrys_address_or_a_folder_outside():
    # Written in two parts, so that this file does not hold them itself.
    hosts = ["pypi" + ".org", "pythonhosted" + ".org", "conda.anaconda" + ".org"]
    hosts += ["download.pytorch" + ".org", "npmjs" + ".org"]
    forbidden = [*hosts, "../" + "shared"]
    paths = texts()
    assert ROOT / "pyproject.toml" in paths
    found = [
        f"{path.relative_to(ROOT)}: {text}"
        for path in paths
        for text in forbidden
        if text in path.read_text(encoding="utf-8", errors="replace")
    ]
    assert not found


def test_what_is_published_holds_no_completions():
    forbidden = {"completion", "completions", "response", "responses"}
    for path in sorted((ROOT / "results" / "published").rglob("*")):
        if path.suffix in (".csv", ".md"):
            heads = [line for line in path.read_text().splitlines() if line.count("|") > 1][:1]
            if path.suffix == ".csv":
                heads = path.read_text().splitlines()[:1]
            columns = {c.strip().lower() for head in heads for c in re.split(r"[|,]", head)}
            assert not forbidden & columns, path
        elif path.suffix == ".ipynb":
            for cell in nbformat.read(path, as_version=4).cells:
                shown = str(cell.get("outputs", ""))
                assert not re.search(r"<th>\s*(?:completion|response)s?\s*</th>", shown), path
                assert not re.search(r"['\"](?:completion|response)s?['\"]\s*:", shown), path
