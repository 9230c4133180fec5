"""Units: which rows and columns of which weights belong to a head, a KV group or a neuron."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ssah.core.errors import UnsupportedModelError
from ssah.units.families import FAMILIES
from ssah.units.layout import Slices, UnitLayout
from ssah.units.mask import UnitMask

HEADS, KV_HEADS, GROUP = 4, 2, 2
KINDS = ("head", "kv_group", "channel")
TOKENS = torch.tensor([[5, 9, 3, 17, 22, 8, 30, 11], [7, 7, 12, 1, 38, 2, 6, 19]])

#: How many units list each row of q, k and v (0: in no unit at all); o columns are never shared.
LISTED = {"head": (1, GROUP, GROUP), "kv_group": (1, 1, 1), "channel": (0, 0, GROUP)}


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS, use_cache=False).logits


def zero(model, slices: Slices, units: torch.Tensor, shared: str) -> None:
    """Set the positions of the chosen units to zero."""
    parameter = model.get_parameter(slices.parameter)
    with torch.no_grad():
        parameter.index_fill_(slices.dim, slices.selected(units, shared), 0)


def with_silent_columns(model, block, units: torch.Tensor):
    """A copy of the model in which the chosen units' columns of ``B`` are zero."""
    reference = copy.deepcopy(model)
    weight = reference.get_submodule(block.output).weight
    with torch.no_grad():
        weight[:, block.channels[units].flatten()] = 0
    return reference


def only(count: int, *chosen: int) -> torch.Tensor:
    units = torch.zeros(count, dtype=torch.bool)
    units[list(chosen)] = True
    return units


def expected_listings(model, layer: int, kind: str) -> dict[str, list[int]]:
    """For each parameter with unit weights: how many units list each of its positions."""
    config, parent = model.config, f"model.layers.{layer}"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // HEADS
    queries, keys, values = LISTED[kind]
    rows = {
        "q_proj": [queries] * HEADS * head_dim,
        "k_proj": [keys] * KV_HEADS * head_dim,
        "v_proj": [values] * KV_HEADS * head_dim,
    }
    neurons = config.intermediate_size
    last = "down_proj"
    if config.model_type == "phi3":
        rows = {"qkv_proj": [count for listed in rows.values() for count in listed]}
        feeding = {"gate_up_proj": [1] * 2 * neurons}
    else:
        rows = {name: listed for name, listed in rows.items() if any(listed)}
        feeding = {"gate_proj": [1] * neurons, "up_proj": [1] * neurons}
    if config.model_type == "starcoder2":  # no gate
        feeding, last = {"c_fc": [1] * neurons}, "c_proj"
    read = {f"{parent}.self_attn.{name}": listed for name, listed in rows.items()}
    read |= {f"{parent}.mlp.{name}": listed for name, listed in feeding.items()}
    wanted = {f"{name}.weight": listed for name, listed in read.items()}
    wanted |= {f"{name}.bias": read[name] for name in read if has_bias(model, name)}
    wanted[f"{parent}.self_attn.o_proj.weight"] = [1] * HEADS * head_dim
    wanted[f"{parent}.mlp.{last}.weight"] = [1] * neurons
    return wanted


