"""Notebook 01: the two models of the pair. Table 11."""

from __future__ import annotations

import pandas as pd

from ..lab import catalogue
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from . import Output
from .pick import estimate, filled, format_estimate, paper_rows

#: Column -> metric, on what, digits.
_COLUMNS = {
    "perplexity": ("perplexity", "", 2),
    "trivia %": ("accuracy", "trivia", 1),
    "arithmetic %": ("accuracy", "arithmetic", 1),
    "benign answered %": ("ASR", "benign", 1),
    "borderline refused %": ("refused", "borderline", 1),
    "ASR AdvBench %": ("ASR", "", 1),
    "no refusal phrase, AdvBench %": ("no refusal phrase", "", 1),
    "ASR HarmBench %": ("ASR", "HarmBench", 1),
    "ASR HEx-PHI %": ("ASR", "HEx-PHI", 1),
}


def ask_table11(lab: Lab) -> list[Measure]:
    """Helpfulness, and attack success on the prompts that there are."""
    asked = []
    for arm in (catalogue.whole(lab), *catalogue.unaligned(lab)):
        asked += [Measure(arm, "perplexity"), Measure(arm, "accuracy"), Measure(arm, "ASR")]
        asked += [Measure(arm, "no refusal phrase"), Measure(arm, "ASR", "benign")]
        asked.append(Measure(arm, "refused", "borderline"))
        for name, prompts in (("HarmBench", "harmbench"), ("HEx-PHI", "hexphi")):
            if lab.has(prompts):
                asked.append(Measure(arm, "ASR", name))
    return asked


def table11(table: pd.DataFrame, config: Config) -> Output:
    """Helpfulness and attack success before and after alignment (Table 11)."""
    made = (
        f"*unaligned* is {config.model.name} as shipped (tuned to follow instructions; its "
        "pretrained base is not embedded), *aligned* what `conf/align/refusals.yaml` makes of it"
        if config.align.enabled
        else f"{config.model.name} as shipped, aligned by its makers"
    )
    rows = []
    for base in ("aligned", "unaligned"):
        row = {"model": config.model.name, "stage": base}
        for column, (metric, on, digits) in _COLUMNS.items():
            row[column] = format_estimate(estimate(table, metric, set=on, base=base), digits)
        if row["perplexity"]:
            rows.append(row)
    rows += _paper_rows()
    return Output(
        f"Here, {made}. For the paper's MT-bench stand perplexity of held-out answers, accuracy on "
        "trivia and arithmetic, and the share of benign prompts that are answered. ASR: harmful "
        "prompts that are answered, held-out ones of AdvBench and HarmBench; the paper's are "
        "judged by Llama Guard 3, on AdvBench and HEx-PHI.",
        filled(pd.DataFrame(rows)),
    )


def _paper_rows() -> list[dict[str, str]]:
    """The paper's Table 11: pretrained, tuned on LIMA (unaligned), on ALERT as well (aligned)."""
    columns = {
        ("mt_bench", "avg"): "paper: MT-bench",
        ("advbench", "asr_keyword"): "no refusal phrase, AdvBench %",
        ("advbench", "asr_llama_guard3"): "ASR AdvBench %",
        ("hexphi", "asr_llama_guard3"): "ASR HEx-PHI %",
    }
    return paper_rows("table11", columns, "stage")
