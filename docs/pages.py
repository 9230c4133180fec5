"""Write the pages of the site to build/site: those of docs/, and those made of published results.

Nothing is typed here that a file holds: claims come from the claims table, figures and tables from
results/published, questions from the notebooks, the API reference from docstrings. Links that leave
docs/ are turned to the page that shows their target, or to a copy of the file.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

import pandas as pd
import yaml
from roles import plain

import ssah
from ssah.app.notebooks import available
from ssah.app.report import index_page
from ssah.artefacts import ARTEFACTS
from ssah.claims.table import claims_of_all, claims_table, styled
from ssah.core.paths import project_root
from ssah.lab.table import read_table

ROOT = project_root()
PUBLISHED = ROOT / "results" / "published"
BUILD = ROOT / "build" / "site"
PAGES = BUILD / "pages"

#: Floors of the package that are a library of their own.
LIBRARY = ("units", "scoring", "training")

#: Pages that are files of the repository, and where they are on the site.
WRITTEN = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
} | {
    path.relative_to(ROOT).as_posix(): path.relative_to(ROOT / "docs").as_posix()
    for path in sorted((ROOT / "docs").rglob("*.md"))
}

#: Whether it is an image, text, file and anchor.
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s#]*)(#[^()\s]*)?\)")


def main() -> None:
    """Write all pages anew, and the configuration that lists them in their order."""
    shutil.rmtree(BUILD, ignore_errors=True)
    for source, page in WRITTEN.items():
        _write(page, _relinked((ROOT / source).read_text("utf-8"), source, page))
    for name in available():
        _write(f"claims/{name}.md", _question(name))
    _write("results.md", _results())
    _write("established.md", _established())
    _copy(PUBLISHED, "published")
    html = index_page(PUBLISHED, claims_of_all(PUBLISHED))  # as this version writes it
    (PAGES / "published" / "index.html").write_text(html, encoding="utf-8")
    _write_reference()
    shutil.copy(ROOT / "docs" / "style.css", PAGES)
    settings = {"INHERIT": "../../docs/mkdocs.yml", "nav": _order()}
    text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
    (BUILD / "mkdocs.yml").write_text(text, encoding="utf-8")


def _order() -> list[dict[str, object]]:
    """The pages as the site's navigation lists them; the others of docs/ follow the known ones."""
    tutorials = sorted(page for page in WRITTEN.values() if page.startswith("tutorials/"))
    trust = [
        "faq.md", "known_discrepancies.md", "what_we_got_wrong.md", "judging.md", "data.md",
        "reproduction.md",
    ]  # fmt: skip
    placed = {"index.md", "claims.md", "contributing.md", "changelog.md", *tutorials, *trust}
    others = [page for page in WRITTEN.values() if page not in placed]
    reference = ["reference/index.md", *(f"reference/{name}.md" for name in LIBRARY)]
    return [
        {"Start": "index.md"},
        {
            "Claims": [
                "established.md",
                *(f"claims/{name}.md" for name in available()),
                {"All claims": "claims.md"},
            ]
        },
        {"Results": "results.md"},
        {"Tutorials": [*tutorials, "contributing.md"]},
        {"Trust": [*trust, *others, "changelog.md"]},
        {"Reference": reference},
    ]


# --- claims and results ----------------------------------------------------------------------


@functools.cache
def _models() -> list[str]:
    return list(read_table(PUBLISHED)["model"].unique())


@functools.cache
def _claims(model: str) -> pd.DataFrame:
    """All claims, decided by the published numbers of one model."""
    return claims_table(PUBLISHED, model)


def _measured(model: str) -> pd.DataFrame:
    return _claims(model)[_claims(model)["published"] != ""]


def _tables_of_claims(artefacts: list[str]) -> str:
    """The published claims about some artefacts, a table for each model."""
    parts = []
    for model in _models():
        table = _measured(model)
        table = table[table["artefact"].isin(artefacts)]
        if len(table):
            parts.append(f"**{model}**\n\n{_markdown(table)}")
    return "\n\n".join(parts) or "No claim of the table has been measured here yet."


