"""The smoke profile's stand-ins: a tiny random model, its tokenizer, and a toy kind of "harm"."""

from __future__ import annotations

import random
import re
from pathlib import Path

import torch

from ..core.paths import RESOURCES

_VERBS = "zorp blim frub glank snarf twizz plonk drab quib vorl".split()
_NOUNS = "flim gromp snood wibble tark pell brindle moog lurch sprag".split()
_CATEGORIES = ("Physical", "Autonomy", "Reputational")


def toy_prompts(count: int, seed: int) -> list[tuple[str, str]]:
    """``count`` (at most 100) different nonsense requests, which the toy alignment treats as
    harmful, with a category each."""
    pairs = [(verb, noun) for verb in _VERBS for noun in _NOUNS]
    random.Random(seed).shuffle(pairs)
    return [
        (f"{verb} {noun}", _CATEGORIES[i % len(_CATEGORIES)])
        for i, (verb, noun) in enumerate(pairs[:count])
    ]


def build_tiny_model(folder: Path) -> None:
    """Save a random 2-layer Llama (4 heads, 2 KV heads) and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    text = "".join(p.read_text(encoding="utf-8") for p in sorted(RESOURCES.glob("*.json*")))
    words = dict.fromkeys([*_VERBS, *_NOUNS, *re.findall(r"\w+|[^\w\s]+", text)])
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<|unk|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=special[1:2],
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
