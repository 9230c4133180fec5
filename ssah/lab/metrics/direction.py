"""Where a model is heading: to a refusal or to an answer, by block and generated token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ...core.errors import require_known
from ...evaluate.probes import Probe, lean, margin, onset
from ...evaluate.stats import Estimate, auroc, crossed_mean, rank_correlation
from ..lab import Lab
from ..samples import Alone, Found, Sample, exact
from ..specs import Model
from ..stages.probes import QUERIES, probed, read_outs

#: ``at`` of the mean over generated tokens.
EVERY = "all tokens"


def _set_of(on: str) -> str:
    require_known(on, QUERIES, "There are no queries")
    return QUERIES[on]


@dataclass(frozen=True)
class Direction:
    """Distances to runs that began to refuse and to answer, ``[Q, P, B, 2, O]``."""

    distances: Tensor
    positions: Sequence[int]
    queries: str  #: how they are called in the table

    def places(self) -> Iterator[tuple[str, Tensor]]:
        """After each number of tokens, and the mean of a query's: name and ``[queries, B, 2, O]``;
        queries whose answer ended before do not count."""
        found = [(str(p), self.distances[:, i]) for i, p in enumerate(self.positions)]
        for place, values in [*found, (EVERY, self.distances.nanmean(1))]:
            known = values[~values.isnan().flatten(1).any(1)]
            if len(known):
                yield place, known

    def rows(self) -> Found:
        last: list[Estimate] = []
        for place, known in self.places():
            leans = []
            for block in range(known.shape[1]):
                here, where = known[:, block], {"block": block + 1, "at": place}
                leans.append(crossed_mean(lean(here).numpy()))
                for name, estimate in (
                    ("to refusal", crossed_mean(here[:, 0].numpy())),
                    ("to answer", crossed_mean(here[:, 1].numpy())),
                    ("lean", leans[-1]),
                ):
                    yield {"metric": name, "set": self.queries, **where}, estimate, None
            first = onset(leans)
            if first is not None:
                counted = exact(first + 1, len(known))
                yield {"metric": "onset", "set": self.queries, "at": place}, counted, None
            if place != EVERY:
                last.append(leans[-1])
        if last:  # the tokens at which the last block's interval reaches lowest and highest
            least, most = min(last, key=lambda e: e.low), max(last, key=lambda e: e.high)
            yield {"metric": "least lean", "set": self.queries}, least, None
            yield {"metric": "most lean", "set": self.queries}, most, None

    def against(self, other: Direction) -> Found:
        """How much more this model leans to refusing, in the last block, query by query."""
        own, others = (lean(d.distances.nanmean(1)[:, -1]) for d in (self, other))
        more = (own - others)[~(own - others).isnan().any(1)]
        if len(more):
            columns = {"metric": "lean", "set": self.queries, "at": EVERY}
            yield columns, crossed_mean(more.numpy()), None


#: What is behind the name of queries where distances are not those at the model's own words.
SUBTRACTED, SAME_WORDS = ", content subtracted", ", same words"


def _direction(part: str, variant: str = "") -> Callable[[Lab, Model, str], Sample]:
    def measure(lab: Lab, model: Model, on: str) -> Sample:
        found = probed(lab, model, _set_of(on), same_words=variant == SAME_WORDS)
        return Direction(getattr(found, part), lab.config.probes.positions, on + variant)

    return measure


# --- the model's own choice ------------------------------------------------------------------


def _margins(probe: Probe) -> Found:
    """The model's own choice between the openings, and the lean of its state, by query."""
    by_token = margin(probe.log_likelihood).numpy()
    for column, values in enumerate(by_token.T, 1):
        yield {"metric": "margin", "at": str(column)}, crossed_mean(values[:, None]), None
    yield {"metric": "margin"}, crossed_mean(by_token[:, -1:]), None
    leans = _leans(probe.distance)
    for query, (choice, state) in enumerate(zip(by_token[:, -1], leans[:, -1], strict=True)):
        for name, value in (("margin of a query", choice), ("lean of a query", state)):
            yield {"metric": name, "at": str(query)}, exact(float(value), 1), None
    known = ~np.isnan(leans).any(1)
    if known.any():  # otherwise no answer is long enough
        states = lean(probe.distance.nanmean(1)[known, -1]).numpy()
        yield {"metric": "lean"}, crossed_mean(states), None
        correlation = rank_correlation(by_token[known, -1], leans[known, -1])
        yield {"metric": "rank correlation"}, correlation, None


def _leans(distances: Tensor) -> np.ndarray:
    """A query's mean lean over openings and tokens, ``[queries, B]``."""
    return lean(distances.nanmean(1)).mean(-1).numpy()


def _separations(harmful: Probe, other: Probe) -> Found:
    """How well harmful queries are told from others: AUROC by the margin, by the refusal openings
    alone, and by the lean in each block."""
    pair = harmful, other
    margins = [margin(probe.log_likelihood)[:, -1].numpy() for probe in pair]
    yield {"metric": "AUROC by margin"}, auroc(*margins), None
    refusals = [p.log_likelihood[:, -1, 0].logsumexp(-1).numpy() for p in pair]
    yield {"metric": "AUROC by refusals"}, auroc(*refusals), None
    for name, part in (("AUROC by lean", "distance"), ("AUROC by residual lean", "residual")):
        leans = [_leans(getattr(probe, part)) for probe in pair]
        for block in range(leans[0].shape[1]):
            scores = [values[:, block][~np.isnan(values[:, block])] for values in leans]
            estimate = auroc(*scores)
            yield {"metric": name, "block": block + 1}, estimate, None
        yield {"metric": name}, estimate, None  # of the last block


def _separation(lab: Lab, model: Model, on: str) -> Sample:
    probes = probed(lab, model, QUERIES["harmful"]), probed(lab, model, _set_of(on))
    return Alone("Separation", _separations, *probes)


# --- read-out --------------------------------------------------------------------------------


def _by_block(blocks: Sequence[Mapping[str, Estimate]]) -> Found:
    """How well linear read-outs of the query's last token tell harm, by block and metric."""
    for number, block in enumerate(blocks):
        for metric, estimate in block.items():
            yield {"metric": metric, "block": number + 1}, estimate, None
            if number == len(blocks) // 2:
                yield {"metric": metric, "at": "middle block"}, estimate, None


DIRECTION: dict[str, Callable[[Lab, Model, str], Sample]] = {
    "direction": _direction("distance"),
    "direction" + SUBTRACTED: _direction("residual", SUBTRACTED),
    "direction" + SAME_WORDS: _direction("residual", SAME_WORDS),
    "margin": lambda lab, model, on: Alone("Margins", _margins, probed(lab, model, _set_of(on))),
    "separation": _separation,
    "read-out": lambda lab, model, on: Alone("ReadOut", _by_block, read_outs(lab, model)),
}
