"""Adapters of peft beside a model's own weights: LoRA, LLaMA-Adapter, prefix tuning (Table 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..core.errors import InvalidValueError, SsahError
from ..core.progress import quiet
from ..core.valid import require_word

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LORA, LLAMA_ADAPTER, PREFIX = TYPES = ("LORA", "ADAPTION_PROMPT", "PREFIX_TUNING")


@dataclass(frozen=True)
class Adapter:
    """An adapter trains, and every weight of the model keeps its bits.

    ``peft`` are the arguments of peft's configuration with its ``peft_type``, one of
    :data:`TYPES`. A LLaMA-Adapter is in the top ``blocks`` of all blocks, a fraction.
    """

    peft: Mapping[str, Any]
    blocks: float = 1.0

    def configuration(self, blocks: int) -> Any:
        """peft's, for a model of that many blocks.

        Raises :class:`InvalidValueError` for arguments that peft does not know.
        """
        from peft import get_peft_config

        kind = self.peft.get("peft_type", "")
        require_word("peft_type", kind, TYPES)
        own = {"adapter_layers": max(round(self.blocks * blocks), 1)}
        try:
            return get_peft_config(
                {"task_type": "CAUSAL_LM", **(own if kind == LLAMA_ADAPTER else {}), **self.peft}
            )
        except (TypeError, ValueError) as error:
            raise InvalidValueError(
                f"peft has no such adapter as {dict(self.peft)}: {error}."
            ) from error

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether peft has this adapter for the model's family.

        That is said for LLaMA-Adapters by peft's own table, and for LoRA by the layers that it
        would change. Of the model only layers and configuration are looked at.
        """
        from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

        text = model.config.get_text_config()
        found = self.configuration(text.num_hidden_layers)
        if found.peft_type == LLAMA_ADAPTER:
            return text.model_type in TRANSFORMERS_MODEL_CONFIG
        if found.peft_type == LORA and isinstance(found.target_modules, set):
            return found.target_modules <= {p.rpartition(".")[2] for p, _ in model.named_modules()}
        return True

    @contextmanager
    def training(self, model: PreTrainedModel) -> Iterator[PeftModel]:
        """A block in which the adapter alone trains; it is drawn where the block begins, and gone
        where it ends. What is yielded holds it (:func:`save_adapter`)."""
        from peft import get_peft_model

        required = {name: p.requires_grad for name, p in model.named_parameters()}
        config = self.configuration(model.config.get_text_config().num_hidden_layers)
        with quiet():
            adapted = get_peft_model(model, config)
        take_off = _wire(model, adapted)
        if config.is_prompt_learning:  # else the model has the adapter's parameters among its own
            model.add_module("adapter", adapted.prompt_encoder)
        try:
            yield adapted
        finally:
            take_off()
            if config.is_prompt_learning:
                del model.adapter
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(required[name])


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """``adapter_model.safetensors`` and ``adapter_config.json``, as peft reads them."""
    with quiet():
        adapted.save_pretrained(str(folder), save_embedding_layers=False)


def with_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The model with a saved adapter, which it keeps: LoRA becomes part of the weights, and of
    anything else every forward pass of the model's body takes account."""
    from peft import PeftModel

    with quiet():
        adapted = PeftModel.from_pretrained(model, folder)
        if adapted.active_peft_config.peft_type == LORA:
            adapted.merge_and_unload()
        else:
            _wire(model, adapted)
    return model.requires_grad_(True).eval()


def _wire(model: PreTrainedModel, adapted: PeftModel) -> Callable[[], Any]:
    """Make the model itself what peft's wrapper is; returned is what undoes that.

    LoRA and LLaMA-Adapter are layers in the model. A prefix is put before what the body reads by
    peft's wrapper alone, so by a hook here.
    """
    kind = adapted.active_peft_config.peft_type
    if kind == PREFIX:
        body = model.base_model
        return body.register_forward_pre_hook(_prefix_hook(adapted), with_kwargs=True).remove
    tuner: Any = adapted.base_model
    return tuner.unload if kind == LORA else tuner.disable_adapter_layers


def _prefix_hook(adapted: PeftModel) -> Callable[..., tuple[tuple, dict[str, Any]]]:
    """Before each forward pass of the body: learned keys and values in every block where there is
    no cache yet, which every token attends to, and positions that count from behind them."""
    length = adapted.active_peft_config.num_virtual_tokens
    window = getattr(adapted.config.get_text_config(), "sliding_window", None)

    def hook(body: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids: Tensor = args[0] if args else kwargs["input_ids"]
        cache: Any = kwargs.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            cache = adapted.get_prompt(len(ids))
        total = cache.get_seq_length() + ids.shape[1]
        if window and total > window:
            raise SsahError(
                f"The prefix would fall out of this model's sliding window: {total} tokens with "
                f"the prefix and the padding, of {window}. Give shorter texts, or leave prefix "
                "tuning out of experiment.adapters."
            )
        kwargs = {**kwargs, "past_key_values": cache}
        attention, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if attention is not None:
            kwargs["attention_mask"] = nn.functional.pad(attention, (length, 0), value=1)
        if position is not None:
            kwargs["position_ids"] = position + length
        return args, kwargs

    return hook
