"""What a reader gets at the end: the claims table in the terminal, and index.html."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from .artefacts import ARTEFACTS
from .artefacts.render import write_atomically
from .claims import claims_table, styled, update_claims
from .paths import results_root

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ssah: {{ title }}</title>
<style>
body {font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem}
table {border-collapse: collapse; font-size: 13px} td, th {padding: .25rem .6rem; text-align: left;
border-bottom: 1px solid #ddd; vertical-align: top}
img {max-width: 100%} pre {white-space: pre-wrap}
</style></head><body>
<h1>Superficial Safety Alignment Hypothesis: {{ title }}</h1>
<h2 id="claims">Claims</h2>
{{ claims }}
{% for artefact, parts in sections %}
<h2 id="{{ artefact.id }}">{{ artefact.id }}: {{ artefact.title }}</h2>
{% if parts.figure %}<img src="figures/{{ artefact.id }}.svg" alt="{{ artefact.title }}">{% endif %}
<pre>{{ parts.text }}</pre>
<p>{% for file in parts.files %}<a href="{{ file }}">{{ file }}</a> {% endfor %}</p>
{% endfor %}
</body></html>
"""


def print_claims(results: Path) -> None:
    """The claims table, as the last thing that ``make reproduce`` prints."""
    table = Table(title=f"Claims ({results})", show_lines=True)
    table.add_column("claim", ratio=1)
    columns = ("paper", "published", "this run", "agrees", "verdict")
    for column in columns:
        table.add_column(column)
    for row in claims_table(results).to_dict("records"):
        table.add_row(f"{row['text']} ({row['unit']})", *(str(row[c]) for c in columns))
    console = Console()
    # A log file has no width; the default of 80 columns would break every interval.
    Console(width=None if console.is_terminal else 140).print(table)


def write_index(results: Path) -> Path:
    """One page with the claims and every artefact of a results folder."""
    sections = []
    for artefact in ARTEFACTS.values():
        figure = (results / "figures" / f"{artefact.id}.svg").exists()
        kind = "figures" if figure else "tables"
        text = results / kind / f"{artefact.id}.md"
        if text.exists():
            files = sorted(p.relative_to(results) for p in results.glob(f"*/{artefact.id}.*"))
            parts = {"figure": figure, "text": text.read_text("utf-8"), "files": files}
            sections.append((artefact, parts))
    page = Environment(autoescape=False).from_string(_PAGE)
    html = page.render(
        title=results.name,
        claims=styled(claims_table(results)).to_html(index=False, border=0),
        sections=sections,
    )
    target = results / "index.html"
    write_atomically(target, lambda path: path.write_text(html, encoding="utf-8"))
    return target


def publish(results: Path, readme: Path) -> None:
    """Make a finished run the published one, and refresh the numbers in the README."""
    published = results_root() / "published"
    fresh = published.with_name("published.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(results, fresh, ignore=shutil.ignore_patterns(".*", "*.failed.ipynb"))
    shutil.rmtree(published, ignore_errors=True)
    fresh.replace(published)
    update_claims(published)
    write_index(published)
    refresh_readme(readme)


def refresh_readme(readme: Path) -> None:
    """Replace the generated block of the README by the published claims."""
    begin, end = "<!-- claims:begin -->", "<!-- claims:end -->"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    frame = claims_table(results_root() / "published")
    frame = frame[["text", "unit", "paper", "published", "verdict"]]
    block = f"{begin}\n{frame.to_markdown(index=False)}\n{end}"
    write_atomically(readme, lambda path: path.write_text(head + block + tail, encoding="utf-8"))


def timings() -> dict[str, float]:
    """Seconds per seed that each artefact took, cold, when it was published."""
    path = results_root() / "published" / "timings.csv"
    if not path.exists():
        return {}
    frame = pd.read_csv(path, dtype={"seeds": str})
    return {row.artefact: row.seconds / len(row.seeds.split()) for row in frame.itertuples()}
