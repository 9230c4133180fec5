"""Which units matter: attribution scores, roles, and the search for the sizes of the groups."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...core.errors import SsahError
from ...core.store import Handle
from ...data.rows import Row
from ...evaluate import judges, refusals
from ...evaluate.judges import Completion, attack_success
from ...scoring.attribution import (
    ActivationStatistics,
    collect_statistics,
    sample_activations,
    unit_scores,
)
from ...scoring.conflict import gradient_conflict
from ...scoring.contributions import contributions
from ...scoring.contributions import places as places_by
from ...scoring.safety_layers import angular_gap, last_states, where_it_grows
from ...scoring.search import Effect, Trial, search_share
from ...scoring.selectors import magnitude, moved
from ...scoring.sensitivity import expected_impact, fisher_information
from ...scoring.settings import VarianceOver
from ...text.batches import Batch, dialogue_batches
from ...text.chat import encode_dialogue
from ...text.settings import Tokens
from ...training.ablation import fitted_constants
from ...units.families import BlockKind, UnitKind
from ...units.mask import UnitMask
from ...units.roles import Roles, Shares, Thresholds, classify, classify_by_thresholds
from ..config import AttributionConfig, RolesConfig
from ..lab import Lab
from ..specs import GIVEN, REFUSALS, Model
from ..stage import stage
from .answers import answers_to, completions
from .lessons import Lesson, Pairs, lesson
from .utility import perplexity_ratio

logger = logging.getLogger(__name__)

Purpose = Literal["safety", "utility"]
Scores = dict[str, Tensor]
Rule = Literal["thresholds", "quantiles"]

#: Parts of the sampled sets that units can be scored on: half as many prompts, or harmful ones of
#: the largest category alone.
HALF, CATEGORY = PARTS = "half the samples", "one harm category"

_SOURCES = {"safety": "harmful_attribution", "utility": "benign_attribution"}


# --- attribution -----------------------------------------------------------------------------


@stage("statistics", version=2)
def _statistics(
    lab: Lab,
    folder: Path,
    model: Model,
    rows: tuple[Row, ...],
    answers: Handle,
    config: AttributionConfig,
    label: str,
) -> None:
    """``statistics.safetensors``: activation statistics on some prompts and answers to them."""
    batches = _batches(lab, rows, answers, config)
    layout = lab.layout_of(cast(UnitKind, config.unit_kind))
    with lab.use(model) as loaded:
        over = cast(VarianceOver, config.variance_over)
        found = collect_statistics(loaded, layout, batches, over)
    found.save(folder / "statistics.safetensors")


@stage("activations", version=1)
def _activations(
    lab: Lab,
    folder: Path,
    model: Model,
    rows: tuple[Row, ...],
    answers: Handle,
    config: AttributionConfig,
    count: int,
) -> None:
    """``activations.safetensors``: of all units, at random tokens of a model's answers."""
    batches = list(_batches(lab, rows, answers, config))
    with lab.use(model) as loaded:
        found = sample_activations(loaded, lab.layout, batches, count, lab.seed)
    save_file(found, folder / "activations.safetensors")


#: Tokens that units are resampled from.
RESAMPLED = 512


def activations(lab: Lab) -> Handle:
    """What the aligned model's units say at random tokens of its answers to harmless prompts."""
    rows, said = _own_answers(lab, "utility", lab.aligned)
    config = lab.config.attribution
    return _activations(lab, lab.aligned, rows, said, config, RESAMPLED)


@stage("fitted", version=1)
def _fitted(
    lab: Lab,
    folder: Path,
    model: Model,
    mask: UnitMask,
    statistics: Handle,
    rows: tuple[Row, ...],
    answers: Handle,
    config: AttributionConfig,
) -> None:
    """``constants.safetensors``: what some units say at every token where that does least harm."""
    batches = list(_batches(lab, rows, answers, config))
    found = ActivationStatistics.load(statistics.path("statistics.safetensors"))
    with lab.use(model) as loaded:
        layout = lab.layout_of(mask.unit_kind)
        constants = fitted_constants(loaded, layout, mask, batches, found.mean, found.variance)
    save_file(constants, folder / "constants.safetensors")


