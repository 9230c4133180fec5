"""Shared fixtures: tiny random models of every supported family, built without a network."""

from __future__ import annotations

import functools
import gc
import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from xdist.scheduler import LoadFileScheduling

from ssah.core.paths import project_root

#: What every tiny configuration shares. Four heads on two KV heads, so that KV rows are shared.
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}

#: What a family needs besides. A ``head_dim`` of 8 makes heads * head_dim differ from the width.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "phi3": {},
    "starcoder2": {"sliding_window": None},
    "olmo": {},
    "olmo2": {},
    "mixtral": {"num_local_experts": 2},
}


def build_family(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A random model of one family with a few thousand weights, in evaluation mode.

    Every parameter is drawn, biases and norms too: they start at 0 and 1, which would hide the
    mistakes that these tests look for.
    """
    config = AutoConfig.for_model(model_type, **(SHAPE | FAMILIES[model_type] | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


class _ByFixtures(LoadFileScheduling):
    """The tests of a file stay in one process, and all files that read the table of the livelier
    model in the same one: it takes two minutes to measure."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "lively" if "lively_table" in _source(file) else file


@functools.cache
def _source(file: str) -> str:
    return (project_root() / file).read_text()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return _ByFixtures(config, log)


def pytest_collection_finish() -> None:
    """Training collects garbage, which takes a second where thousands of tests are alive."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def smoke_home(tmp_path_factory, worker_id) -> Path:
    """One cache for everything of the smoke profile, shared by all processes that test."""
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / "smoke_home"


@pytest.fixture(scope="session")
def families() -> Callable[..., PreTrainedModel]:
    """Builds a fresh tiny model: ``families("qwen2", num_hidden_layers=1)``."""
    return build_family


@pytest.fixture
def tiny_model() -> PreTrainedModel:
    """A fresh tiny random Llama: 4 heads, 2 KV heads, 2 layers."""
    return build_family("llama")


@pytest.fixture(autouse=True)
def no_progress_lines_left_on():
    """The command line turns the package's messages on for its process, here the tests' own."""
    yield
    logger = logging.getLogger("ssah")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
