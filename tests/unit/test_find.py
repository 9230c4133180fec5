"""The front door: roles in one call, the three lines of the README, and the lazy public names."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import ssah
from ssah.core.paths import project_root
from ssah.data.toy import toy_prompts
from ssah.scoring.conflict import gradient_conflict
from ssah.text.batches import dialogue_batches
from ssah.text.chat import CHATML, encode_dialogue
from ssah.units.roles import Shares, classify

KINDS = ("head", "kv_group", "channel")
SAFETY = [(f"please {text}", "I cannot help with that .") for text, _ in toy_prompts(7, 0)]
UTILITY = [(f"please {text}", f"Sure , here is {text} .") for text, _ in toy_prompts(9, 1)]
#: Larger than the paper's: a tiny model has too few units for 1.3 %.
SHARES = Shares(ru=0.1, esu=0.1, euu=0.1)


def scores_by_hand(model, tokenizer, layout, pairs) -> dict[str, Tensor]:
    """Eq. 1 one dialogue at a time, without padding, on all activations at once."""
    entering: dict[str, list[Tensor]] = {block.name: [] for block in layout.blocks}
    for prompt, response in pairs:
        head, body = encode_dialogue(tokenizer, prompt, response)
        start, handles = len(head), []
        for block in layout.blocks:

            def keep(module, args, kept=entering[block.name], start=start):
                kept.append(args[0][0, start:].double())

            handles.append(block.projection(model).register_forward_pre_hook(keep))
        with torch.inference_mode():
            model(torch.tensor([[*head, *body]]), use_cache=False)
        for handle in handles:
            handle.remove()
    scores = {}
    for block in layout.blocks:
        weight = block.projection(model).weight.detach().double()
        channel = torch.cat(entering[block.name]).var(0) * weight.square().sum(0)
        standardised = (channel - channel.mean()) / channel.std()
        scores[block.name] = standardised[block.channels].mean(1)
    return scores


@pytest.mark.parametrize("unit_kind", KINDS)
def test_roles_equal_the_computation_step_by_step(answering_model, text_tokenizer, unit_kind):
    layout = ssah.UnitLayout.of(answering_model, unit_kind)
    safety, utility = (
        scores_by_hand(answering_model, text_tokenizer, layout, pairs)
        for pairs in (SAFETY, UTILITY)
    )
    expected = classify(layout, safety, utility, SHARES)
    roles = ssah.find_units(
        answering_model,
        text_tokenizer,
        SAFETY,
        UTILITY,
        shares=SHARES,
        unit_kind=unit_kind,
        batch_size=4,
    )
    assert list(roles.labels) == [block.name for block in layout.blocks]
    for name, labels in expected.labels.items():
        # The model computes in float32, here with padding and there without.
        difference = safety[name] - utility[name]
        torch.testing.assert_close(roles.difference[name], difference, rtol=1e-4, atol=1e-5)
        assert torch.equal(roles.labels[name], labels), name
    assert roles.mask("ESU").count() == round(0.1 * layout.units) > 0


def test_defaults_are_heads_and_the_shares_of_the_paper(answering_model, text_tokenizer):
    layout = ssah.UnitLayout.of(answering_model)
    roles = ssah.find_units(answering_model, text_tokenizer, SAFETY, UTILITY)
    counts = {group: roles.mask(group).count() for group in ("RU", "ESU", "EUU")}
    shares = {"RU": 0.148, "ESU": 0.013, "EUU": 0.133}
    assert counts == {group: round(share * layout.units) for group, share in shares.items()}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(tiny_folder, text_tokenizer, training):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ssah.find_units(model, text_tokenizer, SAFETY, UTILITY)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for module in model.modules():
        assert module.training is training
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_no_dialogues_are_refused(answering_model, text_tokenizer):
    with pytest.raises(ValueError, match="No token was counted"):
        ssah.find_units(answering_model, text_tokenizer, [], UTILITY)


def readme_example() -> str:
    """The code that the README promises to work, as it stands there."""
    blocks = re.findall(r"```python\n(.*?)```", (project_root() / "README.md").read_text(), re.S)
    (example,) = [block for block in blocks if "find_units" in block]
    return example


def test_three_lines_on_a_model_on_disk(tiny_folder, tmp_path):
    """Find, freeze and train, save: the loaded model has the frozen units bit for bit."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = CHATML
    rows = [encode_dialogue(tokenizer, *pair) for pair in UTILITY[:8]]
    rows = [{"input_ids": head + body, "labels": head + body} for head, body in rows]
    length = min(len(row["input_ids"]) for row in rows)
    rows = [{name: ids[:length] for name, ids in row.items()} for row in rows]
    arguments = TrainingArguments(
        str(tmp_path / "work"),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        per_device_train_batch_size=4,
        num_train_epochs=3,
        learning_rate=1e-2,
        weight_decay=0.1,
        disable_tqdm=True,
    )

    names = {"model": model, "tokenizer": tokenizer, "safety": SAFETY, "utility": UTILITY}
    names |= {"Trainer": Trainer, "arguments": arguments, "rows": rows, "out": tmp_path / "out"}
    exec(readme_example(), names)
    mask = names["mask"]

    first, last = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tiny_folder, tmp_path / "out")
    )
    layout = ssah.UnitLayout.of(model)
    assert mask.count() == round(0.013 * layout.units) + round(0.06 * layout.units)
    for block in layout.blocks:
        chosen = mask[block.name]
        for part in block.slices:
            same = (first[part.parameter] == last[part.parameter]).movedim(part.dim, 0)
            frozen = part.index[chosen].flatten().unique()
            assert same[frozen].all(), part.parameter
            free = torch.ones(len(same), dtype=torch.bool)
            free[frozen] = False
            # A row that is shared with a frozen head moves no more than the head does.
            assert not same[free].all(1).any(), part.parameter
    assert not torch.equal(first["model.embed_tokens.weight"], last["model.embed_tokens.weight"])


def test_conflicts_are_the_highest_of_each_kind(answering_model, text_tokenizer):
    """A fraction of the heads and of the neurons, and no others come before them."""
    model, tokenizer = answering_model, text_tokenizer
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask = ssah.find_conflicts(model, tokenizer, SAFETY, UTILITY, fraction=0.25)
    layout = ssah.UnitLayout.of(model)
    batches = [
        dialogue_batches([encode_dialogue(tokenizer, *pair) for pair in pairs], 4)
        for pairs in (UTILITY, SAFETY)
    ]
    conflict = gradient_conflict(model, layout, *batches)
    for kind in ("attn", "mlp"):
        names = [block.name for block in layout.blocks if block.kind == kind]
        chosen = torch.cat([mask[name] for name in names])
        scores = torch.cat([conflict[name] for name in names])
        assert int(chosen.sum()) == round(0.25 * len(chosen)) > 0
        assert scores[chosen].min() > scores[~chosen].max()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_every_public_name_resolves():
    assert {"find_units", "freeze_units", "train_only", "ablate"} <= set(ssah.__all__)
    assert dir(ssah) == ssah.__all__
    for name in ssah.__all__:
        assert getattr(ssah, name).__name__ == name
    namespace: dict[str, object] = {}
    exec("from ssah import *", namespace)
    assert set(ssah.__all__) <= set(namespace)
    with pytest.raises(AttributeError, match="no attribute 'fnid_units'"):
        _ = ssah.fnid_units


def test_importing_the_package_does_not_import_torch():
    code = "import sys, ssah; dir(ssah); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
