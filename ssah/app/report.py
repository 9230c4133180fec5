"""What a reader gets at the end: the claims table in the terminal, and index.html."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pandas as pd
from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from ..artefacts import ARTEFACTS
from ..claims.table import claims as all_claims
from ..claims.table import claims_table, published_by_model, styled, update_claims
from ..core.errors import SsahError, suggestion
from ..core.files import write_atomically
from ..core.paths import project_root, results_root
from ..core.runtime import is_known
from ..lab.table import read_table

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ssah: {{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>
:root {color-scheme: light dark}
body {font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
overflow-wrap: anywhere}
table {border-collapse: collapse; font-size: 13px} td, th {padding: .25rem .6rem; text-align: left;
border-bottom: 1px solid #8886; vertical-align: top; overflow-wrap: normal}
img {max-width: 100%; background: white} .wide, pre {overflow-x: auto}
</style></head><body>
<h1>Superficial Safety Alignment Hypothesis: {{ title }}</h1>
<h2 id="claims">Claims</h2>
<div class="wide">{{ claims }}</div>
{% for artefact, parts in sections %}
<h2 id="{{ artefact.id }}">{{ artefact.id }}: {{ artefact.title }}</h2>
{% if parts.figure %}<img src="figures/{{ artefact.id }}.svg" alt="{{ artefact.title }}">{% endif %}
{% for part in parts.text %}
{% if part.startswith("|") %}<pre>{{ part | e }}</pre>{% else %}<p>{{ part | e }}</p>{% endif %}
{% endfor %}
<p>{% for file in parts.files %}<a href="{{ file }}">{{ file }}</a> {% endfor %}</p>
{% endfor %}
</body></html>
"""


#: Pages with blocks that name claims.
CLAIMING = ("docs/faq.md", "docs/defences.md")


def print_claims(results: Path) -> None:
    """The claims table, as the last thing that ``make reproduce`` prints."""
    table = Table(title=f"Claims ({results})", show_lines=True)
    table.add_column("claim", ratio=1)
    columns = ("paper", "published", "this run", "agrees", "verdict")
    for column in columns:
        table.add_column(column)
    for row in claims_table(results).to_dict("records"):
        table.add_row(f"{row['text']} ({row['unit']})", *(str(row[c]) for c in columns))
    show(table)


def show(table: Table) -> None:
    """On standard output. A log file has no width: at the usual 80 columns every interval would be
    broken there."""
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)


def write_reports(results: Path) -> None:
    """What is made out of all numbers of a results folder: ``measurements.csv`` for people,
    ``claims.csv``, and ``index.html``, one page with the claims and every artefact."""
    table = read_table(results)
    write_atomically(
        results / "measurements.csv", lambda p: table.to_csv(p, index=False, float_format="%.6g")
    )
    html = index_page(results, update_claims(results))
    write_atomically(results / "index.html", lambda p: p.write_text(html, encoding="utf-8"))


def index_page(results: Path, claims: pd.DataFrame) -> str:
    """The claims and every artefact of a results folder, as HTML."""
    sections = []
    for artefact in ARTEFACTS.values():
        figure = (results / "figures" / f"{artefact.id}.svg").exists()
        kind = "figures" if figure else "tables"
        text = results / kind / f"{artefact.id}.md"
        if text.exists():
            files = sorted(results.glob(f"*/{artefact.id}.*"))
            parts = {
                "figure": figure,
                "text": text.read_text("utf-8").strip().split("\n\n"),
                "files": [p.relative_to(results) for p in files if p != text],  # shown here
            }
            sections.append((artefact, parts))
    page = Environment(autoescape=False).from_string(_PAGE)
    return page.render(
        title=results.name, claims=styled(claims).to_html(index=False, border=0), sections=sections
    )


