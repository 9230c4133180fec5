"""What a block of code takes of the memory."""

from __future__ import annotations

import time

import pytest
import torch

from ssah.runtime import PeakMemory


def test_peak_memory_is_what_a_block_held_at_most_beyond_what_was_there():
    before = torch.ones(30 * 2**18)  # 30 MiB, which do not count
    with PeakMemory(torch.device("cpu")) as memory:
        large = torch.ones(80 * 2**18)
        time.sleep(0.1)
        del large
        small = torch.ones(20 * 2**18)
        time.sleep(0.1)
    assert memory.mib == pytest.approx(80, abs=15)
    assert len(before) > len(small)


def test_a_later_block_starts_anew():
    with PeakMemory(torch.device("cpu")):
        large = torch.ones(80 * 2**18)
        time.sleep(0.05)
        del large
    with PeakMemory(torch.device("cpu")) as memory:
        time.sleep(0.05)
    assert memory.mib < 15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_its_allocator_counts():
    device = torch.device("cuda")
    with PeakMemory(device) as memory:
        torch.ones(80 * 2**18, device=device)
    assert memory.mib == pytest.approx(80, abs=4)