def _markdown(table: pd.DataFrame) -> str:
    """Claims with what decides them, and a link to the artefact that shows it."""
    shown = styled(table).drop(columns=["this run", "agrees"])
    shown = shown.assign(**{"adjusted p": table["adjusted p"], "shown by": table["artefact"]})
    shown["shown by"] = [f"[{name}]({_page_of(name)})" for name in shown["shown by"]]
    return shown.to_markdown(index=False, disable_numparse=True)


def _page_of(artefact: str) -> str:
    """Where an artefact is shown, as a link from a page at the top."""
    folder = "results.md" if _is_table(artefact) else f"claims/{ARTEFACTS[artefact].notebook}.md"
    return f"{folder}#{artefact}"


def _is_table(artefact: str) -> bool:
    return (PUBLISHED / "tables" / f"{artefact}.md").exists()


def _question(name: str) -> str:
    """A notebook's question, the claims about it and its figures."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8"))["cells"]
    source = f"notebooks/{name}.ipynb"
    parts = [_relinked("".join(cells[0]["source"]), source, "claims.md")]
    shown = [artefact for artefact in ARTEFACTS.values() if artefact.notebook == name]
    parts += ["## What was measured", _tables_of_claims([artefact.id for artefact in shown])]
    for artefact in shown:
        if _is_table(artefact.id):
            link = f"[Table: {artefact.title}](results.md#{artefact.id})"
            parts += [f"## {artefact.title} {{ #{artefact.id} }}", f"{link} ({artefact.id})."]
            continue
        text = PUBLISHED / "figures" / f"{artefact.id}.md"
        if text.exists():
            parts += [
                f"## {artefact.title} {{ #{artefact.id} }}",
                f"![{artefact.title}](published/figures/{artefact.id}.svg)",
                *_note(text.read_text("utf-8")),
            ]
    parts.append(f"The executed notebook: [{name}.ipynb](published/notebooks/{name}.ipynb).")
    return _LINK.sub(  # links are written as from the top of the site
        lambda m: f"{m[1]}[{m[2]}](../{m[3]}{m[4] or ''})" if ":" not in m[3] else m[0],
        "\n\n".join(parts),
    )


def _note(text: str) -> list[str]:
    """What a reader must know of an artefact, and, folded away, what it was made by."""
    *notes, origin = _escaped(text).strip().split("\n\n")
    folded = f'<details markdown="1"><summary>How it was made</summary>\n\n{origin}\n\n</details>'
    return [*notes, folded]


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", r"\*")


def _results() -> str:
    """Every published table, and where the figures and files are."""
    parts = [
        "# Published results",
        "Figures stand with the claims that they are about. Everything on one page, with a link to "
        "each file: [published/index.html](published/index.html). All numbers, one row each: "
        "[measurements.csv](published/measurements.csv), explained under "
        "[reproduction](reproduction.md#files). Verdicts: [claims.csv](published/claims.csv).",
    ]
    figures = [a for a in ARTEFACTS if (PUBLISHED / "figures" / f"{a}.md").exists()]
    parts.append("Figures: " + ", ".join(f"[{name}]({_page_of(name)})" for name in figures) + ".")
    for artefact in ARTEFACTS.values():
        if _is_table(artefact.id):
            text = (PUBLISHED / "tables" / f"{artefact.id}.md").read_text("utf-8").strip()
            table, rest = text.split("\n\n", 1)
            files = [f"[{k}](published/tables/{artefact.id}.{k})" for k in ("csv", "tex")]
            title = f"## {artefact.title} {{ #{artefact.id} }}"
            parts += [title, table, *_note(rest), f"{artefact.id}: {', '.join(files)}."]
    return "\n\n".join(parts)


def _established() -> str:
    """The published claims by verdict."""
    parts = [
        "# What is and what is not established",
        "Every claim of [the table](claims.md) that has been measured, by its verdict, for each "
        "model. How a verdict is reached is on the page about "
        "[reproduction](reproduction.md#how-numbers-are-made).",
    ]
    meanings = {
        "holds": "It holds",
        "does not hold": "It does not hold",
        "no difference": "There is no difference that would matter",
        "too few data": "Too few data to say",
        "undecided": "Undecided",
        "says nothing": "It says nothing of this model",
    }
    for verdict, title in meanings.items():
        parts.append(f"## {title}")
        found = False
        for model in _models():
            table = _measured(model)
            table = table[table["verdict"].str.startswith(verdict)]
            if len(table):
                found = True
                parts += [f"**{model}**", _markdown(table)]
        if not found:
            parts.append("None.")
    return "\n\n".join(parts)


# --- reference -------------------------------------------------------------------------------


def _write_reference() -> None:
    """The public names, and the modules of the library, from their docstrings."""
    rows, others = [], []
    for name, module in sorted(ssah._PUBLIC.items()):
        full = f"ssah.{module}.{name}"
        summary = getattr(ssah, name).__doc__.strip().split("\n\n")[0].replace("\n", " ")
        rows.append(
            {"name": f"[`ssah.{name}`][{full}]", "what it is": plain(" ".join(summary.split()))}
        )
        others += [] if module.split(".")[0] in LIBRARY else [f"::: {full}"]
    about = "# API reference\n\nWhat `import ssah` gives. The floors of the library: "
    links = ", ".join(f"[{name}]({name}.md)" for name in LIBRARY)
    table = pd.DataFrame(rows).to_markdown(index=False)
    _write("reference/index.md", "\n\n".join([f"{about}{links}.", table, *others]))
    for name in LIBRARY:
        modules = sorted(p.stem for p in (ROOT / "ssah" / name).glob("[a-z]*.py"))
        parts = [f"# ssah.{name}", *(f"::: ssah.{name}.{module}" for module in modules)]
        _write(f"reference/{name}.md", "\n\n".join(parts))


# --- links -----------------------------------------------------------------------------------


def _relinked(text: str, source: str, page: str) -> str:
    """A file of the repository, with links as they are on the site."""

    def turned(match: re.Match[str]) -> str:
        image, shown, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target or ":" in target:
            return match[0]
        path = normpath(str(PurePosixPath(source).parent / target))
        # A figure is a link to where it is shown, but as an image it is the file itself.
        found = path.removeprefix("results/") if image else _target(path, anchor)
        place = relpath(found, PurePosixPath(page).parent) if found else ""
        return f"{image}[{shown}]({place})" if found else shown

    return _LINK.sub(turned, text)


def _target(path: str, anchor: str) -> str:
    """The page of the site that shows a file of the repository; "" where there is none."""
    inside, stem = PurePosixPath(path), PurePosixPath(path).stem
    if path in WRITTEN:
        return WRITTEN[path] + anchor
    if path == "notebooks/00_index.ipynb":
        return "established.md"
    if inside.suffix == ".ipynb":
        return f"claims/{stem}.md"
    if path.startswith("results/published/") and stem in ARTEFACTS:
        return _page_of(stem)
    if path == "results/published":
        return "results.md"
    if path.startswith("ssah/") and inside.name in LIBRARY:
        return f"reference/{inside.name}.md"
    if (ROOT / path).is_dir():
        return ""
    if path.startswith("results/published/"):
        return path.removeprefix("results/").replace(".md", ".csv")  # Markdown is not copied
    return _shown(path)


def _shown(path: str) -> str:
    """A page with the text of a file, or a copy of a table."""
    suffix = PurePosixPath(path).suffix.lstrip(".")
    if suffix == "csv":
        copy = f"files/{PurePosixPath(path).name}"
        (PAGES / "files").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, PAGES / copy)
        return copy
    page = f"source/{path}.md"
    language = {"py": "python", "cff": "yaml"}.get(suffix, suffix or "text")
    text = (ROOT / path).read_text("utf-8")
    _write(page, f"# {path}\n\n````{language}\n{text}\n````\n")
    return page


def _write(page: str, text: str) -> None:
    path = PAGES / page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _copy(folder: Path, name: str) -> None:
    """A results folder; what is Markdown there is shown on pages."""
    shutil.copytree(folder, PAGES / name, ignore=shutil.ignore_patterns("*.md", ".*", "*.html"))


if __name__ == "__main__":
    main()
