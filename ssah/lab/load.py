"""Load models and tokenizers: the embedded one, the tiny one, a folder, or a hub id."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from ..core.errors import SsahError
from ..core.paths import require_space
from ..core.progress import quiet
from ..core.store import Handle, Store, digest, file_digest
from ..core.valid import require_word
from ..data.assets import ASSETS, MODELS, fetch
from ..data.settings import ModelConfig
from ..data.toy import build_tiny_model
from ..text.chat import FIXED_DATE, chatml
from ..training.adapter import with_adapter
from ..units.families import family_of
from ..units.layout import UnitLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's files are and what identifies them in a run's key."""

    source: str | Handle  #: a folder or a hub id, or the run that makes them
    identity: str
    revision: str | None = None
    adapter: str | None = None  #: the folder of one that belongs to it

    @property
    def path(self) -> str:
        """The folder or hub id; the files are made first where they are not there."""
        if isinstance(self.source, Handle):
            return str(self.source.path("config.json").parent)
        return self.source


def locate(store: Store, config: ModelConfig) -> Checkpoint:
    """The unaligned (or, with ``align=none``, the given) model, built first if it is embedded."""
    folder = Path(config.source).expanduser()
    if config.source == "embedded":
        run = _embedded(store, config)
    elif config.source == "tiny":
        run = Handle(store, "model", "tiny", {"version": 1}, build_tiny_model)
    elif folder.suffix == ".gguf" and folder.is_file():
        build = functools.partial(_dequantise, lambda: folder, None)
        run = Handle(
            store, "model", config.name, {"version": 1, "gguf": file_digest(folder)}, build
        )
    else:
        if folder.is_dir():
            if not (folder / "config.json").exists() or not [*folder.glob("*.safetensors")]:
                raise SsahError(
                    f"{folder} is not a model: it holds no config.json with *.safetensors."
                )
            return Checkpoint(str(folder), digest(_files_of(folder)))
        if config.source.startswith((".", "/", "~")):
            raise SsahError(f"model.source={config.source} does not exist: check the path.")
        return Checkpoint(config.source, _hub_commit(config), config.revision)
    return Checkpoint(run, run.key)


def _files_of(folder: Path) -> dict[str, str]:
    """Whatever of a model's folder shapes what it says: weights, configuration, generation
    settings, tokenizer and chat template."""
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt")
    files = sorted(p for p in folder.glob("*") if p.suffix in kinds and p.is_file())
    return {p.name: file_digest(p) for p in files}


def _embedded(store: Store, config: ModelConfig) -> Handle:
    name = config.name
    require_word("model.name", name, MODELS)
    offered = ASSETS[name]
    if offered.terms and not config.accept_terms:
        raise SsahError(
            f"{name} comes under the {offered.licence} ({offered.terms}): read them, and say "
            "model.accept_terms=true if you accept them; nothing was downloaded."
        )
    asset = fetch(store, name)

    def gguf() -> Path:
        return next(asset.path("files").glob("*.gguf"))

    # In SmolLM2's file it is the end-of-turn token; Gemma's tokenizer, which has its own, does not
    # know this one.
    build = functools.partial(_dequantise, gguf, "<|endoftext|>")
    key = {"version": 1, "asset": asset.key}
    return Handle(store, "model", name, key, build, (asset.key,))


def _dequantise(find: Callable[[], Path], pad: str | None, folder: Path) -> None:
    """Once; later loads read plain safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = find()
    # Four bits become 32.
    require_space(9 * gguf.stat().st_size / 1e9, folder)
    try:
        with quiet():
            source = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # damage shows up anywhere in its reader
        raise SsahError(f"{gguf} cannot be loaded: {_first_line(error)}") from error
    settings = source.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)
    plain = type(source)(type(source.config)(**settings))
    plain.load_state_dict(source.state_dict())
    plain.save_pretrained(folder)
    if pad is not None and pad in tokenizer.get_vocab():
        tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)


def _hub_commit(config: ModelConfig) -> str:
    """The commit that the hub id and revision stand for, so that a moved branch is noticed."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HTTPError, OfflineModeIsEnabled

    cached = try_to_load_from_cache(config.source, "config.json", revision=config.revision)
    try:
        commit = HfApi().model_info(config.source, revision=config.revision).sha
        return f"{config.source}@{commit}"
    except GatedRepoError as error:
        raise SsahError(
            f"{config.source} is gated: request access on its hub page and run `hf auth login`, "
            "or set model.source to a copy that you have on disk."
        ) from error
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        if isinstance(cached, str):
            return f"{config.source}@{Path(cached).parent.name}"
        raise SsahError(
            f"Model '{config.source}' is neither a folder here nor reachable on the hub "
            f"({type(error).__name__}): check the name, the network and HF_HUB_OFFLINE."
        ) from error


