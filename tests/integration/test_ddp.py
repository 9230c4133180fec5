"""Masked fine-tuning on two processes equals that on one with the same global batch.

Run by itself under ``torch.distributed.run`` this file is the script that each process executes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from ssah.training.slicing import SlicedLinear, freeze_units, train_only
from ssah.units.layout import UnitLayout
from ssah.units.mask import UnitMask

MODES = ("sliced", "restored")


def mask_of(layout: UnitLayout, mode: str) -> UnitMask:
    """Head 1 and a fifth of the neurons to train, or head 1 and two neurons to freeze."""
    mask = layout.none()
    for block in layout.blocks:
        if block.kind == "attn":
            mask[block.name][1] = True
        else:
            mask[block.name][3 : 8 if mode == "sliced" else 5] = True
    return mask


def train(folder: Path, mode: str, rank: int, processes: int) -> dict[str, Tensor]:
    """Eight steps in float64; each process takes its share of every batch of four rows."""
    model = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float64).train()
    mask = mask_of(UnitLayout.of(model), mode)
    with (train_only if mode == "sliced" else freeze_units)(model, mask):
        assert any(isinstance(module, SlicedLinear) for module in model.modules())
        wrapped: nn.Module = DistributedDataParallel(model) if processes > 1 else model
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
        for step in range(8):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(3, 40, (4, 8), generator=generator)[rank::processes]
            wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            nn.utils.clip_grad_norm_(trained, 0.05)
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, families) -> Path:
    """Has the model at the start, and what each of two processes made of it."""
    path = tmp_path_factory.mktemp("ddp")
    families("qwen2").double().save_pretrained(path / "start")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*command, __file__, str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=300,
    )
    return path


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one(folder, mode):
    start = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float64)
    layout = UnitLayout.of(start)
    mask = mask_of(layout, mode)
    frozen = ~mask if mode == "sliced" else mask
    alone = train(folder, mode, rank=0, processes=1)
    ranks = [load_file(folder / f"{mode}-{rank}.safetensors") for rank in range(2)]
    for name, tensor in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-7, atol=1e-9, msg=name)
    moved = {name: tensor != start.get_parameter(name) for name, tensor in ranks[0].items()}
    for block in layout.blocks:
        for part in block.slices:
            kept = part.index[frozen[block.name]].flatten()
            assert not moved[part.parameter].movedim(part.dim, 0)[kept].any(), part.parameter
        assert moved[f"{block.output}.weight"].any()
    assert moved["model.embed_tokens.weight"].any() == (mode == "restored")


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for mode in MODES:
        save_file(train(folder, mode, rank, processes=2), folder / f"{mode}-{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
