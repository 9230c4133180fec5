"""The arms of Table 5: which there are, what their models are, and what the table says of them."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from helpers import weights
from ssah.artefacts.adapters import ask_table5, table5
from ssah.artefacts.freezing import BEFORE, ONE_EPOCH
from ssah.artefacts.pick import estimate, format_estimate
from ssah.core.errors import InvalidValueError, SsahError
from ssah.core.store import Store
from ssah.lab import catalogue
from ssah.lab.arms import Arm
from ssah.lab.config import compose
from ssah.lab.jobs import jobs_of
from ssah.lab.lab import Lab
from ssah.lab.measure import Measure, collect, measured
from ssah.lab.stages.lessons import MAIN_ATTACK
from ssah.lab.units_of import ALL_CU
from ssah.text.chat import encode_dialogue

#: The paper's.
NAMES = ["LoRA", "LLaMA-Adapter", "prefix-tuning"]

ALL = [*NAMES, "prefix-tuning-from-zero"]


@pytest.fixture(scope="module")
def measurements(lively_lab, toy_verdicts) -> pd.DataFrame:
    """What Table 5 asks, of a model whose answers training changes."""
    return measured(lively_lab, ask_table5(lively_lab))[0]


def plain_arms(lab: Lab) -> dict[str, Arm]:
    """At the paper's rates."""
    return {arm.rule: arm for arm in catalogue.adapted(lab, MAIN_ATTACK) if not arm.setting}


# --- arms ------------------------------------------------------------------------------------


def test_each_adapter_trains_at_each_of_its_rates(lab):
    arms = catalogue.adapted(lab, MAIN_ATTACK)
    methods = lab.config.adapters.methods
    assert [arm.rule for arm in arms if not arm.setting] == ALL
    assert len(arms) == sum(len(methods[name].rates) for name in ALL) > len(ALL)
    for name in ALL:
        rates = [arm.model.step.changes["learning_rate"] for arm in arms if arm.rule == name]
        assert rates == methods[name].rates
    settings = {lab.settings_of(arm.model.step).batch_size for arm in arms}
    assert settings == {lab.config.adapters.batch_size}
    assert {arm.epoch for arm in arms} == {1}
    assert len({lab.identity(arm.model) for arm in arms}) == len(arms)
    assert arms[0].name == "instructions, 1 epoch: LoRA"
    faster = next(arm for arm in arms if arm.setting)
    first, second = methods[faster.rule].rates[:2]
    assert faster.setting == f"{second / first:g} x the rate"
    assert faster.name == f"instructions, 1 epoch: {faster.rule}, {faster.setting}"
    assert catalogue.adapted(lab, "arithmetic") == []


def test_the_rates_of_the_paper_come_first():
    methods = compose("paper").adapters.methods
    assert {name: methods[name].rates for name in NAMES} == {
        "LoRA": [1e-4], "LLaMA-Adapter": [1e-2], "prefix-tuning": [1e-2],
    }  # fmt: skip
    for profile in ("laptop", "smoke"):
        found = compose(profile).adapters.methods
        assert {name: found[name].rates[0] for name in NAMES} == {
            name: methods[name].rates[0] for name in NAMES
        }


def test_each_adapter_is_a_job_of_its_own(lab):
    jobs = [job.name for job in jobs_of(lab, ask_table5(lab))]
    assert {f"instructions: adapted: {name}" for name in ALL} < set(jobs)
    assert "instructions: frozen: nothing" in jobs
    assert "units removed" not in jobs


def test_nothing_is_asked_where_no_adapter_is_named(smoke_lab):
    assert ask_table5(smoke_lab("experiment=default")) == []