def publish(results: Path) -> None:
    """Make a finished run the published one, and refresh the numbers in README and docs.

    Raises :class:`SsahError` where a number was measured by code that is not in the repository,
    and where models or seeds would be lost.
    """
    published, own = results_root() / "published", read_table(results)
    require_known_commits(own)
    known = read_table(published)[["model", "seed"]].drop_duplicates()
    lost = {*known.itertuples(index=False, name=None)} - {
        *own[["model", "seed"]].itertuples(index=False, name=None)
    }
    if lost:
        lacking = ", ".join(f"{model} seed {seed}" for model, seed in sorted(lost))
        raise SsahError(
            f"{published} holds {lacking}, which this run lacks, so that publishing it would "
            f"delete them. Delete the folder first, or put both together: ssah merge {results} "
            "with a copy of it --out results/published."
        )
    fresh = published.with_name("published.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(results, fresh, ignore=shutil.ignore_patterns(".*", "*.failed.ipynb"))
    for source in published.glob("tables/bench.*"):  # which is measured on an idle machine, apart
        if not (fresh / "tables" / source.name).exists():
            shutil.copy(source, fresh / "tables")
    shutil.rmtree(published, ignore_errors=True)
    fresh.replace(published)
    refresh_published()


def require_known_commits(table: pd.DataFrame) -> None:
    """Raise :class:`SsahError` unless every commit of a table is one of this repository's."""
    for commit in sorted({name for text in table["commits"] for name in text.split()}):
        if not is_known(commit):
            rows = int(table["commits"].str.contains(commit, regex=False).sum())
            raise SsahError(
                f"{rows} numbers were measured at commit {commit}, which is not in the repository "
                "(a + means uncommitted changes): commit them, run `ssah clean-cache`, and "
                "measure again."
            )


def refresh_published() -> None:
    """What is made out of all published numbers, the generated blocks of README and docs too."""
    published = results_root() / "published"
    write_reports(published)
    _fill("README.md", "claims", published_by_model(headline=True))
    claims = published_by_model(headline=False)
    _fill("docs/claims.md", "claims", claims)
    for page in CLAIMING:
        for block, names in claim_blocks(page):
            _fill(page, block, claims.loc[names])
    _fill("docs/reproduction.md", "times", times(published))
    costs = published / "tables" / "bench.csv"
    if costs.exists():
        _fill("docs/reproduction.md", "costs", pd.read_csv(costs, dtype=str).fillna(""))


def claim_blocks(name: str) -> list[tuple[str, list[str]]]:
    """The blocks of a page that name claims, as in ``<!-- claims esu_are_few:begin -->``, and
    these; :class:`SsahError` for one that there is not."""
    text = (project_root() / name).read_text(encoding="utf-8")
    found = re.findall(r"<!-- (claims ([^:]+)):begin -->", text)
    known = [claim["id"] for claim in all_claims()]
    for wanted in (w for _, names in found for w in names.split() if w not in known):
        raise SsahError(f"{name}: there is no claim '{wanted}'{suggestion(wanted, known)}")
    return [(block, names.split()) for block, names in found]


def times(results: Path) -> pd.DataFrame:
    """Minutes a seed that each artefact of a run took, alone and where everything is cached."""
    path = results / "times.csv"
    known = pd.read_csv(path).set_index("artefact") if path.exists() else pd.DataFrame()
    return pd.DataFrame(
        [
            {
                "artefact": name,
                "cold, alone": _minutes(known.loc[name, "cold_seconds"] / known.loc[name, "seeds"]),
                "warm": f"{known.loc[name, 'warm_seconds'] / known.loc[name, 'seeds']:.0f} s",
            }
            for name in ARTEFACTS
            if name in known.index
        ]
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _fill(name: str, block: str, table: pd.DataFrame) -> None:
    """Replace what stands between a file's ``<block>:begin`` and ``<block>:end`` comments."""
    path = project_root() / name
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    head, rest = path.read_text(encoding="utf-8").split(begin)
    tail = rest.split(end)[1]
    text = f"{head}{begin}\n{table.to_markdown(index=False)}\n{end}{tail}"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))
