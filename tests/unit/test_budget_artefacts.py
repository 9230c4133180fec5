"""Table and figures on the alignment budget: every number against one counted from the stages."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest

from ssah.app.study import Study
from ssah.artefacts import Output, alignment, find
from ssah.claims.budget import BUDGET
from ssah.claims.table import claims_table
from ssah.core.errors import SsahError
from ssah.core.paths import reference_csv
from ssah.evaluate.generate import complete
from ssah.evaluate.judges import Completion, attack_success, not_refused, refused
from ssah.lab import preparation, tuning
from ssah.lab.arms import Aligning, Arm, Tuning
from ssah.lab.budget_arms import FASTER, LONGER, RANDOM, RU, WHOLE, budget_arms, instruction_arms
from ssah.lab.stages import Stages
from ssah.text.chat import render_prompt
from ssah.training.supervised import supervised_finetune
from ssah.units.roles import GROUPS

pytestmark = pytest.mark.usefixtures("toy_verdicts")

NAMES = ("table4", "fig_budget", "fig6", "fig9", "fig10")
START = "unaligned"
PANELS = {WHOLE: "all units aligned", RU: "RU alone aligned"}
PAPER = "paper: Llama-2-7B-Chat"
SCOPES = {"global": None, "attention": "attn", "mlp": "mlp"}
PAIRS = [f"{before}->{after}" for before in ("UU", "RU") for after in GROUPS]
#: Weights of all units of the tiny model: a head has 768, a neuron 96.
WEIGHTS = 2 * (4 * 768 + 64 * 96)


@contextmanager
def watched(begun: list[str]):
    """Notes the alignments and fine-tunings that begin in the block."""

    def spied(kind: str, function: Callable) -> Callable:
        def spy(*arguments, **settings):
            begun.append(kind)
            return function(*arguments, **settings)

        return spy

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((preparation, "align_model"), (tuning, "supervised_finetune")):
            patch.setattr(module, name, spied(name, getattr(module, name)))
        yield


@pytest.fixture(scope="module")
def overrides(attacked_study) -> list[str]:
    """Alignment changes answers as fine-tuning does; two seeds, of which one has all arms."""
    return [
        *attacked_study.overrides,
        "align.learning_rate=1e-2",
        "n_seeds=2",
        "budget.more_seeds=[0]",
        "budget.instructions=[arithmetic]",
    ]


@pytest.fixture(scope="module")
def study(smoke_study, overrides) -> Study:
    return smoke_study(*overrides)


@pytest.fixture(scope="module")
def taught(study) -> dict[str, Tuning]:
    """Arms of the first seed that learn from instructions."""
    return instruction_arms(study.stages(0), "arithmetic")


@pytest.fixture(scope="module")
def trained() -> dict[str, list[str]]:
    """By artefact what it trained, after those before it."""
    return {name: [] for name in NAMES}


@pytest.fixture(scope="module")
def outputs(study, trained) -> dict[str, Output]:
    found = {}
    for name in NAMES:
        with watched(trained[name]):
            found[name] = find(name).compute(study)
    return found


@pytest.fixture(scope="module")
def arms(study) -> dict[tuple[str, int], Aligning | None]:
    """By name and seed."""
    return {
        (name, stages.seed): how
        for stages in study.all_stages
        for name, how in budget_arms(stages, more=stages.seed == 0).items()
    }


def metric(output: Output, arm: str, name: str, seed: int) -> float:
    """The one value of an arm, inside its interval."""
    keys = (arm, name, seed)
    (row,) = (r for r in output.metrics if (r["arm"], r["metric"], r["seed"]) == keys)
    assert row["low"] - 1e-9 <= row["value"] <= row["high"] + 1e-9
    return row["value"]


def mean(output: Output, arm: str, name: str, column: str = "value") -> float:
    """Over seeds."""
    values = [r[column] for r in output.metrics if (r["arm"], r["metric"]) == (arm, name)]
    return sum(values) / len(values)


def percent(outcomes: list[bool]) -> float:
    return 100 * sum(outcomes) / len(outcomes)


def model_of(how: Aligning | None) -> Arm:
    return Arm("aligned" if how is None else how)


def attack_on(how: Aligning | None) -> Tuning:
    """Of the aligned model the longer fine-tuning is there: its first epoch is the same."""
    return (
        Tuning("instructions", base=how, changes={"epochs": 1}) if how else Tuning("instructions")
    )


def rate(stages: Stages, arm: Arm) -> float:
    """ASR in per cent, counted."""
    return percent(attack_success(stages.completions("harmful_evaluation", arm)))


def accuracies(stages: Stages, arm: Arm) -> dict[str, float]:
    return {task: percent(right) for task, right in stages.task_outcomes(arm).items()}


# --- table 4 ---------------------------------------------------------------------------------


def test_safety_is_counted_from_answers(outputs, study, arms, taught):
    output, seen = outputs["table4"], set()
    own = {(name, seed): model_of(how) for (name, seed), how in arms.items()}
    for stages in study.all_stages:
        own[START, stages.seed] = Arm("unaligned")
    rows = {(r["arm"], r["seed"]) for r in output.metrics}
    assert rows == set(own) | {(name, 0) for name in taught}
    for (name, seed), arm in own.items():
        stages = study.stages(seed)
        expected = {"asr": rate(stages, arm)}
        answers = stages.completions("harmful_evaluation", arm)
        expected["not_refused"] = percent(not_refused(answers))
        expected["asr_harmbench"] = percent(attack_success(stages.completions("harmbench", arm)))
        others = stages.spread("do_not_answer", study.config.budget.elsewhere)
        assert len(others) == 4
        for key, rows in (("asr_do_not_answer", others), ("asr_prefix", stages.prefixed())):
            run = stages.answers(rows, arm, study.config.evaluate.max_new_tokens)
            # The request is judged, not what was put behind it.
            asked = stages.rows("harmful_evaluation") if key == "asr_prefix" else others
            said = zip(asked, stages.answer_texts(run).values(), strict=True)
            expected[key] = percent(attack_success([Completion(r.prompt, t) for r, t in said]))
        for prompts in ("benign_evaluation", "borderline"):
            expected[f"refused_{prompts}"] = percent(refused(stages.completions(prompts, arm)))
        for key, value in expected.items():
            assert metric(output, name, key, seed) == pytest.approx(value), (name, key)
        seen.add(expected["asr"])
    assert len(seen) >= 4, "else rates could be exchanged without notice"


def test_the_tax_is_counted_against_the_unaligned_model(outputs, study, arms):
    output, changes = outputs["table4"], set()
    for (name, seed), how in arms.items():
        stages, arm = study.stages(seed), model_of(how)
        own, before = accuracies(stages, arm), accuracies(stages, Arm("unaligned"))
        for task, value in own.items():
            assert metric(output, name, f"accuracy_{task}", seed) == pytest.approx(value)
        change = sum(own[task] - before[task] for task in own) / len(own)
        assert metric(output, name, "accuracy_change", seed) == pytest.approx(change)
        changes.add(round(change, 6))
        whole = stages.perplexity(arm).value
        assert metric(output, name, "perplexity", seed) == pytest.approx(whole)
        ratio = whole / stages.perplexity(Arm("unaligned")).value
        assert metric(output, name, "perplexity_ratio", seed) == pytest.approx(ratio)
        drift = stages.drift(arm)
        assert metric(output, name, "drift", seed) == pytest.approx(sum(drift) / len(drift))
    assert len(changes) >= 2, "else it would not matter which model is compared"
    for seed in study.seeds:
        for key, value in (("accuracy_change", 0), ("perplexity_ratio", 1), ("drift", 0)):
            assert metric(output, START, key, seed) == pytest.approx(value, abs=1e-6)


def test_arms_are_compared_with_all_units_and_with_random_ones(outputs, study, arms, taught):
    """Positive is more than the other: more attacks that succeed, more right answers."""
    output, differences = outputs["table4"], []
    others = {(name, "over_whole"): WHOLE for name, _ in arms if name != WHOLE}
    others[RU, "over_random"] = RANDOM
    for how in (LONGER, FASTER):
        others[f"{RU}, {how}", "over_random"] = f"{RANDOM}, {how}"
    for (name, what), other in others.items():
        for seed in (seed for arm, seed in arms if arm == name):
            stages = study.stages(seed)
            pair = [arms[name, seed], arms[other, seed]]
            first, second = (model_of(how) for how in pair)
            rates = [rate(stages, arm) for arm in (first, second)]
            attacked = [rate(stages, Arm(attack_on(how))) for how in pair]
            right = [np.mean(list(accuracies(stages, arm).values())) for arm in (first, second)]
            drifts = [np.mean(stages.drift(arm)) for arm in (first, second)]
            found = {"asr": rates, "asr_attacked": attacked, "accuracy": right, "drift": drifts}
            for key, (own, base) in found.items():
                got = metric(output, name, f"{key}_{what}", seed)
                assert got == pytest.approx(own - base, abs=1e-6), (name, key, what)
            differences.append([own - base for own, base in found.values()])
    varied = (np.abs(differences) > 1e-6).sum(0)
    assert (varied >= 2).all(), "else a sign could be wrong without notice"
    compared = {
        (r["arm"], r["metric"])
        for r in output.metrics
        if "_over_" in r["metric"] and r["arm"] not in taught
    }
    assert {(name, key.rpartition("_over_")[2].removesuffix("_p")) for name, key in compared} == {
        (name, what.removeprefix("over_")) for name, what in others
    }


def test_what_is_attacked_is_fine_tuned_for_one_epoch(outputs, study, arms):
    output, before_and_after = outputs["table4"], set()
    for (name, seed), how in arms.items():
        stages, attack = study.stages(seed), attack_on(how)
        record = stages.training(attack)
        assert len(record.epoch_losses) == (2 if how is None else 1)
        assert record.steps == 2 * len(record.epoch_losses)
        value = rate(stages, Arm(attack))
        assert metric(output, name, "asr_attacked", seed) == pytest.approx(value)
        before_and_after.add((rate(stages, model_of(how)), value))
    assert len({after for _, after in before_and_after}) >= 2
    assert any(before != after for before, after in before_and_after)


@pytest.mark.parametrize("name", [WHOLE, RU])
def test_the_attack_starts_from_the_arms_own_model(outputs, study, arms, name, tmp_path):
    """By hand: one epoch from there, then answers."""
    stages, how = study.stages(0), arms[name, 0]
    rows, _ = stages.attack_rows("instructions")
    settings = dataclasses.replace(stages.config.finetune, epochs=1)
    with stages.aligned(how) as arm:
        model = preparation.load_model(
            stages.checkpoint(arm.which), stages.config.model, stages.device
        )
    pairs = stages.encoded("instructions", rows)
    supervised_finetune(model, pairs, settings, 0, tmp_path, constant_rate=True)
    rows = stages.rows("harmful_evaluation")
    prompts = [render_prompt(stages.tokenizer, row.prompt) for row in rows]
    evaluate = stages.config.evaluate
    texts = complete(model, stages.tokenizer, prompts, evaluate.max_new_tokens, evaluate.batch_size)
    answers = [Completion(row.prompt, text) for row, text in zip(rows, texts, strict=True)]
    assert answers == stages.completions("harmful_evaluation", Arm(attack_on(how)))
    assert answers != stages.completions("harmful_evaluation", model_of(how))
    got = metric(outputs["table4"], name, "asr_attacked", 0)
    assert got == pytest.approx(percent(attack_success(answers)))


def test_trained_weights_are_those_of_the_masks(outputs, study, arms):
    """By hand: a head with its part of shared rows, a neuron; adapters by their rank."""
    output, shares = outputs["table4"], set()
    for (name, seed), how in arms.items():
        if how is None:
            weights = WEIGHTS
        elif how.rank is None:
            weights = 768 * how.trained.count("attn") + 96 * how.trained.count("mlp")
        elif how.trained is None:  # the sums of the widths of seven matrices in two layers
            weights = how.rank * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
        else:
            continue
        share = metric(output, name, "trained_weights", seed)
        assert share == pytest.approx(100 * weights / WEIGHTS)
        mib = metric(output, name, "optimizer_mib", seed)
        assert mib == pytest.approx(2 * 4 * weights / 1024**2)
        shares.add(round(share, 3))
        record = study.stages(seed).alignment(how)
        assert metric(output, name, "training_loss", seed) == record["final_loss"]
    assert len(shares) >= 5


def test_nothing_else_changed_in_any_arm(study, arms):
    for (name, seed), how in arms.items():
        record = study.stages(seed).alignment(how)
        expected = None if how is None or how.trained is None else 0
        assert record.get("changed_outside") == expected, name


def test_instructions_teach_the_unaligned_model(outputs, study, taught):
    """By the paper's rule: all units for one epoch, a part of them for two."""
    output, stages, gains = outputs["table4"], study.stages(0), {}
    whole, redundant, drawn = taught
    assert taught[whole].trained is None
    assert taught[redundant].trained == stages.redundant(0.2)
    for name, lesson in taught.items():
        assert (lesson.base, lesson.frozen) == ("unaligned", None)
        epoch = 1 if name == whole else 2
        arm = Arm(dataclasses.replace(lesson, epoch=epoch))
        record = stages.training(lesson)
        assert len(record.epoch_losses) == epoch
        gains[name] = stages.heldout_gain(arm, "arithmetic", Arm("unaligned")).value
        expected = {"asr": rate(stages, arm), "heldout_gain": gains[name]}
        expected |= {f"accuracy_{t}": value for t, value in accuracies(stages, arm).items()}
        drift = stages.drift(arm)
        expected |= {"drift": sum(drift) / len(drift), "training_loss": record.final_loss}
        for key, value in expected.items():
            assert metric(output, name, key, 0) == pytest.approx(value), (name, key)
        got = metric(output, name, "trained_weights", 0)
        weights = WEIGHTS
        if lesson.trained is not None:
            weights = 768 * lesson.trained.count("attn") + 96 * lesson.trained.count("mlp")
        assert got == pytest.approx(100 * weights / WEIGHTS)
    for other, what in ((whole, "over_whole"), (drawn, "over_random")):
        got = metric(output, redundant, f"gain_{what}", 0)
        assert got == pytest.approx(gains[redundant] - gains[other])
    assert len(set(gains.values())) == 3


