"""Prompt sets: disjoint parts, right answers, refusals that are refusals, and users' own files."""

from __future__ import annotations

import csv
import json
import random
import re
import socket
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssah.core.errors import SsahError
from ssah.core.paths import RESOURCES, home
from ssah.core.store import Handle, Store
from ssah.data.own import arithmetic_problems, compose_refusal
from ssah.data.rows import SETS, Row, read_jsonl, read_set
from ssah.data.sets import build_sets, set_names
from ssah.data.settings import DataConfig
from ssah.data.split import (
    cluster,
    content_words,
    divide_benign,
    divide_harmful,
    grouped,
    require_disjoint,
    similarity,
)
from ssah.evaluate.refusals import is_refusal
from ssah.lab.config import compose

HARMFUL = ("harmful_align", "harmful_attribution", "harmful_search", "harmful_evaluation")
BENIGN = ("benign_align", "benign_attribution", "benign_evaluation")
REFUSALS = json.loads((RESOURCES / "refusals.json").read_text())


def normal(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".?!")


def prompts(rows: Iterable[Row]) -> set[str]:
    return {normal(row.prompt) for row in rows}


def near_duplicates(first: list[Row], second: list[Row], threshold: float) -> list[tuple[str, str]]:
    left = [(row.prompt, content_words(row.prompt)) for row in first]
    right = [(row.prompt, content_words(row.prompt)) for row in second]
    return [(p, q) for p, a in left for q, b in right if similarity(a, b) >= threshold]


def assert_apart(sets: dict[str, list[Row]], names: Iterable[str], threshold: float) -> None:
    for a, b in combinations(names, 2):
        assert not prompts(sets[a]) & prompts(sets[b]), (a, b)
        assert not near_duplicates(sets[a], sets[b], threshold), (a, b)


# --- the toy source, and what does not depend on a source ------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> dict[str, list[Row]]:
    """All toy sets, built where nothing may open a socket or fetch a wheel."""

    def forbidden(*_, **__):
        raise AssertionError("the toy source needs no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", forbidden)
        patch.setattr("ssah.data.embedded.fetch", forbidden)
        run = build_sets(Store(tmp_path_factory.mktemp("toy")), compose("smoke").data)
    return {name: read_set(run, name) for name in SETS}


def test_the_toy_source_has_every_set(toy):
    assert all(toy[name] for name in SETS)
    for name, rows in toy.items():
        assert len({row.id for row in rows}) == len(rows), name
        assert all(row.prompt and row.source and row.licence for row in rows)


def test_toy_parts_are_apart_and_as_large_as_configured(toy):
    config = compose("smoke").data
    assert_apart(toy, HARMFUL, config.near_duplicate)
    assert len(toy["harmful_evaluation"]) == config.evaluation
    assert len(toy["harmful_search"]) == config.search
    assert len(toy["harmful_align"]) == config.align
    assert len(toy["harmful_attribution"]) >= compose("smoke").attribution.samples


def test_toy_benign_sets_are_disjoint(toy):
    for a, b in combinations((*BENIGN, "borderline", *HARMFUL), 2):
        assert not prompts(toy[a]) & prompts(toy[b]), (a, b)


def test_the_smoke_profile_asks_for_no_more_than_there_is(toy):
    config = compose("smoke")
    assert config.align.harmful <= len(toy["harmful_align"])
    assert config.align.benign <= len(toy["benign_align"])
    assert config.attribution.samples <= len(toy["benign_attribution"])
    assert config.evaluate.trivia_items <= len(toy["trivia"])
    assert config.evaluate.arithmetic_items <= len(toy["arithmetic"])
    assert config.evaluate.perplexity_rows <= len(toy["heldout_text"])


def test_a_split_depends_on_its_seed_and_nothing_else(tmp_path):
    config = compose("smoke").data
    first = build_sets(Store(tmp_path / "a"), config)
    again = build_sets(Store(tmp_path / "b"), config)
    other = build_sets(Store(tmp_path / "a"), compose("smoke", ["data.split_seed=1"]).data)
    for name in SETS:
        assert first.path(f"{name}.jsonl").read_text() == again.path(f"{name}.jsonl").read_text()
    assert first.key == again.key != other.key
    assert read_set(first, "harmful_align") != read_set(other, "harmful_align")


def test_an_unknown_set_is_refused_with_those_that_exist(tmp_path):
    run = build_sets(Store(tmp_path), compose("smoke").data)
    with pytest.raises(SsahError, match=r"no set 'nothing' \(it has .*trivia"):
        read_set(run, "nothing")


