"""What a reader gets at the end: the claims table in the terminal, and index.html."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from ..artefacts import ARTEFACTS
from ..artefacts.render import merge_rows
from ..claims.table import claims_table, styled, update_claims
from ..core.files import write_atomically
from ..core.paths import project_root, results_root

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


def publish(results: Path) -> None:
    """Make a finished run the published one, and refresh the numbers in README and docs."""
    published = results_root() / "published"
    fresh = published.with_name("published.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(results, fresh, ignore=shutil.ignore_patterns(".*", "*.failed.ipynb"))
    for source in published.glob("tables/bench.*"):  # which no notebook measures
        shutil.copy(source, fresh / "tables")
    shutil.rmtree(published, ignore_errors=True)
    fresh.replace(published)
    _refresh(published)


def publish_part(results: Path, artefacts: Sequence[str], notebooks: Sequence[str]) -> None:
    """Put some artefacts (or ``bench``) and executed notebooks into the published run.

    All others stay. So do the times: those of a part say nothing about what its artefacts share
    with others.
    """
    published = results_root() / "published"
    for name in artefacts:
        for source in results.glob(f"*/{name}.*"):
            _copy(source, published / source.relative_to(results))
    measured = [name for name in artefacts if name in ARTEFACTS]
    if measured:
        metrics = pd.read_csv(results / "metrics.csv", dtype={"seed": str})
        for name in measured:
            merge_rows(published / "metrics.csv", metrics[metrics["artefact"] == name], name)
    for name in notebooks:
        _copy(*(folder / "notebooks" / f"{name}.ipynb" for folder in (results, published)))
    _refresh(published)


def _copy(source: Path, target: Path) -> None:
    write_atomically(target, lambda path: shutil.copy(source, path))


def _refresh(published: Path) -> None:
    """What is made out of all published numbers."""
    update_claims(published)
    write_index(published)
    refresh_texts()


def refresh_texts() -> None:
    """Fill the generated blocks of the README and of docs/reproduction.md."""
    claims = claims_table(results_root() / "published")
    _fill("README.md", "claims", claims[["text", "unit", "paper", "published", "verdict"]])
    rows = [
        {
            "artefact": name,
            "cold, alone": _minutes(time.alone),
            "cold, after those above": _minutes(time.added),
            "warm": f"{time.warm:.0f} s",
        }
        for name, time in timings().items()
    ]
    _fill("docs/reproduction.md", "times", pd.DataFrame(rows))
    costs = results_root() / "published" / "tables" / "bench.csv"
    if costs.exists():
        _fill("docs/reproduction.md", "costs", pd.read_csv(costs, dtype=str).fillna(""))


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


@dataclass(frozen=True)
class Time:
    """Seconds a seed that an artefact took when it was published."""

    alone: float  #: where nothing is cached
    added: float  #: where the artefacts before it are there
    warm: float  #: where everything is


def timings() -> dict[str, Time]:
    """By artefact, in their order; empty where nothing is published."""
    path = results_root() / "published" / "timings.csv"
    if not path.exists():
        return {}
    frame = pd.read_csv(path, dtype={"seeds": str}).set_index("artefact")
    if "added_seconds" not in frame:  # published by an earlier version
        return {}
    times = {}
    for name in ARTEFACTS:
        if name in frame.index:
            row = frame.loc[name]
            parts = (row["seconds"], row["added_seconds"], row["warm_seconds"])
            times[name] = Time(*(part / len(row["seeds"].split()) for part in parts))
    return times