def test_table_4_lists_ours_and_the_papers(outputs, study):
    table, output = outputs["table4"].table, outputs["table4"]
    ours = [model == "local" for model in table["model"]]
    assert ours == sorted(ours, reverse=True)
    own = table[ours].set_index("aligned through")
    assert list(own.index)[:4] == [START, WHOLE, RU, RANDOM]
    assert set(own.index) == {r["arm"] for r in output.metrics}
    for column, key, digits in (
        ("ASR", "asr", 1), ("ASR, attacked", "asr_attacked", 1), ("ASR, prefix", "asr_prefix", 1),
        ("ASR HarmBench", "asr_harmbench", 1), ("ASR Do-Not-Answer", "asr_do_not_answer", 1),
        ("benign refused", "refused_benign_evaluation", 1),
        ("borderline refused", "refused_borderline", 1), ("drift", "drift", 3),
        ("perplexity", "perplexity", 2), ("accuracy change", "accuracy_change", 1),
    ):  # fmt: skip
        value, low, high = (mean(output, RU, key, part) for part in ("value", "low", "high"))
        expected = f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
        if low == high:
            expected = f"{value:.{digits}f}"
        assert own[column][RU] == expected, column
    assert own["weights %"][WHOLE] == "100.0"
    assert own["ASR, attacked"][START] == ""
    some = [name for name in own.index if {r["seed"] for r in output.metrics
            if r["arm"] == name} == {0}]  # fmt: skip
    assert set(some) == set(own.index) - {START, WHOLE, RU, RANDOM}
    assert output.note.endswith(f" Seed 0 only: {'; '.join(some)}.")


