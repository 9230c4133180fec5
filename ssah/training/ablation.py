"""Change for a while what units say: nothing, a constant, or what they say in another model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..core.valid import require_word
from ..text.batches import Batch, counted_loss
from ..units.layout import UnitLayout
from ..units.mask import UnitMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What is put in the place of units that are removed: nothing, what they say on average, what they
#: said somewhere else, or the constant that does least harm.
Mode = Literal["zero", "mean", "resample", "fitted"]

#: Passes over the texts that constants are fitted on, and the rate at first, in standard deviations
#: of what a channel says; it falls to zero.
FITTING_PASSES, FITTING_RATE = 4, 0.1


@contextmanager
def ablate(
    model: nn.Module,
    layout: UnitLayout,
    mask: UnitMask,
    mode: Mode = "zero",
    constants: Mapping[str, Tensor] | None = None,
    heard: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Context manager under which the chosen units say nothing of their own.

    Their input columns of ``B`` are set to zero (rows of ``A`` alone would not do: with biases on
    q/k/v a "removed" head would still speak). ``mode="mean"`` and ``mode="fitted"`` also
    add what the units contribute where they say a constant: ``W[:, j] @ constants[j]``, with
    ``constants`` by block, ``[channels]``: what they say on average
    (:attr:`ActivationStatistics.mean`), or what does least harm (:func:`fitted_constants`).
    ``mode="resample"`` puts in their place, at each token,
    what they all said at one random token of other texts: ``heard``, by block ``[n, channels]``
    (:func:`ssah.scoring.attribution.sample_activations`), so that nothing is out of the ordinary
    but that it has nothing to do with this text. On exit, also after an error, every weight has
    its old bits again.
    """
    layout.require(mask)
    require_word("mode", mode, get_args(Mode))
    said = constants if mode in ("mean", "fitted") else None
    if mode in ("mean", "fitted") and said is None:
        raise ValueError(f"Ablation by '{mode}' needs the constants that the units say instead.")
    if mode == "resample":
        if heard is None:
            raise ValueError("Resampling needs activations of the units.")
        with _resample(model, layout, mask, heard):
            yield
        return
    with ExitStack() as stack:
        for name, linear, columns in _chosen(model, layout, mask):
            kept = linear.weight.detach()[:, columns].clone()
            if said is not None:
                constant = kept @ said[name].to(kept)[columns]
                stack.callback(linear.register_forward_hook(_adder(constant)).remove)
            stack.callback(_write, linear, columns, kept)
            _write(linear, columns, 0)
        yield


def _chosen(
    model: nn.Module, layout: UnitLayout, mask: UnitMask
) -> list[tuple[str, nn.Linear, Tensor]]:
    """Of each block of which units are chosen its name, ``B``, and the input channels of ``B`` that
    are theirs."""
    found = [(b, b.projection(model), mask[b.name]) for b in layout.blocks if mask[b.name].any()]
    return [
        (block.name, linear, block.channels[chosen].flatten().to(linear.weight.device))
        for block, linear, chosen in found
    ]


@torch.no_grad()
def _write(linear: nn.Linear, columns: Tensor, values: Tensor | float) -> None:
    linear.weight[:, columns] = values


