"""Reasoning direction: is a model on its way to a refusal or to an answer, and from which block on?

Three inputs for each query (paper, Figs 2-4 and 7): the query alone, the query with the opening of
a refusal, and with the opening of an answer. At each token that is generated then, and in each
block, the hidden state of the clean run is nearer to the run that began to refuse or to the one
that began to answer. All runs read the same words there, so that no distance comes from different
words.

Beyond the paper: the same after the query's content is subtracted, the model's own choice between
the openings, and a linear read-out of the query before any word is said.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..text.batches import label_logits
from .stats import Estimate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Openings:
    """Token ids of openings, ``[openings, tokens]`` each: all of one length, so none is padded.

    Neutral ones neither refuse nor begin to answer.
    """

    refusal: Tensor
    compliance: Tensor
    neutral: Tensor

    def __post_init__(self) -> None:
        if self.refusal.shape != self.compliance.shape:
            raise ValueError("There must be as many compliance as refusal openings, as long.")


@dataclass(frozen=True)
class Probe:
    """What a model does on Q queries, after P numbers of words, in B blocks.

    Distances are cosine distances of the clean run's state to that of each of O runs with a refusal
    opening (index 0) and O with a compliance opening (index 1), ``[Q, P, B, 2, O]``, NaN where the
    words ended before. The state of the last block is the one that the language-model head reads,
    after the final norm.
    """

    distance: Tensor
    residual: Tensor  #: the same, the mean state of runs with neutral openings subtracted from both
    log_likelihood: Tensor  #: nats of an opening's first tokens given the query, ``[Q, T, 2, O]``
    query: Tensor  #: state at the query's last token, before any word, ``[Q, B, hidden]``

    def save(self, path: Path) -> None:
        fields = [f.name for f in dataclasses.fields(self)]
        save_file({name: getattr(self, name).contiguous() for name in fields}, path)

    @classmethod
    def load(cls, path: Path) -> Probe:
        return cls(**load_file(path))


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine over the last dimension, in float64; 0 for equal vectors whatever their type.

    A vector of zeros has no direction: its distance to any other is 1.
    """
    smallest = torch.finfo(torch.float64).tiny
    a, b = (x / x.norm(dim=-1, keepdim=True).clamp(min=smallest) for x in (a.double(), b.double()))
    return 1 - (a * b).sum(-1)


@torch.inference_mode()
def probe(
    model: PreTrainedModel,
    queries: Sequence[list[int]],
    words: Sequence[list[int]],
    openings: Openings,
    positions: Sequence[int],
) -> Probe:
    """Probe a model on rendered ``queries`` (token ids); ``words`` are what its answers begin with.

    States are compared at the words' tokens number ``positions`` (from 1). A query is read once,
    all openings share its keys and values in one batch, and nothing is padded but words that are
    too few, on the right; what is computed there is dropped. Memory does not grow with the number
    of queries, except for what is returned.
    """
    pairs = list(zip(queries, words, strict=True))
    rows = tqdm(pairs, desc="queries", leave=False, disable=not sys.stderr.isatty())
    parts = [_probe_query(model, *pair, openings, positions) for pair in rows]
    return Probe(*(torch.stack(part) for part in zip(*parts, strict=True)))


def _probe_query(
    model: PreTrainedModel,
    query: list[int],
    words: list[int],
    openings: Openings,
    positions: Sequence[int],
) -> tuple[Tensor, ...]:
    """The fields of a :class:`Probe` for one query."""
    device, length, (count, tokens) = model.device, max(positions), openings.refusal.shape
    known = words[:length]
    padded = known + [0] * (length - len(known))
    index = torch.tensor(positions) - 1

    asked = _read(model, torch.tensor([query], device=device))
    cache = asked.past_key_values
    # A copy, since caches of sliding windows cannot be cut back.
    clean = _read(model, torch.tensor([padded], device=device), copy.deepcopy(cache))
    begun = torch.cat([openings.refusal, openings.compliance, openings.neutral]).to(device)
    cache.batch_repeat_interleave(len(begun))
    opened = _read(model, begun, cache)
    said = _read(model, torch.tensor([padded] * len(begun), device=device), cache)

    state = _states(clean, index)[0][:, :, None, None]  # [P, B, 1, 1, hidden]
    refusal, compliance, neutral = _states(said, index).split([count, count, len(openings.neutral)])
    others = torch.stack([refusal, compliance]).movedim((0, 1), (2, 3))  # [P, B, 2, O, hidden]
    content = neutral.mean(0)[:, :, None, None]
    ended = (index >= len(known))[:, None, None, None].to(device)

    before = asked.last_hidden_state[:, -1:].expand(2 * count, -1, -1)
    predicting = torch.cat([before, opened.last_hidden_state[: 2 * count, :-1]], 1)
    scores = label_logits(model, predicting).log_softmax(-1)
    taken = scores.gather(-1, begun[: 2 * count, :, None]).squeeze(-1).double().cumsum(-1)
    found = (
        cosine_distance(state, others).masked_fill(ended, torch.nan),
        cosine_distance(state - content, others - content).masked_fill(ended, torch.nan),
        taken.view(2, count, tokens).movedim(-1, 0),
        _states(asked, torch.tensor([len(query) - 1]))[0, 0],
    )
    return tuple(part.float().cpu() for part in found)


def _read(model: PreTrainedModel, ids: Tensor, cache: Any = None) -> Any:
    """One forward pass without the head, after what is in the cache; it ends up there as well."""
    return model.base_model(ids, past_key_values=cache, use_cache=True, output_hidden_states=True)


def _states(output: Any, index: Tensor) -> Tensor:
    """The states after each block at some positions, float64 ``[rows, positions, B, hidden]``."""
    return torch.stack([h[:, index].double() for h in output.hidden_states[1:]], 2)


def lean(distances: Tensor) -> Tensor:
    """How much nearer to a refusal: distance to compliance less that to refusal, by opening pair.

    ``[..., 2, O]`` -> ``[..., O]``; positive where the state is on the side of refusing.
    """
    return distances[..., 1, :] - distances[..., 0, :]


def margin(log_likelihood: Tensor) -> Tensor:
    """The model's own choice: log of the probability of the refusal openings over that of the
    compliance openings, ``[..., 2, O]`` -> ``[...]`` (nats)."""
    mass = log_likelihood.double().logsumexp(-1)
    return mass[..., 0] - mass[..., 1]


def onset(lean_by_block: Sequence[Estimate]) -> int | None:
    """The first block from which on all intervals lie above zero; None if the last does not."""
    undecided = [block for block, estimate in enumerate(lean_by_block) if not estimate.low > 0]
    first = undecided[-1] + 1 if undecided else 0
    return first if first < len(lean_by_block) else None


def read_out(train: Tensor, labels: np.ndarray, test: Tensor) -> np.ndarray:
    """Scores of a linear classifier (logistic regression on standardised states) on other states.

    ``[n, hidden]``, bool ``[n]`` and ``[m, hidden]`` -> ``[m]``; higher where it says ``True``.
    States are turned into the span of the training states, where the weights lie anyway.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(C=0.1, solver="newton-cholesky")
    classifier = make_pipeline(StandardScaler(), PCA(svd_solver="full"), regression)
    classifier.fit(train.double().numpy(), labels)
    return classifier.decision_function(test.double().numpy())
