"""Notebook 01: the two models of the pair. Table 11."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from ..evaluate.judges import attack_success, not_refused, refused
from ..evaluate.stats import proportion
from ..lab.arms import Arm
from ..lab.stages import Stages
from . import Output
from .mirrored import models
from .reasoning import ELSEWHERE
from .render import format_estimate
from .summary import paper_rows, pooled

if TYPE_CHECKING:
    from ..app.study import Study


def table11(study: Study) -> Output:
    """Helpfulness and attack success before and after alignment (Table 11)."""
    config = study.config
    made = (
        f"*unaligned* is {config.model.name} as shipped (tuned to follow instructions; its "
        "pretrained base is not embedded), *aligned* what `conf/align/refusals.yaml` makes of it"
        if config.align.enabled
        else f"{config.model.name} as shipped, aligned by its makers"
    )
    output = Output(
        note=f"Here, {made}. For the paper's MT-bench stand perplexity of held-out answers, "
        "accuracy on trivia and arithmetic, and the share of benign prompts that are "
        "answered. ASR: harmful prompts that are answered, held-out ones of AdvBench and "
        "HarmBench; the paper's rows also have Llama Guard 3, and HEx-PHI where we "
        "have HarmBench."
    )
    for stages in study.all_stages:
        for model in models(stages):
            _measure(stages, output, str(model), Arm(model))
    frame = output.frame(study, "table11")
    rows = []
    for arm, group in frame.groupby("arm", sort=False):
        row = {"model": config.model.name, "stage": arm}
        for metric in group["metric"].unique():
            digits = 2 if metric == "perplexity" else 1
            row[metric] = format_estimate(pooled(group, metric), digits)
        rows.append(row)
    output.table = pd.concat([pd.DataFrame(rows), _paper_rows()], ignore_index=True).fillna("")
    return output


def _measure(stages: Stages, output: Output, name: str, arm: Arm) -> None:
    seed = stages.seed
    output.add(name, "perplexity", seed, stages.perplexity(arm))
    for task, right in stages.task_outcomes(arm).items():
        output.add(name, f"{task} %", seed, proportion(right).scaled(100))
    harmless = stages.completions("benign_evaluation", arm)
    answered = attack_success(harmless)
    output.add(name, "benign answered %", seed, proportion(answered).scaled(100))
    looks = refused(stages.completions("borderline", arm))
    output.add(name, "borderline refused %", seed, proportion(looks).scaled(100))
    answers = {"AdvBench": stages.completions("harmful_evaluation", arm)}
    if stages.has("hexphi"):
        answers[ELSEWHERE["hexphi"]] = stages.completions("hexphi", arm)
    if stages.has("harmbench"):
        answers[ELSEWHERE["harmbench"]] = stages.harmbench(arm)
    for prompts, own in answers.items():
        success = proportion(attack_success(own)).scaled(100)
        output.add(name, f"ASR {prompts} %", seed, success)
        if prompts == "AdvBench":
            coherent = proportion(not_refused(own)).scaled(100)
            output.add(name, "no refusal phrase, AdvBench %", seed, coherent)


def _paper_rows() -> pd.DataFrame:
    """The paper's Table 11: pretrained, tuned on LIMA (unaligned), on ALERT as well (aligned)."""
    columns = {
        ("mt_bench", "avg"): "MT-bench",
        ("advbench", "asr_keyword"): "no refusal phrase, AdvBench %",
        ("advbench", "asr_llama_guard3"): "ASR AdvBench % (Llama Guard 3)",
        ("hexphi", "asr_llama_guard3"): "ASR HEx-PHI % (Llama Guard 3)",
    }
    return paper_rows("table11", columns, "stage")