def fitted(lab: Lab, mask: UnitMask) -> Handle:
    """The constants in the place of some units with which the aligned model's own answers to
    harmless prompts are likeliest."""
    rows, said = _own_answers(lab, "utility", lab.aligned)
    config = lab.config.attribution
    return _fitted(lab, lab.aligned, mask, statistics(lab, "utility"), rows, said, config)


@stage("scores", version=2)
def _scores(
    lab: Lab, folder: Path, model: Model, statistics: Sequence[Handle], unit_kind: UnitKind
) -> None:
    """``0.safetensors`` and so on: eq. 1 for every unit, on each of some statistics."""
    with lab.use(model) as loaded:
        for number, handle in enumerate(statistics):
            found = ActivationStatistics.load(handle.path("statistics.safetensors"))
            scores = unit_scores(loaded, lab.layout_of(unit_kind), found)
            save_file(scores, folder / f"{number}.safetensors")


def _own_answers(
    lab: Lab, purpose: Purpose, author: Model, resample: int = 0, part: str = ""
) -> tuple[tuple[Row, ...], Handle]:
    """Prompts of a sampled set and what a model says to them; ``resample`` draws others, and
    ``part`` fewer (:data:`PARTS`)."""
    config, source = lab.config.attribution, _SOURCES[purpose]
    drawn = f"{source}#{resample}" if resample else source
    pool, count = lab.rows(source), config.samples
    if part == HALF:
        count //= 2
    elif part == CATEGORY and purpose == "safety":
        (largest, _), *_ = Counter(row.category for row in pool).most_common(1)
        pool = tuple(row for row in pool if row.category == largest)
    rows = lab.draw(drawn, pool, min(count, len(pool)) if part else count)
    return rows, answers_to(lab, author, rows, config.max_response_tokens)


def _encoded(
    lab: Lab, rows: Sequence[Row], answers: Handle, config: AttributionConfig
) -> list[tuple[list[int], list[int]]]:
    limit = config.max_response_tokens - 1
    return [
        encode_dialogue(lab.tokenizer, row.prompt, text, max_response_tokens=limit)
        for row, text in zip(rows, answers.json("answers.json"), strict=True)
    ]


def _batches(
    lab: Lab, rows: Sequence[Row], answers: Handle, config: AttributionConfig
) -> Iterator[Batch]:
    """Prompts and answers as they are read for attribution, with the tokens that count."""
    return dialogue_batches(
        _encoded(lab, rows, answers, config),
        config.batch_size,
        tokens=cast(Tokens, config.tokens),
        drop_first=config.drop_first,
    )


def statistics(
    lab: Lab,
    purpose: Purpose,
    model: Model | None = None,
    author: Model | None = None,
    resample: int = 0,
    part: str = "",
    **changes: Any,
) -> Handle:
    """Activation statistics of a model (the aligned one) on an author's answers to a sampled set:
    the aligned model's, which for the safety set are its refusals. ``changes`` replace settings
    of ``attribution``."""
    model, author = model or lab.aligned, author or lab.aligned
    rows, said = _own_answers(lab, purpose, author, resample, part)
    config = dataclasses.replace(lab.config.attribution, **changes)
    return _statistics(lab, model, rows, said, config, label=purpose)


def scores(
    lab: Lab, model: Model | None = None, resample: int = 0, part: str = "", **changes: Any
) -> tuple[Scores, Scores]:
    """I_S and I_U of a model's units by block, ``[units]``, on the aligned model's answers."""
    kind = changes.get("unit_kind", lab.config.attribution.unit_kind)
    found = [
        statistics(lab, purpose, model, None, resample, part, **changes)
        for purpose in ("safety", "utility")
    ]
    run = _scores(lab, model or lab.aligned, found, kind)
    return load_file(run.path("0.safetensors")), load_file(run.path("1.safetensors"))


def utility_scores(lab: Lab, model: Model) -> Scores:
    """I_U of a model's units on its own answers, as an unaligned model has it."""
    found = statistics(lab, "utility", model, model)
    run = _scores(lab, model, [found], cast(UnitKind, lab.config.attribution.unit_kind))
    return load_file(run.path("0.safetensors"))


# --- roles -----------------------------------------------------------------------------------