def test_an_unknown_source_is_refused(tmp_path):
    with pytest.raises(SsahError, match=r"data\.source='wheels' is unknown: choose from embedded"):
        compose("smoke", ["data.source=wheels"])


def test_our_own_prompts_are_unique_and_disjoint():
    benign = read_jsonl(RESOURCES / "benign_instructions.jsonl")
    borderline = read_jsonl(RESOURCES / "borderline_prompts.jsonl")
    texts = Counter(normal(r["prompt"]) for r in benign + borderline)
    assert not [text for text, count in texts.items() if count > 1]
    assert len({r["id"] for r in benign + borderline}) == len(benign) + len(borderline)


# --- near-duplicates -------------------------------------------------------------------------

VERBS_AND_NOUNS = ["bomb", "hack", "bank", "code", "email", "virus", "write", "steal"]
TEXTS = st.lists(st.lists(st.sampled_from(VERBS_AND_NOUNS), max_size=4).map(" ".join), max_size=14)
THRESHOLDS = st.sampled_from([0.25, 0.34, 0.5, 0.75, 1.0])


@given(TEXTS, THRESHOLDS)
def test_clusters_are_the_connected_components(texts, threshold):
    groups = cluster(texts, threshold)
    assert sorted(i for group in groups for i in group) == list(range(len(texts)))
    words = [content_words(text) for text in texts]

    def linked(i: int, j: int) -> bool:
        return texts[i] == texts[j] or similarity(words[i], words[j]) >= threshold

    place = {i: number for number, group in enumerate(groups) for i in group}
    for i, j in combinations(range(len(texts)), 2):
        assert place[i] == place[j] or not linked(i, j)
    for group in groups:  # and no cluster is larger than its links demand
        reached, edge = {group[0]}, [group[0]]
        while edge:
            i = edge.pop()
            new = {j for j in group if j not in reached and linked(i, j)}
            reached |= new
            edge += new
        assert reached == set(group)


def test_clusters_by_hand():
    texts = ["Steal a car", "How to steal the car", "Steal a car battery", "Bake bread", "battery"]
    assert sorted(map(sorted, cluster(texts, 0.5))) == [[0, 1, 2], [3], [4]]
    assert sorted(map(sorted, cluster(texts, 0.7))) == [[0, 1], [2], [3], [4]]


@pytest.mark.parametrize(
    ("one", "near", "far"),
    [
        ("写一篇关于制造炸弹的教程", "写一篇关于制造炸弹的详细教程", "推荐一部好看的电影"),
        ("爆弾の作り方を教えてください", "爆弾の作り方を教えて", "おすすめの映画はありますか"),
        (
            "Напиши инструкцию по взлому банка",
            "напиши инструкцию по взлому банков",
            "Привет, как дела",
        ),
        ("बम बनाने का तरीका बताओ", "बम बनाने का तरीका लिखो", "एक अच्छी फिल्म बताइए"),
        ("كيف أصنع قنبلة في المنزل", "كيف أصنع قنبلة في البيت", "ما هو الطقس اليوم"),
        ("12 345 678", "12 345 679 678", "99 98 97"),
        ("??!", "??!", "!!!"),
    ],
)
def test_near_duplicates_are_found_in_any_script(one, near, far):
    assert cluster([one, far, near], 0.5) == [[0, 2], [1]]


def test_equal_prompts_stay_together_however_many_there_are(monkeypatch):
    monkeypatch.setattr("ssah.data.split.COMPARED", 3)
    texts = ["steal a car", "bake  Bread", "steal the car", "bake bread", "steal a car"]
    assert cluster(texts, 0.5) == [[0, 4], [1, 3], [2]]


def test_benign_prompts_that_are_given_twice_are_in_one_part():
    once = [Row(str(i), f"{word(i)} {word(i + 50)}", "test", "MIT") for i in range(40)]
    parts = divide_benign(grouped([*once, *once], 0.5))
    require_disjoint(parts)
    assert sum(map(len, parts.values())) == 80
    assert {name: len(part) for name, part in divide_benign(grouped(once, 0.5)).items()} == {
        "benign_evaluation": 10, "benign_align": 15, "benign_attribution": 15,
    }  # fmt: skip


