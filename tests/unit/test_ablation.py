"""Ablation: the chosen units say nothing, and afterwards every weight has its old bits."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from ssah.evaluate.generate import continuations
from ssah.scoring.attribution import collect_statistics
from ssah.text.batches import Batch, counted_loss, dialogue_batches
from ssah.training.ablation import ablate, fitted_constants, patch
from ssah.units.families import FAMILIES
from ssah.units.layout import UnitLayout
from ssah.units.mask import UnitMask

TOKENS = torch.tensor([[5, 9, 3, 17, 22, 8, 30, 11], [7, 7, 12, 1, 38, 2, 6, 19]])


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS, use_cache=False).logits


def some_units(layout: UnitLayout, seed: int = 0) -> UnitMask:
    """About a third of the units of each block, but none of the first MLP's."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {b.name: torch.rand(b.units, generator=generator) < 0.4 for b in layout.blocks}
    chosen["layers.0.mlp"][:] = False
    return UnitMask(chosen, layout.unit_kind)


def means(layout: UnitLayout) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        b.name: torch.randn(b.channels.numel(), generator=generator).double() for b in layout.blocks
    }


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_restored(model, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["head", "kv_group", "channel"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "gemma2"])
def test_zero_equals_a_model_with_zero_columns(families, model_type, kind):
    model = families(model_type)
    layout = UnitLayout.of(model, kind)
    mask = some_units(layout)
    assert mask.count("attn") > 0
    assert mask.count("mlp") > 0
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for block in layout.blocks:
            weight = reference.get_submodule(block.output).weight
            for unit in mask[block.name].nonzero().flatten().tolist():
                for channel in block.channels[unit].tolist():
                    weight[:, channel] = 0
    with ablate(model, layout, mask):
        ablated = logits(model)
    assert torch.equal(ablated, logits(reference))
    assert not torch.allclose(ablated, logits(model), atol=1e-3)


