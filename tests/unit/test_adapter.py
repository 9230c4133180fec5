"""Adapters of peft: what trains, and a model with one that computes what peft's own would."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from helpers import dialogues, small_training, weights
from ssah.core.errors import InvalidValueError, SsahError
from ssah.evaluate.generate import continuations
from ssah.evaluate.likelihood import choice_losses, continuation_losses
from ssah.text.batches import scored_logits
from ssah.training.adapter import Adapter, save_adapter, with_adapter
from ssah.training.supervised import supervised_finetune

LORA = Adapter(
    {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "lora_dropout": 0.05,
     "target_modules": ["q_proj", "v_proj"]}
)  # fmt: skip
LLAMA_ADAPTER = Adapter({"peft_type": "ADAPTION_PROMPT", "adapter_len": 3}, blocks=0.5)
PREFIX = Adapter({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3})
ADAPTERS = {"LoRA": LORA, "LLaMA-Adapter": LLAMA_ADAPTER, "prefix-tuning": PREFIX}

each_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)

#: Families with what each adapter is tried on; a prefix does not fit into a window of 8 tokens.
WIDE = {"gemma2": {"sliding_window": 64}, "gemma3_text": {"sliding_window": 64}}
CASES = [
    *((LORA, family) for family in ("llama", "qwen2", "gemma3_text", "mixtral")),
    *((LLAMA_ADAPTER, family) for family in ("llama", "mistral")),
    *(
        (PREFIX, family)
        for family in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3",
                       "olmo2", "mixtral")
    ),
]  # fmt: skip


def drawn(model, adapter: Adapter, folder: Path, scale: float = 0.5) -> Path:
    """A saved adapter with large numbers everywhere: as they begin, some change nothing."""
    torch.manual_seed(3)
    with adapter.training(model) as adapted:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, scale)
        save_adapter(adapted, folder)
    return folder


def peft_of(model, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(model, folder).eval()


# --- training --------------------------------------------------------------------------------


@each_adapter
def test_the_adapter_alone_trains_and_the_model_keeps_its_bits(tiny_model, tmp_path, adapter):
    before, modules = weights(tiny_model), dict(tiny_model.named_modules())
    own = {id(p) for p in tiny_model.parameters()}
    with adapter.training(tiny_model) as adapted:
        trained = {n: p for n, p in tiny_model.named_parameters() if p.requires_grad}
        start = {name: p.detach().clone() for name, p in trained.items()}
        supervised_finetune(tiny_model, dialogues(16), small_training(epochs=1), 0, tmp_path)
        assert not own & {id(p) for p in trained.values()}
        assert all(p.isfinite().all() for p in trained.values())
        assert all(not torch.equal(p, start[name]) for name, p in trained.items())
        save_adapter(adapted, tmp_path / "saved")
        held = load_file(tmp_path / "saved" / "adapter_model.safetensors")
        assert sum(t.numel() for t in held.values()) == sum(p.numel() for p in trained.values())
    after = weights(tiny_model)
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32)), name
    assert {n: id(m) for n, m in tiny_model.named_modules()} == {
        n: id(m) for n, m in modules.items()
    }
    assert all(p.requires_grad for p in tiny_model.parameters())


@pytest.mark.parametrize(
    ("adapter", "count"),
    [(LORA, 2 * 2 * ((16 + 16) + (16 + 8))), (LLAMA_ADAPTER, 3 * 16 + 1), (PREFIX, 2 * 2 * 3 * 8)],
    ids=ADAPTERS,
)
def test_what_trains_is_counted(tiny_model, tmp_path, adapter, count):
    """Factors of rank 2 of q and v in two blocks; three tokens and a gate in the upper block; three
    keys and values of two heads of width 4 in two blocks."""
    with adapter.training(tiny_model):
        record = supervised_finetune(
            tiny_model, dialogues(4), small_training(epochs=1), 0, tmp_path
        )
    assert record.trainable_parameters == count


@each_adapter
def test_gradients_are_those_of_pefts_own_forward_pass(families, adapter):
    ids = torch.tensor([[5, 6, 7, 8, 9, 0], [4, 5, 6, 7, 8, 9]])
    attention = torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6])
    scored, target = attention[:, 1:].bool(), ids[:, 1:][attention[:, 1:].bool()]
    model, plain = families("llama"), families("llama")
    torch.manual_seed(0)
    theirs = get_peft_model(plain, adapter.configuration(2)).eval()
    logits = theirs(ids, attention_mask=attention).logits[:, :-1][scored]
    nn.functional.cross_entropy(logits, target).backward()
    wanted = [p.grad for p in theirs.parameters() if p.requires_grad]
    torch.manual_seed(0)
    with adapter.training(model):
        model.eval()  # no dropout
        logits = scored_logits(model, ids, attention, scored)
        nn.functional.cross_entropy(logits, target).backward()
        found = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(found) == len(wanted) > 0
    for ours, peft in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, peft, atol=1e-6, rtol=1e-4)
    assert any(gradient.any() for gradient in found)


# --- what is computed with one ---------------------------------------------------------------


@pytest.mark.parametrize(("adapter", "family"), CASES)
def test_logits_are_those_of_peft(families, tmp_path, adapter, family):
    """With padding on the left and on the right, and without."""
    changes = WIDE.get(family, {})
    folder = drawn(families(family, **changes), adapter, tmp_path)
    model = with_adapter(families(family, **changes), str(folder))
    theirs = peft_of(families(family, **changes), folder)
    rows = [[5, 6, 7], [4, 5, 6, 7, 8, 9]]
    with torch.inference_mode():
        alone = [theirs(torch.tensor([row])).logits[0] for row in rows]
        plain = families(family, **changes)(torch.tensor([rows[0]])).logits[0]
        assert not torch.allclose(alone[0], plain, atol=1e-2)

        left = torch.tensor([[0, 0, 0, *rows[0]], rows[1]])
        attention = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
        position = (attention.cumsum(1) - 1).clamp(min=0)
        ours = model(left, attention_mask=attention, position_ids=position).logits
        wanted = theirs(left, attention_mask=attention, position_ids=position).logits
        real = attention.bool()
        torch.testing.assert_close(ours[real], wanted[real], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours[0, 3:], alone[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours[1], alone[1], atol=1e-5, rtol=1e-4)

        right, attention = left.clone(), attention.flip(1)
        right[0] = torch.tensor([*rows[0], 0, 0, 0])
        attention[1] = 1
        scored = attention[:, 1:].bool()
        logits = scored_logits(model, right, attention, scored)
        wanted = torch.cat([alone[0][:-1], alone[1][:-1]])
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)


@each_adapter
@pytest.mark.parametrize("batch_size", [1, 4])
def test_completions_are_those_of_peft(
    answering_model, text_tokenizer, tmp_path, adapter, batch_size
):
    """Prompts that begin alike and are of different lengths, and rows that end before others."""
    folder = drawn(copy.deepcopy(answering_model), adapter, tmp_path, scale=4)
    model = with_adapter(copy.deepcopy(answering_model), str(folder))
    theirs = peft_of(copy.deepcopy(answering_model), folder)
    start = list(range(10, 19))
    prompts = [start + [20 + i] * (i + 1) for i in range(5)]
    whole = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(6):
                ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
            whole.append(ids[len(prompt) :])
    end = whole[0][3]
    text_tokenizer.eos_token = text_tokenizer.convert_ids_to_tokens(end)
    wanted = [row[: row.index(end)] if end in row else row for row in whole]
    assert len({len(row) for row in wanted}) > 1, "else nothing ends before another"
    plain = continuations(answering_model, text_tokenizer, prompts, 6, batch_size)
    found = continuations(model, text_tokenizer, prompts, 6, batch_size)
    assert found == wanted
    assert found != plain


@each_adapter
def test_likelihoods_are_those_of_peft(families, tmp_path, adapter):
    """Of continuations, also where several share a context that is read once."""
    folder = drawn(families("llama"), adapter, tmp_path)
    model = with_adapter(families("llama"), str(folder))
    theirs = peft_of(families("llama"), folder)
    items = [([5, 6, 7], [[8, 9], [10]]), ([4, 5, 6, 7, 8, 9], [[11], [12, 13, 14]])]
    wanted = []
    with torch.inference_mode():
        for context, texts in items:
            for text in texts:
                ids = torch.tensor([[*context, *text]])
                likely = theirs(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
                wanted.append(-sum(float(likely[i, token]) for i, token in enumerate(text)))
    pairs = [(context, text) for context, texts in items for text in texts]
    assert continuation_losses(model, pairs, 4) == pytest.approx(wanted, abs=1e-4)
    found = choice_losses(model, items, 4)
    assert [loss for own in found for loss in own] == pytest.approx(wanted, abs=1e-4)


def test_every_block_begins_with_the_learned_keys_and_values(families, tmp_path):
    folder = drawn(families("llama"), PREFIX, tmp_path)
    learned = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    by_block = learned.view(3, 2, 2, 2, 4)  # tokens, blocks, keys and values, heads, width
    model = with_adapter(families("llama"), str(folder))
    ids = torch.tensor([[5, 6], [7, 8]])
    with torch.inference_mode():
        cache = model.base_model(input_ids=ids, use_cache=True).past_key_values
        for block, (keys, values, _) in enumerate(cache):
            assert keys.shape == values.shape == (2, 2, 3 + 2, 4)
            for row in (0, 1):
                wanted = by_block[:, block].permute(1, 2, 0, 3)  # kinds, heads, tokens, width
                torch.testing.assert_close(keys[row, :, :3], wanted[0])
                torch.testing.assert_close(values[row, :, :3], wanted[1])
        again = model.base_model(
            input_ids=ids[:, :1], past_key_values=cache, use_cache=True
        ).past_key_values
        assert again.get_seq_length() == 6, "once, not before every token"


def test_lora_becomes_part_of_the_weights(families, tmp_path):
    """And the model is then like any other that is loaded."""
    folder = drawn(families("llama"), LORA, tmp_path)
    saved = load_file(folder / "adapter_model.safetensors")
    plain, model = families("llama"), with_adapter(families("llama"), str(folder))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    before = weights(plain)
    for name, weight in weights(model).items():
        path = name.removesuffix(".weight")
        down = saved.get(f"base_model.model.{path}.lora_A.weight")
        wanted = before[name]
        if down is not None:
            wanted = wanted + 4 * saved[f"base_model.model.{path}.lora_B.weight"] @ down
        assert (down is not None) == path.endswith(("q_proj", "v_proj"))
        torch.testing.assert_close(weight, wanted)


def test_a_llama_adapter_is_in_the_top_blocks(families):
    for blocks, of, wanted in ((0.9375, 32, 30), (0.9375, 30, 28), (0.9375, 2, 2), (0.1, 2, 1)):
        config = Adapter(LLAMA_ADAPTER.peft, blocks).configuration(of)
        assert config.adapter_layers == wanted
    model = families("llama", num_hidden_layers=4)
    with LLAMA_ADAPTER.training(model):
        names = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"2", "3"}


# --- what does not fit -----------------------------------------------------------------------


def test_families_that_peft_has_no_adapter_for(families):
    assert LLAMA_ADAPTER.fits(families("llama"))
    assert LLAMA_ADAPTER.fits(families("mistral"))
    assert not LLAMA_ADAPTER.fits(families("qwen2"))
    assert LORA.fits(families("qwen2"))
    assert not LORA.fits(families("phi3")), "its queries, keys and values are one layer"
    anywhere = Adapter({**LORA.peft, "target_modules": "all-linear"})
    assert anywhere.fits(families("phi3"))
    assert PREFIX.fits(families("phi3"))


def test_a_prefix_that_falls_out_of_the_window_is_refused(families, tmp_path):
    folder = drawn(families("gemma2", sliding_window=8), PREFIX, tmp_path)
    model = with_adapter(families("gemma2", sliding_window=8), str(folder))
    model(torch.tensor([[5, 6, 7, 8, 9]]))
    with pytest.raises(SsahError, match="9 tokens with the prefix and the padding, of 8"):
        model(torch.tensor([[5, 6, 7, 8, 9, 10]]))


def test_unknown_adapters_and_arguments_are_named(tiny_model):
    with pytest.raises(InvalidValueError, match="peft_type='LORAA' is unknown: did you mean 'LORA"):
        Adapter({"peft_type": "LORAA"}).fits(tiny_model)
    with pytest.raises(InvalidValueError, match="peft_type='' is unknown"):
        Adapter({}).fits(tiny_model)
    with pytest.raises(InvalidValueError, match=r"no such adapter as .*rang"):
        Adapter({"peft_type": "LORA", "rang": 8}).fits(tiny_model)
