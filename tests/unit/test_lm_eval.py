"""The batched scorers against lm-evaluation-harness, item by item, on local task files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from ssah.data.rows import Row
from ssah.evaluate.generate import complete
from ssah.evaluate.tasks import exact_match, last_number, lm_eval_outcomes, multiple_choice

pytest.importorskip("lm_eval", reason="lm-eval is an optional extra")

WORDS = "zorp blim frub glank snarf twizz plonk drab quib vorl flim gromp snood wibble".split()
LENGTH = 12


def write_task(folder: Path, rows: list[Row], **task) -> None:
    """A task file and its data, with a cache of its own."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    settings = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "Question: {{prompt}}\nAnswer:",
        "metadata": {"version": 1},
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(settings | task))


def exact_by_item(model, tokenizer, folder: Path, task: str) -> list[bool]:
    """lm-eval's ``exact_match`` of every item, in the order of the file."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    output = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(output["samples"][task], key=lambda sample: sample["doc_id"])
    return [bool(sample["exact_match"]) for sample in samples]


def choice_rows() -> list[Row]:
    rows = []
    for i in range(24):
        prompt = " ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + i % 5))
        choices = tuple(
            " ".join(WORDS[(3 * i + 5 * c + j) % len(WORDS)] for j in range(1 + (i + c) % 3))
            for c in range(4)
        )
        rows.append(Row(str(i), prompt, "test", "CC0", response=choices[i % 4], choices=choices))
    return rows


def test_multiple_choice_is_lm_evals_accuracy(answering_model, text_tokenizer, tmp_path):
    rows = choice_rows()
    write_task(
        tmp_path,
        rows,
        task="local_choice",
        output_type="multiple_choice",
        doc_to_choice="choices",
        doc_to_target="{{choices.index(response)}}",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    expected = lm_eval_outcomes(
        answering_model, text_tokenizer, ["local_choice"], None, 4, include_path=tmp_path
    )["local_choice"]
    assert len(expected) == len(rows)
    assert 2 < sum(expected) < 22  # one answer for all would not pass
    assert multiple_choice(answering_model, text_tokenizer, rows, 7) == expected
    limited = lm_eval_outcomes(
        answering_model, text_tokenizer, ["local_choice"], 10, 4, include_path=tmp_path
    )
    assert limited == {"local_choice": expected[:10]}


def test_exact_match_is_lm_evals(answering_model, text_tokenizer, tmp_path):
    """lm-eval generates, takes the last number of the answer and compares it with the target."""
    prompts = [" ".join(WORDS[i % 14 : i % 14 + 1 + i % 4]) + f" {i}" for i in range(16)]
    # Some targets have to be right: they are taken from what the model is known to answer.
    texts = [f"Question: {prompt}\nAnswer:" for prompt in prompts]
    answers = complete(answering_model, text_tokenizer, texts, LENGTH, 1, special_tokens=True)
    said = [last_number(answer) or "0" for answer in answers]
    golds = [said[i] if i % 2 else said[i - 1] for i in range(len(said))]
    rows = [
        Row(str(i), prompt, "test", "CC0", response=gold, choices=(gold,))
        for i, (prompt, gold) in enumerate(zip(prompts, golds, strict=True))
    ]
    write_task(
        tmp_path,
        rows,
        task="local_number",
        output_type="generate_until",
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": LENGTH, "do_sample": False},
        filter_list=[
            {
                "name": "last_number",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(-?\d+)", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    expected = exact_by_item(answering_model, text_tokenizer, tmp_path, "local_number")
    assert 2 < sum(expected) < 14
    assert exact_match(answering_model, text_tokenizer, rows, 5, max_new_tokens=LENGTH) == expected
