"""The model families whose units are known: one entry of :data:`FAMILIES` for each.

To add a family, name the linear layers of a transformer block here; everything else (layouts,
attribution, ablation, masked training) follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core.errors import UnsupportedModelError

UnitKind = Literal["head", "channel", "kv_group"]
BlockKind = Literal["attn", "mlp"]


@dataclass(frozen=True)
class Family:
    """Names of a block's linear layers, below ``layers.<number>``.

    ``inputs`` are what a unit reads with: the rows of queries, keys and values; and those of gate
    and up-projection, or of the one projection of an MLP without a gate. Layers that one matrix
    holds, one after the other, are named alike.
    """

    attention: str = "self_attn"
    attention_inputs: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    attention_output: str = "o_proj"
    mlp: str = "mlp"
    mlp_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_output: str = "down_proj"


#: ``model_type`` of the Hugging Face configuration -> its family.
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "olmo": Family(),
    "olmo2": Family(),
    "starcoder2": Family(mlp_inputs=("c_fc",), mlp_output="c_proj"),
    "phi3": Family(attention_inputs=("qkv_proj",) * 3, mlp_inputs=("gate_up_proj",) * 2),
}


def family_of(model_type: str) -> Family:
    """Raises :class:`UnsupportedModelError` for an architecture without a unit layout here."""
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"Model type '{model_type}' has no unit layout; supported are {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]
