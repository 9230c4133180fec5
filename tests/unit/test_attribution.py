"""Attribution: running moments, activation statistics and the unit score of eq. 1."""

from __future__ import annotations

import gc
import math
import random
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ssah.scoring.attribution import (
    ActivationStatistics,
    Moments,
    collect_statistics,
    sample_activations,
    unit_scores,
)
from ssah.text.batches import Batch, dialogue_batches
from ssah.units.layout import Block, UnitLayout

Pairs = list[tuple[list[int], list[int]]]


def random_pairs(count: int, seed: int = 0) -> Pairs:
    """Prompts and responses of different lengths over the tiny vocabulary (0 is padding)."""
    rng = random.Random(seed)

    def draw(shortest: int, longest: int) -> list[int]:
        return [rng.randint(3, 39) for _ in range(rng.randint(shortest, longest))]

    return [(draw(1, 6), draw(1, 9)) for _ in range(count)]


def one_by_one(model, layout: UnitLayout, pairs: Pairs) -> dict[str, list[np.ndarray]]:
    """What enters each output projection, sample by sample without padding, in float64."""
    captured: dict[str, list[np.ndarray]] = {block.name: [] for block in layout.blocks}
    handles = []
    for block in layout.blocks:

        def keep(module, args, name=block.name):
            captured[name].append(args[0][0].double().numpy())

        handles.append(model.get_submodule(block.output).register_forward_pre_hook(keep))
    with torch.inference_mode():
        for prompt, response in pairs:
            model(torch.tensor([[*prompt, *response]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return captured


def observations(
    captured: list[np.ndarray],
    pairs: Pairs,
    variance_over: str = "token",
    tokens: str = "response",
    drop_first: bool = False,
) -> np.ndarray:
    """The rows over which the variance is taken, ``[n, channels]``."""
    starts = [len(p) if tokens == "response" else int(drop_first) for p, _ in pairs]
    parts = [rows[start:] for rows, start in zip(captured, starts, strict=True)]
    if variance_over == "sample_mean":
        return np.stack([part.mean(0) for part in parts])
    return np.concatenate(parts)


def reference_scores(model, layout: UnitLayout, pairs: Pairs, **options) -> dict[str, np.ndarray]:
    """Eq. 1 by two passes in float64, for units of any number of channels."""
    captured = one_by_one(model, layout, pairs)
    scores = {}
    for block in layout.blocks:
        rows = observations(captured[block.name], pairs, **options)
        weight = model.get_submodule(block.output).weight.detach().double().numpy()
        channel = rows.var(0, ddof=1) * (weight**2).sum(0)
        standardised = (channel - channel.mean()) / channel.std(ddof=1)
        scores[block.name] = standardised[block.channels.numpy()].mean(1)
    return scores


# --- running moments ---------------------------------------------------------------------------


def test_moments_of_a_large_mean_are_stable():
    """Mean 1e4 and deviation 1 in float32, where E[x^2] - E[x]^2 would lose every digit."""
    values = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) + 1e4
    expected = values.double().numpy()
    for size in (1, 7, 512, 4000):
        moments = Moments(3)
        for part in values.split(size):
            moments.update(part)
        assert moments.count == 4000
        # Far tighter than the 1e-3 that scores need: centring keeps float32 exact here.
        np.testing.assert_allclose(moments.mean, expected.mean(0), rtol=1e-10)
        np.testing.assert_allclose(moments.variance, expected.var(0, ddof=1), rtol=1e-6)
    naive = (values**2).mean(0) - values.mean(0) ** 2
    assert not np.allclose(naive, expected.var(0, ddof=1), rtol=1e-3)


def test_moments_when_the_first_observation_is_an_outlier():
    values = torch.randn(500, 2, generator=torch.Generator().manual_seed(1)) * 0.1
    values[0] = 50.0
    moments = Moments(2)
    moments.update(values)
    np.testing.assert_allclose(moments.variance, values.double().numpy().var(0, ddof=1), rtol=1e-3)


def test_moments_of_half_precision_values():
    """The sums are not taken in the precision of the activations."""
    values = (torch.randn(3000, 2, generator=torch.Generator().manual_seed(2)) + 20).bfloat16()
    moments = Moments(2)
    moments.update(values)
    expected = values.double().numpy()
    np.testing.assert_allclose(moments.mean, expected.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.variance, expected.var(0, ddof=1), rtol=1e-3)


def test_moments_ignore_empty_updates():
    moments = Moments(2)
    moments.update(torch.empty(0, 2))
    assert moments.count == 0
    assert moments.variance.tolist() == [0, 0]
    moments.update(torch.tensor([[1.0, 2.0]]))
    moments.update(torch.empty(0, 2))
    assert (moments.count, moments.mean.tolist()) == (1, [1, 2])
    assert moments.variance.tolist() == [0, 0]  # one observation has none


# --- by hand -----------------------------------------------------------------------------------


class TwoByTwo(nn.Module):
    """An embedding whose rows are the activations, in front of a 2x2 ``B``."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        # Token 0 is padding: were it counted, the statistics would be far off.
        rows = [[900.0, -900.0], [1.0, 2.0], [3.0, 2.0], [5.0, 8.0]]
        self.table = nn.Embedding.from_pretrained(torch.tensor(rows))
        self.down = nn.Linear(2, 2, bias=False)
        self.down.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
        self.fail = False
        self.modes: list[bool] = []

    @property
    def base_model(self) -> TwoByTwo:
        return self

    def forward(self, input_ids: Tensor, **unused) -> Tensor:
        self.modes.append(self.training)
        output = self.down(self.table(input_ids))
        if self.fail:
            raise RuntimeError("out of memory")
        return output

    def layout(self) -> UnitLayout:
        channels = torch.tensor([[0], [1]])
        return UnitLayout("toy", "head", (Block("layers.0.mlp", 0, "mlp", "down", channels, ()),))


@pytest.fixture
def by_hand() -> TwoByTwo:
    return TwoByTwo()


def padded(counted: list[list[int]]) -> Batch:
    """Samples (1, 2) and (3), the second padded."""
    return Batch(
        torch.tensor([[1, 2], [3, 0]]),
        torch.tensor([[1, 1], [1, 0]]),
        torch.tensor(counted).bool(),
    )


def test_by_hand_over_tokens(by_hand):
    # Channel 0 sees 1, 3, 5: mean 3, variance (4 + 0 + 4) / 2 = 4; times 1^2 + 2^2 = 5: 20.
    # Channel 1 sees 2, 2, 8: mean 4, variance (4 + 4 + 16) / 2 = 12; times 0^2 + 1^2 = 1: 12.
    # Their mean is 16 and their deviation sqrt(4^2 + 4^2): scores +-4 / sqrt(32) = +-0.7071.
    statistics = collect_statistics(by_hand, by_hand.layout(), [padded([[1, 1], [1, 0]])])
    assert statistics.observations == 3
    assert statistics.mean["layers.0.mlp"].tolist() == pytest.approx([3, 4])
    assert statistics.variance["layers.0.mlp"].tolist() == pytest.approx([4, 12])
    scores = unit_scores(by_hand, by_hand.layout(), statistics)["layers.0.mlp"]
    assert scores.tolist() == pytest.approx([4 / math.sqrt(32), -4 / math.sqrt(32)])


def test_by_hand_over_sample_means(by_hand):
    # Sample means are (2, 2) and (5, 8): variances 2 * 1.5^2 = 4.5 and 2 * 3^2 = 18.
    batch = padded([[1, 1], [1, 0]])
    statistics = collect_statistics(by_hand, by_hand.layout(), [batch], "sample_mean")
    assert statistics.observations == 2
    assert statistics.mean["layers.0.mlp"].tolist() == pytest.approx([3.5, 5])
    assert statistics.variance["layers.0.mlp"].tolist() == pytest.approx([4.5, 18])


def test_score_of_a_head_averages_standardised_channels():
    # Unit columns, so I = 1, 2, 3, 6: mean 3, deviation sqrt((4 + 1 + 0 + 9) / 3) = sqrt(14 / 3).
    # Head 0 has (-2 - 1) / 2 = -1.5 of these and head 1 (0 + 3) / 2 = 1.5.
    model = nn.Module()
    model.out = nn.Linear(4, 4, bias=False)
    model.out.weight = nn.Parameter(torch.eye(4))
    heads = torch.tensor([[0, 1], [2, 3]])
    layout = UnitLayout("toy", "head", (Block("layers.0.attn", 0, "attn", "out", heads, ()),))
    variance = {"layers.0.attn": torch.tensor([1.0, 2.0, 3.0, 6.0]).double()}
    statistics = ActivationStatistics({"layers.0.attn": torch.zeros(4)}, variance, 9)
    scores = unit_scores(model, layout, statistics)["layers.0.attn"]
    assert scores.tolist() == pytest.approx([-1.5 / math.sqrt(14 / 3), 1.5 / math.sqrt(14 / 3)])


@pytest.mark.parametrize("variance_over", ["token", "sample_mean"])
def test_padding_is_never_counted(by_hand, variance_over):
    """Not even where a batch says that it counts."""
    right = collect_statistics(by_hand, by_hand.layout(), [padded([[1, 1], [1, 0]])], variance_over)
    wrong = collect_statistics(by_hand, by_hand.layout(), [padded([[1, 1], [1, 1]])], variance_over)
    assert right.observations == wrong.observations
    assert torch.equal(right.variance["layers.0.mlp"], wrong.variance["layers.0.mlp"])


@pytest.mark.parametrize("variance_over", ["token", "sample_mean"])
def test_samples_without_a_counted_token_are_left_out(by_hand, variance_over):
    alone = Batch(torch.tensor([[1, 2]]), torch.ones(1, 2).long(), torch.ones(1, 2).bool())
    statistics = collect_statistics(
        by_hand, by_hand.layout(), [padded([[1, 1], [0, 0]])], variance_over
    )
    expected = collect_statistics(by_hand, by_hand.layout(), [alone], variance_over)
    assert statistics.observations == expected.observations
    assert torch.equal(statistics.mean["layers.0.mlp"], expected.mean["layers.0.mlp"])


@pytest.mark.parametrize("batches", [[], [padded([[0, 0], [0, 0]])]])
def test_nothing_counted_is_an_error(by_hand, batches):
    with pytest.raises(ValueError, match="No token was counted"):
        collect_statistics(by_hand, by_hand.layout(), batches)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fail", [True, False])
def test_hooks_and_mode_are_restored(by_hand, training, fail):
    by_hand.train(training)
    by_hand.fail = fail
    if fail:
        with pytest.raises(RuntimeError, match="out of memory"):
            collect_statistics(by_hand, by_hand.layout(), [padded([[1, 1], [1, 0]])])
    else:
        collect_statistics(by_hand, by_hand.layout(), [padded([[1, 1], [1, 0]])])
    assert by_hand.modes == [False]  # no dropout while measuring
    assert by_hand.training is training
    assert not by_hand.down._forward_pre_hooks


# --- against two passes in float64 -------------------------------------------------------------


@pytest.mark.parametrize("variance_over", ["token", "sample_mean"])
@pytest.mark.parametrize(
    ("tokens", "drop_first"), [("response", False), ("all", False), ("all", True)]
)
def test_statistics_equal_two_passes(tiny_model, variance_over, tokens, drop_first):
    layout, pairs = UnitLayout.of(tiny_model), random_pairs(11)
    batches = dialogue_batches(pairs, 4, tokens=tokens, drop_first=drop_first, side="left")
    statistics = collect_statistics(tiny_model, layout, batches, variance_over)
    captured = one_by_one(tiny_model, layout, pairs)
    for block in layout.blocks:
        rows = observations(captured[block.name], pairs, variance_over, tokens, drop_first)
        assert statistics.observations == len(rows)
        np.testing.assert_allclose(statistics.mean[block.name], rows.mean(0), atol=1e-5)
        np.testing.assert_allclose(
            statistics.variance[block.name], rows.var(0, ddof=1), rtol=1e-4, atol=1e-9
        )


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("unit_kind", ["head", "kv_group", "channel"])
def test_scores_equal_two_passes(families, model_type, unit_kind):
    model, pairs = families(model_type), random_pairs(9, seed=1)
    layout = UnitLayout.of(model, unit_kind)
    statistics = collect_statistics(model, layout, dialogue_batches(pairs, 5))
    expected = reference_scores(model, layout, pairs)
    for name, scores in unit_scores(model, layout, statistics).items():
        assert scores.shape == (layout[name].units,)
        np.testing.assert_allclose(scores, expected[name], atol=2e-4)


def test_sample_means_in_half_precision(tiny_model):
    """A mean over bfloat16 activations is still exact: only the activations are rounded."""
    model, pairs = tiny_model.bfloat16(), random_pairs(8)
    layout = UnitLayout.of(model)
    # One sample at a time, so that both sides see the very same activations.
    statistics = collect_statistics(model, layout, dialogue_batches(pairs, 1), "sample_mean")
    captured = one_by_one(model, layout, pairs)
    for block in layout.blocks:
        rows = observations(captured[block.name], pairs, "sample_mean")
        np.testing.assert_allclose(
            statistics.variance[block.name], rows.var(0, ddof=1), rtol=1e-3, atol=1e-9
        )


@pytest.fixture(scope="module")
def model_and_layout(families):
    """One model for all examples of the property test, which does not change it."""
    model = families("llama")
    return model, UnitLayout.of(model, "head")


@settings(max_examples=30, deadline=None)
@given(
    responses=st.lists(
        st.lists(st.integers(3, 39), min_size=1, max_size=7),
        min_size=4,
        max_size=9,
        unique_by=tuple,
    ),
    prompt_lengths=st.lists(st.integers(1, 8), min_size=9, max_size=9),
    batch_size=st.integers(1, 9),
    side=st.sampled_from(["left", "right"]),
    variance_over=st.sampled_from(["token", "sample_mean"]),
    tokens=st.sampled_from(["response", "all"]),
    shuffle=st.randoms(use_true_random=False),
)
def test_scores_depend_on_the_samples_alone(
    model_and_layout, responses, prompt_lengths, batch_size, side, variance_over, tokens, shuffle
):
    """Neither on the batch size, nor on the padding side, nor on the order of the samples."""
    model, layout = model_and_layout
    pairs = [(list(range(4, 4 + n)), r) for r, n in zip(responses, prompt_lengths, strict=False)]
    expected = reference_scores(model, layout, pairs, variance_over=variance_over, tokens=tokens)
    shuffle.shuffle(pairs)
    batches = dialogue_batches(pairs, batch_size, tokens=tokens, side=side)
    statistics = collect_statistics(model, layout, batches, variance_over)
    for name, scores in unit_scores(model, layout, statistics).items():
        np.testing.assert_allclose(scores, expected[name], atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_move_positions(families, side):
    """With length-dependent rotary scaling, counted padding would change every activation."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    make = {"max_position_embeddings": 8, "rope_parameters": rope}
    sample = torch.tensor([[5, 9, 3, 17, 22, 8]])
    mask = torch.ones_like(sample)
    fill = torch.zeros(1, 40, dtype=torch.long)
    parts = (lambda t: [fill, t]) if side == "left" else (lambda t: [t, fill])
    wide = [torch.cat(parts(t), dim=1) for t in (sample, mask, mask)]
    results = []
    for ids, attention, counted in ([sample, mask, mask], wide):
        model = families("llama", **make)  # afresh: the scaling remembers the longest input
        layout = UnitLayout.of(model)
        results.append(collect_statistics(model, layout, [Batch(ids, attention, counted.bool())]))
    for name, variance in results[0].variance.items():
        np.testing.assert_allclose(results[1].variance[name], variance, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_start_at_the_first_real_token(tiny_model, side):
    seen = []

    def keep(module, args, kwargs):
        seen.append(kwargs["position_ids"])

    handle = tiny_model.base_model.register_forward_pre_hook(keep, with_kwargs=True)
    pairs = [([5, 6], [7, 8, 9]), ([5], [6])]
    batch = next(iter(dialogue_batches(pairs, 2, side=side)))
    collect_statistics(tiny_model, UnitLayout.of(tiny_model), [batch])
    handle.remove()
    real = batch.attention_mask.bool()
    assert seen[0][0].tolist() == [0, 1, 2, 3, 4]
    assert seen[0][1][real[1]].tolist() == [0, 1]


# --- memory and storage ------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_samples(tiny_model):
    """Batches and activations are dropped as they pass; what stays is two vectors a block."""
    layout = UnitLayout.of(tiny_model)
    batches, activations, alive = [], [], []

    def stream(pairs: Pairs):
        for batch in dialogue_batches(pairs, 2):
            batches.append(weakref.ref(batch))
            alive.append(sum(ref() is not None for ref in batches))
            yield batch

    def watch(module, args):
        activations.append(weakref.ref(args[0]))
        alive.append(sum(ref() is not None for ref in activations))

    module = tiny_model.get_submodule(layout.blocks[0].output)
    sizes = []
    for count in (4, 40):
        alive.clear()
        handle = module.register_forward_pre_hook(watch)
        statistics = collect_statistics(tiny_model, layout, stream(random_pairs(count)))
        handle.remove()
        assert max(alive) <= 3
        kept = [*statistics.mean.values(), *statistics.variance.values()]
        sizes.append(sum(t.untyped_storage().nbytes() for t in kept))
    gc.collect()
    assert not any(ref() is not None for ref in [*batches, *activations])
    assert sizes[0] == sizes[1] == 2 * 8 * sum(b.channels.numel() for b in layout.blocks)


def test_statistics_survive_saving(tiny_model, tmp_path):
    layout = UnitLayout.of(tiny_model)
    statistics = collect_statistics(tiny_model, layout, dialogue_batches(random_pairs(5), 2))
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = ActivationStatistics.load(tmp_path / "statistics.safetensors")
    assert loaded.observations == statistics.observations
    assert set(loaded.mean) == set(loaded.variance) == {b.name for b in layout.blocks}
    for name in loaded.mean:
        assert torch.equal(loaded.mean[name], statistics.mean[name])
        assert torch.equal(loaded.variance[name], statistics.variance[name])
    assert all(t.dtype == torch.float64 for t in loaded.variance.values())


# --- samples of activations ----------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_sampled_activations_are_those_of_response_tokens(families, side):
    """All of them where more are asked for; the same tokens in every block where fewer are."""
    model = families("llama")
    layout = UnitLayout.of(model)
    pairs = random_pairs(7)
    captured = one_by_one(model, layout, pairs)
    batches = list(dialogue_batches(pairs, 3, side=side))
    total = sum(len(response) for _, response in pairs)
    few = sample_activations(model, layout, batches, 9, seed=1)
    positions = set()
    for block in layout.blocks:
        rows = observations(captured[block.name], pairs)
        found = sample_activations(model, layout, batches, 1000, seed=0)[block.name].numpy()
        assert found.shape == (total, block.channels.numel())
        np.testing.assert_allclose(
            found[found[:, 0].argsort()], rows[rows[:, 0].argsort()], atol=1e-4
        )
        assert len(few[block.name]) == 9
        distances = np.abs(few[block.name].numpy()[:, None] - rows[None]).max(-1)
        assert distances.min(1).max() < 1e-4
        positions.add(tuple(distances.argmin(1)))
    assert len(positions) == 1
    other = sample_activations(model, layout, batches, 9, seed=2)
    assert not torch.equal(other["layers.0.mlp"], few["layers.0.mlp"])
