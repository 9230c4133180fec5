"""Which openings, queries and words are probed, and what a cached probe depends on."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import ssah.lab.probing
from ssah.artefacts import find
from ssah.core.errors import SsahError
from ssah.core.paths import RESOURCES
from ssah.evaluate.refusals import is_refusal
from ssah.lab.stages import Stages
from ssah.text.chat import encode, render_prompt

KINDS = ("refusal", "compliance", "neutral")


@pytest.fixture(scope="module")
def stages(smoke_study) -> Stages:
    return smoke_study().stages(0)


# --- openings ----------------------------------------------------------------------------------


def test_openings_are_long_enough_and_cut_to_one_length(stages):
    length = stages.config.probes.opening_tokens
    texts, openings = stages.opening_texts, stages.openings
    for kind in KINDS:
        whole = [stages.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts[kind]]
        assert min(map(len, whole)) >= length
        assert getattr(openings, kind).tolist() == [ids[:length] for ids in whole]
        assert getattr(openings, kind).shape == (len(texts[kind]), length)


def test_openings_differ_after_the_cut(stages):
    """Two that share their first tokens would count as one that is read twice."""
    rows = [tuple(ids) for kind in KINDS for ids in getattr(stages.openings, kind).tolist()]
    assert len(set(rows)) == len(rows)


def test_there_are_enough_openings_and_none_is_taught(stages):
    texts = stages.opening_texts
    assert set(texts) == {*KINDS, "words"}
    assert len(texts["refusal"]) == len(texts["compliance"]) >= 8
    assert len(texts["neutral"]) > 1
    every = [text for kind in texts.values() for text in kind]
    assert len(set(every)) == len(every)
    taught = json.loads((RESOURCES / "refusals.json").read_text(encoding="utf-8"))["openings"]
    assert len(taught) > 10
    assert not set(every) & set(taught)


def test_openings_mean_what_they_stand_for(stages):
    texts = stages.opening_texts
    assert all(map(is_refusal, texts["refusal"]))
    for kind in ("compliance", "neutral", "words"):
        assert [text for text in texts[kind] if is_refusal(text)] == []


def test_too_many_tokens_of_openings_are_refused(smoke_study):
    study = smoke_study("probes.opening_tokens=40")
    with pytest.raises(SsahError, match=r"probes\.opening_tokens=40"):
        _ = study.stages(0).openings


# --- queries -----------------------------------------------------------------------------------


def test_probed_rows_are_spread_over_the_set(stages):
    config = stages.config.probes
    assert (config.evaluation_queries, config.queries) == (12, 6)
    for name, few, count in (
        ("harmful_evaluation", False, 12),
        ("harmful_evaluation", True, 6),
        ("benign_evaluation", False, 6),
        ("harmbench", False, 6),
    ):
        rows = stages.rows(name)
        chosen = [rows.index(row) for row in stages.probed_rows(name, few=few)]
        assert len(chosen) == count
        assert chosen[0] == 0
        assert chosen == sorted(set(chosen)), "in order and each once"
        steps = {after - before for before, after in pairwise(chosen)}
        steps.add(len(rows) - chosen[-1])
        assert max(steps) - min(steps) <= 1, "no part of the set is left out"


def test_a_set_smaller_than_asked_for_is_probed_whole(smoke_study):
    found = smoke_study("probes.queries=1000", "probes.evaluation_queries=1000").stages(0)
    for name in ("harmful_evaluation", "harmbench"):
        assert found.probed_rows(name) == found.rows(name)


# --- cached probes -----------------------------------------------------------------------------

POSITIONS = "probes.positions=[1,3]"  # no other test asks for these, so nothing is cached yet


def test_a_probe_is_built_once(smoke_study):
    found = []
    for _ in range(2):
        study = smoke_study(POSITIONS)
        found.append(study.stages(0).probe("aligned", "harmbench"))
    assert study.store.built_seconds == 0
    for name in ("distance", "residual", "log_likelihood", "query"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))
    assert found[0].distance.shape == (6, 2, 2, 2, 8)


def probe_keys(study, *which, **options) -> set[str]:
    """Keys of the probes that a call uses."""
    stages = study.stages(0)
    study.store.touched.clear()
    stages.probe(*which, **options)
    runs = study.store.touched.values()
    return {run.key for run in runs if run.folder.name.startswith("probe_")}


def test_what_changes_a_probe_changes_its_key(smoke_study):
    study = smoke_study(POSITIONS)
    again = probe_keys(study, "aligned", "harmbench")
    assert again == probe_keys(smoke_study(POSITIONS), "aligned", "harmbench")
    found = [
        again,
        probe_keys(study, "unaligned", "harmbench"),
        probe_keys(study, "aligned", "benign_evaluation"),
        probe_keys(study, "aligned", "harmbench", same_words=True),
        probe_keys(smoke_study("probes.positions=[1,2]"), "aligned", "harmbench"),
        probe_keys(smoke_study(POSITIONS, "probes.queries=5"), "aligned", "harmbench"),
        probe_keys(smoke_study(POSITIONS, "probes.opening_tokens=3"), "aligned", "harmbench"),
        probe_keys(smoke_study(POSITIONS, "evaluate.batch_size=3"), "aligned", "harmbench"),
    ]
    assert [len(keys) for keys in found] == [1] * len(found)
    assert set(Counter(key for keys in found for key in keys).values()) == {1}


def test_other_texts_are_another_probe(smoke_study):
    study = smoke_study(POSITIONS)
    before = probe_keys(study, "aligned", "harmbench", same_words=True)
    texts = study.stages(0).opening_texts
    study.stages(0).opening_texts = texts | {"words": ["Another text that every model reads."]}
    assert probe_keys(study, "aligned", "harmbench", same_words=True) != before


def test_each_model_reads_its_own_words_unless_they_shall_be_the_same(smoke_study, monkeypatch):
    read = []

    def keep(model, queries, words, openings, positions):
        read.append((queries, words))
        return whole(model, queries, words, openings, positions)

    whole = ssah.lab.probing.probe
    monkeypatch.setattr(ssah.lab.probing, "probe", keep)
    stages = smoke_study("probes.positions=[2,5]").stages(0)
    tokenizer, said = stages.tokenizer, stages.opening_texts["words"]
    assert len(said) == 1
    rows = stages.probed_rows("harmful_evaluation", few=True)
    prompts = [encode(tokenizer, render_prompt(tokenizer, row.prompt)) for row in rows]
    for which in ("aligned", "unaligned"):
        stages.probe(which, "harmful_evaluation", same_words=True)
        assert read.pop() == (prompts, [encode(tokenizer, said[0])] * 6)
    for which in ("aligned", "unaligned"):
        stages.probe(which, "harmful_evaluation")
        queries, words = read.pop()
        every = stages.probed_rows("harmful_evaluation")
        assert queries == [encode(tokenizer, render_prompt(tokenizer, r.prompt)) for r in every]
        model = stages.model(which)
        for query, own in zip(queries, words, strict=True):
            known = list(query)
            for token in own:
                with torch.inference_mode():
                    logits = model(torch.tensor([known]), use_cache=False).logits[0, -1]
                assert int(logits.argmax()) == token
                known.append(token)
            assert len(own) == 5
    assert not read


# --- the user's own prompts --------------------------------------------------------------------

#: Letters only, so that no two prompts count as one.
WORDS = [f"{a}{b}ing" for a in "bdfgk" for b in "aeiou"]


def given(folder: Path, name: str, records: list[dict[str, str]]) -> str:
    """An override that names a file with these records."""
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    columns = ", ".join(f"{column}: {column}" for column in records[0])
    return f"data.files.{name}={{path: {path}, {columns}}}"


@pytest.fixture
def own_files(tmp_path, monkeypatch) -> list[str]:
    """Prompts of the user's and no more, of a model that nothing aligns."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    benign = [{"prompt": f"do {a} {b}", "response": f"done {b} {a}"} for a in WORDS for b in WORDS]
    return [
        "data=files",
        "align=none",
        "data.evaluation=8",
        "data.search=4",
        given(tmp_path, "harmful", [{"prompt": f"zorp {word}"} for word in WORDS[:20]]),
        given(tmp_path, "benign", benign),
    ]


def test_hexphi_of_the_user_is_what_fig7_shows(smoke_study, own_files, tmp_path):
    records = [{"prompt": f"blim {word}"} for word in WORDS[:9]]
    study = smoke_study(*own_files, given(tmp_path, "hexphi", records))
    stages = study.stages(0)
    assert stages.has("hexphi")
    assert not stages.has("harmbench")
    assert [row.prompt for row in stages.rows("hexphi")] == [r["prompt"] for r in records]
    output = find("fig7").compute(study)
    assert {row["arm"] for row in output.metrics} == {"aligned: hexphi"}
    assert {row["n"] for row in output.metrics} == {6}
    assert [axes.get_title() for axes in output.figure.axes] == [
        "HEx-PHI, last block",
        "HEx-PHI, by block",
    ]
