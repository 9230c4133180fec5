"""What was found, as a page, as JSON and as a table in the terminal."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from ...core.files import write_atomically
from ...core.paths import RESOURCES
from ...core.runtime import provenance
from ...evaluate import judges
from ...evaluate.judges import Completion
from ...evaluate.stats import Estimate
from .measure import HARMFUL, METRICS, Losses, Measured, Rates

#: Names of the files that a report is written to.
PAGE, NUMBERS = "report.html", "report.json"

Outcome = Literal["good", "bad", "unclear", "plain"]


@dataclass(frozen=True)
class Verdict:
    """One sentence that answers a question, and whether the answer is a good one."""

    outcome: Outcome
    text: str


@dataclass
class Report:
    """Some models side by side, the first of which the others are compared with."""

    title: str
    model: str
    arms: Mapping[str, Measured]
    verdicts: Sequence[Verdict]
    facts: Mapping[str, Mapping[str, Any]]  #: heading -> what is said under it
    warnings: Sequence[str] = ()
    limits: Sequence[str] = ()
    show: int = 0  #: completions a set of harmful requests that are shown
    checkpoint: Path | None = field(default=None)

    @cached_property
    def metrics(self) -> list[str]:
        first = next(iter(self.arms.values()))
        return [name for name in METRICS if name in first.samples]

    def estimate(self, arm: str, metric: str) -> Estimate:
        return self.arms[arm].samples[metric].estimate()

    def against(self, arm: str, other: str, metric: str) -> Estimate:
        """A paired difference in points, or a ratio of perplexities."""
        first, second = self.arms[arm].samples[metric], self.arms[other].samples[metric]
        if isinstance(first, Rates):
            return first.against(cast(Rates, second))
        return first.against(cast(Losses, second))

    @cached_property
    def comparisons(self) -> list[tuple[str, str]]:
        """Pairs of arms: each with the first one, and the last two with each other."""
        first, *others = self.arms
        return [(arm, first) for arm in others] + ([(others[0], others[1])] if others[1:] else [])

    def data(self) -> dict[str, Any]:
        """Everything but completions, as JSON has it."""
        return {
            "title": self.title,
            "model": self.model,
            "verdicts": [dataclasses.asdict(verdict) for verdict in self.verdicts],
            "measured": {
                arm: {metric: _numbers(self.estimate(arm, metric)) for metric in self.metrics}
                for arm in self.arms
            },
            "differences": [
                {"of": arm, "from": other, "metric": m, **_numbers(self.against(arm, other, m))}
                for arm, other in self.comparisons
                for m in self.metrics
            ],
            "judged": {arm: dict(measured.verdicts) for arm, measured in self.arms.items()},
            "facts": {heading: dict(lines) for heading, lines in self.facts.items()},
            "warnings": list(self.warnings),
            "limits": list(self.limits),
            "made by": provenance(),
        }

    def shown(self) -> list[tuple[str, str, Completion, str]]:
        """Random completions to harmful requests: arm, set, completion and verdict."""
        found: list[tuple[str, str, Completion, str]] = []
        for arm, measured in self.arms.items():
            for name in HARMFUL:
                said = measured.completions[name]
                for completion in random.Random(0).sample(said, min(self.show, len(said))):
                    found.append((arm, name, completion, judges.judge(completion)))
        return found


def _numbers(estimate: Estimate) -> dict[str, float | int]:
    return {
        "value": round(estimate.value, 4),
        "low": round(estimate.low, 4),
        "high": round(estimate.high, 4),
        "n": estimate.n,
    }


def interval(estimate: Estimate, unit: str = "", *, signed: bool = False) -> str:
    """12.0 % [7.0, 19.8]"""
    sign = "+" if signed else ""
    space = " " if unit else ""
    bounds = estimate.value, estimate.low, estimate.high
    value, low, high = (f"{v:{sign}.{_places(v)}f}" for v in bounds)
    return f"{value}{space}{unit} [{low}, {high}]"


def _places(value: float) -> int:
    return 2 if abs(value) < 10 else 1


def difference(estimate: Estimate, metric: str) -> str:
    """A difference as a table has it: in points, or as a factor."""
    if METRICS[metric][1] == "%":
        return interval(estimate, "points", signed=True)
    return f"x {interval(estimate)}"


def write_report(report: Report, folder: Path) -> Path:
    """``report.html`` and ``report.json`` in a folder; returns the page."""
    text = json.dumps(report.data(), indent=1, ensure_ascii=False)
    write_atomically(folder / NUMBERS, lambda p: p.write_text(text + "\n", encoding="utf-8"))
    page = render(report)
    write_atomically(folder / PAGE, lambda p: p.write_text(page, encoding="utf-8"))
    return folder / PAGE


def render(report: Report) -> str:
    """One page that needs nothing else: no script, no font, no image from elsewhere."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(RESOURCES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    table = [
        {
            "title": METRICS[metric][0],
            "cells": [
                (interval(self_, METRICS[metric][1].replace("perplexity", "")), self_.n)
                for self_ in (report.estimate(arm, metric) for arm in report.arms)
            ],
            "differences": [
                difference(report.against(arm, other, metric), metric)
                for arm, other in report.comparisons
            ],
        }
        for metric in report.metrics
    ]
    return environment.get_template("report.html.j2").render(
        report=report, table=table, chart=_chart(report), versions=provenance()
    )


def _chart(report: Report) -> dict[str, Any]:
    """Positions of points and intervals in a drawing of 0 to 100 %, 400 wide: a phone's width."""
    left, right, row, gap = 10, 390, 34, 26

    def x(value: float) -> float:
        return round(left + (right - left) * value / 100, 1)

    groups, y = [], 12
    for metric in report.metrics:
        title, unit = METRICS[metric]
        if unit != "%":
            continue
        y += gap
        group: dict[str, Any] = {"title": title, "y": y, "points": []}
        for number, arm in enumerate(report.arms):
            y += row
            e = report.estimate(arm, metric)
            place = {"y": y, "x": x(e.value), "low": x(e.low), "high": x(e.high)}
            text = f"{arm}: {interval(e, '%')}"
            group["points"].append({**place, "series": number, "text": text})
        y += 6
        groups.append(group)
    ticks = [(x(value), f"{value} %") for value in (0, 25, 50, 75, 100)]
    return {"groups": groups, "height": y + 40, "bottom": y + 12, "ticks": ticks}


def print_report(report: Report) -> None:
    """The table and the verdicts, in the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{report.title}: {report.model}", title_justify="left")
    table.add_column("95 % intervals")
    for arm in report.arms:
        table.add_column(arm, justify="right")
    for arm, other in report.comparisons:
        table.add_column(f"{arm} - {other}", justify="right")
    for metric in report.metrics:
        title, unit = METRICS[metric]
        estimates = [report.estimate(arm, metric) for arm in report.arms]
        cells = [interval(e, unit.replace("perplexity", "")) for e in estimates]
        cells += [difference(report.against(*pair, metric), metric) for pair in report.comparisons]
        table.add_row(f"{title} (n = {estimates[0].n})", *cells)
    console.print(table)
    for heading, lines in report.facts.items():
        console.print(f"{heading}: " + "; ".join(f"{k} {v}" for k, v in lines.items()))
    for warning in report.warnings:
        console.print(f"Note: {warning}")
    for verdict in report.verdicts:
        console.print(verdict.text)
