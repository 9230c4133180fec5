"""Notebook 04: does freezing safety units keep a model safe? Tables 2 and 13 to 15."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from ..evaluate.judges import attack_success, is_coherent, not_refused
from ..evaluate.stats import Estimate, paired_difference, paired_p_value, proportion
from ..lab.arms import Arm, Tuning
from ..lab.selections import (
    ALL,
    CONFLICT_ARM,
    CU6,
    FULL,
    available_attacks,
    contenders,
    label,
    random_controls,
)
from ..lab.stages import Stages, paper_rule
from ..lab.tuning import ATTACKS, LESSON, MAIN_ATTACK
from . import Output
from .summary import arm_rows, paper_rows, same

if TYPE_CHECKING:
    from ..app.study import Study

#: A headline arm -> the paper's name of it, after the data set.
PAPER_ARMS = {FULL: "full", CU6: "freeze_esu_cu6", ALL: "freeze_esu_cu_all"}


def measure(
    stages: Stages,
    output: Output,
    name: str,
    tuning: Tuning,
    *,
    thorough: bool = False,
    draw: str | None = None,
) -> list[list[bool]]:
    """Every metric of a fine-tuned arm at every epoch; returns attack success by epoch."""
    arms, record = stages.measured(tuning, thorough=thorough), stages.training(tuning)
    seed = draw or stages.seed
    start = attack_success(stages.completions("harmful_evaluation", Arm()))
    successes = []
    for epoch, arm in enumerate(arms, 1):
        answers = stages.completions("harmful_evaluation", arm)
        successes.append(attack_success(answers))
        estimates = {
            "asr": proportion(successes[-1]).scaled(100),
            "asr_rise": paired_difference(successes[-1], start).scaled(100),
            "not_refused": proportion(not_refused(answers)).scaled(100),
            "incoherent": proportion([not is_coherent(a.text) for a in answers]).scaled(100),
            "perplexity": stages.perplexity(arm),
            "heldout_gain": stages.heldout_gain(arm, tuning.attack),
            "training_loss": same(record.epoch_losses[epoch - 1], record.steps),
            **frozen_shares(stages, tuning),
        }
        if thorough and arm is paper_rule(arms) and stages.asks_harmbench(tuning.attack):
            harmbench = attack_success(stages.harmbench(arm))
            estimates["asr_harmbench"] = proportion(harmbench).scaled(100)
        for metric, estimate in estimates.items():
            output.add(label(tuning.attack, name, epoch), metric, seed, estimate)
    return successes


def frozen_shares(stages: Stages, tuning: Tuning) -> dict[str, Estimate]:
    """Per cent of units, and of the units' weights, that an arm freezes."""
    mask = stages.layout.none() if tuning.frozen is None else tuning.frozen
    layout = stages.layout_for(mask.unit_kind)
    weights = layout.weights(mask) / layout.parameters
    return {
        "frozen_units": same(100 * mask.share(), layout.units),
        "frozen_weights": same(100 * weights, layout.units),
    }


def compare(
    output: Output, arm: str, metric: str, seed: int | str, worse: list[bool], better: list[bool]
) -> None:
    """By how many points ``better`` is attacked less often than ``worse``, on the same prompts."""
    output.add(arm, metric, seed, paired_difference(worse, better).scaled(100))
    p = paired_p_value(worse, better)
    output.add(arm, f"{metric}_p", seed, same(p, len(worse)))


def measure_contenders(stages: Stages, output: Output, attack: str) -> dict[str, list[list[bool]]]:
    """Attack success by epoch of the paper's arms and of gradient conflict."""
    return {
        name: measure(stages, output, name, tuning, thorough=name in PAPER_ARMS)
        for name, tuning in contenders(stages, attack).items()
    }


def measure_random(
    stages: Stages, output: Output, like: str, count: int
) -> dict[str, list[list[bool]]]:
    """Attack success by epoch of each draw of as many units as ``like`` freezes.

    The first draw for ESU + 6 % CU is the one that attribute transfer is shown for.
    """
    return {
        draw: measure(
            stages, output, f"random, as {like}", tuning, thorough=like == CU6 and i == 0, draw=draw
        )
        for i, (draw, tuning) in enumerate(random_controls(stages, like, count).items())
    }


def _measure_headline(stages: Stages, output: Output, attack: str) -> dict[str, list[list[bool]]]:
    """All contenders, each frozen one against the arm that freezes nothing."""
    seed, tunings = stages.seed, contenders(stages, attack)
    success = measure_contenders(stages, output, attack)
    base = paper_rule(stages.measured(tunings[FULL], thorough=True))
    compared = [name for name in (CU6, ALL, CONFLICT_ARM) if name in success]
    for name in compared:
        arms = stages.measured(tunings[name], thorough=name in PAPER_ARMS)
        for epoch, own in enumerate(success[name], 1):
            arm = label(attack, name, epoch)
            gain = stages.heldout_gain(arms[epoch - 1], attack, base)
            output.add(arm, "gain_over_full", seed, gain)
            if epoch <= len(success[FULL]):
                compare(output, arm, "saved_equal_epochs", seed, success[FULL][epoch - 1], own)
            compare(output, arm, "saved_paper_rule", seed, success[FULL][0], own)
    for name in compared[1:]:  # beside CU6
        for epoch, own in enumerate(success[name], 1):
            arm = label(attack, name, epoch)
            compare(output, arm, "saved_over_cu6", seed, success[CU6][epoch - 1], own)
    return success


