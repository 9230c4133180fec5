"""Probes: states and likelihoods against plain forward passes, and a direction that is planted."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssah.evaluate.generate import complete, continuations
from ssah.evaluate.probes import (
    Openings,
    Probe,
    cosine_distance,
    lean,
    margin,
    onset,
    probe,
    read_out,
)
from ssah.evaluate.stats import Estimate, crossed_mean
from ssah.text.chat import encode, end_tokens, render_prompt

POSITIONS = (1, 3, 4)
FIELDS = [field.name for field in dataclasses.fields(Probe)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Token ids of the tiny vocabulary, without the special ones."""
    return torch.randint(3, 40, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def openings() -> Openings:
    return Openings(draw(3, 4, seed=1), draw(3, 4, seed=2), draw(2, 4, seed=3))


QUERIES = [draw(7, seed=4).tolist(), draw(1, seed=5).tolist(), draw(11, seed=6).tolist()]
WORDS = [draw(4, seed=7).tolist(), draw(6, seed=8).tolist(), draw(5, seed=9).tolist()]


# --- distances ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e30])
def test_equal_vectors_have_no_distance(dtype, scale):
    """In half precision the usual formula gives up to 0.01 there, more than what is compared."""
    vectors = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * scale
    vectors = vectors.to(dtype)
    assert cosine_distance(vectors, vectors.clone()).abs().max() < 1e-6
    assert cosine_distance(vectors, 3 * vectors.float()).abs().max() < 1e-4


def test_distance_of_orthogonal_and_of_opposite_vectors():
    a = torch.tensor([[3.0, 4.0, 0.0], [1e-6, 0.0, 0.0], [2.0, 2.0, 1.0]])
    b = torch.tensor([[-4.0, 3.0, 0.0], [-1e6, 0.0, 0.0], [1.0, 0.0, 0.0]])
    found = cosine_distance(a, b)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([1, 2, 1 - 2 / 3], abs=1e-9)


# --- against plain forward passes --------------------------------------------------------------


def states_and_logits(model: PreTrainedModel, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """What leaves each block (the last one's after the norm), ``[B, tokens, hidden]``."""
    found: list[Tensor] = []
    layers = [*model.base_model.layers, model.base_model.norm]
    handles = [
        layer.register_forward_hook(
            lambda *args: found.append(args[2][0] if isinstance(args[2], tuple) else args[2])
        )
        for layer in layers
    ]
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    assert len(found) == len(layers)
    states = torch.stack([*found[:-2], found[-1]])[:, 0]
    return states.double().numpy(), logits[0].double().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return 1 - float(a @ b / np.sqrt((a @ a) * (b @ b)))


def reference(model, query: list[int], words: list[int], openings: Openings) -> dict[str, Tensor]:
    """A probe of one query from one run for each opening, one sequence at a time, uncached."""
    kinds = [openings.refusal.tolist(), openings.compliance.tolist()]
    count, tokens = openings.refusal.shape
    clean, _ = states_and_logits(model, query + words)
    neutral = [states_and_logits(model, query + o + words)[0] for o in openings.neutral.tolist()]
    content = np.mean(neutral, 0)
    shape = len(POSITIONS), len(clean), 2, count
    distance, residual = np.full(shape, np.nan), np.full(shape, np.nan)
    likelihood = np.zeros((tokens, 2, count))
    for kind, texts in enumerate(kinds):
        for number, opening in enumerate(texts):
            states, logits = states_and_logits(model, query + opening + words)
            total = 0.0
            for step, token in enumerate(opening):
                row = logits[len(query) - 1 + step]
                total += row[token] - np.log(np.exp(row - row.max()).sum()) - row.max()
                likelihood[step, kind, number] = total
            for column, position in enumerate(POSITIONS):
                if position > len(words):
                    continue
                at = len(query) + position - 1
                for block in range(len(clean)):
                    own, other = clean[block, at], states[block, at + tokens]
                    less = content[block, at + tokens]
                    where = column, block, kind, number
                    distance[where] = cosine(own, other)
                    residual[where] = cosine(own - less, other - less)
    parts = distance, residual, likelihood, clean[:, len(query) - 1]
    return {name: torch.tensor(part) for name, part in zip(FIELDS, parts, strict=True)}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("gemma2", {"sliding_window": 64, "final_logit_softcapping": 2.0}),
        ("mistral", {"sliding_window": 8}),
    ],
)
def test_a_probe_is_what_plain_runs_give(families, openings, family, options):
    model = families(family, num_hidden_layers=3, **options)
    found = probe(model, QUERIES, WORDS, openings, POSITIONS)
    assert found.distance.shape == found.residual.shape == (3, 3, 3, 2, 3)
    assert found.log_likelihood.shape == (3, 4, 2, 3)
    assert found.query.shape == (3, 3, 16)
    for row, (query, words) in enumerate(zip(QUERIES, WORDS, strict=True)):
        for name, expected in reference(model, query, words, openings).items():
            torch.testing.assert_close(
                getattr(found, name)[row].double(), expected, rtol=1e-5, atol=2e-5, msg=name
            )
    assert found.distance.min() > 1e-3, "else a comparison of zeros says nothing"


