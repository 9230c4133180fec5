"""The alignment budget: which units it takes, its arms, and how far a model drifts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from ssah.app.study import Study
from ssah.evaluate.likelihood import divergences
from ssah.lab.arms import Aligning, Arm
from ssah.lab.budget import PREFIX_JAILBREAK
from ssah.lab.budget_arms import FASTER, LONGER, RANDOM, RU, WHOLE, budget_arms
from ssah.lab.stages import Stages
from ssah.scoring.attribution import ActivationStatistics, unit_scores
from ssah.text.chat import encode_dialogue
from ssah.units.mask import UnitMask

#: Units of the tiny model: 2 * (4 heads + 64 neurons).
UNITS = 136


@pytest.fixture(scope="module")
def study(smoke_study, attacked_study) -> Study:
    """Of a model whose answers change when it is aligned: else it would not matter whose are."""
    return smoke_study(*attacked_study.overrides, "align.learning_rate=2e-2")


@pytest.fixture(scope="module")
def stages(study) -> Stages:
    return study.stages(0)


def members(mask: UnitMask) -> set[tuple[str, int]]:
    """Chosen units by block and number."""
    return {(name, unit) for name, part in mask.items() for unit in part.nonzero()[:, 0].tolist()}


def lowest(scores: dict[str, torch.Tensor], kind: str, count: int) -> set[tuple[str, int]]:
    """By sorting pairs: the units of a kind (or of both, '') with the lowest scores."""
    ranked = sorted(
        (float(score), name, unit)
        for name, part in scores.items()
        if name.endswith(kind)
        for unit, score in enumerate(part)
    )
    assert ranked[count - 1][0] < ranked[count][0], "else it is not told which are lowest"
    return {(name, unit) for _, name, unit in ranked[:count]}


# --- units of the unaligned model ------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.2, 0.41])
def test_redundant_units_have_the_lowest_utility(stages, share):
    assert stages.config.roles.redundant_kinds == ["attn", "mlp"]
    roles = stages.utility_roles(share)
    assert members(stages.redundant(share)) == members(roles.mask("RU"))
    assert members(roles.mask("RU")) == lowest(stages.utility_scores, "", round(share * UNITS))
    assert roles.mask("CU") == ~roles.mask("RU")
    assert roles.mask("ESU").count() == roles.mask("EUU").count() == 0


@pytest.mark.parametrize("kind", ["attn", "mlp"])
def test_only_the_redundant_kinds_hold_redundant_units(smoke_study, kind):
    """The share is one of all units nevertheless."""
    stages = smoke_study(f"roles.redundant_kinds=[{kind}]").stages(0)
    share = 0.04
    assert members(stages.redundant(share)) == lowest(stages.utility_scores, kind, 5)


def test_utility_is_that_of_the_unaligned_model_on_its_own_answers(stages):
    rows = stages.rows("benign_evaluation")
    texts = [
        stages.answer_texts(stages.answers(rows, Arm(which), 8))
        for which in ("unaligned", "aligned")
    ]
    assert texts[0] != texts[1], "else it would not matter whose answers they are"
    own = stages.statistics_run("utility", "unaligned", author="unaligned")
    others = [
        stages.statistics_run("utility"),
        stages.statistics_run("utility", "unaligned"),
        stages.statistics_run("utility", "aligned", author="unaligned"),
        stages.statistics_run("safety", "unaligned", author="unaligned"),
    ]
    assert len({own.key, *(run.key for run in others)}) == 5

    def scores(which, run) -> torch.Tensor:
        statistics = ActivationStatistics.load(run.path("statistics.safetensors"))
        found = unit_scores(stages.model(which), stages.layout, statistics)
        return stages.layout.flatten(found)

    used = stages.layout.flatten(stages.utility_scores)
    torch.testing.assert_close(used, scores("unaligned", own))
    for which, run in (("aligned", others[0]), ("unaligned", others[1]), ("aligned", others[2])):
        assert not torch.allclose(used, scores(which, run), atol=1e-3)
    torch.testing.assert_close(
        stages.layout.flatten(stages.scores_of("unaligned")[1]), scores("unaligned", others[1])
    )


# --- arms ------------------------------------------------------------------------------------


def test_the_arms_and_their_order(stages):
    everything, three = budget_arms(stages, more=True), budget_arms(stages, more=False)
    assert list(three) == [WHOLE, RU, RANDOM] == ["all units", "RU", "random, as RU"]
    five = budget_arms(stages, longer=True)
    assert list(five) == list(everything)[:5]
    # Adapters of rank 1 have as many weights as the widths of seven matrices in two layers.
    step = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    rank = round(stages.layout.weights(stages.redundant(0.2)) / step)
    assert list(everything) == [
        WHOLE, RU, RANDOM, f"RU, {LONGER}", f"random, as RU, {LONGER}",
        f"RU, {FASTER}", f"random, as RU, {FASTER}", "highest I_U, as RU", "RU 10 %",
        "ESU of the aligned model", "all heads", f"LoRA, rank {rank}",
        f"LoRA inside RU, rank {rank}",
    ]  # fmt: skip
    assert three[WHOLE] is everything[WHOLE] is None
    for name in (RU, RANDOM):
        assert stages.identity(three[name]) == stages.identity(everything[name])
    identities = {stages.identity(how or "aligned") for how in everything.values()}
    assert len(identities) == len(everything)
    adapters, confined = (
        everything[f"LoRA, rank {rank}"],
        everything[f"LoRA inside RU, rank {rank}"],
    )
    assert (adapters.trained, adapters.rank) == (None, rank)
    assert (members(confined.trained), confined.rank) == (members(stages.redundant(0.2)), rank)


def test_what_the_arms_train(study, stages):
    arms = budget_arms(stages, more=True)
    redundant = stages.redundant(0.2)
    sizes = {kind: redundant.count(kind) for kind in ("attn", "mlp")}
    assert sum(sizes.values()) == round(0.2 * UNITS)
    assert min(sizes.values()) > 0, "else matching one kind would do"
    assert arms[RU] == Aligning(redundant)
    assert members(arms["RU 10 %"].trained) == lowest(stages.utility_scores, "", 14)
    assert arms["ESU of the aligned model"].trained == stages.roles.mask("ESU")
    heads = arms["all heads"].trained
    assert (heads.count("attn"), heads.count("mlp")) == (8, 0)

    negative = {name: -part for name, part in stages.utility_scores.items()}
    best = set().union(*(lowest(negative, kind, count) for kind, count in sizes.items()))
    assert members(arms["highest I_U, as RU"].trained) == best

    drawn = arms[RANDOM].trained
    assert {kind: drawn.count(kind) for kind in sizes} == sizes
    assert drawn != redundant
    for name in (RU, RANDOM):
        longer = dataclasses.replace(arms[name], changes={"epochs": 2})
        assert arms[f"{name}, {LONGER}"] == longer
        rate = {"learning_rate": pytest.approx(3 * stages.config.align.learning_rate)}
        assert arms[f"{name}, {FASTER}"] == dataclasses.replace(arms[name], changes=rate)
    assert stages.config.align.epochs == 1
    other = budget_arms(study.stages(1), more=False)
    assert other[RANDOM].trained != drawn


def test_random_units_are_the_same_every_time(stages):
    first, second = (budget_arms(stages, more=False)[RANDOM].trained for _ in range(2))
    assert first == second


# --- drift -----------------------------------------------------------------------------------


@pytest.fixture
def two_models(tiny_folder, answering_model):
    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), answering_model


def some_pairs() -> list[tuple[list[int], list[int]]]:
    """Of different lengths; one answer is empty."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(4, 900, (count,), generator=generator).tolist()

    return [(draw(2 + i % 4), draw((5 * i) % 7)) for i in range(9)]


