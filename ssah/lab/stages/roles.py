"""Roles of units: the search for the sizes of the groups, and roles in other models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...core.store import Handle
from ...data.rows import Row
from ...evaluate import judges
from ...evaluate.judges import attack_success
from ...units.mask import UnitMask
from ...units.roles import Roles, Shares, Thresholds, classify, classify_by_thresholds
from ..config import RolesConfig
from ..lab import Lab
from ..specs import Model
from ..stage import stage
from .answers import completions
from .attribution import scores, statistics, utility_scores
from .utility import perplexity_ratio

Rule = Literal["thresholds", "quantiles"]


@dataclass(frozen=True)
class Effect:
    """What removing some units did: rates in [0, 1], perplexity relative to the whole model."""

    asr: float
    perplexity_ratio: float


@dataclass(frozen=True)
class Trial:
    """One step of the ablation search."""

    group: str
    share: float
    effect: Effect
    accepted: bool


def search_share(
    group: str,
    shares: Sequence[float],
    removed: Callable[[float], Effect],
    accept: Callable[[Effect], bool],
) -> tuple[float, list[Trial]]:
    """Ablation search (paper, section 3.2): the largest share whose removal does what is expected.

    Shares are tried from large to small, ``removed`` says what the removal of each does, and the
    first that ``accept`` takes is kept. Where none is accepted the smallest is returned, and no
    trial in the trace is marked accepted.
    """
    trials = []
    for share in sorted(shares, reverse=True):
        effect = removed(share)
        trials.append(Trial(group, share, effect, accept(effect)))
        if trials[-1].accepted:
            break
    return trials[-1].share, trials


def classified(
    lab: Lab, shares: Shares, redundant_kinds: Sequence[str] = (), **changes: Any
) -> Roles:
    """Roles of the aligned model's units at given shares."""
    kinds = redundant_kinds or lab.config.roles.redundant_kinds
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

    def removed(group: str, ru: float, esu: float = 0, euu: float = 0) -> Effect:
        return effect(lab, classified(lab, Shares(ru, esu, euu)).mask(group))

    ru, trials_ru = search_share(
        "RU",
        config.ru_shares,
        lambda share: removed("RU", share),
        lambda e: (
            e.asr <= whole.asr + config.ru_max_asr_rise
            and e.perplexity_ratio <= config.ru_max_perplexity_ratio
        ),
    )
    esu, trials_esu = search_share(
        "ESU",
        config.esu_shares,
        lambda share: removed("ESU", ru, share),
        lambda e: (
            e.asr >= whole.asr + config.esu_min_asr_rise
            and e.perplexity_ratio <= config.esu_max_perplexity_ratio
        ),
    )
    euu, trials_euu = search_share(
        "EUU",
        config.euu_shares,
        lambda share: removed("EUU", ru, esu, share),
        lambda e: e.perplexity_ratio >= config.euu_min_perplexity_ratio,
    )
    return Shares(ru, esu, euu), trials_ru + trials_esu + trials_euu


def roles_after(lab: Lab, model: Model, rule: Rule, resample: int = 0) -> Roles:
    """Roles in another model, by the aligned model's thresholds or by its shares."""
    kinds = lab.config.roles.redundant_kinds
    found = scores(lab, model, resample)
    if rule == "quantiles":
        return classify(lab.layout, *found, shares(lab), kinds)
    thresholds = Thresholds.of(roles(lab), *scores(lab))
    return classify_by_thresholds(lab.layout, *found, thresholds, kinds)


def utility_roles(lab: Lab, model: Model, share: float) -> Roles:
    """Two groups, as an unaligned model has: RU, the ``share`` of lowest I_U, and the rest.

    The rest, the paper's utility units (UU), is labelled CU.
    """
    found, kinds = utility_scores(lab, model), lab.config.roles.redundant_kinds
    return classify(lab.layout, found, found, Shares(share, 0, 0), kinds)