def fitted_constants(
    model: PreTrainedModel,
    layout: UnitLayout,
    mask: UnitMask,
    batches: Sequence[Batch],
    mean: Mapping[str, Tensor],
    variance: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """What the chosen units would have to say at every token so that their removal does least harm
    (optimal ablation: Li & Janson 2024, arXiv 2409.09951).

    Those constants with the lowest cross-entropy of the counted tokens of ``batches`` that Adam
    finds, by block, float32 ``[channels]``. It begins at ``mean`` and steps in standard deviations
    of a channel, the roots of ``variance``, both by block ``[channels]``; where it ends above the
    loss of ``mean``, that is kept. The model is left as it was.
    """
    names = [name for name, *_ in _chosen(model, layout, mask)]
    if not names:
        return {}
    start = {name: mean[name].float().to(model.device) for name in names}
    scale = {name: variance[name].float().sqrt().to(model.device) for name in names}
    moved = {name: torch.zeros_like(start[name], requires_grad=True) for name in names}

    def loss(batch: Batch) -> Tensor:
        return counted_loss(model, batch) / batch.counted[:, 1:].sum()

    def shifted() -> dict[str, Tensor]:
        return {name: start[name] + scale[name] * moved[name] for name in names}

    required, was_training = {p: p.requires_grad for p in model.parameters()}, model.training
    optimizer = torch.optim.Adam(moved.values(), lr=FITTING_RATE)
    steps = FITTING_PASSES * len(batches)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    try:
        model.eval().requires_grad_(False)
        for _ in range(FITTING_PASSES):
            for batch in batches:
                with ablate(model, layout, mask, "fitted", shifted()):
                    optimizer.zero_grad()
                    loss(batch).backward()
                optimizer.step()
                falling.step()
        with torch.no_grad():
            tried = []
            for constants in (shifted(), start):
                with ablate(model, layout, mask, "fitted", constants):
                    total = sum(float(counted_loss(model, batch)) for batch in batches)
                tried.append((total, constants))
    finally:
        model.train(was_training)
        for parameter, own in required.items():
            parameter.requires_grad_(own)
    _, best = min(tried, key=lambda pair: pair[0])
    return {name: part.cpu() for name, part in best.items()}


@contextmanager
def _resample(
    model: nn.Module, layout: UnitLayout, mask: UnitMask, heard: Mapping[str, Tensor]
) -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)
    chosen = _chosen(model, layout, mask)
    drawn = torch.zeros(0, dtype=torch.long)

    def says(values: Tensor, first: bool) -> Callable[[Tensor], Tensor]:
        def what(entering: Tensor) -> Tensor:
            nonlocal drawn
            if first:  # the same token in every block
                drawn = torch.randint(len(values), entering.shape[:-1], generator=generator)
            return values[drawn]

        return what

    with ExitStack() as stack:
        for number, (name, linear, columns) in enumerate(chosen):
            what = says(heard[name][:, columns.cpu()], first=number == 0)
            stack.callback(linear.register_forward_pre_hook(_speaker(columns, what)).remove)
        yield


def _adder(constant: Tensor):
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + constant

    return hook


@contextmanager
def patch(
    model: PreTrainedModel, layout: UnitLayout, mask: UnitMask, donor: PreTrainedModel
) -> Iterator[None]:
    """Context manager under which the chosen units of ``model`` say what they say in ``donor``, a
    model of the same shapes, on the same tokens (activation patching).

    Before each forward pass of the model the donor reads the same input, with a key-value cache of
    its own; then the inputs of ``B`` at the units' channels are the donor's. All that is before
    the units in the model itself has no part in what they say; the weights of ``B`` stay its own.
    """
    layout.require(mask)
    inner = model.base_model
    forward = inner.forward
    heard: dict[str, Tensor] = {}

    def as_heard(name: str) -> Callable[[Tensor], Tensor]:
        return lambda _: heard[name]

    def lockstep(*ids: Tensor, past_key_values: Any = None, **inputs: Any) -> Any:
        own = past_key_values or _Caches(None, None)
        there = donor.base_model(*ids, past_key_values=own.donor, **inputs)
        here = forward(*ids, past_key_values=own.model, **inputs)
        if here.past_key_values is not None:
            here.past_key_values = _Caches(here.past_key_values, there.past_key_values)
        return here

    with ExitStack() as stack:
        own, others = _chosen(model, layout, mask), _chosen(donor, layout, mask)
        for (name, linear, columns), (_, there, _) in zip(own, others, strict=True):
            for layer, hook in (
                (there, _listener(heard, name, columns)),
                (linear, _speaker(columns, as_heard(name))),
            ):
                stack.callback(layer.register_forward_pre_hook(hook).remove)
        inner.forward = lockstep
        stack.callback(inner.__dict__.pop, "forward")
        yield


@dataclass(frozen=True)
class _Caches:
    """Keys and values of a model and of its donor."""

    model: Any
    donor: Any

    def batch_select_indices(self, indices: Tensor) -> None:
        for cache in (self.model, self.donor):
            cache.batch_select_indices(indices)


def _listener(heard: dict[str, Tensor], name: str, columns: Tensor):
    def hook(module: nn.Module, args: tuple[Tensor]) -> None:
        heard[name] = args[0][..., columns]

    return hook


def _speaker(columns: Tensor, what: Callable[[Tensor], Tensor]):
    """A hook that puts ``what`` (of all that enters) into a layer at some channels."""

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        said = args[0].clone()
        said[..., columns.to(said.device)] = what(said).to(said)
        return (said,)

    return hook