def test_half_precision_is_near_full(families, openings):
    model = families("llama")
    full = probe(model, QUERIES, WORDS, openings, POSITIONS)
    half = probe(model.bfloat16(), QUERIES, WORDS, openings, POSITIONS)
    for name in FIELDS:
        assert getattr(half, name).dtype == torch.float32
        assert getattr(half, name).isfinite().all()
    assert (half.distance - full.distance).abs().max() < 0.05


def test_words_that_end_early_leave_gaps_and_nothing_else(families, openings):
    """What fills the gap is never read: the same numbers before it as with more words."""
    model = families("llama")
    for name in ("distance", "residual"):
        longer = getattr(probe(model, QUERIES, WORDS, openings, POSITIONS), name)
        for length, known in ((3, 2), (2, 1), (0, 0)):
            words = [WORDS[0], WORDS[1][:length], WORDS[2]]
            cut = getattr(probe(model, QUERIES, words, openings, POSITIONS), name)
            assert cut[1, known:].isnan().all()
            torch.testing.assert_close(cut[1, :known], longer[1, :known])
            torch.testing.assert_close(cut[[0, 2]], longer[[0, 2]])


def test_queries_do_not_touch_each_other(families, openings):
    model = families("llama")
    together = probe(model, QUERIES, WORDS, openings, POSITIONS)
    order = [2, 0]
    some = probe(model, [QUERIES[i] for i in order], [WORDS[i] for i in order], openings, POSITIONS)
    for name in FIELDS:
        assert torch.equal(getattr(some, name), getattr(together, name)[order])


def test_openings_must_match():
    with pytest.raises(ValueError, match="as many"):
        Openings(draw(3, 4), draw(2, 4), draw(2, 4))
    with pytest.raises(ValueError, match="as long"):
        Openings(draw(3, 4), draw(3, 5), draw(2, 4))


def test_a_probe_survives_saving(families, openings, tmp_path):
    words = [WORDS[0], WORDS[1][:2], WORDS[2]]
    found = probe(families("llama"), QUERIES, words, openings, POSITIONS)
    assert found.distance.isnan().any()
    found.save(tmp_path / "probe.safetensors")
    loaded = Probe.load(tmp_path / "probe.safetensors")
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(loaded, name), getattr(found, name), rtol=0, atol=0, equal_nan=True
        )


# --- words -------------------------------------------------------------------------------------

LENGTH = 8


def greedy(model: PreTrainedModel, ids: list[int]) -> list[int]:
    """The likeliest tokens, one full run for each."""
    known = list(ids)
    with torch.inference_mode():
        for _ in range(LENGTH):
            known.append(int(model(torch.tensor([known]), use_cache=False).logits[0, -1].argmax()))
    return known[len(ids) :]