def load_model(
    checkpoint: Checkpoint, config: ModelConfig, device: torch.device
) -> PreTrainedModel:
    """A causal language model in evaluation mode."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.path,
                revision=checkpoint.revision,
                dtype=getattr(torch, config.dtype),
                attn_implementation=config.attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which the report names
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise SsahError(f"{checkpoint.path} cannot be loaded: {_first_line(error)}") from error
    model, report = loaded
    _require_all_weights(checkpoint.path, report)
    model = model.to(device).eval()
    return model if checkpoint.adapter is None else with_adapter(model, checkpoint.adapter)


def _require_all_weights(path: str, report: Mapping[str, Collection[Any]]) -> None:
    """Raise :class:`SsahError` where weights were not found, for which the library draws random
    ones and only warns, or where weights of a block had no place. Others, such as a second head's,
    are left out aloud."""
    found = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]),
        "of another shape": sorted(key[0] for key in report["mismatched_keys"]),
    }
    wrong = [
        f"{kind}: {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        for kind, keys in found.items()
        if keys
    ]
    in_blocks = any("layers." in key for key in found["unexpected"])
    if len(wrong) == 1 and found["unexpected"] and not in_blocks:
        logger.info("%s: weights that have no place are left out (%s)", path, wrong[0])
    elif wrong:
        raise SsahError(
            f"The weights in {path} do not fit its config.json ({'; '.join(wrong)}): was it saved "
            "from inside a wrapper (module., _orig_mod., base_model.model.), or by another model?"
        )


def shapes(store: Store, checkpoint: Checkpoint, name: str) -> PreTrainedModel:
    """The linear layers of a model, without weights: enough for a layout.

    They are read off once, since the library that knows them takes seconds to import.
    Raises :class:`UnsupportedModelError` for a family without a unit layout.
    """
    key = {"version": 1, "model": checkpoint.identity}
    run = Handle(store, "shapes", name, key, functools.partial(_write_shapes, checkpoint))
    return cast("PreTrainedModel", _Skeleton(**run.json("shapes.json")))


class _Skeleton(nn.Module):
    """Linear layers without weights, under the paths that they have in a model, and what its
    configuration says of heads and blocks."""

    def __init__(self, config: Mapping[str, Any], layers: Mapping[str, tuple[int, int, bool]]):
        super().__init__()
        self.config: Any = SimpleNamespace(**config)
        self.config.get_text_config = lambda: self.config
        for path, (inputs, outputs, bias) in layers.items():
            *above, name = path.split(".")
            parent: nn.Module = self
            for part in above:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(name, nn.Linear(inputs, outputs, bias, device="meta"))


def _write_shapes(checkpoint: Checkpoint, folder: Path) -> None:
    path = checkpoint.path  # where it is not there yet, no library need be loaded
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet():
            config = AutoConfig.from_pretrained(path, revision=checkpoint.revision)
    except (OSError, ValueError, KeyError) as error:
        reason = _first_line(error)
        raise SsahError(f"The configuration in {path} cannot be read: {reason}") from error
    text = config.get_text_config()
    family_of(text.model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    UnitLayout.of(model)  # says what is wrong with it
    layers = {
        path: (layer.in_features, layer.out_features, layer.bias is not None)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    names = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    found = {"config": {name: getattr(text, name) for name in names}, "layers": layers}
    (folder / "shapes.json").write_text(json.dumps(found))


def load_tokenizer(checkpoint: Checkpoint, config: ModelConfig) -> PreTrainedTokenizerBase:
    """Its tokenizer, padding on the left, with the template that the configuration names."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.path, revision=checkpoint.revision, padding_side="left"
            )
    except Exception as error:  # the tokenizers library raises nothing narrower
        reason = _first_line(error)
        raise SsahError(f"The tokenizer in {checkpoint.path} cannot be loaded: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.chat_template == "chatml":
        tokenizer.chat_template = chatml(tokenizer)
    elif tokenizer.chat_template is None:
        raise SsahError(
            f"{checkpoint.path} has no chat template, as chat models have: put one into its "
            "tokenizer, or in a study set model.chat_template=chatml."
        )
    if "strftime_now" in tokenizer.chat_template:
        tokenizer.chat_template = FIXED_DATE + tokenizer.chat_template
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
