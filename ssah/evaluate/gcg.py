"""Greedy coordinate gradient: a suffix that makes a model begin its answer as an attacker wants.

Zou et al. 2023, *Universal and Transferable Adversarial Attacks on Aligned Language Models*
(arXiv 2307.15043), Algorithm 1, for one request and one model.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from ..core.errors import SsahError
from ..text.batches import label_logits
from ..text.chat import encode, render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Tokens of a suffix, and how many replacements of each are considered: the paper's.
LENGTH, TOP = 20, 256

#: Stands in the template where the suffix goes.
_MARK = "@@suffix@@"


@dataclass(frozen=True)
class Suffix:
    """What was found: text to put behind the request and a space."""

    text: str
    loss: float  #: nats per token of the target with it: the lowest that was seen
    losses: list[float]  #: of the suffix at the start and after each step


def find_suffix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    target: str,
    steps: int,
    width: int,
    batch_size: int,
) -> Suffix:
    """A suffix under which ``target`` is a likely beginning of the answer to ``prompt``.

    In each step the gradient of the target's mean loss says which tokens promise most at each
    place; ``width`` candidates get one such token at a random place, and the best of them is gone
    on with. Unlike in the paper, the best of all steps is returned, and candidates that would be
    read as other tokens once they are text are left out. The draws are the same on every device.

    Raises :class:`SsahError` where no word, repeated, is read as so many tokens.
    """
    allowed = readable_tokens(tokenizer, _embeddings(model).num_embeddings)
    place = Place(tokenizer, prompt, allowed)
    wanted, current = torch.tensor(encode(tokenizer, target)), place.start
    losses = target_losses(model, place, current[None], wanted, 1).tolist()
    best = losses[0], current
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(steps), desc="suffix", leave=False, disable=not sys.stderr.isatty()):
        promise = -token_gradient(model, place, current, wanted)
        promise[:, ~allowed] = -torch.inf
        top = promise.topk(min(TOP, int(allowed.sum())), dim=1).indices
        where = torch.randint(len(current), (width,), generator=generator)
        which = torch.randint(top.shape[1], (width,), generator=generator)
        candidates = current.repeat(width, 1)
        candidates[torch.arange(width), where] = top[where, which]
        candidates = candidates[[place.text(c) is not None for c in candidates]]
        if len(candidates):
            found = target_losses(model, place, candidates, wanted, batch_size)
            current = candidates[int(found.argmin())]
            losses.append(float(found.min()))
            best = min(best, (losses[-1], current), key=lambda pair: pair[0])
    return Suffix(place.text(best[1]) or "", best[0], losses)


class Place:
    """Where a suffix stands in a rendered request: token ids ``before`` and ``after`` it, and the
    ids of the suffix to ``start`` from: exclamation marks, or where these are read as other tokens
    the first token that is not."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str, allowed: Tensor):
        self._tokenizer = tokenizer
        rendered = render_prompt(tokenizer, f"{prompt} {_MARK}")
        self._head, _, self._tail = rendered.rpartition(_MARK)
        words = (self._decoded([i]) for i in allowed.nonzero()[:, 0].tolist())
        for word in ("!", *words):
            text = " ".join([word] * LENGTH)
            read = tokenizer(
                self._head + text + self._tail,
                add_special_tokens=False,
                return_offsets_mapping=True,
            )
            ids = torch.tensor(read["input_ids"])
            first, last = len(self._head), len(self._head) + len(text)
            spans = enumerate(read["offset_mapping"])
            within = [i for i, (a, b) in spans if a < last and b > first]
            self.before, self.after = ids[: within[0]], ids[within[-1] + 1 :]
            self.start = ids[within]
            if len(within) == LENGTH and allowed[self.start].all() and self.text(self.start):
                return
        raise SsahError("GCG needs a word that is one token wherever it stands; there is none.")

    def text(self, suffix: Tensor) -> str | None:
        """A suffix as text, which stands behind the request and a space; None where the whole would
        be read as other tokens."""
        text = self._decoded(suffix.tolist())
        whole = torch.cat([self.before, suffix, self.after]).tolist()
        return text if encode(self._tokenizer, self._head + text + self._tail) == whole else None

    def _decoded(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return cast(str, text).strip()


def readable_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """Bool ``[vocabulary]``: tokens of printable ASCII that are not special."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    words = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    for i, word in enumerate(words[:vocabulary]):
        shown = bool(word.strip()) and word.isascii() and word.isprintable()
        allowed[i] = shown and i not in special
    return allowed


def token_gradient(model: PreTrainedModel, place: Place, suffix: Tensor, wanted: Tensor) -> Tensor:
    """How the target's mean loss changes with the weight of each token of the vocabulary at each
    place of the suffix (with a one-hot vector in its place): float32 ``[length, vocabulary]``, on
    the CPU."""
    embeddings = _embeddings(model)
    ids = torch.cat([place.before, suffix, place.after, wanted])[None].to(model.device)
    with torch.enable_grad():
        embedded = embeddings(ids).detach().requires_grad_()
        loss = _losses(model, {"inputs_embeds": embedded}, wanted).sum()
        (gradient,) = torch.autograd.grad(loss, embedded)
    start = len(place.before)
    own = gradient[0, start : start + len(suffix)]
    return (own @ embeddings.weight.detach().T).float().cpu()


@torch.no_grad()
def target_losses(
    model: PreTrainedModel, place: Place, suffixes: Tensor, wanted: Tensor, batch_size: int
) -> Tensor:
    """Mean loss of the target's tokens, in nats, under each of ``[n, length]`` suffixes: ``[n]``,
    on the CPU."""
    found = []
    for part in suffixes.split(batch_size):
        around = (place.before.expand(len(part), -1), part, place.after.expand(len(part), -1))
        ids = torch.cat([*around, wanted.expand(len(part), -1)], 1).to(model.device)
        found.append(_losses(model, {"input_ids": ids}, wanted).cpu())
    return torch.cat(found)


def _losses(model: PreTrainedModel, read: dict[str, Tensor], wanted: Tensor) -> Tensor:
    """Mean loss in each row of the last tokens, which are the wanted ones."""
    hidden = model.base_model(**read, use_cache=False).last_hidden_state
    logits = label_logits(model, hidden[:, -len(wanted) - 1 : -1])
    labels = wanted.to(logits.device).expand(len(logits), -1)
    return cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def _embeddings(model: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, model.get_input_embeddings())