def one_token_after_the_other(reference, model, pairs) -> list[float]:
    found = []
    for prompt, answer in pairs:
        ids, total = [*prompt, *answer], 0.0
        for end in range(len(prompt), len(ids)):
            with torch.inference_mode():
                wanted, given = (
                    m(torch.tensor([ids[:end]]), use_cache=False).logits[0, -1].double()
                    for m in (reference, model)
                )
            total += float(
                kl_div(
                    given.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True
                )
            )
        found.append(total / max(len(answer), 1))
    return found


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_divergence_equals_token_by_token(two_models, batch_size):
    pairs = some_pairs()
    assert {len(answer) for _, answer in pairs} >= {0, 1, 6}
    expected = one_token_after_the_other(*two_models, pairs)
    assert divergences(*two_models, pairs, batch_size) == pytest.approx(expected, rel=1e-4)
    backwards = divergences(*reversed(two_models), pairs, batch_size)
    assert backwards == pytest.approx(
        one_token_after_the_other(*reversed(two_models), pairs), rel=1e-4
    )
    assert backwards != pytest.approx(expected, rel=1e-2), "else the direction would not matter"
    assert [value == 0 for value in expected] == [not answer for _, answer in pairs]
    for model in two_models:
        assert divergences(model, model, pairs, batch_size) == pytest.approx([0] * 9, abs=1e-6)


def test_divergence_of_capped_logits(families):
    """Gemma 2 squeezes its logits, which the distribution must not miss."""
    models = [families("gemma2", final_logit_softcapping=cap).eval() for cap in (2.0, 30.0)]
    models[1].load_state_dict(models[0].state_dict())
    pairs = [([5, 6, 7], [8, 9]), ([11], [12, 13, 14])]
    expected = one_token_after_the_other(*models, pairs)
    assert min(expected) > 1e-3
    assert divergences(*models, pairs, 2) == pytest.approx(expected, rel=1e-4)


def test_drift_is_measured_on_what_the_unaligned_model_says(stages):
    rows = stages.rows("benign_evaluation")
    evaluate = stages.config.evaluate
    said = stages.answer_texts(stages.answers(rows, Arm("unaligned"), evaluate.max_new_tokens))
    pairs = [encode_dialogue(stages.tokenizer, r.prompt, said[r.id], end=False) for r in rows]
    models = [stages.model(which) for which in ("unaligned", "aligned")]
    expected = one_token_after_the_other(*models, pairs)
    assert len(set(expected)) > 1
    assert stages.drift(Arm()) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert stages.drift(Arm("unaligned")) == pytest.approx([0] * len(rows), abs=1e-6)


# --- prompts ---------------------------------------------------------------------------------


def test_the_prefix_is_put_after_every_prompt(stages):
    rows = stages.rows("harmful_evaluation")
    assert PREFIX_JAILBREAK.startswith(" ")
    assert [(row.id, row.prompt) for row in stages.prefixed()] == [
        (row.id, row.prompt + PREFIX_JAILBREAK) for row in rows
    ]
    assert len({row.id for row in rows}) == len(rows)


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_rows_from_elsewhere_are_spread_over_the_set(stages, count):
    ids = [row.id for row in stages.rows("harmful_evaluation")]
    chosen = [ids.index(row.id) for row in stages.spread("harmful_evaluation", count)]
    assert len(chosen) == len(set(chosen)) == count
    assert chosen[0] == 0
    steps = [b - a for a, b in zip(chosen, [*chosen[1:], len(ids)], strict=True)]
    assert max(steps) - min(steps) <= 1


def test_all_rows_where_more_are_asked_for(stages):
    rows = stages.rows("harmful_evaluation")
    assert stages.spread("harmful_evaluation", len(rows) + 5) == rows