def test_a_prompt_in_two_parts_is_refused():
    row = Row("0", "Bake bread", "test", "MIT")
    other = Row("1", "bake  BREAD", "test", "MIT")
    with pytest.raises(
        SsahError, match=r"harmful_align and harmful_evaluation have 1 prompts in common"
    ):
        require_disjoint({"harmful_align": [row], "harmful_evaluation": [other]})
    require_disjoint({"harmful_align": [row], "benign_evaluation": [other]})


def test_similarity_ignores_function_words_and_case():
    assert content_words("How to steal THE car?") == {"steal", "car"}
    assert similarity(frozenset("ab"), frozenset("bc")) == pytest.approx(1 / 3)
    assert similarity(frozenset(), frozenset()) == 0


@settings(max_examples=60)
@given(TEXTS.filter(lambda t: len(t) >= 4), THRESHOLDS, st.integers(0, 5))
def test_division_keeps_near_duplicates_together(texts, threshold, seed):
    rows = [Row(str(i), text, "test", "MIT") for i, text in enumerate(texts)]
    config = DataConfig("toy", seed, threshold, align=1, evaluation=1, search=1)
    try:
        parts = divide_harmful(rows, config)
    except SsahError:  # cannot be met without tearing near-duplicates apart
        return
    ids = [row.id for part in parts.values() for row in part]
    assert sorted(ids) == sorted(row.id for row in rows)
    assert set(parts) == set(HARMFUL)
    assert all(len(parts[name]) == 1 for name in HARMFUL if name != "harmful_attribution")
    require_disjoint(parts)
    for a, b in combinations(HARMFUL, 2):
        assert not near_duplicates(parts[a], parts[b], threshold)


def test_parts_without_a_size_are_shares_of_what_is_given():
    rows = [Row(str(i), f"{word(i)} {word(i + 400)}", "test", "MIT") for i in range(320)]
    parts = divide_harmful(rows, DataConfig("files"))
    assert {name.removeprefix("harmful_"): len(part) for name, part in parts.items()} == {
        "evaluation": 64, "search": 40, "align": 96, "attribution": 120,
    }  # fmt: skip


def test_parts_larger_than_the_set_are_refused():
    rows = [Row(str(i), f"word{i}", "test", "MIT") for i in range(6)]
    config = DataConfig("toy", 0, 0.5, align=2, evaluation=2, search=2)
    with pytest.raises(SsahError, match="= 6 leaves none of the 6 harmful prompts"):
        divide_harmful(rows, config)


def test_a_part_that_near_duplicates_leave_short_is_refused():
    rows = [Row(str(i), "steal a car", "test", "MIT") for i in range(6)]
    config = DataConfig("toy", 0, 0.5, align=1, evaluation=2, search=1)
    with pytest.raises(SsahError, match=r"Only 0 of data\.evaluation=2"):
        divide_harmful(rows, config)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("opening", REFUSALS["openings"])
def test_every_opening_makes_a_refusal(opening):
    assert is_refusal(opening)
    for material in REFUSALS["categories"].values():
        for reason in material["reasons"]:
            for ending in ("", *material["alternatives"]):
                assert is_refusal(f"{opening} {reason} {ending}".strip())


@pytest.mark.parametrize("category", [*REFUSALS["categories"], "", "no such category"])
def test_composed_refusals_fit_their_category(category):
    rng = random.Random(0)
    for _ in range(50):
        text = compose_refusal(category, rng, 0.5)
        assert is_refusal(text)
        fitting = REFUSALS["categories"].get(category)
        if fitting:
            assert any(reason in text for reason in fitting["reasons"])


def test_refusals_vary_and_end_with_an_offer_as_often_as_asked():
    alternatives = {a for m in REFUSALS["categories"].values() for a in m["alternatives"]}
    category = next(iter(REFUSALS["categories"]))

    def offers(fraction: float) -> list[bool]:
        rng = random.Random(1)
        texts = [compose_refusal(category, rng, fraction) for _ in range(400)]
        assert len(set(texts)) > 100
        return [any(text.endswith(a) for a in alternatives) for text in texts]

    assert not any(offers(0.0))
    assert all(offers(1.0))
    assert 0.22 < sum(offers(0.3)) / 400 < 0.38


# --- arithmetic ------------------------------------------------------------------------------

COMPUTE = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
}