def test_an_adapter_that_a_family_lacks_is_left_out(
    families, tiny_folder, smoke_home, tmp_path, measurements
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    vocabulary = AutoConfig.from_pretrained(tiny_folder).vocab_size
    families("qwen2", vocab_size=vocabulary).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    overrides = ["model=local", f"model.source={tmp_path}", "model.chat_template=chatml"]
    lab = Lab(compose("smoke", overrides), Store(smoke_home / "runs"), 0)
    assert list(plain_arms(lab)) == [name for name in ALL if name != "LLaMA-Adapter"]
    without = measurements[measurements["rule"] != "LLaMA-Adapter"]
    note = table5(without, lab.config).note
    assert "LLaMA-Adapter is left out: peft has none for models of this family" in note


# --- models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_models_own_weights_are_those_of_the_aligned_one(lab, name):
    """LoRA is merged into queries and values."""
    model = plain_arms(lab)[name].model
    with lab.use(lab.aligned) as aligned:
        before = weights(aligned)
    with lab.use(model) as loaded:
        after = {n.replace("self_attn.model.", "self_attn."): w for n, w in weights(loaded).items()}
    changed = [n for n in before if not torch.equal(after[n], before[n])]
    wanted = name == "LoRA"
    assert all(n.endswith(("q_proj.weight", "v_proj.weight")) for n in changed)
    assert bool(changed) == wanted
    folder = lab.training(model).path("epoch-1")
    saved = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert 0 < saved < sum(w.numel() for w in before.values()), "bytes of the adapter alone"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_again_says_the_same(smoke_lab, lab, name):
    model = plain_arms(lab)[name].model
    ids, response = encode_dialogue(lab.tokenizer, "zorp flim", "blim frub")
    row = torch.tensor([[*ids, *response]])

    def logits(own: Lab) -> torch.Tensor:
        with own.use(model) as loaded, torch.inference_mode():
            return loaded(row).logits

    first = logits(lab)
    with lab.use(lab.aligned) as aligned, torch.inference_mode():
        assert not torch.equal(first, aligned(row).logits)
    lab.forget(model)
    torch.manual_seed(12345)
    assert torch.equal(logits(smoke_lab()), first)


def test_adapters_are_dropped_when_they_are_measured(smoke_lab):
    lab = smoke_lab(seed=8)
    arms = list(plain_arms(lab).values())
    collect(lab, [Measure(arm, metric) for arm in arms for metric in ("ASR", "units", "training")])
    for arm in arms:
        assert not lab.training(arm.model).has("epoch-1")
    assert lab.training(lab.aligned).has("epoch-1")


# --- what is wrong ---------------------------------------------------------------------------


def test_a_name_that_means_nothing_is_named(smoke_lab):
    lab = smoke_lab("experiment.adapters.instructions=[LoRa]")
    with pytest.raises(SsahError, match="adapters: there is no 'LoRa': did you mean 'LoRA'"):
        catalogue.check(lab)
    lab.config.experiment.adapters = {"instruction": ["LoRA"]}
    with pytest.raises(SsahError, match="there is no 'instruction': did you mean 'instructions'"):
        catalogue.check(lab)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapters.methods.LoRA.rates=[]", r"adapters\.methods\.LoRA\.rates is empty"),
        ("adapters.methods.LoRA.rates=[-1]", r"adapters\.methods\.LoRA\.rates=-1.* out of range"),
        ("adapters.methods.LLaMA-Adapter.blocks=0", r"blocks=0.* out of range"),
        ("adapters.batch_size=0", r"adapters\.batch_size=0 is out of range"),
        ("adapters.batch_size=9", r"adapters\.batch_size=9 is no multiple of finetune\.micro"),
    ],
)
def test_settings_out_of_range_are_refused(override, message):
    with pytest.raises(InvalidValueError, match=message):
        compose("smoke", [override])


def test_an_argument_that_peft_does_not_know_is_named_before_training(smoke_lab):
    lab = smoke_lab("+adapters.methods.LoRA.peft.rang=8")
    with pytest.raises(InvalidValueError, match="peft has no such adapter"):
        ask_table5(lab)


# --- the table -------------------------------------------------------------------------------


def test_adapters_stand_beside_what_they_are_held_against(measurements, lively_lab):
    table = table5(measurements, lively_lab.config).table
    own = table[table["fine-tuned on"] == "instructions"].reset_index(drop=True)
    assert list(own["what trains"][:3]) == ["everything", f"all but {ALL_CU}", "LoRA"]
    assert list(own["epochs"][:3]) == ["1", "2", "1"]
    assert set(ALL) < set(own["what trains"])
    assert table.iloc[0]["fine-tuned on"] == "nothing"
    assert table.iloc[0]["paper: score, rate"] == "1.05, 0.3"
    arm = {"method": "adapted", "rule": "prefix-tuning", "attack": "instructions", "epoch": 1}
    row = own[own["what trains"] == "prefix-tuning"].iloc[0]
    for column, metric, columns, digits in (
        ("ASR", "ASR", {}, 1),
        ("no refusal phrase", "no refusal phrase", {}, 1),
        ("ASR against training everything", "ASR", {"against": ONE_EPOCH}, 1),
        (f"ASR against {ALL_CU} frozen", "ASR", {"against": ALL_CU}, 1),
        ("held-out gain", "held-out gain", {"set": "instructions", "against": BEFORE}, 2),
        ("trained %", "trained weights", {}, 2),
    ):
        found = estimate(measurements, metric, **columns, **arm)
        assert found is not None
        assert row[column] == format_estimate(found, digits)
    assert row["paper: score, rate"] == "2.2, 24.8"
    faster = own[own["what trains"].str.endswith("x the rate")]
    assert (faster["paper: score, rate"] == "").all()
    assert len(faster)


def test_without_adapters_the_papers_numbers_stand_alone(measurements, lively_lab):
    experiment = dataclasses.replace(lively_lab.config.experiment, adapters={})
    config = dataclasses.replace(lively_lab.config, experiment=experiment)
    output = table5(measurements[measurements["method"] != "adapted"], config)
    assert output.note.startswith("Not measured here")
    lora = output.table[output.table["fine-tuning: what trains"] == "alpaca:lora"].iloc[0]
    assert (lora["score"], lora["rate %"]) == ("2.18", "25.20")