def test_continuations_do_not_depend_on_the_batch(answering_model, text_tokenizer):
    """Some are made to end early: a token that the model says becomes the end-of-turn token."""
    prompts = ["zorp flim", "blim", "frub gromp snood wibble", "2 + 2", "glank tark pell brindle"]
    texts = [render_prompt(text_tokenizer, prompt) for prompt in prompts]
    ids = [encode(text_tokenizer, text) for text in texts]
    whole = [greedy(answering_model, row) for row in ids]
    end = whole[0][3]
    text_tokenizer.eos_token = text_tokenizer.convert_ids_to_tokens(end)
    expected = [row[: row.index(end)] if end in row else row for row in whole]
    assert len({len(row) for row in expected}) > 1, "else nothing ends before another"
    for batch_size in (1, 2, 5):
        found = continuations(answering_model, text_tokenizer, ids, LENGTH, batch_size)
        assert found == expected
        said = complete(answering_model, text_tokenizer, texts, LENGTH, batch_size)
        assert said == [text_tokenizer.decode(r, skip_special_tokens=True) for r in expected]


@pytest.mark.parametrize("common", [7, 8, 20])
@pytest.mark.parametrize(
    ("model_type", "window"),
    [("llama", None), ("qwen2", None), ("gemma3_text", 64), ("gemma3_text", 16)],
)
def test_what_prompts_have_in_common_changes_nothing(
    families, text_tokenizer, monkeypatch, model_type, window, common
):
    """Also where some prompts are padded behind it, and where one is nothing else."""
    model = families(model_type, sliding_window=window)
    beginning = [(7 * i) % 30 + 3 for i in range(common)]
    prompts = [beginning + own for own in ([5, 9, 11], [6], [8, 4, 7, 12, 13], [])]
    ends = end_tokens(model, text_tokenizer)
    said = [greedy(model, prompt) for prompt in prompts]
    whole = [row[: next((i for i, t in enumerate(row) if t in ends), LENGTH)] for row in said]
    read: list[int] = []
    base = model.base_model.forward
    monkeypatch.setattr(
        model.base_model, "forward",
        lambda *a, **k: (read.append(k["input_ids"].numel()), base(*a, **k))[1],
    )  # fmt: skip
    assert continuations(model, text_tokenizer, prompts, LENGTH, 4) == whole
    is_shared = common > 8 and window != 16
    assert (read[0] == common - 1) == is_shared, "the last token is read by each"


# --- a planted direction -----------------------------------------------------------------------

BLOCKS, KIND, LEANING = 6, 0, 1


@pytest.fixture
def planted(families):
    """Random models in which only block ``k`` can read what began and write where it leads.

    Token ids below 60 carry refusal in one dimension of their embedding, those from 80 on
    compliance, others nothing. No block reads that dimension but one head of block ``k``, which
    adds the mean over what it has read so far to another dimension, that no other block writes.
    """

    def build(k: int) -> PreTrainedModel:
        model = families(
            "llama",
            vocab_size=140,
            hidden_size=32,
            num_hidden_layers=BLOCKS,
            num_key_value_heads=4,
        )
        width = 32 // 4
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1)
            embedding = model.get_input_embeddings().weight
            embedding[:, [KIND, LEANING]] = 0
            embedding[:60, KIND], embedding[80:, KIND] = 1, -1
            for layer in model.base_model.layers:
                attention, neurons = layer.self_attn, layer.mlp
                for reader in (
                    attention.q_proj, attention.k_proj, attention.v_proj,
                    neurons.gate_proj, neurons.up_proj,
                ):  # fmt: skip
                    reader.weight[:, [KIND, LEANING]] = 0
                for writer in (attention.o_proj, neurons.down_proj):
                    writer.weight[[KIND, LEANING]] = 0
            head = model.base_model.layers[k].self_attn
            head.q_proj.weight[:width] = 0
            head.v_proj.weight[:width] = 0
            head.v_proj.weight[0, KIND] = 1
            head.o_proj.weight[:, :width] = 0
            head.o_proj.weight[LEANING, 0] = 300
        return model

    return build