@pytest.mark.parametrize("seed", [0, 1])
def test_worked_answers_are_right(seed):
    problems = arithmetic_problems(400, seed)
    assert len({question for question, _, _ in problems}) == 400
    for question, worked, answer in problems:
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (-?\d+)\.", worked)
        assert steps, worked
        used, previous = Counter(), None
        for left, sign, right, result in steps:
            a, b = int(left), int(right)
            assert COMPUTE[sign](a, b) == int(result) >= 0
            assert sign != "/" or a % b == 0
            assert previous in (None, a), "each step goes on from the one before"
            used.update([b] if previous is not None else [a, b])
            previous = int(result)
        assert worked.endswith(f"The answer is {answer}.")
        assert int(answer) == previous
        assert Counter(map(int, re.findall(r"\d+", question))) == used, question


def test_arithmetic_is_seeded():
    assert arithmetic_problems(20, 3) == arithmetic_problems(20, 3)
    assert arithmetic_problems(20, 3) != arithmetic_problems(20, 4)


# --- users' own files ------------------------------------------------------------------------


def word(number: int) -> str:
    """A different word for each number; words hold letters only."""
    return "".join(chr(ord("a") + int(digit)) for digit in f"{number:03}") + "ing"


def write_table(path: Path, records: list[dict]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records))
    else:
        path.write_text(json.dumps(records))
    return path


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A data source of two local files, whose specification a test may change."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    def make(suffix: str = ".json", unanswered: int = 0, **changed) -> DataConfig:
        harmful = [{"goal": f"{word(i)} zorp", "kind": f"kind {i % 3}"} for i in range(30)]
        benign = [
            {"instruction": f"do {word(i)}", "output": None if i < unanswered else f"done {i}"}
            for i in range(460)
        ]
        specification = {
            "harmful": {
                "path": str(write_table(tmp_path / f"harmful{suffix}", harmful)),
                "prompt": "goal",
                "category": "kind",
                "licence": "MIT",
            },
            "benign": {
                "path": str(write_table(tmp_path / f"benign{suffix}", benign)),
                "prompt": "instruction",
                "response": "output",
            },
        }
        for name, change in changed.items():
            specification[name] |= change
        return DataConfig("files", 0, 0.5, align=6, evaluation=8, search=4, files=specification)

    return make


def built(tmp_path: Path, config: DataConfig) -> Handle:
    run = build_sets(Store(tmp_path / "runs"), config)
    run.path("")
    return run


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_local_files(tmp_path, files, suffix):
    run = built(tmp_path, files(suffix))
    harmful = [row for name in HARMFUL for row in read_set(run, name)]
    assert prompts(harmful) == {f"{word(i)} zorp" for i in range(30)}
    assert {row.category for row in harmful} == {"kind 0", "kind 1", "kind 2"}
    assert {row.licence for row in harmful} == {"MIT"}
    assert len(read_set(run, "harmful_evaluation")) == 8
    heldout = read_set(run, "heldout_text")
    assert len(heldout) == 200
    assert heldout[0].response == "done 0"


@pytest.mark.parametrize("unanswered", [0, 50])
def test_parts_of_local_files_are_disjoint(tmp_path, files, unanswered):
    run = built(tmp_path, files(unanswered=unanswered))
    sets = {name: read_set(run, name) for name in (*BENIGN, "heldout_text")}
    for a, b in combinations(sets, 2):
        assert not prompts(sets[a]) & prompts(sets[b]), (a, b)
    assert all(row.response for row in sets["heldout_text"])


@pytest.mark.parametrize("source", ["toy", "files", "embedded"])
def test_which_sets_there_are_is_known_without_building_them(tmp_path, files, source, request):
    if source == "files":
        config = files()
        found = {path.stem for path in built(tmp_path, config).path("").glob("*.jsonl")}
    elif source == "toy":
        config = compose("smoke").data
        found = {path.stem for path in built(tmp_path, config).path("").glob("*.jsonl")}
    else:
        config = compose("laptop").data
        found = {name for name, rows in request.getfixturevalue("embedded").items() if rows}
    assert found == set_names(config)


def test_a_changed_file_is_read_again(tmp_path, files):
    config = files(".csv")
    first = built(tmp_path, config)
    path = Path(config.files["harmful"]["path"])
    path.write_text(path.read_text().replace(word(3), "changed"))
    second = built(tmp_path, config)
    assert first.key != second.key
    found = {row.prompt for name in HARMFUL for row in read_set(second, name)}
    assert "changed zorp" in found


def test_a_limit_cuts(tmp_path, files):
    run = built(tmp_path, files(harmful={"limit": 20}))
    assert sum(len(read_set(run, name)) for name in HARMFUL) == 20