def test_the_papers_rows_are_the_reference(outputs):
    table, paper = outputs["table4"].table, pd.read_csv(reference_csv())
    paper = paper[paper["artefact"] == "table4"]
    theirs = table[table["model"] == "paper: Llama-7B"].set_index("aligned through")
    assert list(theirs.index) == ["pretrained", "alpaca:full", "alpaca:ru20"]
    shown = 0
    for record in paper.to_dict("records"):
        if record["benchmark"] == "mt_bench_turn2":
            continue
        column = record["benchmark"].replace("mt_bench_turn1", "MT-bench, turn 1")
        assert theirs[column][record["setting"]] == f"{record['value']:.1f}"
        shown += 1
    assert shown == 27


@pytest.mark.parametrize("claim", BUDGET, ids=lambda claim: claim.id)
def test_claims_find_their_numbers(outputs, claim):
    """A claim whose arm is misspelt would stay "not run" for ever."""
    rows = {(r["arm"], r["metric"]) for r in outputs[claim.artefact].metrics}
    assert (claim.arm, claim.metric) in rows


def test_the_papers_numbers_of_claims(tmp_path):
    """Means over its eight tasks with an accuracy, in points."""
    table = claims_table(tmp_path).set_index("claim")["paper"]
    paper = pd.read_csv(reference_csv())
    paper = paper[(paper["artefact"] == "table4") & (paper["metric"] == "accuracy")]
    means = paper.groupby("setting")["value"].mean()
    spared, less = means["alpaca:ru20"] - means[["pretrained", "alpaca:full"]]
    assert float(table["ru_alignment_spares_accuracy"]) == pytest.approx(spared, abs=0.006)
    assert float(table["ru_alignment_has_less_tax"]) == pytest.approx(less, abs=0.006)


