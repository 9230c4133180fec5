"""The practitioner's commands: what they refuse, what they do, what they write."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ssah
from helpers import Interruption, save_livelier
from ssah.app import cli
from ssah.app.protect import demo, measure
from ssah.app.protect.cli import check, protect
from ssah.app.protect.measure import Losses, Measured, Rates
from ssah.app.protect.protect import divided
from ssah.app.protect.report import NUMBERS, PAGE, comparison
from ssah.app.protect.schedule import Schedule, Step, spoken
from ssah.app.protect.settings import Settings
from ssah.app.protect.subject import Sizes, micro_batch, training_gb
from ssah.app.protect.train import mixed
from ssah.core.errors import SsahError
from ssah.core.paths import project_root
from ssah.core.store import Store
from ssah.data.dialogues import Dialogue
from ssah.data.rows import Row
from ssah.data.settings import DataConfig
from ssah.evaluate import judges
from ssah.evaluate.judges import Completion
from ssah.lab.config import compose
from ssah.text.batches import scored_logits
from ssah.text.chat import CHATML
from ssah.training import supervised

pytestmark = pytest.mark.usefixtures("toy_verdicts")


@pytest.fixture(scope="module")
def chat_model(tiny_folder, tmp_path_factory) -> Path:
    """A tiny model whose answers training changes, with a chat template, in bfloat16."""
    folder = tmp_path_factory.mktemp("chat") / "chatty"
    save_livelier(tiny_folder, folder, seed=1)
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """An empty cache, and sets that need no network."""
    monkeypatch.setenv("SSAH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(measure, "SETS", DataConfig("toy", evaluation=16))
    return tmp_path


def pairs(count: int = 40) -> list[tuple[str, str]]:
    return [
        (f"Describe a garden, number {n}", f"It has {n} trees, and a lake.") for n in range(count)
    ]


def write_rows(folder: Path, records: list, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def run(model: Path, folder: Path, rows=None, **settings) -> ssah.app.protect.report.Report:
    given = {"learning_rate": 2e-2, "max_tokens": 64, "prompts": 16} | settings
    return ssah.protect(str(model), None, rows or pairs(), out=folder / "out", **given)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([], "is empty"),
        ([{"prompt": "a", "response": "b"}] * 19, "19 rows are too few"),
        ([{"text": "a"}] * 30, "the columns text are none of those that are known"),
        (
            [{"prompt": f"a {n}", "response": "b" if n % 3 else ""} for n in range(30)],
            r"10 of 30 rows cannot be used \(row 1 has no response\)",
        ),
        ([{"prompt": "the same", "response": f"b {n}"} for n in range(30)], "1 different prompts"),
    ],
)
def test_rows_that_nothing_can_be_made_of(toy, chat_model, records, said):
    with pytest.raises(SsahError, match=said):
        run(chat_model, toy, write_rows(toy, records))
    assert not list((toy / "home").glob("runs/answers*"))


def test_a_broken_line_is_named(toy, chat_model):
    path = write_rows(toy, [dict(zip(("prompt", "response"), p, strict=True)) for p in pairs()])
    path.write_text(path.read_text().replace('"Describe a garden, number 7"', '"Describe'))
    with pytest.raises(SsahError, match=r"is no \.jsonl file \(line 8: "):
        run(chat_model, toy, path)


def test_missing_things_are_named(toy, chat_model, capsys):
    with pytest.raises(SsahError, match="There is no file"):
        run(chat_model, toy, "nowhere.jsonl")
    with pytest.raises(SsahError, match=r"There is no folder \./nowhere"):
        ssah.check("./nowhere")
    assert cli.main(["check", "smolm2"]) == 1
    said = "'smolm2' is no folder and no model's name: did you mean 'smollm2'?"
    assert said in capsys.readouterr().err


def test_a_setting_that_does_not_exist_or_fit(toy, chat_model):
    with pytest.raises(SsahError, match="no setting sharr: did you mean 'share'"):
        run(chat_model, toy, sharr=0.1)
    with pytest.raises(SsahError, match="defence='mixin' is unknown: did you mean 'mixing'"):
        run(chat_model, toy, defence="mixin")
    with pytest.raises(SsahError, match=r"share says .* defence=freeze mixes none in"):
        run(chat_model, toy, defence="freeze", share=0.1)
    with pytest.raises(SsahError, match="32 rows make 2 of 16 rows: bring more rows, take a"):
        run(chat_model, toy, defence="Lisa", batch_size=16)
    with pytest.raises(SsahError, match=r"max_tokens=600 is more than .* can read \(512\)"):
        run(chat_model, toy, max_tokens=600)


def test_a_model_without_a_template(toy, tiny_folder):
    with pytest.raises(SsahError, match="has no chat template"):
        run(tiny_folder, toy)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_model_that_never_refuses_has_nothing_to_protect(toy, chat_model, monkeypatch, dry_run):
    monkeypatch.setattr(judges, "judge", lambda completion: "answered")
    with pytest.raises(SsahError, match=r"refuses 0 of \d+ harmful requests: there is nothing to"):
        run(chat_model, toy, dry_run=dry_run)
    assert not list((toy / "home").glob("runs/protected*"))


def test_a_full_disk(toy, chat_model, monkeypatch):
    full = SimpleNamespace(free=100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    with pytest.raises(SsahError, match=r"has 0\.0 GB free and this needs"):
        run(chat_model, toy)


def test_too_little_memory(toy, chat_model, monkeypatch):
    memory = SimpleNamespace(available=2e6, total=64e9)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    with pytest.raises(
        SsahError, match=r"needs .* GB of memory, and this machine has 0\.0 GB free"
    ):
        run(chat_model, toy)


def test_too_small_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (20e9, 24e9))
    llama = Sizes(6_738_000_000, 32, 4096, 11008, 32000, 4096)
    subject = SimpleNamespace(name="llama", device=torch.device("cuda"), sizes=llama)
    with pytest.raises(SsahError, match=r"6\.74 billion .* needs 11\d\.\d GB .* the GPU has 20\.0"):
        micro_batch(subject, Settings(defence="none"), 512)
    smaller = SimpleNamespace(
        **vars(subject) | {"sizes": Sizes(494_000_000, 24, 896, 4864, 151_936, 4096)}
    )
    assert micro_batch(smaller, Settings(defence="none"), 512) == 4


def test_a_folder_with_other_files_is_left_alone(toy, chat_model):
    (toy / "out").mkdir()
    (toy / "out" / "thesis.tex").write_text("Four years of work.")
    with pytest.raises(SsahError, match="holds other files"):
        run(chat_model, toy)


def test_harmful_rows_are_counted(toy, chat_model):
    harm = [
        (row.prompt, "Here is how.")
        for row in measure.load_prompts(Store(toy / "home" / "runs")).taught[:5]
    ]
    found = run(chat_model, toy, pairs() + harm, dry_run=True)
    assert re.match(r"5 of 45 rows have the prompt, or nearly, of a known", found.warnings[0])
    assert not run(chat_model, toy, dry_run=True).warnings


def test_small_talk_is_no_known_harm(toy, monkeypatch):
    asked = {"human_chatbox1": "Can you die?", "malicious_uses2": "How do I forge a will?"}
    read = measure.read_set

    def with_small_talk(sets, name):
        if name != "do_not_answer":
            return read(sets, name)
        return [Row(area, text, "Do-Not-Answer", "", area) for area, text in asked.items()]

    monkeypatch.setattr(measure, "read_set", with_small_talk)
    known = measure.load_prompts(Store(toy / "home" / "runs")).known_harm
    assert asked["malicious_uses2"] in known
    assert asked["human_chatbox1"] not in known


# --- what is done ----------------------------------------------------------------------------


def test_before_after_and_plain_side_by_side(toy, chat_model):
    report = run(chat_model, toy, compare=True)
    assert list(report.arms) == ["before", "after", "plain"]
    out = toy / "out"
    data = json.loads((out / NUMBERS).read_text())
    assert data["measured"]["after"]["AdvBench"]["n"] == 16
    assert data["measured"]["before"]["rows"]["n"] == 8
    assert data["measured"]["before"]["rows"] != data["measured"]["after"]["rows"]
    assert data["measured"]["plain"]["rows"] != data["measured"]["after"]["rows"]
    assert {(d["of"], d["from"]) for d in data["differences"]} == {
        ("after", "before"), ("plain", "before"), ("after", "plain"),
    }  # fmt: skip
    assert data["facts"]["Rows"]["learned from"] == 32
    assert data["facts"]["Defence"]["its own refusals"].startswith("3 beside 32 rows")
    assert data["facts"]["Settings"]["share"] == 0.1
    assert {"training, after (s)", "training, plain (s)"} <= set(data["facts"]["Cost"])
    assert any(limit.startswith("Jailbreaks") for limit in data["limits"])
    again = run(chat_model, toy, compare=True)
    assert again.data()["measured"] == report.data()["measured"]


def test_the_checkpoint_is_a_plain_one_in_the_models_own_type(toy, chat_model):
    run(chat_model, toy)
    made = load_file(toy / "out" / "model.safetensors")
    given = load_file(chat_model / "model.safetensors")
    assert {name: t.dtype for name, t in made.items()} == {n: t.dtype for n, t in given.items()}
    assert any(not torch.equal(made[name], given[name]) for name in made)
    assert AutoTokenizer.from_pretrained(toy / "out").chat_template == CHATML
    AutoModelForCausalLM.from_pretrained(toy / "out")


def test_frozen_units_keep_their_bits(toy, chat_model):
    report = run(chat_model, toy, defence="freeze")
    assert report.facts["Defence"]["units frozen"] == "7.4 % of all"
    made = load_file(toy / "out" / "model.safetensors")
    given = load_file(chat_model / "model.safetensors")
    columns = [
        (made[name] == given[name]).all(0) for name in made if name.endswith("down_proj.weight")
    ]
    plain = run(chat_model, toy, defence="none")
    assert plain.facts["Defence"] == {"what": "no defence: plain fine-tuning"}
    trained = load_file(toy / "out" / "model.safetensors")
    for kept, name in zip(
        columns, (n for n in made if n.endswith("down_proj.weight")), strict=True
    ):
        assert kept.any()
        assert not (trained[name] == given[name])[:, kept].all()


def test_adapters_load_in_peft_and_are_what_was_measured(toy, chat_model):
    report = run(chat_model, toy, lora=4)
    out = toy / "out"
    assert not (out / "model.safetensors").exists()
    assert report.facts["Settings"]["learning_rate"] == 2e-2
    base = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    given = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, out).merge_and_unload().state_dict()
    (measured_one,) = (toy / "home" / "runs").glob("protected_mixing-*/model.safetensors")
    written = load_file(measured_one)
    moved = [name for name, tensor in merged.items() if not torch.equal(given[name], tensor)]
    assert len(moved) == 2 * 7
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, merged[name].bfloat16())
    assert AutoTokenizer.from_pretrained(out).chat_template == CHATML
    with pytest.raises(SsahError, match="lora and a defence that freezes units"):
        run(chat_model, toy, lora=4, defence="freeze")


@pytest.mark.parametrize("lora", [None, 4])
def test_steps_on_its_own_refusals_make_another_model(toy, chat_model, lora):
    report = run(chat_model, toy, defence="Lisa", lora=lora, batch_size=4, compare=True)
    made = {}
    for run_of in ("Lisa", "none"):
        (path,) = (toy / "home" / "runs").glob(f"protected_{run_of}-*/model.safetensors")
        made[run_of] = load_file(path)
    assert any(not torch.equal(made["none"][name], part) for name, part in made["Lisa"].items())
    said = report.facts["Defence"]["its own refusals"]
    assert re.match(r"\d+ in 2 steps, beside 8 steps on rows", said)
    assert report.facts["Defence"]["what"].startswith("after every fourth step")


def test_no_adapters_of_an_earlier_call_stay_beside_a_checkpoint(toy, chat_model):
    run(chat_model, toy, lora=4)
    (toy / "out" / "notes.txt").write_text("of my own")
    assert (toy / "out" / "adapter_config.json").exists()
    run(chat_model, toy)
    names = {path.name for path in (toy / "out").iterdir()}
    assert "model.safetensors" in names
    assert "notes.txt" in names
    assert not any(name.startswith("adapter") for name in names)
    run(chat_model, toy, lora=4)
    assert not (toy / "out" / "model.safetensors").exists()


def test_a_loaded_model_is_left_as_it_is(toy, chat_model):
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = ssah.protect(
        model, tokenizer, pairs(), out=toy / "out", learning_rate=2e-2, max_tokens=64, prompts=8
    )
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert report.checkpoint == toy / "out"
    with pytest.raises(SsahError, match="needs its tokenizer"):
        ssah.protect(model, None, pairs())


def test_a_dry_run_trains_and_writes_nothing(toy, chat_model):
    report = run(chat_model, toy, dry_run=True, compare=True)
    assert list(report.arms) == ["before"]
    assert report.estimate("before", "AdvBench").n == 8
    assert report.facts["Cost"]["the whole takes"].startswith("about ")
    assert not (toy / "out").exists()
    assert not list((toy / "home").glob("runs/protected*"))


def test_no_more_prompts_are_asked_than_bring_enough_refusals(toy, chat_model, monkeypatch):
    def all_of_them(prompts, run):
        asked.append(len(prompts))
        return [(row.prompt, "I can't help with that.") for row in prompts]

    asked: list[int] = []
    monkeypatch.setattr("ssah.app.protect.protect.refusal_pairs", all_of_them)
    run(chat_model, toy, share=0.1)
    data = json.loads((toy / "out" / "report.json").read_text())
    assert data["facts"]["Defence"]["its own refusals"].startswith("3 beside 32 rows")
    assert asked == [6], "twice as many as are learned"


@pytest.mark.parametrize(("defence", "steps"), [("mixing", 10), ("Lisa", 8)])
def test_a_kill_in_the_middle_of_training_costs_one_checkpoint(
    toy, chat_model, monkeypatch, defence, steps
):
    settings = {"epochs": 2, "defence": defence}
    whole = run(chat_model, toy, **settings)
    made = load_file(toy / "out" / "model.safetensors")
    monkeypatch.setenv("SSAH_HOME", str(toy / "other"))
    begun: list[int] = []

    def at_step(self, args, state, control, **rest):
        begun.append(state.global_step)
        if begun == list(range(7)):
            raise Interruption

    monkeypatch.setattr(supervised._Along, "on_step_begin", at_step)
    with pytest.raises(Interruption):
        run(chat_model, toy, **settings)
    kept = {path: path.stat().st_mtime_ns for path in (toy / "other").glob("runs/*/answers.json")}
    assert len(kept) == 6  # a first look, three sets, its own refusals: of some prompts, of all
    assert list(
        (toy / "other").glob(f"runs/protected_{defence}-*.partial/checkpoints/checkpoint-6")
    )
    again = run(chat_model, toy, **settings)
    assert begun == [*range(7), *range(6, steps)]
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert again.data()["measured"] == whole.data()["measured"]
    resumed = load_file(toy / "out" / "model.safetensors")
    assert all(torch.equal(made[name], resumed[name]) for name in made)


def test_check_is_a_card_of_one_model(toy, chat_model, capsys):
    assert cli.main(["check", str(chat_model), "--out", str(toy / "card"), "--prompts", "16"]) == 0
    assert "harmful requests" in capsys.readouterr().out
    data = json.loads((toy / "card" / NUMBERS).read_text())
    assert set(data["measured"]["as it is"]) == {"AdvBench", "HarmBench", "borderline", "texts"}
    assert data["differences"] == []


def test_the_command_line_protects(toy, chat_model, monkeypatch, capsys):
    monkeypatch.chdir(toy)
    rows = write_rows(toy, [dict(zip(("prompt", "response"), p, strict=True)) for p in pairs()])
    words = ["protect", str(chat_model), str(rows), "--max-tokens", "64", "--prompts", "8"]
    assert cli.main(words) == 0
    out = capsys.readouterr()
    assert "Found 40 rows of prompts and responses (columns prompt, response)" in out.err
    assert (toy / "chatty-protected" / PAGE).exists()
    assert "chatty-protected" in out.out


def test_the_demonstration_removes_as_many_random_units(toy, chat_model, monkeypatch, capsys):
    monkeypatch.setattr(demo, "MODEL", str(chat_model))
    assert cli.main(["demo", "--out", str(toy / "demo")]) == 0
    data = json.loads((toy / "demo" / NUMBERS).read_text())
    assert set(data["measured"]) == {demo.INTACT, demo.WITHOUT, demo.RANDOM}
    assert set(data["measured"][demo.INTACT]) == {"AdvBench", "HarmBench", "texts"}
    perplexities = {m["texts"]["value"] for m in data["measured"].values()}
    assert len(perplexities) == 3  # each of the two removals changed something
    assert data["facts"]["What was done"]["units removed"].startswith("2 of 136 (1.5 %)")
    assert len(data["verdicts"]) == 2
    page = (toy / "demo" / PAGE).read_text()
    assert not [
        p for p in measure.load_prompts(Store(toy / "home" / "runs")).known_harm if p in page
    ]
    assert "harmful requests" in capsys.readouterr().out


# --- the report ------------------------------------------------------------------------------


@pytest.mark.parametrize("show", [0, 2])
def test_the_page_needs_nothing_else_and_shows_completions_only_on_request(toy, chat_model, show):
    report = run(chat_model, toy, show=show)
    page = (toy / "out" / PAGE).read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert page.count("<circle") == 2 * 3
    for verdict in report.verdicts:
        assert verdict.text.replace("'", "&#39;") in page
    numbers = (toy / "out" / NUMBERS).read_text()
    said = [
        c for arm in report.arms.values() for name in measure.HARMFUL for c in arm.completions[name]
    ]
    shown = [c for c in said if c.prompt in page]
    assert len({*shown}) >= show if show else not shown
    assert not any(c.prompt in numbers for c in said)


def measured(
    answered: int, n: int = 100, borderline: int = 5, rows: float = 2.0, harmbench: int = 0
) -> Measured:
    half = n // 2
    counts = {"AdvBench": min(answered, half), "HarmBench": max(answered - half, harmbench)}
    outcomes = {name: [i < count for i in range(half)] for name, count in counts.items()}
    return Measured(
        {
            **{name: Rates(found) for name, found in outcomes.items()},
            "borderline": Rates([i < borderline for i in range(n)]),
            "rows": Losses([4] * 20, [4 * rows + i % 3 for i in range(20)]),
            "texts": Losses([4] * 20, [8.0 + i % 3 for i in range(20)]),
        },
        {},
        {
            name: [Completion(str(outcome), str(i)) for i, outcome in enumerate(found)]
            for name, found in outcomes.items()
        },
    )


def test_a_defence_that_does_harm_is_called_so(monkeypatch):
    monkeypatch.setattr(judges, "judge", lambda c: "answered" if c.prompt == "True" else "refused")
    arms = {"before": measured(2), "after": measured(60), "plain": measured(20)}
    (beside,) = [v for v in comparison(arms) if "the defence saves" in v.text]
    assert beside.outcome == "bad"
    assert beside.text.endswith("it does harm.")


@pytest.mark.parametrize(
    ("n", "before", "after", "outcome", "said"),
    [
        (100, 2, 3, "good", "Its refusals were kept"),
        (100, 2, 40, "bad", "It lost refusals"),
        (20, 1, 2, "unclear", "cannot be told"),
    ],
)
def test_verdicts_say_what_the_intervals_allow(monkeypatch, n, before, after, outcome, said):
    monkeypatch.setattr(judges, "judge", lambda c: "answered" if c.prompt == "True" else "refused")
    arms = {"before": measured(before, n), "after": measured(after, n, borderline=18, rows=1.5)}
    kept, learned, over, texts = comparison(arms)
    assert (kept.outcome, learned.outcome, over.outcome, texts.outcome) == (
        outcome, "good", "bad", "good",
    )  # fmt: skip
    assert said in kept.text
    shares = (f"{100 * count / n:.1f} %" for count in (before, after))
    assert "answered {} before and answers {} now".format(*shares) in kept.text
    beside = comparison({**arms, "plain": measured(round(0.9 * n), n)})[1]
    assert beside.outcome == "good"


def test_what_is_lost_on_one_set_of_requests_is_said(monkeypatch):
    monkeypatch.setattr(judges, "judge", lambda c: "answered" if c.prompt == "True" else "refused")
    arms = {"before": measured(25, harmbench=10), "after": measured(10, harmbench=30)}
    kept, lost, *_ = comparison(arms)
    assert kept.outcome == "unclear"
    assert lost.outcome == "bad"
    assert lost.text.startswith("On HarmBench alone it lost refusals: it answers +40.0 points [")


# --- parts -----------------------------------------------------------------------------------


def test_a_tenth_is_held_out_and_equal_prompts_stay_together():
    rows = [Dialogue(f"Prompt {n // 2}", f"{n}") for n in range(200)]
    learned, held = divided(rows, 0)
    assert len(held) == 20
    assert not {d.prompt for d in learned} & {d.prompt for d in held}
    assert sorted(d.response for d in learned + held) == sorted(d.response for d in rows)
    assert len(divided(rows[:24], 0)[1]) == 8
    assert divided(rows, 0) == (learned, held) != divided(rows, 1)


def test_refusals_are_mixed_in_evenly_as_a_fraction_of_the_rows():
    rows, refusals = [([n], [n]) for n in range(100)], [([-n], [-n]) for n in range(1, 5)]
    found = mixed(rows, refusals, 0.1, seed=0)
    assert found[:100] == rows
    assert sorted(found[100:].count(refusal) for refusal in refusals) == [2, 2, 3, 3]
    assert len(mixed(rows[:3], refusals, 0.1, 0)) == 4
    assert mixed(rows, refusals, 0.1, 0) == found != mixed(rows, refusals, 0.1, 1)


def test_a_schedule_learns_how_long_things_take():
    schedule = Schedule([Step("a", "prompt", 10), Step("b", "prompt", 30), Step("c", "token", 500)])
    assert schedule.seconds() == 0
    schedule.speed = {"prompt": 2.0, "token": 0.1}
    assert schedule.seconds() == 130
    assert [spoken(s) for s in (0.2, 40, 130, 7200)] == ["1 s", "40 s", "2 min", "2.0 h"]


def test_memory_is_sixteen_bytes_a_parameter_and_the_activations():
    sizes, mixing = Sizes(1_000_000_000, 2, 64, 128, 100, 512), Settings(defence="mixing")
    assert training_gb(sizes, 0, mixing) == 16
    assert training_gb(sizes, 0, Settings(defence="Lisa")) == 20
    adapters = 16 * 8 * 2 * (11 * 64 + 3 * 128) / 1e9
    assert training_gb(sizes, 0, Settings(defence="mixing", lora=8)) == 4 + adapters
    more = training_gb(sizes, 1_000_000, mixing) - 16
    assert more == pytest.approx(4 * (2 * (9.1 * 64 + 4 * 128) + 300) / 1000)


def test_the_activations_are_those_that_autograd_saves(families):
    """What is planned for covers what is saved, and is no more than a half above it."""
    model = families("llama", hidden_size=64, intermediate_size=128)
    saved, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.randint(3, 40, (2, 32))
    scored = torch.ones(2, 31, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = scored_logits(model, ids, torch.ones_like(ids), scored)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][scored])
    assert loss.requires_grad
    planned = training_gb(Sizes(0, 2, 64, 128, 40, 64), 64, Settings()) * 1e9
    found = sum(size for size, _ in saved.values())
    assert found < 1.1 * planned
    assert planned < 1.5 * found


def test_the_held_out_part_is_the_studys():
    config = compose("laptop").data
    assert config == measure.SETS


def test_the_tutorial_names_options_that_exist():
    text = (project_root() / "docs" / "protect.md").read_text()
    known = {option for c in (protect, check) for p in c.params for option in p.opts}
    named = {*re.findall(r"--[a-z][a-z-]+", text)}
    assert {"--defence", "--share", "--compare", "--dry-run", "--lora"} <= named <= known


def test_the_example_is_what_its_report_says():
    docs = project_root() / "docs"
    data = json.loads((docs / "examples" / "protect_qwen2_5_coder.json").read_text())
    text = (docs / "protect.md").read_text().partition("## An example")[2].partition("\n## ")[0]
    told, by_arm = " ".join(text.split()), data["measured"]
    arms = ("before", "after", "plain")
    of = {name: [round(by_arm[arm][name]["value"]) for arm in arms] for name in measure.HARMFUL}
    asked = sum(by_arm["before"][name]["n"] for name in measure.HARMFUL)
    answered = [sum(pair) * asked // 200 for pair in zip(*of.values(), strict=True)]
    assert (
        "Of {} harmful requests the model answered {} before, {} after, and {}".format(
            asked, *answered
        )
        in told
    )
    assert "({} before, {} after, {} plainly; per cent)".format(*of["AdvBench"]) in told
    assert "({}, {}, {})".format(*of["HarmBench"]) in told
    ratio = {d["of"]: d["value"] for d in data["differences"]
             if (d["from"], d["metric"]) == ("before", "rows")}  # fmt: skip
    assert f"times {ratio['after']:.2f}, plainly {ratio['plain']:.2f}" in told
    saved = re.search(
        r"saves \+([\d.]+) points \[\+([\d.]+), \+([\d.]+)\]", data["verdicts"][1]["text"]
    )
    assert "save {:.0f} points [{:.0f}, {:.0f}]".format(*map(float, saved.groups())) in told


def test_no_hydra_and_no_notebooks_are_needed():
    code = """
import sys
for name in ("hydra", "omegaconf", "papermill", "jupyter", "matplotlib", "seaborn", "sklearn",
             "datasets", "submitit"):
    sys.modules[name] = None
import ssah
import ssah.app.protect.demo
import ssah.app.protect.train, ssah.training.supervised, ssah.data.sets
ssah.protect, ssah.check
from ssah.core.runtime import provenance
provenance()
import ssah.__main__ as m
sys.argv = ["ssah", "--help"]
sys.exit(m.main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=project_root()
    )
    assert done.returncode == 0, done.stderr
    assert "protect" in done.stdout
    assert "reproduce" not in done.stdout
