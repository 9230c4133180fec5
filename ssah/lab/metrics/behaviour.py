"""What a model does: safety, utility, and what its training did."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from ...core.errors import SsahError, require_known
from ...data.rows import Row
from ...evaluate import judges
from ...evaluate.judges import VERDICTS, Completion, attack_success, not_refused, refused
from ...evaluate.labels import agreement, errors_of_answered, judged, key, known_labels
from ...evaluate.stats import corrected, proportion
from ...training.part import EVERYTHING, Part
from ..jailbreaks import JAILBREAKS, Jailbreak, with_prefix
from ..lab import Lab
from ..samples import (
    Alone,
    Found,
    LessonLosses,
    Pooled,
    Rates,
    Sample,
    Tasks,
    TextLosses,
    Values,
    counted,
    exact,
)
from ..specs import Model, Train
from ..stages.answers import completions
from ..stages.lessons import attack_rate, heldout, lesson, rises
from ..stages.utility import attack_losses, drift, held_out_texts, task_outcomes

#: Prompts as tables call them -> the set; ASR is of the evaluation prompts where nothing is said.
PROMPTS = {
    "": "harmful_evaluation",
    "AdvBench": "harmful_evaluation",
    "search": "harmful_search",
    "HarmBench": "harmbench",
    "Do-Not-Answer": "do_not_answer",
    "HEx-PHI": "hexphi",
    "benign": "benign_evaluation",
    "borderline": "borderline",
}

SYSTEM, PREFIX, BOTH = "with system prompt", "with prefix", "mean of both"

#: What else may be done with prompts than to ask them -> the completions. The first two are of the
#: evaluation prompts, jailbreaks of :func:`jailbroken`.
CONDITIONS: dict[str, Jailbreak] = {
    SYSTEM: functools.partial(completions, system=True),
    PREFIX: with_prefix,
    **JAILBREAKS,
}

#: Everything that prompts and conditions are called.
ASKED = (*PROMPTS, *CONDITIONS, BOTH)


def asked(lab: Lab, on: str) -> tuple[Row, ...]:
    """The prompts behind a name; of sets of other authors as many as configured."""
    counts = {
        "harmbench": lab.config.evaluate.harmbench,
        "do_not_answer": lab.config.evaluate.do_not_answer,
    }
    name = _set_of(on)
    return lab.spread(name, counts[name]) if name in counts else lab.rows(name)


def has_prompts(lab: Lab, on: str) -> bool:
    """Whether the data source has the prompts behind a name."""
    return lab.has(_set_of(prompts_of(lab, on)))


def prompts_of(lab: Lab, on: str) -> str:
    """The prompts that a condition is about; other names are those of prompts."""
    if on in JAILBREAKS:
        return jailbroken(lab)
    return "" if on in CONDITIONS or on == BOTH else on


def jailbroken(lab: Lab) -> str:
    """The prompts that jailbreaks are of: those that the experiment names, or AdvBench's where the
    data source has none of that name."""
    name = lab.config.experiment.jailbreak_prompts
    return name if lab.has(_set_of(name)) else "AdvBench"


def _set_of(on: str) -> str:
    require_known(on, PROMPTS, "There are no prompts")
    return PROMPTS[on]


def said(lab: Lab, model: Model, on: str) -> list[Completion]:
    """A model's completions under one condition."""
    complete = CONDITIONS.get(on, completions)
    return complete(lab, model, asked(lab, prompts_of(lab, on)))


def is_share(metric: str) -> bool:
    """Whether a metric is the share of some items, in per cent."""
    return metric in (*VERDICTS, "ASR", "no refusal phrase", "accuracy", CORRECTED)


def _judged(count: Callable[[list[Completion]], list[bool]]) -> Callable[[Lab, Model, str], Sample]:
    """A metric that counts completions of one kind."""

    def measure(lab: Lab, model: Model, on: str) -> Sample:
        if on == BOTH:
            return Pooled([Rates(count(said(lab, model, part))) for part in ("", SYSTEM)])
        return Rates(count(said(lab, model, on)))

    return measure


def _heldout(lab: Lab, model: Model, on: str) -> Sample:
    """Rows whose prompt was trained on with another response do not count."""
    seen = {row.prompt for row in lesson(lab, on).rows}
    losses = zip(heldout(lab, on).rows, *attack_losses(lab, model, on), strict=True)
    kept = [(count, loss) for row, count, loss in losses if row.prompt not in seen]
    if not kept:
        raise SsahError(
            f"No held-out row of '{on}' has a prompt of its own: give prompts that differ."
        )
    return LessonLosses(*zip(*kept, strict=True))