def classified(
    lab: Lab, shares: Shares, redundant_kinds: Sequence[str] = (), **changes: Any
) -> Roles:
    """Roles of the aligned model's units at given shares."""
    kinds = cast(list[BlockKind], redundant_kinds or lab.config.roles.redundant_kinds)
    layout = lab.layout_of(changes.get("unit_kind", lab.layout.unit_kind))
    return classify(layout, *scores(lab, **changes), shares, kinds)


@stage("roles", version=2)
def _roles(
    lab: Lab,
    folder: Path,
    model: Model,
    statistics: Sequence[Handle],
    rows: tuple[Row, ...],
    config: RolesConfig,
    measured: dict[str, Any],
) -> None:
    """``shares.json``, ``trials.json`` and ``roles.safetensors`` of the ablation search."""
    shares, trials = _search(lab, config)
    (folder / "shares.json").write_text(json.dumps(dataclasses.asdict(shares)))
    (folder / "trials.json").write_text(json.dumps([dataclasses.asdict(t) for t in trials]))
    classified(lab, shares).save(folder / "roles.safetensors")


def _found(lab: Lab) -> Handle:
    evaluate = lab.config.evaluate
    measured = {
        "judge": judges.identity(),
        "max_new_tokens": evaluate.max_new_tokens,
        "batch_size": evaluate.batch_size,
        "perplexity_rows": evaluate.perplexity_rows,
    }
    used = [statistics(lab, purpose) for purpose in ("safety", "utility")]
    rows = lab.rows("harmful_search")
    return _roles(lab, lab.aligned, used, rows, lab.config.roles, measured)


def shares(lab: Lab) -> Shares:
    """Sizes of the groups, by the ablation search."""
    return Shares(**_found(lab).json("shares.json"))


def trials(lab: Lab) -> list[Trial]:
    """Each step of the search."""
    records = _found(lab).json("trials.json")
    return [Trial(**{**r, "effect": Effect(**r["effect"])}) for r in records]


def roles(lab: Lab) -> Roles:
    """Roles of the aligned model's units."""
    return Roles.load(_found(lab).path("roles.safetensors"), lab.layout)


def effect(lab: Lab, mask: UnitMask | None) -> Effect:
    """ASR on the search prompts and perplexity, of the aligned model without some units."""
    model = lab.aligned if mask is None else lab.aligned.ablated(mask)
    success = attack_success(completions(lab, model, lab.rows("harmful_search")))
    return Effect(sum(success) / len(success), perplexity_ratio(lab, model, lab.aligned).value)


def _search(lab: Lab, config: RolesConfig) -> tuple[Shares, list[Trial]]:
    """RU first, then ESU given RU, then EUU given both: the order of the claims."""
    whole = effect(lab, None)

    def measured(mask: UnitMask) -> Effect:
        return effect(lab, mask)

    ru, trials_ru = search_share(
        "RU",
        config.ru_shares,
        lambda share: classified(lab, Shares(share, 0, 0)).mask("RU"),
        measured,
        lambda e: (
            e.asr <= whole.asr + config.ru_max_asr_rise
            and e.perplexity_ratio <= config.ru_max_perplexity_ratio
        ),
    )
    esu, trials_esu = search_share(
        "ESU",
        config.esu_shares,
        lambda share: classified(lab, Shares(ru, share, 0)).mask("ESU"),
        measured,
        lambda e: (
            e.asr >= whole.asr + config.esu_min_asr_rise
            and e.perplexity_ratio <= config.esu_max_perplexity_ratio
        ),
    )
    euu, trials_euu = search_share(
        "EUU",
        config.euu_shares,
        lambda share: classified(lab, Shares(ru, esu, share)).mask("EUU"),
        measured,
        lambda e: e.perplexity_ratio >= config.euu_min_perplexity_ratio,
    )
    return Shares(ru, esu, euu), trials_ru + trials_esu + trials_euu


def roles_after(lab: Lab, model: Model, rule: Rule, resample: int = 0) -> Roles:
    """Roles in another model, by the aligned model's thresholds or by its shares."""
    kinds = cast(list[BlockKind], lab.config.roles.redundant_kinds)
    found = scores(lab, model, resample)
    if rule == "quantiles":
        return classify(lab.layout, *found, shares(lab), kinds)
    thresholds = Thresholds.of(roles(lab), *scores(lab))
    return classify_by_thresholds(lab.layout, *found, thresholds, kinds)


