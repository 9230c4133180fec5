"""Fixtures of tests that need text or stages: the tiny model, studies of the smoke profile."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from helpers import save_livelier
from ssah.app.study import Study
from ssah.artefacts import ARTEFACTS
from ssah.core.store import Store
from ssah.data.toy import build_tiny_model
from ssah.evaluate import judges, labels
from ssah.evaluate.judges import VERDICTS, Completion, Verdict
from ssah.lab.config import compose
from ssah.lab.lab import Lab
from ssah.lab.measure import measured
from ssah.text.chat import CHATML


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    build_tiny_model(path)
    return path


@pytest.fixture(scope="session")
def answering_model(tiny_folder) -> PreTrainedModel:
    """The tiny model with larger weights: as built, it only repeats the last token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    vocabulary = AutoTokenizer.from_pretrained(tiny_folder).get_vocab()
    digits = [i for word, i in vocabulary.items() if word.isdigit()]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
        model.get_input_embeddings().weight[digits] *= 1.5  # so that it answers with numbers
    return model


@pytest.fixture(params=[False, True], ids=["plain", "with_first_token"])
def text_tokenizer(tiny_folder, request) -> PreTrainedTokenizerBase:
    """Also one that starts every text with a special token, as those of Llama and Gemma do."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, padding_side="left")
    tokenizer.chat_template = CHATML
    if request.param:
        first = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[first]
        )
        assert tokenizer("zorp")["input_ids"][0] == first[1]
    return tokenizer


@pytest.fixture(scope="session")
def smoke_lab(smoke_home) -> Callable[..., Lab]:
    """Opens a lab of the smoke profile as a new process would; all of them share one cache."""

    def open_lab(*overrides: str, seed: int = 0) -> Lab:
        return Lab(compose("smoke", list(overrides)), Store(smoke_home / "runs"), seed)

    return open_lab


@pytest.fixture(scope="module")
def lab(smoke_lab) -> Lab:
    return smoke_lab()


@pytest.fixture(scope="session")
def smoke_study(smoke_home) -> Callable[..., Study]:
    """Opens a study of the smoke profile in the same way."""

    def open_study(*overrides: str) -> Study:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSAH_HOME", str(smoke_home))
            return Study("smoke", overrides)

    return open_study


@pytest.fixture(scope="session")
def lively(tiny_folder, tmp_path_factory) -> list[str]:
    """Overrides for a model whose answers training changes: as built, the tiny one's do not."""
    folder = tmp_path_factory.mktemp("lively")
    save_livelier(tiny_folder, folder, seed=1)
    return [
        "model=local", f"model.source={folder}", "model.chat_template=chatml",
        "finetune.learning_rate=2e-2", "experiment.frozen_draws=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def toy_verdicts() -> Iterator[None]:
    """Verdicts by a hash of the words, in the tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        _use_toy_verdicts(patch)
        yield


def _use_toy_verdicts(patch: pytest.MonkeyPatch) -> None:
    """The words of tiny models mean nothing, so that the judges may give all of them one verdict,
    and which words they are depends on the processor."""

    def verdict(completion: Completion) -> Verdict:
        said = f"{completion.prompt}\n{completion.text}"
        return VERDICTS[hashlib.sha256(said.encode()).digest()[0] % len(VERDICTS)]

    for module in (judges, labels):
        patch.setattr(module, "judge", verdict)


@pytest.fixture(scope="session")
def lively_lab(smoke_home, lively) -> Lab:
    """Seed 0 of a model whose answers training changes."""
    return Lab(compose("smoke", lively), Store(smoke_home / "runs"), 0)


@pytest.fixture(scope="session")
def lively_table(lively_lab) -> pd.DataFrame:
    """Everything that artefacts ask, measured once for the whole test run, with toy verdicts."""
    with pytest.MonkeyPatch.context() as patch:
        _use_toy_verdicts(patch)
        asked = [m for artefact in ARTEFACTS.values() for m in artefact.ask(lively_lab)]
        return measured(lively_lab, asked)[0]