def _training(lab: Lab, model: Model, on: str) -> Sample:
    """What the training did, whether or not its models are still there."""
    assert isinstance(model.step, Train)
    record = lab.training(model).json("training.json")
    losses = record["epoch_losses"]
    loss = losses[lab.epoch_of(model.step) - 1] if losses else record["final_loss"]
    held = trained = record["trainable_parameters"]  # held: what the optimizer has moments of
    part = model.step.part
    if part == EVERYTHING:
        held = trained = round(lab.layout.parameters)
    elif isinstance(part, Part) and part.train is not None and part.rank is None:
        held = trained = round(lab.layout_of(part.train.unit_kind).weights(part.train))
    elif isinstance(part, Part) and part.freeze is not None:
        frozen = lab.layout_of(part.freeze.unit_kind).weights(part.freeze)
        trained = round(lab.layout.parameters - frozen)
    found = {
        "training loss": loss,
        "trained weights": 100 * trained / lab.layout.parameters,
        "optimizer MiB": 8 * held / 2**20,  # two float32 moments
    }
    steps = record["steps"]
    return Alone("Counted", counted, {name: (value, steps) for name, value in found.items()})


def _strength(lab: Lab, model: Model, on: str) -> Sample:
    """At which rate the attacks are, and by how many points of ASR each that was tried raised that
    of the search prompts."""
    prompts, found = len(lab.rows(PROMPTS["search"])), rises(lab)
    tried = {f"rise at rate {rate:g}": (rise, prompts) for rate, rise in found.items()}
    rate = {"attack rate": (attack_rate(lab), len(found))}
    return Alone("Counted", counted, rate | tried)


#: Answered, as a judge without errors would find it.
CORRECTED = "answered, corrected"

#: What is known of the judges where there are labels, by verdict.
AGREEMENT = ("accuracy of the judges", "labelled", "judged", "kappa", "precision", "recall")


def _shares(found: Sequence[str], errors: tuple[list[bool], list[bool]]) -> Found:
    """The judges' verdicts, and how often they call answers what is labelled so, or not."""
    for verdict in VERDICTS:
        share = proportion([v == verdict for v in found]).scaled(100)
        yield {"metric": verdict}, share, None
    answered = [v == "answered" for v in found]
    yield {"metric": CORRECTED}, corrected(answered, *errors).scaled(100), None


def _verdicts(lab: Lab, model: Model, on: str) -> Sample:
    found, errors = judged(said(lab, model, on)), errors_of_answered(lab.config.model.name)
    return Alone("Verdicts", _shares, found, errors)


def _agreements(labels: Sequence[str], verdicts: Sequence[str]) -> Found:
    """Labels and verdicts of the completions that are labelled."""
    if not labels:
        return
    for record in agreement(labels, verdicts).to_dict("records"):
        verdict = record["verdict"]
        pairs = zip(labels, verdicts, strict=True)
        right = proportion([(a == verdict) == (b == verdict) for a, b in pairs]).scaled(100)
        yield {"metric": AGREEMENT[0], "set": verdict}, right, None
        for name in AGREEMENT[1:]:
            value = exact(float(record[name]), len(labels))
            yield {"metric": name, "set": verdict}, value, None


def _labels(lab: Lab, model: Model, on: str) -> Sample:
    """Labels of the half that chose nothing, found by a hash of prompt and completion."""
    known = known_labels()
    tested = known[known["half"] == "test"].set_index("key")["label"]
    found = {key(c): c for c in said(lab, model, on)}
    own = {name: c for name, c in found.items() if name in tested.index}
    labels, verdicts = [tested[name] for name in own], judged(list(own.values()))
    return Alone("Labelled", _agreements, labels, verdicts)


BEHAVIOUR: dict[str, Callable[[Lab, Model, str], Sample]] = {
    "ASR": _judged(attack_success),
    "no refusal phrase": _judged(not_refused),
    "refused": _judged(refused),
    "evaded": _judged(lambda found: [judges.judge(c) == "evaded" for c in found]),
    "incoherent": _judged(lambda found: [judges.judge(c) == "incoherent" for c in found]),
    "verdicts": _verdicts,
    "labels": _labels,
    "perplexity": lambda lab, model, on: TextLosses(*held_out_texts(lab, model)),
    "held-out gain": _heldout,
    "accuracy": lambda lab, model, on: Tasks(task_outcomes(lab, model)),
    "drift": lambda lab, model, on: Values(drift(lab, model)),
    "training": _training,
    "strength": _strength,
}