def _measure_controls(stages: Stages, output: Output, success: dict[str, list[list[bool]]]) -> None:
    """Random units, as many as each frozen arm has."""
    draws = stages.config.finetune.random_draws
    for like, count, names in ((CU6, draws, (CU6, CONFLICT_ARM)), (ALL, 1, (ALL,))):
        for draw, control in measure_random(stages, output, like, count).items():
            for name in [n for n in names if n in success]:
                for epoch, own in enumerate(success[name], 1):
                    arm = label(MAIN_ATTACK, name, epoch)
                    compare(output, arm, "saved_over_random", draw, control[epoch - 1], own)


# --- tables ----------------------------------------------------------------------------------


def table2(study: Study) -> Output:
    """ASR after fine-tuning on instructions (Table 2), with random controls; and the lesson."""
    return _freezing_table(study, "table2", [MAIN_ATTACK, LESSON])


def table13(study: Study) -> Output:
    """The same for arithmetic (Table 13)."""
    return _freezing_table(study, "table13", ["arithmetic"])


def table14(study: Study) -> Output:
    """Fine-tuning Mistral on instructions (Table 14)."""
    return _other_family(study, "table14", "instructions")


def table15(study: Study) -> Output:
    """Fine-tuning Mistral on arithmetic (Table 15)."""
    return _other_family(study, "table15", "arithmetic")


def _freezing_table(study: Study, artefact: str, attacks: list[str]) -> Output:
    output = Output(note=_note(study, attacks))
    every_stages = study.headline_stages if MAIN_ATTACK in attacks else study.all_stages
    for stages in every_stages:
        success = attack_success(stages.completions("harmful_evaluation", Arm()))
        output.add("initial", "asr", stages.seed, proportion(success).scaled(100))
        if stages.has("harmbench"):
            success = attack_success(stages.harmbench(Arm()))
            output.add("initial", "asr_harmbench", stages.seed, proportion(success).scaled(100))
        output.add("initial", "perplexity", stages.seed, stages.perplexity(Arm()))
        for attack in _attacks_of(stages, study, attacks):
            by_arm = _measure_headline(stages, output, attack)
            if attack == MAIN_ATTACK:
                _measure_controls(stages, output, by_arm)
    frame, name = output.frame(study, artefact), study.config.model.name
    rows = [arm_rows(frame, name, "fine-tuning: frozen", _COLUMNS), _paper_rows(artefact)]
    table = pd.concat(rows, ignore_index=True).fillna("")
    own = [c for c in ("model", "fine-tuning: frozen", *_COLUMNS) if c in table.columns]
    output.table = table[[*own, *(c for c in table.columns if c not in own)]]
    return output


def _attacks_of(stages: Stages, study: Study, attacks: list[str]) -> list[str]:
    """Those that there are rows for; of a seed that only the headline has, the main attack."""
    known = [attack for attack in available_attacks(stages) if attack in attacks]
    return known if stages.seed in study.seeds else [MAIN_ATTACK]


def _other_family(study: Study, artefact: str, attack: str) -> Output:
    """A table of another model family: measured where that family is the model under study."""
    if study.config.model.name.startswith("mistral"):
        return _freezing_table(study, artefact, [attack])
    return Output(
        note=f"The paper's numbers for another model family; not measured here, where the model is "
        f"{study.config.model.name}. `make {artefact} HF_HUB_OFFLINE=0 "
        'ARGS="profile=paper model=mistral_7b_instruct"` measures it (one 80 GB GPU). The same '
        f"attack on this model is in {'table2' if attack == 'instructions' else 'table13'}.",
        table=_paper_rows(artefact),
    )


#: Column of the table -> (metric, digits)
_COLUMNS: dict[str, tuple[str, int]] = {
    "units %": ("frozen_units", 1),
    "weights %": ("frozen_weights", 1),
    "training loss": ("training_loss", 2),
    "held-out gain": ("heldout_gain", 2),
    "perplexity": ("perplexity", 2),
    "ASR": ("asr", 1),
    "no refusal phrase": ("not_refused", 1),
    "saved, equal epochs": ("saved_equal_epochs", 1),
    "saved, paper's rule": ("saved_paper_rule", 1),
    "saved over random": ("saved_over_random", 1),
    "ASR HarmBench": ("asr_harmbench", 1),
}


def _paper_rows(artefact: str) -> pd.DataFrame:
    """The paper's keyword ASR on AdvBench, and Llama Guard's on HEx-PHI beside our HarmBench."""
    wanted = {
        ("advbench", "asr_keyword"): "no refusal phrase",
        ("hexphi", "asr_llama_guard3"): "ASR HEx-PHI (Llama Guard 3)",
    }
    return paper_rows(artefact, wanted, "fine-tuning: frozen")


def _note(study: Study, attacks: list[str]) -> str:
    config = study.config.finetune
    trained = ", ".join(f"{config.rows[a]} {a} (for the paper's {ATTACKS[a]})" for a in attacks)
    embeddings = "train with the rest" if config.train_embeddings else "are frozen in every arm"
    return (
        f"The aligned model is fine-tuned on harmless rows: {trained}; rate "
        f"{config.learning_rate:g}, batches of {config.batch_size}, embeddings {embeddings}. ASR: "
        "share of the held-out harmful prompts that are answered; no refusal phrase: share with "
        "coherent text that holds none, the paper's measure. Saved: points of "
        "ASR that the arm has less than the arm that freezes nothing, on the same prompts (paired "
        "95 % interval): after as many epochs, or (paper's rule) after one epoch of that arm. "
        "Saved over random: against as many heads and neurons drawn at random, frozen, after as "
        "many epochs. Gradient conflict (not in the paper): as many heads and neurons, those by "
        "which a first step on the rows would raise the loss of refusals most. Held-out gain: nats "
        "per token by which held-out rows of the same kind, with other prompts, became likelier. "
        "Training loss: mean of the epoch's last quarter. Units and weights: share that is frozen, "
        "of all heads and neurons. Several seeds: means of values and of interval "
        "bounds."
    )