def tokens_of(low: int, high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


REFUSING, ANSWERING = tokens_of(3, 60, 8, 6, seed=1), tokens_of(80, 140, 8, 6, seed=2)
NEUTRAL, SAID = tokens_of(60, 80, 4, 6, seed=3), tokens_of(60, 80, 3, seed=4).tolist()


def onset_of(model: PreTrainedModel, queries: Tensor, openings: Openings, field: str) -> int | None:
    found = probe(model, queries.tolist(), [SAID] * len(queries), openings, (1, 3))
    by_block = lean(getattr(found, field).mean(1)).movedim(1, 0).numpy()
    return onset([crossed_mean(values) for values in by_block])


@pytest.mark.parametrize("field", ["distance", "residual"])
@pytest.mark.parametrize("k", [1, 4])
def test_a_planted_onset_is_found_where_it_is(planted, k, field):
    model = planted(k)
    openings = Openings(REFUSING, ANSWERING, NEUTRAL)
    harmful, benign = tokens_of(3, 60, 12, 5, seed=5), tokens_of(80, 140, 12, 5, seed=6)
    assert onset_of(model, harmful, openings, field) == k
    assert onset_of(model, benign, openings, field) is None


@pytest.mark.parametrize("field", ["distance", "residual"])
@pytest.mark.parametrize("k", [1, 4])
def test_openings_under_the_wrong_name_show_nothing(planted, k, field):
    """Half of either kind swapped: what is found above comes from their meaning alone."""
    refusal, compliance = REFUSING.clone(), ANSWERING.clone()
    refusal[::2], compliance[::2] = ANSWERING[::2], REFUSING[::2]
    shuffled = Openings(refusal, compliance, NEUTRAL)
    harmful = tokens_of(3, 60, 12, 5, seed=5)
    assert onset_of(planted(k), harmful, shuffled, field) is None


# --- what is made of them ----------------------------------------------------------------------


def test_lean_is_positive_on_the_side_of_refusing():
    distances = torch.tensor([[[0.1, 0.2, 0.5], [0.4, 0.2, 0.1]]])
    assert lean(distances).tolist() == [pytest.approx([0.3, 0.0, -0.4])]


def test_margin_compares_whole_probabilities():
    refusal, compliance = (0.02, 0.03, 0.001), (0.1, 0.0001, 0.004)
    likelihood = torch.tensor([[refusal, compliance], [compliance, refusal]]).log()
    expected = math.log(sum(refusal)) - math.log(sum(compliance))
    assert margin(likelihood).tolist() == pytest.approx([expected, -expected], abs=1e-6)
    far = torch.tensor([[-2000.0, -2001.0], [-3000.0, -3000.0]])
    expected = 1000 + math.log1p(math.exp(-1)) - math.log(2)
    assert float(margin(far)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("lows", "expected"),
    [
        ([0.1, 0.2, 0.3], 0),
        ([-0.1, 0.2, 0.3], 1),
        ([0.1, -0.2, 0.3], 2),
        ([0.1, 0.2, 0.0], None),
        ([-0.1, -0.2, -0.3], None),
        ([0.0, 0.1], 1),
        ([math.nan, 0.1], 1),
        ([], None),
    ],
)
def test_onset_is_followed_by_no_undecided_block(lows, expected):
    assert onset([Estimate(low + 1, low, low + 2, 5) for low in lows]) == expected


def test_a_read_out_finds_what_is_planted_and_only_that():
    rng = np.random.default_rng(0)
    labels, seen = rng.random(400) < 0.5, np.arange(400) < 200
    # One dimension of a hundred times the size tells nothing; standardised, it drowns nothing.
    states = rng.normal(size=(400, 20)) * np.where(np.arange(20) == 7, 100, 1)
    states[:, 3] += 4 * labels
    train, test = (torch.tensor(states[part], dtype=torch.float32) for part in (seen, ~seen))
    scores = read_out(train, labels[seen], test)
    assert scores.shape == (200,)
    assert ((scores > 0) == labels[~seen]).mean() > 0.9
    shuffled = read_out(train, rng.permutation(labels[seen]), test)
    assert 0.35 < ((shuffled > 0) == labels[~seen]).mean() < 0.65
    half = read_out(train.bfloat16(), labels[seen], test.bfloat16())
    assert ((half > 0) == labels[~seen]).mean() > 0.9
