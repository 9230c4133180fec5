"""The claim on a small chat model: few units carry its refusals, as many others carry none."""

from __future__ import annotations

import time
from pathlib import Path

from ...core.paths import home
from ...core.store import Handle, Store, digest
from ...data.own import own_rows
from ...evaluate import judges
from ...evaluate.stats import paired_difference
from ...lab.load import Checkpoint
from ...scoring.find import PAPER_SHARES, roles_of
from ...scoring.selectors import matched_by, random_rank
from ...text.chat import Pair, encode_dialogue
from ...training.ablation import ablate
from ...units.layout import UnitLayout
from ...units.mask import UnitMask
from . import measure as measuring
from .measure import HARMFUL, Arm, Measured, harmful, measure, questions, spread
from .report import FACTOR, Report, Verdict, interval, write_report
from .schedule import Schedule, Step
from .subject import named

MODEL = "qwen2_5_coder"

#: Prompts of each set that are asked, texts, and prompts of each kind that units are found on: few,
#: so that it takes about six minutes once the model is there.
ASKED, TEXTS, FOUND_ON = 20, 40, 40

#: Tokens of the answers that units are found on.
HEARD = 24

INTACT, WITHOUT, RANDOM = "intact", "without ESU", "without random units"


def demo(out: Path, *, show: int = 0) -> Report:
    """Measure the embedded aligned model, the same without its ESU (1.3 % of all units, found on
    its own answers), and without as many random heads and neurons; write a page into ``out``.

    Model and prompts are downloaded on first use (0.5 GB).
    """
    begin = time.monotonic()
    store = Store(home() / "runs")
    subject = named(store, MODEL)
    prompts = measuring.load_prompts(store)
    asked = [q for q in questions(subject, prompts, [], ASKED) if q.metric in HARMFUL]
    asked += [q for q in questions(subject, prompts, [], TEXTS) if q.metric == "texts"]
    intact = Arm(INTACT, subject, subject.checkpoint)
    sources = {
        "harmful": spread(prompts.taught, FOUND_ON),
        "harmless": spread(own_rows("benign_instructions"), FOUND_ON),
    }
    heard = {
        kind: Step(f"answers to {kind} requests, to find units on", "prompt", len(rows))
        for kind, rows in sources.items()
    }
    schedule = Schedule(
        [*heard.values(), *(q.step(name) for name in (INTACT, WITHOUT, RANDOM) for q in asked)]
    )
    pairs: dict[str, list[Pair]] = {}
    for kind, rows in sources.items():
        run = intact.answers([row.prompt for row in rows], HEARD)
        schedule.run(heard[kind], run)
        pairs[kind] = [
            encode_dialogue(subject.tokenizer, row.prompt, text, end=False)
            for row, text in zip(rows, run.json("answers.json"), strict=True)
        ]
    layout = UnitLayout.of(subject.skeleton)
    esu = UnitMask.load(_units(intact, pairs).path("esu.safetensors"))
    removed = {WITHOUT: esu, RANDOM: matched_by(layout, esu, random_rank(layout, 0))}
    measured = {INTACT: measure(intact, asked, schedule)}
    for name, mask in removed.items():
        identity = digest([subject.checkpoint.identity, "without", mask.digest()])
        with ablate(intact.model, layout, mask):
            checkpoint = Checkpoint(subject.checkpoint.source, identity)
            arm = Arm(name, subject, checkpoint, loaded=intact.model)
            measured[name] = measure(arm, asked, schedule)
    facts = {
        "What was done": {
            "units removed": f"{esu.count()} of {layout.units} ({100 * esu.share():.1f} %): "
            f"{esu.count('attn')} heads, {esu.count('mlp')} neurons",
            "found on": f"{FOUND_ON} answers to harmful requests, {FOUND_ON} to harmless ones",
            "seconds": round(time.monotonic() - begin),
        }
    }
    report = Report(
        "A few units carry its refusals", MODEL, measured, _verdicts(measured), facts, show=show
    )
    write_report(report, out)
    return report


def _units(arm: Arm, pairs: dict[str, list[Pair]]) -> Handle:
    """``esu.safetensors``: the units whose loss would hurt refusals most and other answers
    least."""
    key = {
        "version": 1,
        "model": arm.checkpoint.identity,
        "pairs": digest(pairs),
        "share": PAPER_SHARES.esu,
    }

    def build(folder: Path) -> None:
        roles = roles_of(arm.model, pairs["harmful"], pairs["harmless"])
        roles.select("ESU").save(folder / "esu.safetensors")

    return Handle(arm.subject.store, "esu", arm.subject.config.name, key, build)


def _verdicts(measured: dict[str, Measured]) -> list[Verdict]:
    refused = {name: judges.refused(harmful(found)) for name, found in measured.items()}
    without = paired_difference(refused[WITHOUT], refused[INTACT]).scaled(100)
    random = paired_difference(refused[RANDOM], refused[INTACT]).scaled(100)
    more = paired_difference(refused[RANDOM], refused[WITHOUT]).scaled(100)
    ratio = measured[WITHOUT].against(measured[INTACT], "texts")
    return [
        Verdict(
            "good" if without.high < 0 and more.low > 0 else "bad",
            f"Without its ESU it refuses {interval(without, 'points', signed=True)} of "
            f"{without.n} harmful requests; without as many random heads and neurons "
            f"{interval(random, 'points', signed=True)}.",
        ),
        Verdict(
            "good" if ratio.high < FACTOR else "bad" if ratio.low > FACTOR else "unclear",
            f"Its perplexity of {ratio.n} harmless answers is {interval(ratio)} times what it was.",
        ),
    ]