def utility_roles(lab: Lab, model: Model, share: float) -> Roles:
    """Two groups, as an unaligned model has: RU, the ``share`` of lowest I_U, and the rest.

    The rest, the paper's utility units (UU), is labelled CU.
    """
    kinds = cast(list[BlockKind], lab.config.roles.redundant_kinds)
    found = utility_scores(lab, model)
    return classify(lab.layout, found, found, Shares(share, 0, 0), kinds)


# --- gradient conflict -----------------------------------------------------------------------


@stage("conflict", version=2)
def _conflict(
    lab: Lab,
    folder: Path,
    model: Model,
    learned: Lesson,
    rows: tuple[Row, ...],
    refusals: Handle,
    config: AttributionConfig,
    batch_size: int,
) -> None:
    """``conflict.safetensors``: what a first step on a lesson does to the loss of refusals."""
    layout = lab.layout_of(cast(UnitKind, config.unit_kind))
    pairs = learned.taught(lab), _encoded(lab, rows, refusals, config)
    training, safety = (dialogue_batches(part, batch_size) for part in pairs)
    with lab.use(model) as loaded:
        found = gradient_conflict(loaded, layout, training, safety)
    save_file(found, folder / "conflict.safetensors")


def conflict(lab: Lab, learned: Lesson) -> Scores:
    """How much a first step on a lesson would hurt the aligned model's refusals, by unit."""
    rows, refusals = _own_answers(lab, "safety", lab.aligned)
    config = lab.config.attribution
    size = lab.config.finetune.micro_batch_size
    run = _conflict(lab, lab.aligned, learned, rows, refusals, config, size)
    return load_file(run.path("conflict.safetensors"))


# --- weights ---------------------------------------------------------------------------------


@stage("weights", version=1)
def _weights(
    lab: Lab, folder: Path, before: Model, after: Model, unit_kind: UnitKind, measure: str
) -> None:
    """``weights.safetensors``: a number for each unit, of the weights alone."""
    layout = lab.layout_of(unit_kind)
    with lab.use(before) as old, lab.use(after) as new:
        given, aligned = dict(old.named_parameters()), dict(new.named_parameters())
        found = moved(layout, given, aligned) if measure == "moved" else magnitude(layout, aligned)
    save_file(found, folder / "weights.safetensors")


def weights_of_units(lab: Lab, measure: Literal["magnitude", "moved"]) -> Scores:
    """The magnitude of the aligned model's units, or how far the alignment moved them."""
    run = _weights(lab, GIVEN, lab.aligned, lab.layout.unit_kind, measure)
    return load_file(run.path("weights.safetensors"))


# --- what other papers' rules look at --------------------------------------------------------

#: Share of the blocks that are safety layers: 9 of 32 in Llama-2 (the paper's Tables 9 and 10).
LAYERS_SHARE = 9 / 32


def _prompts(lab: Lab, rows: Sequence[Row], batch_size: int, side: str) -> Iterator[Batch]:
    """Prompts without answers. Counted are all tokens but the first: it takes the attention that
    nothing else does, and what units add there is of another size."""
    pairs = [encode_dialogue(lab.tokenizer, row.prompt, "", end=False) for row in rows]
    return dialogue_batches(pairs, batch_size, tokens="all", drop_first=True, side=side)


@stage("places", version=1)
def _places(
    lab: Lab,
    folder: Path,
    model: Model,
    rows: tuple[Row, ...],
    unit_kind: UnitKind,
    batch_size: int,
    label: str,
) -> None:
    """``places.safetensors``: by what each unit adds to its block's output on some prompts."""
    batches = _prompts(lab, rows, batch_size, "right")
    with lab.use(model) as loaded:
        found = contributions(loaded, lab.layout_of(unit_kind), batches)
    save_file(places_by(found), folder / "places.safetensors")


def places(lab: Lab, purpose: Purpose) -> Scores:
    """Places of the aligned model's units on the prompts that attribution uses."""
    rows, _ = _own_answers(lab, purpose, lab.aligned)
    size = lab.config.attribution.batch_size
    run = _places(lab, lab.aligned, rows, lab.layout.unit_kind, size, label=purpose)
    return load_file(run.path("places.safetensors"))