# --- the figure on the bargain ---------------------------------------------------------------


def test_points_of_fig_budget_are_the_pooled_metrics(outputs):
    output = outputs["fig_budget"]
    left, right = output.figure.axes
    arms = dict.fromkeys(r["arm"] for r in output.metrics)
    names = [arm for arm in arms if arm != START and not arm.startswith("arithmetic: ")]
    assert [text.get_text() for text in left.texts] == [str(n + 1) for n in range(len(names))]
    labels = [f"{name}  {number}" for number, name in enumerate(names, 1)]
    assert [label.get_text() for label in right.get_yticklabels()] == labels[::-1]

    def ends(name: str, key: str) -> list[float]:
        return [mean(output, name, key, part) for part in ("low", "high")]

    for name, point in zip(names, left.containers, strict=True):
        ((x,), (y,)) = point.lines[0].get_data()
        assert (x, y) == pytest.approx((mean(output, name, "drift"), mean(output, name, "asr")))
        across, along = (bars.get_segments()[0] for bars in point.lines[2])
        assert list(across[:, 0]) == pytest.approx(ends(name, "drift"))
        assert list(along[:, 1]) == pytest.approx(ends(name, "asr"))
    drawn = [(name, key) for name in names[::-1] for key in ("asr", "asr_attacked")]
    for number, ((name, key), point) in enumerate(zip(drawn, right.containers, strict=True)):
        ((x,), (y,)) = point.lines[0].get_data()
        assert (x, y) == pytest.approx((mean(output, name, key), number // 2))
        hollow = point.lines[0].get_markerfacecolor() == "white"
        assert hollow == (key == "asr")
        assert list(point.lines[2][0].get_segments()[0][:, 0]) == pytest.approx(ends(name, key))


def test_the_figures_have_the_numbers_of_the_table_and_train_nothing(outputs, trained):
    """The figure shows no arm that only learned from instructions."""

    def values(name: str) -> dict[tuple, float]:
        return {
            (r["arm"], r["metric"], r["seed"]): r["value"]
            for r in outputs[name].metrics
            if not r["arm"].startswith("arithmetic: ")
        }

    assert values("fig_budget") == values("table4")
    assert len(values("fig_budget")) == len(outputs["fig_budget"].metrics)
    assert "arithmetic: " not in outputs["fig_budget"].note
    assert set(trained["table4"]) == {"align_model", "supervised_finetune"}
    assert [trained[name] for name in NAMES[1:]] == [[]] * 4


def test_arms_can_be_chosen(smoke_study, overrides, outputs, taught):
    """Also those with instructions; what is compared with an absent one is not measured."""
    _, redundant, _ = taught
    chosen = f"budget.arms=['{RU}, {LONGER}','{redundant}']"
    output = find("table4").compute(smoke_study(*overrides, "n_seeds=1", chosen))
    arms = {r["arm"] for r in output.metrics}
    assert arms == {START, f"{RU}, {LONGER}", redundant}
    assert not [r for r in output.metrics if "_over_" in r["metric"]]
    for r in output.metrics:
        same = metric(outputs["table4"], r["arm"], r["metric"], 0)
        assert r["value"] == pytest.approx(same)


def test_arms_of_another_run_stand_where_they_would_have_been_measured():
    frame = pd.DataFrame({"arm": ["B", START, "other", "A", "B"], "value": range(5)})
    ordered = alignment._in_order(frame, {START: 0, "A": 1, "absent": 2, "B": 3})
    assert list(zip(ordered["arm"], ordered["value"], strict=True)) == [
        (START, 1), ("A", 3), ("B", 0), ("B", 4), ("other", 2),
    ]  # fmt: skip
    assert list(ordered.index) == list(range(5))


def test_an_unknown_arm_is_refused_before_anything_is_measured(smoke_study, overrides):
    """The second seed has no other parts: it says so although the first one has them."""
    begun = []
    with watched(begun), pytest.raises(SsahError, match="'all heads' is no arm of seed 1"):
        find("table4").compute(
            smoke_study(*overrides, "align.benign=15", "budget.arms=[all heads]")
        )
    assert "supervised_finetune" not in begun


@pytest.mark.parametrize("longer", [0, 1])
def test_without_more_seeds_there_are_few_arms(smoke_study, overrides, outputs, longer):
    """Three, and where it is asked for RU and random units for longer, of the first seed."""
    changes = ("budget.more_seeds=[]", f"budget.longer_seeds={[0] * longer}")
    output = find("fig_budget").compute(smoke_study(*overrides, *changes))
    expected = {(name, seed) for name in (START, WHOLE, RU, RANDOM) for seed in (0, 1)}
    if longer:
        expected |= {(f"{name}, {LONGER}", 0) for name in (RU, RANDOM)}
    assert {(r["arm"], r["seed"]) for r in output.metrics} == expected
    more = " `budget=wide` aligns for longer and with larger steps as well."
    some = f" Seed 0 only: {RU}, {LONGER}; {RANDOM}, {LONGER}."
    assert output.note.endswith(some if longer else more)
    for name, seed in expected:
        for key in ("asr", "drift"):
            assert metric(output, name, key, seed) == metric(outputs["table4"], name, key, seed)


# --- what becomes of the groups --------------------------------------------------------------


def cells_of(output: Output, arm: str, seed: int) -> dict[str, float]:
    rows = [r for r in output.metrics if (r["arm"], r["seed"]) == (arm, seed)]
    values = {r["metric"]: r["value"] for r in rows}
    assert len(values) == len(rows), "one row each"
    return values


@pytest.mark.parametrize(
    ("figure", "scopes"),
    [("fig6", ["global"]), ("fig9", ["global"]), ("fig10", ["attention", "mlp"])],
)
def test_matrices_count_every_unit_once(outputs, study, arms, figure, scopes):
    output, matrices = outputs[figure], []
    assert {r["arm"] for r in output.metrics} == {f"{n}, {s}" for n in PANELS for s in scopes}
    for stages in study.all_stages:
        redundant = stages.redundant(stages.shares.ru)
        before = {"RU": redundant, "UU": ~redundant}
        for name in PANELS:
            how = arms[name, stages.seed]
            after = stages.classify(stages.shares)
            if how is not None:
                after = stages.roles_after(how, "quantiles")
            for scope in scopes:
                kind = SCOPES[scope]
                size = sum(mask.count(kind) for mask in before.values())
                cells = cells_of(output, f"{name}, {scope}", stages.seed)
                assert list(cells) == PAIRS
                assert sum(cells.values()) == pytest.approx(100)
                for pair, value in cells.items():
                    source, target = pair.split("->")
                    both = before[source] & after.mask(target)
                    assert value == pytest.approx(100 * both.count(kind) / size), pair
                for source, mask in before.items():
                    row = sum(cells[f"{source}->{group}"] for group in GROUPS)
                    assert row == pytest.approx(100 * mask.count(kind) / size)
                matrices.append(tuple(cells.values()))
    assert len(set(matrices)) >= 3, "else arms could be exchanged without notice"


def shown_matrix(output: Output, title: str, scope: str) -> dict[str, float]:
    """Means over seeds, or the paper's."""
    if title == PAPER:
        paper = pd.read_csv(reference_csv())
        number = "fig9" if scope == "global" else "fig10"
        rows = paper[(paper["artefact"] == number) & (paper["benchmark"] == scope)]
        values = dict(zip(rows["setting"], rows["value"], strict=True))
        return {pair: values[pair] for pair in PAIRS}
    (name,) = (arm for arm, panel in PANELS.items() if panel == title)
    return {pair: mean(output, f"{name}, {scope}", pair) for pair in PAIRS}


@pytest.mark.parametrize(
    ("figure", "scopes"), [("fig9", ["global"]), ("fig10", ["attention", "mlp"])]
)
def test_heat_maps_show_the_metrics(outputs, figure, scopes):
    output = outputs[figure]
    titles = [axes.get_title() for axes in output.figure.axes]
    assert titles == [f"{t}\n{scope}" for scope in scopes for t in (*PANELS.values(), PAPER)]
    for axes in output.figure.axes:
        title, scope = axes.get_title().split("\n")
        cells = shown_matrix(output, title, scope)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["UU", "RU"]
        assert [label.get_text() for label in axes.get_xticklabels()] == list(GROUPS)
        shown = {}
        for text in axes.texts:
            column, row = text.get_position()
            shown[f"{('UU', 'RU')[row]}->{GROUPS[column]}"] = text.get_text()
        assert shown == {pair: f"{cells[pair]:.2f}" for pair in PAIRS}
        (image,) = axes.images
        expected = [(cells[pair] / 100) ** 0.5 for pair in PAIRS]
        assert image.get_array().flatten().tolist() == pytest.approx(expected)


def test_flows_of_fig6_start_and_end_at_the_group_sizes(outputs):
    output = outputs["fig6"]
    assert [axes.get_title() for axes in output.figure.axes] == [*PANELS.values(), PAPER]
    for axes in output.figure.axes:
        cells = shown_matrix(output, axes.get_title(), "global")
        before = {g: sum(cells[f"{g}->{o}"] for o in GROUPS) for g in ("UU", "RU")}
        after = {g: cells[f"UU->{g}"] + cells[f"RU->{g}"] for g in GROUPS}
        expected = [f"{g} {size:.1f}" for part in (before, after) for g, size in part.items()]
        assert [text.get_text() for text in axes.texts] == expected
        # Beside the six bars a band for each flow that there is, as wide as the bars together.
        bands = len(axes.patches) - 6
        assert bands == sum(value > 0 for value in cells.values())
        heights = sum(bars.patches[0].get_height() for bars in axes.containers)
        assert heights == pytest.approx(2 * sum(value**0.5 for value in cells.values()))


# --- a model that came aligned ---------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_came_aligned_is_not_measured(smoke_study, name):
    study, begun = smoke_study("align=none"), []
    before = set(study.store.root.iterdir())
    with watched(begun):
        output = find(name).compute(study)
    assert begun == []
    assert set(study.store.root.iterdir()) == before
    assert output.metrics == []
    assert output.note.startswith("Not measured here: tiny came aligned")
    assert "`align=refusals`" in output.note
    assert not re.search(r"\.[A-Z]", output.note), "two sentences without a space"
    if name == "table4":
        assert set(output.table["model"]) == {"paper: Llama-7B"}
        assert len(output.table) == 3
    else:
        assert output.figure is not None
        titles = {axes.get_title().split("\n")[0] for axes in output.figure.axes}
        assert titles == (set() if name == "fig_budget" else {PAPER})
