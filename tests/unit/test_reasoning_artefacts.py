"""Artefacts on the reasoning direction: numbers against the probes, and drawings against both."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from scipy.special import logsumexp
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import ssah.lab.probing
from helpers import save_livelier
from ssah.app.study import Study
from ssah.artefacts import Output, choice, find
from ssah.claims.reasoning import REASONING
from ssah.core.paths import reference_csv
from ssah.data.rows import Row
from ssah.evaluate.judges import judge, refused
from ssah.evaluate.probes import Probe
from ssah.lab.arms import Arm
from ssah.lab.stages import Stages

NAMES = ("fig2", "fig3", "fig4", "fig7", "fig_margin", "fig_readout", "table11")
MODELS = ("aligned", "unaligned")
POSITIONS = (2, 4)
KINDS = {"harmful": "harmful_evaluation", "borderline": "borderline", "benign": "benign_evaluation"}
TO_REFUSAL, TO_ANSWER = "#0072b2", "#f0a830"

#: What is left of an answer by the query's number modulo 4: some end before the last position
#: that is probed, some before the first.
ENDS = {1: 3, 3: 0}


@pytest.fixture(scope="module")
def study(smoke_study, tiny_folder, tmp_path_factory) -> Iterator[Study]:
    """Two seeds of a model that alignment changes, some of whose answers end early."""
    folder = tmp_path_factory.mktemp("leaning")
    save_livelier(tiny_folder, folder, seed=2)

    def cut_short(*args, **kwargs):
        answers = whole(*args, **kwargs)
        return [answer[: ENDS.get(i % 4, len(answer))] for i, answer in enumerate(answers)]

    whole = ssah.lab.probing.continuations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssah.lab.probing, "continuations", cut_short)
        yield smoke_study(
            "model=local",
            f"model.source={folder}",
            "model.chat_template=chatml",
            "align.learning_rate=1e-2",
            "n_seeds=2",
        )


@pytest.fixture(scope="module")
def outputs(study) -> dict[str, Output]:
    return {name: find(name).compute(study) for name in NAMES}


@pytest.fixture(scope="module")
def lonely(smoke_study) -> dict[str, Output]:
    """A model that comes aligned, so that nothing is there to compare it with."""
    return {name: find(name).compute(smoke_study("align=none")) for name in NAMES}


def by_seed(output: Output, arm: str, metric: str, column: str = "value") -> list[float]:
    return [r[column] for r in output.metrics if (r["arm"], r["metric"]) == (arm, metric)]


def mean(output: Output, arm: str, metric: str, column: str = "value") -> float:
    found = by_seed(output, arm, metric, column)
    assert found, (arm, metric)
    return sum(found) / len(found)


def tensor(stages: Stages, which, name: str, field: str, same_words: bool = False) -> np.ndarray:
    return getattr(stages.probe(which, name, same_words=same_words), field).double().numpy()


def at(distances: np.ndarray, place: str) -> np.ndarray:
    """Queries that have not ended, ``[queries, B, 2, O]``."""
    if place != "all tokens":
        found = distances[:, POSITIONS.index(int(place.split()[0]))]
        return found[~np.isnan(found[:, 0, 0, 0])]
    rows = []
    for query in distances:
        known = [words for words in query if not np.isnan(words).any()]
        if known:
            rows.append(sum(known) / len(known))
    return np.stack(rows)


# --- figs 2, 3, 4 and 7 ------------------------------------------------------------------------

LAST, EACH = ("last block",), ("block 1", "block 2")
HARMFUL = "harmful_evaluation"
CASES = [
    ("fig2", "harmful", HARMFUL, "distance", LAST),
    ("fig3", "harmful", HARMFUL, "distance", EACH),
    ("fig4", "content subtracted", HARMFUL, "residual", LAST + EACH),
    ("fig4", "same words", HARMFUL, "residual", EACH),
    ("fig7", "harmbench", "harmbench", "distance", LAST + EACH),
    ("fig7", "do_not_answer", "do_not_answer", "distance", LAST + EACH),
]


def test_answers_end_where_these_tests_need_it(study):
    """Of twelve queries three end before the fourth token and three more before the second."""
    found = tensor(study.stages(0), "aligned", HARMFUL, "distance")
    assert found.shape == (12, 2, 2, 2, 8)
    assert np.isnan(found).all((2, 3, 4)).sum(0).tolist() == [3, 6]
    aligned, unaligned = (tensor(study.stages(1), m, HARMFUL, "query") for m in MODELS)
    assert abs(aligned - unaligned).max() > 0.01


@pytest.mark.parametrize(("artefact", "what", "name", "field", "blocks"), CASES)
def test_distances_are_means_over_queries_and_openings(
    study, outputs, artefact, what, name, field, blocks
):
    output = outputs[artefact]
    places = [f"{position} tokens" for position in POSITIONS] + ["all tokens"]
    for model, place, where in product(MODELS, places, blocks):
        if artefact != "fig3" and where != "last block" and place != "all tokens":
            continue  # which is drawn nowhere
        arm, end = f"{model}: {what}", f"{where}, {place}"
        block = -1 if where == "last block" else int(where[6:]) - 1
        for seed, stages in enumerate(study.all_stages):
            distances = tensor(stages, model, name, field, same_words=what == "same words")
            known = at(distances, place)[:, block]
            refusal, answer = known[:, 0].mean(), known[:, 1].mean()
            expected = {"to refusal": refusal, "to answer": answer, "lean": answer - refusal}
            for kind, value in expected.items():
                metric = f"{kind}, {end}"
                assert by_seed(output, arm, metric)[seed] == pytest.approx(value, abs=1e-6)
                assert by_seed(output, arm, metric, "n")[seed] == len(known)
                low, high = (by_seed(output, arm, metric, c)[seed] for c in ("low", "high"))
                assert low < value < high


@pytest.mark.parametrize("what", ["content subtracted", "same words"])
def test_both_models_are_compared_query_by_query(study, outputs, what):
    """On queries that both have answered, over all tokens before the answer ended."""
    found = by_seed(outputs["fig4"], f"aligned: {what}", "lean over unaligned")
    assert len(found) == 2
    for value, stages in zip(found, study.all_stages, strict=True):
        leans = []
        for model in MODELS:
            distances = tensor(stages, model, HARMFUL, "residual", what == "same words")
            known = at(distances, "all tokens")[:, -1]
            leans.append((known[:, 1] - known[:, 0]).mean())
        assert value == pytest.approx(leans[0] - leans[1], abs=1e-6)
        assert abs(value) > 1e-5


@pytest.mark.parametrize(
    ("artefact", "what"), [("fig2", "harmful"), ("fig4", "content subtracted")]
)
def test_least_and_most_lean_are_of_single_tokens(outputs, artefact, what):
    output, differ = outputs[artefact], []
    for model, seed in product(MODELS, (0, 1)):
        arm = f"{model}: {what}"
        ends = {
            position: [
                by_seed(output, arm, f"lean, last block, {position} tokens", column)[seed]
                for column in ("value", "low", "high", "n")
            ]
            for position in POSITIONS
        }
        least, most = (
            [by_seed(output, arm, f"{end} lean", c)[seed] for c in ("value", "low", "high", "n")]
            for end in ("least", "most")
        )
        assert least == min(ends.values(), key=lambda end: end[1])
        assert most == max(ends.values(), key=lambda end: end[2])
        differ.append(least != most)
    assert any(differ)


def test_what_the_claims_rest_on_is_measured(outputs):
    for claim in REASONING:
        found = {(row["arm"], row["metric"]) for row in outputs[claim.artefact].metrics}
        assert (claim.arm, claim.metric) in found, claim


def test_notes_say_how_many_openings_there_are(study, outputs):
    count = len(study.stages(0).opening_texts["refusal"])
    assert count == 8
    for name in ("fig2", "fig3", "fig4", "fig7"):
        assert f"{count} openings of each kind" in outputs[name].note
    assert "opening" in outputs["fig_margin"].note
    assert "neutral openings" in outputs["fig4"].note


# --- what is drawn -----------------------------------------------------------------------------


def check_bars(axes: Axes, output: Output, what: str, models: tuple[str, ...] = MODELS) -> None:
    """Aligned above the axis and unaligned below, each with its interval."""
    bars = {
        (round(bar.get_x() + bar.get_width() / 2, 6), to_hex(bar.get_facecolor()), bar.get_height())
        for bar in axes.patches
    }
    ends = [
        tuple(segment[:, 1])
        for lines in axes.collections
        if isinstance(lines, LineCollection)
        for segment in lines.get_segments()
    ]
    assert len(bars) == len(ends) == len(models) * len(POSITIONS) * 2
    for model, (x, position) in product(models, enumerate(POSITIONS)):
        sign = 1 if model == "aligned" else -1
        for shift, colour, kind in (
            (-0.2, TO_REFUSAL, "to refusal"),
            (0.2, TO_ANSWER, "to answer"),
        ):
            metric = f"{kind}, last block, {position} tokens"
            value, low, high = (
                sign * mean(output, f"{model}: {what}", metric, c) for c in ("value", "low", "high")
            )
            (height,) = [
                h for at, c, h in bars if (at, c) == (x + shift, colour) and (h > 0) == (sign > 0)
            ]
            assert height == pytest.approx(value)
            assert any(end == pytest.approx((low, high)) for end in ends)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "4"]


def curves(axes: Axes) -> list[Line2D]:
    """Lines but the axis."""
    return [
        line for line in axes.lines if len(line.get_xdata()) > 1 and line.get_color() != "black"
    ]


def check_blocks(
    axes: Axes, output: Output, what: str, place: str, models: tuple[str, ...] = MODELS
) -> None:
    lines = curves(axes)
    assert len(lines) == len(axes.collections) == 2 * len(models), "a band for each line"
    wanted = product(models, (("to refusal", TO_REFUSAL), ("to answer", TO_ANSWER)))
    for line, band, (model, (kind, colour)) in zip(lines, axes.collections, wanted, strict=True):
        sign = 1 if model == "aligned" else -1
        assert to_hex(line.get_color()) == colour
        assert list(line.get_xdata()) == [1, 2]
        values, lows, highs = (
            [sign * mean(output, f"{model}: {what}", f"{kind}, {b}, {place}", c) for b in EACH]
            for c in ("value", "low", "high")
        )
        assert list(line.get_ydata()) == pytest.approx(values)
        corners = band.get_paths()[0].vertices[:, 1]
        assert [corners.min(), corners.max()] == pytest.approx(
            [min(lows + highs), max(lows + highs)]
        )


def mirrored(axes: Axes) -> bool:
    low, high = axes.get_ylim()
    return low == -high


def test_fig2_is_drawn(outputs):
    (axes,) = outputs["fig2"].figure.axes
    check_bars(axes, outputs["fig2"], "harmful")
    assert mirrored(axes)
    assert [text.get_text() for text in axes.texts] == list(MODELS)


def test_fig3_is_drawn(outputs):
    panels = outputs["fig3"].figure.axes
    for axes, position in zip(panels, POSITIONS, strict=True):
        check_blocks(axes, outputs["fig3"], "harmful", f"{position} tokens")
        assert mirrored(axes)


def test_fig4_is_drawn(outputs):
    left, middle, right = outputs["fig4"].figure.axes
    check_bars(left, outputs["fig4"], "content subtracted")
    check_blocks(middle, outputs["fig4"], "content subtracted", "all tokens")
    lines = {line.get_label(): list(line.get_ydata()) for line in right.lines[:-1]}
    assert list(lines) == list(MODELS)
    for model in MODELS:
        leans = [
            mean(outputs["fig4"], f"{model}: same words", f"lean, {b}, all tokens") for b in EACH
        ]
        assert lines[model] == pytest.approx(leans)


def test_fig7_is_drawn(outputs):
    grid = outputs["fig7"].figure.axes
    for (left, right), name in zip(
        (grid[:2], grid[2:]), ("harmbench", "do_not_answer"), strict=True
    ):
        check_bars(left, outputs["fig7"], name)
        check_blocks(right, outputs["fig7"], name, "all tokens")


def markers(axes: Axes) -> dict[str, tuple[float, float]]:
    return {
        line.get_marker(): (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in axes.lines
        if line.get_marker() in ("^", "v")
    }


def planted(onsets: dict[tuple[str, int, int], int | None]):
    """Stands in for ``Stages.probe``: states that lean to refusal from a block on (from 1)."""

    def find_probe(self: Stages, which, set_name: str, *, same_words: bool = False) -> Probe:
        noise = torch.Generator().manual_seed(self.seed)
        distance = 0.5 + 0.02 * torch.rand(12, len(POSITIONS), 5, 2, 8, generator=noise)
        for column, position in enumerate(POSITIONS):
            first = onsets[str(which), self.seed, position]
            begin = 5 if first is None else first - 1
            distance[:, column, :begin, 0] += 0.1
            distance[:, column, begin:, 1] += 0.1
        return Probe(distance, distance, torch.zeros(12, 4, 2, 8), torch.zeros(12, 5, 3))

    return find_probe


def test_fig7_says_what_is_missing(study, monkeypatch):
    monkeypatch.setattr(type(study.stages(0)), "has", lambda self, name: False)
    output = find("fig7").compute(study)
    assert "hexphi, harmbench, do_not_answer" in output.note
    assert output.figure is not None
    assert not output.metrics


def test_an_onset_is_marked_where_there_is_one(study, monkeypatch):
    onsets = {
        ("aligned", 0, 2): 3, ("aligned", 1, 2): 4,
        ("aligned", 0, 4): None, ("aligned", 1, 4): None,
        ("unaligned", 0, 2): None, ("unaligned", 1, 2): None,
        ("unaligned", 0, 4): 5, ("unaligned", 1, 4): 1,
    }  # fmt: skip
    monkeypatch.setattr(Stages, "probe", planted(onsets))
    output = find("fig3").compute(study)
    for model, position in product(MODELS, POSITIONS):
        wanted = [onsets[model, seed, position] for seed in (0, 1)]
        found = by_seed(output, f"{model}: harmful", f"onset, {position} tokens")
        assert found == [value for value in wanted if value is not None]
    early, late = output.figure.axes
    assert markers(early) == {"^": (3.5, 0)}
    assert markers(late) == {"v": (3, 0)}


def test_no_onset_is_marked_without_a_metric(outputs):
    for axes, position in zip(outputs["fig3"].figure.axes, POSITIONS, strict=True):
        expected = {
            mark
            for mark, model in (("^", "aligned"), ("v", "unaligned"))
            if by_seed(outputs["fig3"], f"{model}: harmful", f"onset, {position} tokens")
        }
        assert set(markers(axes)) == expected


# --- the model's own choice --------------------------------------------------------------------


def margins(stages: Stages, model, what: str) -> np.ndarray:
    """By query and number of tokens."""
    likelihood = tensor(stages, model, KINDS[what], "log_likelihood")
    return logsumexp(likelihood[:, :, 0], -1) - logsumexp(likelihood[:, :, 1], -1)


def query_leans(stages: Stages, model, what: str, field: str = "distance") -> np.ndarray:
    """By query and block, NaN for those that say nothing."""
    rows = []
    for query in tensor(stages, model, KINDS[what], field):
        known = [words[:, 1] - words[:, 0] for words in query if not np.isnan(words).any()]
        rows.append(np.mean(known, (0, 2)) if known else np.full(2, np.nan))
    return np.array(rows)


def test_margins_leans_and_their_correlation(study, outputs):
    output = outputs["fig_margin"]
    for model, what in product(MODELS, KINDS):
        arm = f"{model}: {what}"
        for seed, stages in enumerate(study.all_stages):
            own = margins(stages, model, what)
            tokens = stages.config.probes.opening_tokens
            assert own.shape[1] == tokens
            for column in range(tokens):
                found = by_seed(output, arm, f"margin, {column + 1} tokens")[seed]
                assert found == pytest.approx(own[:, column].mean(), abs=1e-5)
            assert by_seed(output, arm, "margin")[seed] == pytest.approx(
                own[:, -1].mean(), abs=1e-5
            )
            leans = query_leans(stages, model, what)[:, -1]
            known = ~np.isnan(leans)
            assert known.sum() == len(leans) - (3 if what == "harmful" else 1)
            found = by_seed(output, arm, "lean")[seed]
            assert found == pytest.approx(leans[known].mean(), abs=1e-6)
            expected = spearmanr(own[known, -1], leans[known]).statistic
            found = by_seed(output, arm, "rank_correlation")[seed]
            assert found == pytest.approx(expected, abs=1e-6)


def separation(positive: np.ndarray, negative: np.ndarray) -> float:
    positive, negative = positive[~np.isnan(positive)], negative[~np.isnan(negative)]
    labels = [True] * len(positive) + [False] * len(negative)
    return roc_auc_score(labels, np.concatenate([positive, negative]))


def test_auroc_is_that_of_scikit_learn(study, outputs):
    output = outputs["fig_margin"]
    for model, other in product(MODELS, ("benign", "borderline")):
        arm = f"{model}: harmful against {other}"
        for seed, stages in enumerate(study.all_stages):
            expected = {
                "auroc_margin": [margins(stages, model, w)[:, -1] for w in ("harmful", other)],
                "auroc_refusal": [
                    logsumexp(tensor(stages, model, KINDS[w], "log_likelihood")[:, -1, 0], -1)
                    for w in ("harmful", other)
                ],
            }
            for field, name in (("distance", "lean"), ("residual", "residual")):
                pair = [query_leans(stages, model, w, field) for w in ("harmful", other)]
                for block in range(2):
                    expected[f"auroc_{name}, block {block + 1}"] = [v[:, block] for v in pair]
                expected[f"auroc_{name}"] = [v[:, -1] for v in pair]
            found = {row["metric"] for row in output.metrics if row["arm"] == arm}
            assert found == set(expected)
            for metric, pair in expected.items():
                assert by_seed(output, arm, metric)[seed] == pytest.approx(separation(*pair))


def test_fig_margin_is_drawn(study, outputs):
    output = outputs["fig_margin"]
    left, middle, right = output.figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    for model, what in product(MODELS, KINDS):
        values = [mean(output, f"{model}: {what}", f"margin, {n} tokens") for n in range(1, 9)]
        assert lines[f"{model}, {what}"] == pytest.approx(values)
    lines = {line.get_label(): list(line.get_ydata()) for line in middle.lines}
    assert len(lines) == 6
    for model in MODELS:
        arm = f"{model}: harmful against benign"
        values = [mean(output, arm, f"auroc_lean, {block}") for block in EACH]
        assert lines[f"{model}, lean"] == pytest.approx(values)
        for what in ("margin", "refusal"):
            value = mean(output, arm, f"auroc_{what}")
            assert lines[f"{model}, {what}"] == pytest.approx([value, value])
    first = study.stages(0)
    for points, what in zip(right.collections, KINDS, strict=True):
        expected = np.stack(
            [margins(first, "aligned", what)[:, -1], query_leans(first, "aligned", what)[:, -1]], 1
        )
        drawn = np.ma.filled(points.get_offsets(), np.nan)
        expected[np.isnan(drawn).any(1)] = np.nan
        assert np.isnan(expected).any(1).sum() == (3 if what == "harmful" else 1)
        np.testing.assert_allclose(np.where(np.isnan(expected), np.nan, drawn), expected, atol=1e-5)
        value = mean(output, f"aligned: {what}", "rank_correlation")
        assert points.get_label() == f"{what}, rank correlation {value:.2f}"


# --- read-out ----------------------------------------------------------------------------------


def read_out_by_hand(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    centre, size = train.mean(0), train.std(0)
    classifier = LogisticRegression(C=0.1, max_iter=1000)
    classifier.fit((train - centre) / size, labels)
    return classifier.decision_function((test - centre) / size)


def categories(stages: Stages) -> np.ndarray:
    return np.array([row.category for row in stages.probed_rows(HARMFUL)])


def test_read_outs_are_those_of_unseen_categories(study, outputs):
    output = outputs["fig_readout"]
    for stages, model in product(study.all_stages, MODELS):
        names, seed = categories(stages), stages.seed
        assert len(set(names)) == 3
        harmful, borderline, benign = (
            tensor(stages, model, name, "query") for name in KINDS.values()
        )
        for block in range(2):
            found: dict[str, list[float]] = {"auroc": [], "auroc_borderline": []}
            for name in sorted(set(names)):
                inside, outside = harmful[names == name, block], harmful[names != name, block]
                train = np.concatenate([inside, benign[::2, block]])
                labels = np.arange(len(train)) < len(inside)
                scores, unseen, looks = (
                    read_out_by_hand(train, labels, part)
                    for part in (outside, benign[1::2, block], borderline[:, block])
                )
                found["auroc"].append(separation(scores, unseen))
                found["auroc_borderline"].append(separation(scores, looks))
            for metric, values in found.items():
                value = by_seed(output, model, f"{metric}, block {block + 1}")[seed]
                assert value == pytest.approx(sum(values) / 3, abs=1e-9)
        middle = by_seed(output, model, "auroc, middle")[seed]
        assert middle == by_seed(output, model, "auroc, block 2")[seed]


def test_read_outs_never_train_on_what_they_are_tested_on(study, monkeypatch):
    asked = []

    def keep(train, labels, test):
        asked.append((train, labels, test))
        return whole(train, labels, test)

    whole = choice.read_out
    monkeypatch.setattr(choice, "read_out", keep)
    find("fig_readout").compute(study)
    stages, each = study.stages(0), 1 + choice.SHUFFLES  # as labelled and shuffled
    stride = each * 3  # by category
    assert len(asked) == stride * 2 * 2 * 2, "for each block of each model of each seed"
    names = categories(stages)
    harmful, borderline, benign = (
        stages.probe("aligned", name).query[:, 0] for name in KINDS.values()
    )
    trained_on, shuffles = [], set()
    for number, (train, labels, test) in enumerate(asked[:stride]):
        seen, unseen = ({tuple(row) for row in part.tolist()} for part in (train, test))
        assert not seen & unseen
        assert len(seen) == len(train)
        inside, outside = (
            {n for n, row in zip(names, harmful.tolist(), strict=True) if tuple(row) in part}
            for part in (seen, unseen)
        )
        assert len(inside) == 1
        assert outside == set(names) - inside
        assert not {tuple(row) for row in borderline.tolist()} & seen
        assert len({tuple(row) for row in benign.tolist()} & seen) == 3
        if number % each == 0:
            real = [tuple(row) in {tuple(r) for r in harmful.tolist()} for row in train.tolist()]
            assert labels.tolist() == real
            trained_on += inside
        else:
            for kind in (True, False):  # so that they follow the kinds in no way
                inside_kind = [own for own, true in zip(labels, real, strict=True) if true == kind]
                assert sum(inside_kind) == (len(inside_kind) + 1) // 2
            shuffles.add(tuple(labels.tolist()))
    assert sorted(trained_on) == sorted(set(names))
    assert len(shuffles) > 5


def test_without_categories_a_read_out_sees_one_half():
    rows = [Row(str(i), str(i), "ours", "MIT") for i in range(7)]
    first, second = choice._parts(rows)
    assert first.tolist() == [True, False] * 3 + [True]
    assert (first ^ second).all()


def test_only_the_largest_categories_are_trained_on():
    rows = [
        Row(str(i), str(i), "ours", "MIT", name)
        for i, name in enumerate("a" * 2 + "b" * 5 + "c" * 3 + "d" * 4)
    ]
    parts = choice._parts(rows)
    assert [part.nonzero()[0].tolist() for part in parts] == [
        [2, 3, 4, 5, 6], [10, 11, 12, 13], [7, 8, 9],
    ]  # fmt: skip


def test_fig_readout_is_drawn(outputs):
    output = outputs["fig_readout"]
    (axes,) = output.figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert len(lines) == 6
    names = {"auroc": "benign", "auroc_borderline": "borderline", "auroc_shuffled": "shuffled"}
    for model, (metric, what) in product(MODELS, names.items()):
        values = [mean(output, model, f"{metric}, {block}") for block in EACH]
        assert lines[f"{model}, {what}"] == pytest.approx(values)


# --- table 11 ----------------------------------------------------------------------------------


def test_table11_counts_answers(study, outputs):
    output = outputs["table11"]
    table = output.table.set_index("stage")
    rates = []
    for model in MODELS:
        counted: dict[str, list[float]] = {}
        for stages in study.all_stages:
            benign, borderline, advbench, harmbench = (
                stages.completions(name, Arm(model))
                for name in ("benign_evaluation", "borderline", HARMFUL, "harmbench")
            )
            seed_rates = {
                "benign answered %": [judge(a) == "answered" for a in benign],
                "borderline refused %": refused(borderline),
                "ASR AdvBench %": [judge(a) == "answered" for a in advbench],
                "no refusal phrase, AdvBench %": [
                    judge(a) in ("answered", "evaded") for a in advbench
                ],
                "ASR HarmBench %": [judge(a) == "answered" for a in harmbench],
            }
            for column, outcomes in seed_rates.items():
                counted.setdefault(column, []).append(100 * sum(outcomes) / len(outcomes))
        for column, values in counted.items():
            assert by_seed(output, model, column) == pytest.approx(values)
            shown = table.loc[model, column]
            assert shown.startswith(f"{sum(values) / len(values):.1f} [")
            rates += values
        assert table.loc[model, "model"] == study.config.model.name
        assert "ASR HEx-PHI %" not in {r["metric"] for r in output.metrics}
    assert len(set(rates)) > 2, "else a mixed-up column would not show"


def test_table11_has_the_papers_rows(outputs):
    table = outputs["table11"].table
    paper = pd.read_csv(reference_csv())
    paper = paper[paper["artefact"] == "table11"]
    columns = {
        "MT-bench": ("mt_bench", "avg"),
        "no refusal phrase, AdvBench %": ("advbench", "asr_keyword"),
        "ASR AdvBench % (Llama Guard 3)": ("advbench", "asr_llama_guard3"),
        "ASR HEx-PHI % (Llama Guard 3)": ("hexphi", "asr_llama_guard3"),
    }
    pairs = paper[["model", "setting"]].drop_duplicates()
    assert len(table) == 2 + len(pairs)
    for model, setting in pairs.to_numpy():
        (row,) = table[(table["model"] == f"paper: {model}") & (table["stage"] == setting)].to_dict(
            "records"
        )
        own = paper[(paper["model"] == model) & (paper["setting"] == setting)]
        for column, (benchmark, metric) in columns.items():
            chosen = own[(own["benchmark"] == benchmark) & (own["metric"] == metric)]["value"]
            assert float(row[column]) == pytest.approx(chosen.item(), abs=0.0501)
        assert row["perplexity"] == ""
    assert not table.isna().any(axis=None)


# --- a model that comes aligned ----------------------------------------------------------------


def test_an_aligned_model_is_drawn_alone(lonely):
    for output in lonely.values():
        arms = {row["arm"].split(":")[0] for row in output.metrics}
        assert arms == {"aligned"}
    names = lonely["table11"].table["model"]
    assert list(names[~names.str.startswith("paper")]) == ["tiny"]
    alone = ("aligned",)
    (axes,) = lonely["fig2"].figure.axes
    check_bars(axes, lonely["fig2"], "harmful", alone)
    for panel, position in zip(lonely["fig3"].figure.axes, POSITIONS, strict=True):
        check_blocks(panel, lonely["fig3"], "harmful", f"{position} tokens", alone)
    left, middle, right = lonely["fig4"].figure.axes
    check_bars(left, lonely["fig4"], "content subtracted", alone)
    check_blocks(middle, lonely["fig4"], "content subtracted", "all tokens", alone)
    for axes in (*lonely["fig2"].figure.axes, *lonely["fig3"].figure.axes, left, middle):
        assert axes.get_ylim()[0] == 0
        assert all(bar.get_height() >= 0 for bar in axes.patches)
        assert [text.get_text() for text in axes.texts] == ["aligned"]
    assert [line.get_label() for line in right.lines[:-1]] == ["aligned"]
    assert by_seed(lonely["fig4"], "aligned: same words", "lean over unaligned") == []