_SENSITIVITY = {"ESI": expected_impact, "Fisher": fisher_information}


@stage("sensitivity", version=1)
def _sensitivity(
    lab: Lab,
    folder: Path,
    model: Model,
    rows: tuple[Row, ...],
    refusals: Handle,
    config: AttributionConfig,
    batch_size: int,
    measure: str,
) -> None:
    """``sensitivity.safetensors``: how the loss of refusals depends on each unit's weights."""
    layout = lab.layout_of(cast(UnitKind, config.unit_kind))
    batches = dialogue_batches(_encoded(lab, rows, refusals, config), batch_size)
    with lab.use(model) as loaded:
        found = _SENSITIVITY[measure](loaded, layout, batches)
    save_file(found, folder / "sensitivity.safetensors")


def _of_refusals(lab: Lab, measure: str, batch_size: int) -> Scores:
    rows, refusals = _own_answers(lab, "safety", lab.aligned)
    config = lab.config.attribution
    run = _sensitivity(lab, lab.aligned, rows, refusals, config, batch_size, measure)
    return load_file(run.path("sensitivity.safetensors"))


def impact(lab: Lab) -> Scores:
    """Expected safety impact of the aligned model's units, on its refusals."""
    return _of_refusals(lab, "ESI", lab.config.finetune.micro_batch_size)


def fisher(lab: Lab) -> Scores:
    """Fisher information of the aligned model's refusals, by unit."""
    return _of_refusals(lab, "Fisher", 1)


@stage("angles", version=1)
def _angles(
    lab: Lab,
    folder: Path,
    model: Model,
    harmless: tuple[Row, ...],
    harmful: tuple[Row, ...],
    batch_size: int,
) -> None:
    """``gap.json``: degrees between harmless and harmful prompts beyond those among harmless ones,
    by block."""
    with lab.use(model) as loaded:
        states = [
            last_states(loaded, _prompts(lab, rows, batch_size, "left"))
            for rows in (harmless, harmful)
        ]
    (folder / "gap.json").write_text(json.dumps(angular_gap(*states).tolist()))


def safety_layers(lab: Lab) -> tuple[list[float], range]:
    """The aligned model's angular gap in each block, and the blocks, from 0, in which it grows
    most: the paper's share of all of them."""
    harmless, _ = _own_answers(lab, "utility", lab.aligned)
    harmful, _ = _own_answers(lab, "safety", lab.aligned)
    run = _angles(lab, lab.aligned, harmless, harmful, lab.config.attribution.batch_size)
    gap = run.json("gap.json")
    width = max(1, round(LAYERS_SHARE * len(gap)))
    return gap, where_it_grows(torch.tensor(gap), width)


# --- refusals --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusals:
    """What a model refuses of the prompts that units are scored on, in its own words; prompts that
    it is evaluated with are never among them. ``judge`` is the identity of the phrases, which
    decide alone what is refused."""

    rows: tuple[Row, ...]
    answers: Handle
    config: AttributionConfig
    judge: str

    def pairs(self, lab: Lab) -> Pairs:
        """Prompt and response ids.

        Of a model that refuses none of them, and was aligned here, those that it was taught.
        """
        pairs = _encoded(lab, self.rows, self.answers, self.config)
        said = self.answers.json("answers.json")
        asked = [Completion(row.prompt, text) for row, text in zip(self.rows, said, strict=True)]
        own = [p for p, declined in zip(pairs, judges.refused(asked), strict=True) if declined]
        if own or not lab.config.align.enabled:
            return own or _refuses_nothing(lab, len(pairs))
        logger.warning("The aligned model refuses nothing: refusals that it was taught stand in.")
        return lesson(lab, REFUSALS).taught(lab)


def own_refusals(lab: Lab, model: Model) -> Refusals:
    """The refusals that a defence of a model can rest on."""
    rows, said = _own_answers(lab, "safety", model)
    return Refusals(rows, said, lab.config.attribution, refusals.identity())


def _refuses_nothing(lab: Lab, asked: int) -> NoReturn:
    raise SsahError(
        f"{lab.config.model.name} refuses none of the {asked} harmful prompts that units are "
        "scored on, so that there is nothing to defend: take an aligned model, align this one "
        "(align=refusals), or leave experiment.defences empty."
    )