@pytest.mark.parametrize("mode", ["mean", "fitted"])
@pytest.mark.parametrize("kind", ["head", "channel"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo2"])
def test_mean_equals_a_model_whose_channels_are_constant(families, model_type, kind, mode):
    model = families(model_type)
    layout = UnitLayout.of(model, kind)
    mask, mean = some_units(layout), means(layout)
    reference = copy.deepcopy(model)
    for block in layout.blocks:
        channels = block.channels[mask[block.name]].flatten()

        def replace(module, args, channels=channels, value=mean[block.name]):
            inward = args[0].clone()
            inward[..., channels] = value[channels].to(inward)
            return (inward,)

        reference.get_submodule(block.output).register_forward_pre_hook(replace)
    with ablate(model, layout, mask, mode, mean):
        ablated = logits(model)
    torch.testing.assert_close(ablated, logits(reference), rtol=1e-4, atol=1e-4)
    with ablate(model, layout, mask):
        assert not torch.allclose(ablated, logits(model), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["zero", "mean", "fitted"])
@pytest.mark.parametrize("fail", [True, False])
def test_every_bit_is_restored(tiny_model, dtype, mode, fail):
    model = tiny_model.to(dtype)
    layout = UnitLayout.of(model)
    mask, before = some_units(layout), bits(model)

    def inside() -> None:
        with ablate(model, layout, mask, mode, means(layout)):
            changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
            assert changed == [
                "model.layers.0.self_attn.o_proj.weight",
                "model.layers.1.self_attn.o_proj.weight",
                "model.layers.1.mlp.down_proj.weight",
            ]
            logits(model)
            if fail:
                raise KeyboardInterrupt

    if fail:
        with pytest.raises(KeyboardInterrupt):
            inside()
    else:
        inside()
    assert_restored(model, before)


def test_an_error_while_ablating_restores_too(tiny_model):
    """Here a later block's mean is missing, when earlier blocks are already changed."""
    layout = UnitLayout.of(tiny_model)
    mean, before = means(layout), bits(tiny_model)
    del mean["layers.1.mlp"]
    with (
        pytest.raises(KeyError, match=r"layers\.1\.mlp"),
        ablate(tiny_model, layout, some_units(layout), "mean", mean),
    ):
        pytest.fail("the block must not be entered")
    assert_restored(tiny_model, before)


def test_blocks_nest(tiny_model):
    layout = UnitLayout.of(tiny_model)
    first, second, before = some_units(layout, 2), some_units(layout, 3), bits(tiny_model)
    assert first != second
    with ablate(tiny_model, layout, first | second):
        both = logits(tiny_model)
    with ablate(tiny_model, layout, first), ablate(tiny_model, layout, second):
        assert torch.equal(logits(tiny_model), both)
    assert_restored(tiny_model, before)


def test_no_units_change_nothing(tiny_model):
    layout = UnitLayout.of(tiny_model)
    whole = logits(tiny_model)
    for mode in ("zero", "mean"):
        with ablate(tiny_model, layout, layout.none(), mode, means(layout)):
            assert torch.equal(logits(tiny_model), whole)


@pytest.mark.parametrize("mode", ["mean", "fitted"])
def test_ablation_by_constants_needs_them(tiny_model, mode):
    layout = UnitLayout.of(tiny_model)
    with (
        pytest.raises(ValueError, match=f"Ablation by '{mode}' needs the constants"),
        ablate(tiny_model, layout, some_units(layout), mode),
    ):
        pytest.fail("the block must not be entered")


def test_a_head_with_biases_is_really_silent(families):
    """Qwen2 has biases on q, k and v: without its rows alone, a head would still speak."""
    model = families("qwen2")
    layout = UnitLayout.of(model, "head")
    block = layout["layers.0.attn"]
    chosen = {b.name: torch.zeros(b.units, dtype=torch.bool) for b in layout.blocks}
    chosen["layers.0.attn"][:2] = True  # both heads of a KV group, so that its rows are theirs
    mask = UnitMask(chosen, layout.unit_kind)

    def speech(model) -> torch.Tensor:
        """What the two heads add to the residual stream."""
        linear, added = model.get_submodule(block.output), []
        columns = block.channels[:2].flatten()

        def keep(module, args):
            added.append(args[0][..., columns] @ linear.weight[:, columns].T)

        handle = linear.register_forward_pre_hook(keep)
        logits(model)
        handle.remove()
        return added[0]

    without_rows = copy.deepcopy(model)
    with torch.no_grad():
        for cut in block.slices:
            if cut.parameter.endswith("_proj.weight") and cut.dim == 0:
                rows = cut.selected(mask["layers.0.attn"], "all")
                without_rows.get_parameter(cut.parameter)[rows] = 0
    assert speech(without_rows).abs().max() > 0.01
    with ablate(model, layout, mask):
        silent = logits(model)
        assert speech(model).abs().max() == 0
        # Whatever the heads now compute from, biases included, changes nothing.
        with torch.no_grad():
            for cut in block.slices:
                if cut.dim == 0:
                    rows = cut.selected(mask["layers.0.attn"], "all")
                    model.get_parameter(cut.parameter)[rows] += 3
        assert torch.equal(logits(model), silent)
    assert not torch.allclose(logits(model), silent, atol=1e-2)


# --- the constant that does least harm ---------------------------------------------------------


@pytest.fixture
def texts() -> list[Batch]:
    """Dialogues of random tokens, some padded."""
    generator = torch.Generator().manual_seed(2)
    pairs = [
        (
            torch.randint(3, 40, (4,), generator=generator).tolist(),
            torch.randint(3, 40, (6 + n % 3,), generator=generator).tolist(),
        )
        for n in range(48)
    ]
    return list(dialogue_batches(pairs, 4))


def loss_of(model, layout, mask, batches, mode, constants=None) -> float:
    with torch.no_grad(), ablate(model, layout, mask, mode, constants):
        return sum(float(counted_loss(model, batch)) for batch in batches)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_fitted_constants_do_less_harm_than_means(families, texts, model_type):
    model = families(model_type)
    layout = UnitLayout.of(model)
    mask, before = some_units(layout), bits(model)
    found = collect_statistics(model, layout, texts)
    fitted = fitted_constants(model, layout, mask, texts, found.mean, found.variance)
    assert set(fitted) == {name for name in mask if mask[name].any()}
    losses = {
        "zero": loss_of(model, layout, mask, texts, "zero"),
        "mean": loss_of(model, layout, mask, texts, "mean", found.mean),
        "fitted": loss_of(model, layout, mask, texts, "fitted", fitted),
    }
    assert losses["fitted"] < losses["mean"] - 1, losses  # nats, of about 330 tokens
    assert losses["fitted"] < losses["zero"] - 1, losses
    assert_restored(model, before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_no_other_constant_of_one_neuron_does_less_harm(families, texts):
    """Its whole range is looked through."""
    model = families("llama")
    layout = UnitLayout.of(model)
    found = collect_statistics(model, layout, texts)
    name = "layers.1.mlp"
    chosen = {b.name: torch.zeros(b.units, dtype=torch.bool) for b in layout.blocks}
    neuron = int(found.variance[name].argmax())
    chosen[name][neuron] = True
    mask = UnitMask(chosen, layout.unit_kind)
    fitted = fitted_constants(model, layout, mask, texts, found.mean, found.variance)

    def loss_at(value: float) -> float:
        constants = {name: found.mean[name].clone()}
        constants[name][neuron] = value
        return loss_of(model, layout, mask, texts, "fitted", constants)

    centre, scale = float(found.mean[name][neuron]), float(found.variance[name][neuron]) ** 0.5
    tried = [loss_at(centre + scale * step / 10) for step in range(-40, 41)]
    assert max(tried) - min(tried) > 0.5, "else it does not matter what the neuron says"
    assert loss_at(float(fitted[name][neuron])) < min(tried) + 0.05 * (max(tried) - min(tried))


def test_nothing_is_fitted_for_no_units(tiny_model, texts):
    layout = UnitLayout.of(tiny_model)
    found = collect_statistics(tiny_model, layout, texts)
    nothing = fitted_constants(tiny_model, layout, layout.none(), texts, found.mean, found.variance)
    assert nothing == {}


# --- activations of another model ------------------------------------------------------------


def that_reads_otherwise(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that differs in what its units read alone: rows of queries, keys and values, gates
    and up-projections."""
    other = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        for block in UnitLayout.of(other).blocks:
            for part in block.slices:
                if part.dim == 0:
                    weight = other.get_parameter(part.parameter)
                    weight.add_(0.3 * torch.randn_like(weight))
    return other


@pytest.mark.parametrize("model_type", FAMILIES)
def test_units_say_what_they_say_in_the_donor(families, model_type):
    model = families(model_type)
    donor = that_reads_otherwise(model)
    layout = UnitLayout.of(model)
    ids = torch.arange(5, 17).view(2, 6)
    with torch.inference_mode():
        own, theirs = model(ids).logits, donor(ids).logits
        assert not torch.allclose(own, theirs, atol=1e-3)
        with patch(model, layout, layout.none(), donor):
            assert torch.equal(model(ids).logits, own)
        everything = layout.mask(torch.ones(layout.units, dtype=torch.bool))
        with patch(model, layout, everything, donor):
            # What differs between the two is then heard nowhere.
            assert torch.allclose(model(ids).logits, theirs, atol=1e-5)
        assert torch.equal(model(ids).logits, own), "and nothing is left of it"
        assert torch.equal(donor(ids).logits, theirs)


def test_only_the_chosen_units_are_patched(families):
    model = families("llama")
    donor = that_reads_otherwise(model)
    layout = UnitLayout.of(model)
    chosen = torch.zeros(layout.units, dtype=torch.bool)
    chosen[3::7] = True
    mask = layout.mask(chosen)
    ids, heard = torch.arange(5, 17).view(2, 6), {}

    def listen(owner: PreTrainedModel, name: str) -> None:
        """Hooks that are added later hear what those before them changed."""
        for block in layout.blocks:
            block.projection(owner).register_forward_pre_hook(
                lambda module, args, key=(name, block.name): heard.update({key: args[0]})
            )

    with torch.inference_mode():
        listen(model, "before")
        model(ids)
        with patch(model, layout, mask, donor):
            listen(model, "patched")
            listen(donor, "donor")
            model(ids)
    first = layout.blocks[0]  # what is before it is the same in both
    own, patched, theirs = (heard[name, first.name] for name in ("before", "patched", "donor"))
    columns = torch.zeros(own.shape[-1], dtype=torch.bool)
    columns[first.channels[mask[first.name]].flatten()] = True
    assert columns.any()
    assert torch.equal(patched[..., columns], theirs[..., columns])
    assert torch.equal(patched[..., ~columns], own[..., ~columns])


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_patched_model_answers_as_its_donor(answering_model, text_tokenizer, batch_size):
    """Word by word, with the keys and values of both models, while rows leave the batch."""
    model, donor = answering_model, that_reads_otherwise(answering_model)
    layout = UnitLayout.of(model)
    everything = layout.mask(torch.ones(layout.units, dtype=torch.bool))
    prompts = [[5, 6, 7], [8, 9], [11, 12, 13, 14], [20]]
    said = continuations(donor, text_tokenizer, prompts, 8, batch_size)
    text_tokenizer.eos_token = text_tokenizer.convert_ids_to_tokens(said[0][3])
    wanted = continuations(donor, text_tokenizer, prompts, 8, batch_size)
    assert len({len(row) for row in wanted}) > 1, "else nothing ends before another"
    assert continuations(model, text_tokenizer, prompts, 8, batch_size) != wanted
    with patch(model, layout, everything, donor):
        assert continuations(model, text_tokenizer, prompts, 8, batch_size) == wanted


# --- what they said somewhere else -------------------------------------------------------------


def test_resampled_units_say_what_they_all_said_at_one_token(families):
    """The rest says what it says; the same token in every block, another one at each position."""
    model = families("llama")
    layout = UnitLayout.of(model)
    mask = some_units(layout)
    numbered = {  # which token it was can be read off every value
        b.name: torch.arange(50.0)[:, None].expand(50, b.channels.numel()) for b in layout.blocks
    }
    entering: dict[str, torch.Tensor] = {}

    def listen() -> None:
        for block in layout.blocks:
            block.projection(model).register_forward_pre_hook(
                lambda module, args, name=block.name: entering.update({name: args[0]})
            )

    before = bits(model)
    with ablate(model, layout, mask, "resample", heard=numbered):
        listen()
        first = logits(model)
    found = []
    for block in layout.blocks:
        columns = block.channels[mask[block.name]].flatten()
        if len(columns):
            values = entering[block.name][..., columns]
            assert (values == values[..., :1]).all(), block.name
            found.append(values[..., 0])
            rest = torch.ones(entering[block.name].shape[-1], dtype=torch.bool)
            rest[columns] = False
            assert not torch.equal(
                entering[block.name][..., rest], entering[block.name][..., rest].round()
            )
    assert len(found) > 2
    assert all(torch.equal(found[0], other) for other in found)
    assert len(found[0].unique()) > 5
    with ablate(model, layout, mask, "resample", heard=numbered):
        assert torch.equal(logits(model), first), "it is drawn in the same way again"
    after = bits(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with (
        pytest.raises(ValueError, match="Resampling needs activations"),
        ablate(model, layout, mask, "resample"),
    ):
        pass