def has_bias(model, path: str) -> bool:
    return model.get_submodule(path).bias is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_slices_cover_every_position(families, model_type, kind):
    """Once where unshared, and once for each user of a shared KV row; nothing outside is listed."""
    model = families(model_type)
    layout = UnitLayout.of(model, kind)
    assert [b.name for b in layout.blocks] == [
        "layers.0.attn",
        "layers.0.mlp",
        "layers.1.attn",
        "layers.1.mlp",
    ]
    for layer in range(2):
        listed: dict[str, torch.Tensor] = {}
        for block in layout.blocks:
            if block.layer != layer:
                continue
            for cut in block.slices:
                parameter = model.get_parameter(cut.parameter)
                assert cut.index.shape[0] == block.units
                assert cut.width * parameter.shape[cut.dim] == parameter.numel()
                counts = torch.bincount(cut.index.flatten(), minlength=parameter.shape[cut.dim])
                listed[cut.parameter] = listed.get(cut.parameter, 0) + counts
        got = {name: counts.tolist() for name, counts in listed.items()}
        assert got == expected_listings(model, layer, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_unit_weights_sum_to_the_true_count(families, model_type, kind):
    model = families(model_type)
    layout = UnitLayout.of(model, kind)
    head_dim = model.get_submodule("model.layers.0.self_attn.o_proj").in_features // HEADS
    width, neurons = model.config.hidden_size, model.config.intermediate_size
    query_rows, kv_rows = HEADS * head_dim, KV_HEADS * head_dim
    row = width + (model_type in ("qwen2", "starcoder2"))  # with its bias
    if kind == "channel":
        attention = kv_rows * row + width * query_rows
    else:
        attention = (query_rows + 2 * kv_rows) * row + width * query_rows
        in_model = sum(
            p.numel()
            for n, p in model.named_parameters()
            if "_proj" in n and "self_attn" in n and not n.endswith("o_proj.bias")
        )
        assert 2 * attention == in_model
    per_neuron = 2 * width + 1 if model_type == "starcoder2" else 3 * width
    assert layout.parameters == pytest.approx(2 * (attention + per_neuron * neurons))
    assert layout.weights(~layout.none()) == pytest.approx(layout.parameters)
    assert layout.weights(layout.none()) == 0
    units = {"head": HEADS, "kv_group": KV_HEADS, "channel": query_rows}[kind]
    assert layout.units == 2 * (units + neurons)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_silent_head_is_one_whose_output_columns_are_zero(families, model_type):
    """Zeroing all that is the head's own equals zeroing its columns of o_proj, bit for bit."""
    model = families(model_type).double()
    layout = UnitLayout.of(model, "head")
    for name, head in (("layers.0.attn", 1), ("layers.1.attn", 2)):
        block = layout[name]
        units = only(HEADS, head)
        reference = logits(with_silent_columns(model, block, units))
        assert not torch.allclose(reference, logits(model), atol=1e-3)
        changed = copy.deepcopy(model)
        for cut in block.slices:
            # OLMo 2 normalises queries over all heads at once: a head's query rows reach others.
            if model_type != "olmo2" or "q_proj" not in cut.parameter:
                zero(changed, cut, units, "all")
        torch.testing.assert_close(logits(changed), reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_value_rows_feed_the_heads_that_list_them(families, model_type):
    """Without its value rows a KV group is silent, which only holds for the right rows."""
    model = families(model_type).double()
    block = UnitLayout.of(model, "head")["layers.0.attn"]
    group = only(HEADS, 2, 3)
    reference = logits(with_silent_columns(model, block, group))
    for units, shared in ((group, "all"), (only(HEADS, 2), "any"), (only(HEADS, 3), "any")):
        changed = copy.deepcopy(model)
        for cut in block.slices:
            inward = cut.dim == 0
            if inward and (model_type != "olmo2" or "v_proj" in cut.parameter):
                zero(changed, cut, units, shared)
        torch.testing.assert_close(logits(changed), reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["kv_group", "channel"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_value_rows_of_other_unit_kinds(families, model_type, kind):
    """The value rows of a KV group, or of the channels that share one, silence their columns."""
    model = families(model_type).double()
    block = UnitLayout.of(model, kind)["layers.1.attn"]
    values = [cut for cut in block.slices if "v_proj" in cut.parameter]
    if model_type == "phi3":  # value rows are the last third of the fused matrix's slices
        values = [cut for cut in block.slices if "qkv" in cut.parameter][-1:]
    head_dim = block.channels.numel() // HEADS
    # Channel 1 of head 0 and channel 1 of head 1 read one value row.
    units = only(block.units, 0) if kind == "kv_group" else only(block.units, 1, head_dim + 1)
    reference = logits(with_silent_columns(model, block, units))
    assert not torch.allclose(reference, logits(model), atol=1e-4)
    changed = copy.deepcopy(model)
    for cut in values:
        zero(changed, cut, units, "all")
    torch.testing.assert_close(logits(changed), reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_neuron_without_its_rows_is_silent(families, model_type):
    model = families(model_type).double()
    block = UnitLayout.of(model)["layers.0.mlp"]
    units = only(block.units, 5, 23)
    reference = logits(with_silent_columns(model, block, units))
    assert not torch.allclose(reference, logits(model), atol=1e-4)
    changed = copy.deepcopy(model)
    for cut in block.slices:
        if cut.dim == 0:
            zero(changed, cut, units, "all")
    torch.testing.assert_close(logits(changed), reference, rtol=1e-9, atol=1e-9)


def test_shared_rows_by_all_or_any(tiny_model):
    """Heads 0 and 1 share KV rows 0..3, heads 2 and 3 share rows 4..7."""
    block = UnitLayout.of(tiny_model, "head")["layers.0.attn"]
    keys = next(cut for cut in block.slices if "k_proj" in cut.parameter)
    queries = next(cut for cut in block.slices if "q_proj" in cut.parameter)
    first, second = list(range(4)), list(range(4, 8))
    assert keys.selected(only(4, 0), "all").tolist() == []
    assert keys.selected(only(4, 0), "any").tolist() == first
    assert keys.selected(only(4, 0, 1), "all").tolist() == first
    assert keys.selected(only(4, 1, 2, 3), "all").tolist() == second
    assert keys.selected(only(4, 1, 2, 3), "any").tolist() == first + second
    assert keys.selected(only(4), "any").tolist() == []
    for shared in ("all", "any"):
        assert queries.selected(only(4, 1), shared).tolist() == second


def test_a_position_that_no_unit_lists_is_never_selected():
    cut = Slices("matrix", 0, torch.tensor([[1], [4]]), width=3, length=6)
    assert cut.selected(torch.tensor([True, True]), "all").tolist() == [1, 4]
    assert cut.selected(torch.tensor([False, True]), "all").tolist() == [4]


def test_multi_query_shares_one_row_among_all_heads(families):
    model = families("llama", num_key_value_heads=1)
    block = UnitLayout.of(model, "head")["layers.0.attn"]
    values = next(cut for cut in block.slices if "v_proj" in cut.parameter)
    assert values.weights_per_unit() == 4 * 16 / HEADS
    assert values.selected(only(HEADS, 0, 1, 2)).tolist() == []
    assert UnitLayout.of(model, "kv_group")["layers.0.attn"].units == 1


def test_unsupported_architecture_is_named(families):
    with pytest.raises(UnsupportedModelError, match="'mixtral'"):
        UnitLayout.of(families("mixtral"))


def test_layout_splits_and_flattens_in_forward_order(tiny_model):
    layout = UnitLayout.of(tiny_model)
    flat = torch.arange(layout.units)
    parts = layout.split(flat)
    assert parts["layers.0.mlp"].tolist() == list(range(4, 28))
    assert torch.equal(layout.flatten(parts), flat)
    assert torch.equal(layout.flatten(dict(reversed(parts.items()))), flat)


@pytest.fixture
def masks() -> tuple[UnitMask, UnitMask]:
    left = UnitMask({"layers.0.attn": torch.tensor([1, 1, 0, 0]), "layers.0.mlp": torch.ones(4)})
    right = UnitMask({"layers.0.attn": torch.tensor([1, 0, 1, 0]), "layers.0.mlp": torch.zeros(4)})
    return left, right


def test_mask_algebra(masks):
    left, right = masks
    results = {
        "and": (left & right, [True, False, False, False], False),
        "or": (left | right, [True, True, True, False], True),
        "minus": (left - right, [False, True, False, False], True),
        "not": (~left, [False, False, True, True], False),
    }
    for mask, heads, neurons in results.values():
        assert mask["layers.0.attn"].tolist() == heads
        assert mask["layers.0.mlp"].tolist() == [neurons] * 4
    assert left - right == left & ~right
    assert left | right == ~(~left & ~right)
    assert left != right
    assert left != "a mask"


def test_mask_counts_and_share(masks):
    left, right = masks
    assert (left.count(), left.count("attn"), left.count("mlp")) == (6, 2, 4)
    assert (left.share(), right.share()) == (6 / 8, 2 / 8)
    assert "6 of 8" in repr(left)


def test_masks_of_different_layouts_do_not_mix(masks):
    other = UnitMask({"layers.0.attn": torch.ones(4)})
    assert masks[0] != other
    by_channel = UnitMask(masks[0], "channel")
    assert masks[0] != by_channel
    for another in (other, by_channel):
        with pytest.raises(ValueError, match="different layouts"):
            masks[0] | another
    with pytest.raises(TypeError):
        hash(other)


def test_mask_survives_saving(tiny_model, tmp_path):
    """Also one cut out of a flat tensor, whose parts share memory."""
    layout = UnitLayout.of(tiny_model)
    mask = layout.mask(torch.arange(layout.units) % 3 == 0)
    mask.save(tmp_path / "mask.safetensors", group="ESU", model="tiny")
    with safe_open(tmp_path / "mask.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["metadata"]) == {"group": "ESU", "model": "tiny"}
    loaded = UnitMask.load(tmp_path / "mask.safetensors")
    assert loaded == mask
    assert loaded.digest() == mask.digest()
    by_channel = UnitLayout.of(tiny_model, "channel").none()
    by_channel.save(tmp_path / "mask.safetensors")
    assert UnitMask.load(tmp_path / "mask.safetensors").unit_kind == "channel"


def test_equal_masks_have_one_digest_and_others_another(tiny_model):
    layout = UnitLayout.of(tiny_model)
    mask = layout.mask(torch.arange(layout.units) % 3 == 0)
    turned = UnitMask(dict(reversed(list(mask.items()))))
    one_more = UnitMask({name: part.clone() for name, part in mask.items()})
    one_more["layers.1.mlp"][1].logical_not_()
    other_kind = UnitMask(mask, "kv_group")
    assert mask.digest() == turned.digest()
    assert len({m.digest() for m in (mask, one_more, other_kind, ~mask)}) == 4


def test_a_layout_refuses_masks_of_another(tiny_model):
    layout = UnitLayout.of(tiny_model)
    layout.require(layout.none())
    for mask in (UnitMask(layout.none(), "channel"), UnitMask({"layers.0.attn": torch.ones(4)})):
        with pytest.raises(ValueError, match="does not fit a llama with head units in 4 blocks"):
            layout.require(mask)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_without_weights_has_the_same_layout(families, model_type):
    model = families(model_type)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    for kind in ("head", "kv_group", "channel"):
        whole, shapes = UnitLayout.of(model, kind), UnitLayout.of(empty, kind)
        assert [b.name for b in whole.blocks] == [b.name for b in shapes.blocks]
        for own, other in zip(whole.blocks, shapes.blocks, strict=True):
            assert torch.equal(own.channels, other.channels)
            for a, b in zip(own.slices, other.slices, strict=True):
                assert (a.parameter, a.dim, a.width, a.length) == (
                    b.parameter, b.dim, b.width, b.length,
                )  # fmt: skip
                assert torch.equal(a.index, b.index)