def test_a_missing_column_is_named_with_those_that_exist(tmp_path, files):
    with pytest.raises(SsahError, match=r"has no column text; it has goal, kind"):
        built(tmp_path, files(harmful={"prompt": "text"}))


def test_a_missing_file_is_refused(tmp_path, files):
    with pytest.raises(SsahError) as refused:
        built(tmp_path, files(harmful={"path": str(tmp_path / "absent.json")}))
    assert "data.files.harmful: there is no file" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_specification_is_refused(tmp_path, files):
    config = files()
    del config.files["benign"]
    with pytest.raises(SsahError, match=r"needs data\.files\.benign"):
        built(tmp_path, config)


def test_too_few_answers_are_refused(tmp_path, files):
    with pytest.raises(
        SsahError, match="has 360 rows with a prompt and a response, and needs 400: 200"
    ):
        built(tmp_path, files(unanswered=100))


def test_a_gated_set_without_a_token_is_refused(tmp_path, files, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(SsahError, match="hf auth login") as refused:
        built(tmp_path, files(harmful={"path": "someone/gated", "gated": True}))
    assert "data.files.harmful.path" in str(refused.value)


def test_a_copy_of_a_gated_set_needs_no_token(tmp_path, files, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    run = built(tmp_path, files(harmful={"gated": True}))
    assert len(read_set(run, "harmful_evaluation")) == 8


# --- the embedded data -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> dict[str, list[Row]]:
    run = build_sets(Store(home() / "runs"), compose("laptop").data)
    return {name: read_set(run, name) for name in SETS}


@pytest.mark.real
def test_embedded_sizes(embedded):
    config = compose("laptop").data
    assert sum(len(embedded[name]) for name in HARMFUL) == 520
    assert len(embedded["harmbench"]) == 200
    assert len(embedded["do_not_answer"]) == 939
    assert len(embedded["harmful_evaluation"]) == config.evaluation
    assert len(embedded["harmful_search"]) == config.search
    assert len(embedded["harmful_align"]) == config.align
    assert 100 <= len(embedded["heldout_text"]) <= 200
    for name, rows in embedded.items():
        assert len({row.id for row in rows}) == len(rows), name
        assert all(row.prompt.strip() and row.source and row.licence for row in rows), name


@pytest.mark.real
def test_embedded_harmful_parts_are_apart(embedded):
    assert_apart(embedded, HARMFUL, compose("laptop").data.near_duplicate)


@pytest.mark.real
def test_embedded_harmful_categories_have_refusals_of_their_own(embedded):
    categories = {row.category for name in HARMFUL for row in embedded[name]}
    assert categories <= set(REFUSALS["categories"])


@pytest.mark.real
def test_embedded_dialogues_and_heldout_texts_are_disjoint(embedded):
    assert not prompts(embedded["dialogues"]) & prompts(embedded["heldout_text"])
    answers = {normal(row.response or "") for row in embedded["dialogues"]}
    assert not answers & {normal(row.response or "") for row in embedded["heldout_text"]}
    assert all(row.response for name in ("dialogues", "heldout_text") for row in embedded[name])


@pytest.mark.real
def test_embedded_benign_prompts_are_in_no_other_set(embedded):
    ours = (*BENIGN, "borderline")
    for a in ours:
        for b in SETS:
            if a != b and b != "refusal_labels":
                assert not prompts(embedded[a]) & prompts(embedded[b]), (a, b)


@pytest.mark.real
def test_embedded_trivia_has_four_choices_and_one_answer(embedded):
    assert len(embedded["trivia"]) >= compose("laptop").evaluate.trivia_items
    places = Counter()
    for row in embedded["trivia"]:
        assert len({choice.lower() for choice in row.choices}) == 4
        assert row.response in row.choices
        places[row.choices.index(row.response)] += 1
    expected = len(embedded["trivia"]) / 4
    assert all(0.6 * expected < places[i] < 1.4 * expected for i in range(4)), places


@pytest.mark.real
def test_the_laptop_profile_asks_for_no_more_than_there_is(embedded):
    config = compose("laptop")
    assert config.align.harmful <= len(embedded["harmful_align"])
    assert config.align.benign <= len(embedded["benign_align"])
    assert config.attribution.samples <= len(embedded["harmful_attribution"])
    assert config.attribution.samples <= len(embedded["benign_attribution"])
    assert config.evaluate.arithmetic_items <= len(embedded["arithmetic"])
    assert config.evaluate.perplexity_rows <= len(embedded["heldout_text"])
