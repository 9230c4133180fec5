"""Figures on attribute transfer: metrics against roles by hand, and drawings against metrics."""

from __future__ import annotations

import dataclasses

import pytest

from ssah.artefacts import Output, find
from ssah.lab.arms import Arm
from ssah.lab.selections import ALL, CU6, FULL, headline, random_controls
from ssah.lab.stages import Stages
from ssah.units.roles import GROUPS, Roles, transfer

SCOPES = {"global": None, "attention": "attn", "mlp": "mlp"}
OTHER_PROMPTS, RANDOM = "no fine-tuning, other prompts", f"random, as {CU6}"
ARMS = (OTHER_PROMPTS, FULL, RANDOM, CU6, ALL)
RULES = ("thresholds", "quantiles")
PAIRS = [f"{before}->{after}" for before in GROUPS for after in GROUPS]


@pytest.fixture(scope="module")
def outputs(attacked_study) -> dict[str, Output]:
    names = ("fig5", "fig11", "fig12", "fig13")
    return {name: find(name).compute(attacked_study) for name in names}


@pytest.fixture(scope="module")
def stages(attacked_study) -> Stages:
    return attacked_study.stages(0)


@pytest.fixture(scope="module")
def after(stages) -> dict[tuple[str, str], Roles]:
    """Roles by arm and rule: nothing frozen after one epoch, the others after two."""
    tunings = headline(stages, "instructions")
    tunings[RANDOM] = random_controls(stages, CU6, 1)["0.0"]
    found = {}
    for rule in RULES:
        found[OTHER_PROMPTS, rule] = stages.roles_after("aligned", rule, resample=1)
        for name, tuning in tunings.items():
            which = Arm(dataclasses.replace(tuning, epoch=1 if name == FULL else 2)).which
            found[name, rule] = stages.roles_after(which, rule)
    return found


def values_of(output: Output, arm: str) -> dict[str, float]:
    rows = [r for r in output.metrics if r["arm"] == arm]
    values = {r["metric"]: r["value"] for r in rows}
    assert len(values) == len(rows), "one row each"
    return values


@pytest.mark.parametrize(
    ("figure", "scopes"),
    [("fig5", ["global"]), ("fig11", ["global"]), ("fig12", ["attention", "mlp"])],
)
def test_transfer_matrices_count_every_unit_once(outputs, stages, after, figure, scopes):
    """Per cent of all units of the scope; rows are the groups before, the same for every arm."""
    arms = {f"{name}, {scope}, {rule}" for name, rule in after for scope in scopes}
    assert {r["arm"] for r in outputs[figure].metrics} == arms
    for (name, rule), roles in after.items():
        for scope in scopes:
            kind = SCOPES[scope]
            cells = values_of(outputs[figure], f"{name}, {scope}, {rule}")
            assert list(cells) == PAIRS
            assert sum(cells.values()) == pytest.approx(100)
            size = sum(stages.roles.mask(group).count(kind) for group in GROUPS)
            for group in GROUPS:
                row = sum(cells[f"{group}->{other}"] for other in GROUPS)
                assert row == pytest.approx(100 * stages.roles.mask(group).count(kind) / size)
            counts = transfer(stages.roles, roles, kind).flatten().tolist()
            assert list(cells.values()) == pytest.approx([100 * c / size for c in counts])


def test_fates_of_the_esu_add_up(outputs, stages, after):
    output, esu = outputs["fig13"], stages.layout.flatten(stages.roles.mask("ESU"))
    kept = {}
    for (name, rule), roles in after.items():
        values = values_of(output, f"{name}, {rule}")
        for group in GROUPS:
            now = stages.layout.flatten(roles.mask(group))
            share = 100 * int((esu & now).sum()) / int(esu.sum())
            assert values[f"ESU->{group}"] == pytest.approx(share)
        assert sum(values[f"ESU->{group}"] for group in GROUPS) == pytest.approx(100)
        kept[name, rule] = values["ESU->ESU"]
    for (name, rule), share in kept.items():
        values = values_of(output, f"{name}, {rule}")
        for base, change in ((OTHER_PROMPTS, "kept_over_noise"), (FULL, "kept_over_full")):
            assert (change in values) == (name != base)
            if name != base:
                assert values[change] == pytest.approx(share - kept[base, rule])
    assert len(set(kept.values())) >= 3, "else arms could be exchanged without notice"


def test_bars_of_fig13_are_the_shares(outputs):
    """One bar an arm and four parts a bar, each where the one before it ends."""
    output = outputs["fig13"]
    (axes,) = output.figure.axes
    names = [label.get_text().removeprefix("frozen: ") for label in axes.get_yticklabels()]
    assert names == [*ARMS, "paper: Llama-2-7B-Chat, Dolly"]
    assert [bars.get_label() for bars in axes.containers] == [f"to {group}" for group in GROUPS]
    for row, name in enumerate(ARMS):
        values, end = values_of(output, f"{name}, thresholds"), 0.0
        for group, bars in zip(GROUPS, axes.containers, strict=True):
            part = bars.patches[row]
            assert part.get_width() == pytest.approx(values[f"ESU->{group}"])
            assert part.get_x() == pytest.approx(end)
            assert part.get_y() + part.get_height() / 2 == pytest.approx(row)
            end += part.get_width()
        assert end == pytest.approx(100)


@pytest.mark.parametrize(("figure", "scopes"), [("fig11", 1), ("fig12", 2)])
def test_heat_maps_show_the_metrics(outputs, figure, scopes):
    output = outputs[figure]
    places = [axes for axes in output.figure.axes if not axes.get_title().startswith("paper")]
    assert len(places) == 4 * scopes
    for axes in places:
        name, scope = axes.get_title().removeprefix("frozen: ").split("\n")
        cells = values_of(output, f"{name}, {scope}, thresholds")
        assert [label.get_text() for label in axes.get_yticklabels()] == list(GROUPS)
        assert [label.get_text() for label in axes.get_xticklabels()] == list(GROUPS)
        shown = {}
        for text in axes.texts:
            column, row = text.get_position()
            shown[f"{GROUPS[row]}->{GROUPS[column]}"] = text.get_text()
        assert shown == {pair: f"{cells[pair]:.2f}" for pair in PAIRS}
        (image,) = axes.images
        expected = [(cells[pair] / 100) ** 0.5 for pair in PAIRS]
        assert image.get_array().flatten().tolist() == pytest.approx(expected)


def test_flows_of_fig5_start_and_end_at_the_group_sizes(outputs):
    output = outputs["fig5"]
    titles = [axes.get_title().removeprefix("frozen: ") for axes in output.figure.axes]
    assert titles == [*ARMS, "paper: Llama-2-7B-Chat, Dolly"]
    for name, axes in zip(ARMS, output.figure.axes, strict=False):
        cells = values_of(output, f"{name}, global, thresholds")
        sizes = [
            [sum(cells[f"{g}->{o}" if side == 0 else f"{o}->{g}"] for o in GROUPS) for g in GROUPS]
            for side in (0, 1)
        ]
        expected = [f"{g} {size:.1f}" for s in sizes for g, size in zip(GROUPS, s, strict=True)]
        assert [text.get_text() for text in axes.texts] == expected
        # Beside the eight bars a band for each flow that there is, as wide as the bars together.
        bands = len(axes.patches) - 8
        assert bands == sum(value > 0 for value in cells.values())
        heights = sum(bars.patches[0].get_height() for bars in axes.containers)
        assert heights == pytest.approx(2 * sum(value**0.5 for value in cells.values()))
