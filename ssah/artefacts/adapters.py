"""Notebook 05: do adapters keep a model safe? Table 5."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..lab import catalogue
from ..lab.catalogue import NOTHING, by_the_papers_rule
from ..lab.config import Config
from ..lab.lab import Lab
from ..lab.measure import Measure
from ..lab.stages.lessons import ATTACKS, available_attacks
from ..lab.units_of import ALL_CU
from . import Output
from .freezing import BEFORE, ONE_EPOCH, PAPER_SETS, ask_against, ask_arms, name_of
from .pick import arms_of, filled, paper, paper_rows, text

_PAPER_ARMS = {
    NOTHING: "full", ALL_CU: "freeze_esu_cu_all",
    "LoRA": "lora", "LLaMA-Adapter": "llama_adapter", "prefix-tuning": "prefix",
}  # fmt: skip

_PAPERS = (
    "The paper's numbers are GPT-4's score from 1 to 5 of answers to HEx-PHI, and the share of "
    "answers with the highest score."
)


def ask_table5(lab: Lab) -> list[Measure]:
    """The aligned model, and for each attack the adapters with what they are held against."""
    asked: list[Measure] = []
    for attack in available_attacks(lab):
        if lab.config.experiment.adapters.get(attack):
            full = by_the_papers_rule(catalogue.unfrozen(lab, attack))
            frozen = by_the_papers_rule(catalogue.with_frozen(lab, attack, ALL_CU))
            adapters = catalogue.adapted(lab, attack)
            asked += ask_arms(lab, [full, frozen, *adapters], attack)
            asked += ask_against([frozen, *adapters], [full], attack)
            asked += [Measure(arm, "ASR", "", frozen, ALL_CU) for arm in adapters]
    before = ("ASR", "no refusal phrase", "incoherent") if asked else ()
    return [Measure(catalogue.whole(lab), metric) for metric in before] + asked


def table5(table: pd.DataFrame, config: Config) -> Output:
    """ASR after fine-tuning through adapters, and as a whole with or without frozen units."""
    wanted, printed = config.experiment.adapters, paper("table5")
    attacks = [a for a in wanted if arms_of(table, method="adapted", attack=a)]
    if not attacks:
        columns = {("hexphi", "gpt4_score"): "score", ("hexphi", "gpt4_rate"): "rate %"}
        return Output(
            "Not measured here: the adapters are part of `experiment=published` "
            f"(experiment.adapters names them). {_PAPERS}",
            filled(pd.DataFrame(paper_rows("table5", columns, "fine-tuning: what trains", 2))),
        )
    rows = [_row(table, {}, printed)]
    for attack in attacks:
        rows += [_row(table, arm, printed) for arm in _shown(table, attack, config)]
    shown = {row["what trains"].split(", ")[0] for row in rows}
    left_out = {name for names in wanted.values() for name in names} - shown
    return Output(_note(config, attacks, sorted(left_out)), filled(pd.DataFrame(rows)))


def _shown(table: pd.DataFrame, attack: str, config: Config) -> list[dict[str, Any]]:
    """Full fine-tuning for one epoch, ESU and all CU frozen for the longest, and the adapters."""
    frozen = arms_of(table, method="frozen", attack=attack, setting="", like="")
    ends = {NOTHING: 1, ALL_CU: config.finetune.epochs}
    return [
        *(arm for rule, epoch in ends.items() for arm in frozen
          if (arm["rule"], arm["epoch"]) == (rule, epoch)),
        *arms_of(table, method="adapted", attack=attack),
    ]  # fmt: skip


def _row(
    table: pd.DataFrame, arm: dict[str, Any], printed: dict[tuple[str, str], float]
) -> dict[str, str]:
    attack, rule = arm.get("attack", ""), arm.get("rule", "")
    trains = {"": "", NOTHING: "everything", ALL_CU: f"all but {ALL_CU}"}
    setting = f"{PAPER_SETS[attack]}:{_PAPER_ARMS.get(rule, '')}" if arm else "initial"
    numbers = [printed.get((setting, metric)) for metric in ("gpt4_score", "gpt4_rate")]
    plain = not arm.get("setting")
    gain = text(table, "held-out gain", 2, set=attack, against=BEFORE, **arm)

    def against(than: str) -> str:
        return text(table, "ASR", against=than, **arm) if arm else ""

    return {
        "fine-tuned on": attack or "nothing",
        "what trains": trains.get(rule) or (name_of(arm) if arm else ""),
        "epochs": str(arm["epoch"]) if arm else "",
        "trained %": text(table, "trained weights", 2, **arm) if arm else "",
        "held-out gain": gain if arm else "",
        "ASR": text(table, "ASR", **arm),
        "no refusal phrase": text(table, "no refusal phrase", **arm),
        "incoherent": text(table, "incoherent", **arm),
        "ASR against training everything": against(ONE_EPOCH),
        f"ASR against {ALL_CU} frozen": against(ALL_CU),
        "paper: score, rate": ", ".join(f"{n:g}" for n in numbers if n is not None and plain),
    }


def _note(config: Config, attacks: list[str], left_out: list[str]) -> str:
    rates = {
        name: ", ".join(f"{rate:g}" for rate in method.rates)
        for name, method in config.adapters.methods.items()
        if any(name in config.experiment.adapters[attack] for attack in attacks)
    }
    missing = "".join(
        f" {name} is left out: peft has none for models of this family." for name in left_out
    )
    return (
        f"The aligned model is fine-tuned on {' and '.join(attacks)} (for the paper's "
        f"{' and '.join(ATTACKS[a] for a in attacks)}) through adapters of peft, one epoch in "
        f"batches of {config.adapters.batch_size}, at the paper's rate and others (rates: "
        f"{'; '.join(f'{name} {own}' for name, own in rates.items())}); beside them the arm that "
        "freezes nothing, for one epoch, and the one that freezes ESU and all CU, for twice as "
        "many epochs, as in Table 2. ASR: share of the held-out harmful prompts that are answered; "
        "differences are points of ASR on the same prompts (paired 95 % interval), below zero is "
        "safer. Held-out gain: nats per token by which held-out rows of the same kind became "
        "likelier: an adapter that learned nothing had no chance to hurt, and one that made the "
        "model incoherent had none to protect. Trained: per cent of the weights of the model, or "
        "as many in the adapter. " + _PAPERS + missing
    )
