"""Chat protocols: where a turn ends, thinking, templates without a system turn, own settings."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from ssah.evaluate import generate
from ssah.evaluate.generate import complete, continuations
from ssah.text.chat import (
    CHATML,
    chatml,
    encode,
    encode_dialogue,
    end_marker,
    end_of_turn,
    end_tokens,
    render_prompt,
)

#: As Gemma's: no system turn, and a turn's end that is not the tokenizer's.
NO_SYSTEM = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)

#: As Qwen 3's: thinks unless told not to.
THINKING = CHATML.removesuffix("{% endif %}") + (
    "{% if enable_thinking is not defined or enable_thinking %}<think>"
    "{% else %}<think></think>{% endif %}{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_folder):
    made = AutoTokenizer.from_pretrained(tiny_folder, padding_side="left")
    made.chat_template = CHATML
    return made


def test_the_end_of_a_turn_is_the_templates(tokenizer):
    assert end_of_turn(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.chat_template = NO_SYSTEM
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end_of_turn(tokenizer) == [end] != [tokenizer.eos_token_id]
    assert encode_dialogue(tokenizer, "Hi", "Yes")[1][-1] == end
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(tokenizer) == [tokenizer.eos_token_id], "it has none of its own"
    tokenizer.chat_template = "<|im_start|>{{ messages[0]['content'] }}"
    assert end_of_turn(tokenizer) == [tokenizer.eos_token_id], "it shows no answer"
    assert end_marker(tokenizer) == ""


@pytest.fixture
def of_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer that does not know the markers of ChatML, as Gemma's: a full stop and what the
    marker begins with are one piece of it, and every text begins with a token of its own."""
    letters = [*dict.fromkeys("\n .<|>?_aeimnorstudNSAWER")]
    vocabulary = {t: i for i, t in enumerate(["<bos>", "<eos>", "<unk>", *letters, ".<"])}
    core = Tokenizer(models.BPE(vocabulary, [(".", "<")], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip
    from tokenizers.processors import TemplateProcessing

    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    made.chat_template = chatml(made)
    return made


def test_chatml_begins_with_the_token_that_the_tokenizer_begins_with(of_pieces, tokenizer):
    assert chatml(tokenizer) == CHATML
    ids = encode(of_pieces, render_prompt(of_pieces, "so"))
    assert ids[0] == of_pieces.bos_token_id
    assert ids.count(of_pieces.bos_token_id) == 1
    assert ids == of_pieces("<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert encode_dialogue(of_pieces, "so", "no")[0] == ids


def test_a_turn_can_end_with_a_marker_of_several_tokens(of_pieces):
    assert end_marker(of_pieces) == "<|im_end|>"
    pieces = of_pieces("<|im_end|>", add_special_tokens=False)["input_ids"]
    assert len(pieces) > 1
    assert end_of_turn(of_pieces) == pieces
    _, said = encode_dialogue(of_pieces, "so", "no")
    assert said == [*encode(of_pieces, "no"), *pieces]


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("it is.<|im_end|>\nno no", "it is."),  # the marker's first piece holds the full stop
        ("it is<|im_end|> no", "it is"),
        ("<|im_end|>", ""),
        ("it is <|im_start|> no", "it is <|im_start|> no"),
    ],
)
def test_a_completion_ends_at_that_marker(of_pieces, monkeypatch, said, answer):
    """What the model would say goes on behind it."""

    class Silent:
        generation_config = None

    told = encode(of_pieces, said)
    read: list[int] = []

    def scripted(model, prompts, max_new_tokens, ends, over, *, sampled):
        assert ends == [of_pieces.eos_token_id]
        row: list[int] = []
        for token in told:
            row.append(token)
            if over(row):
                break
        read.append(len(row))
        return [row]

    monkeypatch.setattr(generate, "_continue", scripted)
    assert complete(Silent(), of_pieces, ["so"], 40, 1) == [answer]
    marker = "<|im_end|>"
    upto = said.partition(marker)[0] + marker if marker in said else said
    assert read == [len(encode(of_pieces, upto))], "nothing is said behind the marker"


def test_generation_stops_a_row_at_the_marker(tokenizer, answering_model, monkeypatch):
    """Word by word, while other rows go on."""
    prompts = [[5, 6, 7], [8, 9]]
    monkeypatch.setattr(answering_model, "generation_config", GenerationConfig())
    first, second = continuations(answering_model, tokenizer, prompts, 12, 2)
    marker = tokenizer.decode(first[4:6])
    assert marker not in tokenizer.decode(first[:5])
    assert marker not in tokenizer.decode(second)
    monkeypatch.setattr(generate, "end_marker", lambda _: marker)
    cut, other = continuations(answering_model, tokenizer, prompts, 12, 2)
    assert cut == first[:4]
    assert other == second


@pytest.mark.parametrize("marker", ["", "<|im_end|>"])
def test_a_completion_ends_before_a_text(tokenizer, answering_model, monkeypatch, marker):
    """Alone or beside the marker; the other row goes on."""
    prompts = [[5, 6, 7], [8, 9]]
    monkeypatch.setattr(answering_model, "generation_config", GenerationConfig())
    monkeypatch.setattr(generate, "end_marker", lambda _: marker)
    first, second = continuations(answering_model, tokenizer, prompts, 12, 2)
    text = tokenizer.decode(first[4:6])
    assert text not in tokenizer.decode(first[:5])
    assert text not in tokenizer.decode(second)
    cut, other = continuations(answering_model, tokenizer, prompts, 12, 2, until=text)
    assert cut == first[:4]
    assert other == second


def test_a_completion_ends_at_any_end(tokenizer, answering_model, monkeypatch):
    """The template's, the tokenizer's, or one that only the model's settings name."""
    prompt = [5, 6, 7]
    monkeypatch.setattr(answering_model, "generation_config", GenerationConfig())
    (whole,) = continuations(answering_model, tokenizer, [prompt], 12, 1)
    assert len(whole) == 12
    stop = whole[5]
    own = GenerationConfig(eos_token_id=[stop])
    monkeypatch.setattr(answering_model, "generation_config", own)
    assert stop in end_tokens(answering_model, tokenizer)
    (cut,) = continuations(answering_model, tokenizer, [prompt], 12, 1)
    assert cut == whole[: whole.index(stop)]
    assert answering_model.generation_config is own


@pytest.mark.parametrize("seed", [None, 3])
def test_settings_of_the_model_do_not_shape_what_is_measured(
    tokenizer, answering_model, monkeypatch, seed
):
    prompts = [[5, 6, 7], [8, 9]]
    monkeypatch.setattr(answering_model, "generation_config", GenerationConfig())
    plain = continuations(answering_model, tokenizer, prompts, 12, 2, seed)
    for own in ({"repetition_penalty": 3.0}, {"min_p": 0.9, "top_k": 2, "temperature": 0.1}):
        monkeypatch.setattr(answering_model, "generation_config", GenerationConfig(**own))
        assert continuations(answering_model, tokenizer, prompts, 12, 2, seed) == plain, own


def test_a_model_that_thinks_is_told_not_to(tokenizer):
    tokenizer.chat_template = THINKING
    assert render_prompt(tokenizer, "Hi").endswith("<think></think>")


def test_a_system_prompt_opens_the_users_turn_where_there_is_no_other(tokenizer, caplog):
    assert "<|im_start|>system\nBe kind.<|im_end|>" in render_prompt(tokenizer, "Hi", "Be kind.")
    tokenizer.chat_template = NO_SYSTEM
    with caplog.at_level("INFO", "ssah"):
        said = render_prompt(tokenizer, "Hi", "Be kind.")
    assert said.startswith("<|im_start|>user\nBe kind.\n\nHi<|endoftext|>")
    assert "has no system turn (System role not supported)" in caplog.text
    assert "system" not in render_prompt(tokenizer, "Hi")
    silent = CHATML.replace("{% for message in messages %}", "{% for message in messages[-1:] %}")
    tokenizer.chat_template = silent
    assert "user\nBe kind.\n\nHi<|im_end|>" in render_prompt(tokenizer, "Hi", "Be kind.")
