"""How many single edits are planned for a pass, by what memory a GPU says that it has."""

from __future__ import annotations

import pytest
import torch

from baft.engine.slots import FIRST_SLOTS, ran_out, slots_that_fit

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 1 << 30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with 40 GiB free, and 10 more that torch has reserved and doesn't use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20 * GIB)


def test_a_cpu_is_filled_and_its_memory_not_asked() -> None:
    assert [slots_that_fit(CPU, cells) for cells in (1, 128, 1000, 5000, 0)] == [2048, 16, 2, 1, 2048]


def test_the_first_pass_on_a_gpu_is_a_small_one(gpu: None) -> None:
    assert slots_that_fit(GPU, 100) == FIRST_SLOTS
    assert slots_that_fit(GPU, 1 << 20) == 1


def test_later_ones_are_as_large_as_memory_allows(gpu: None) -> None:
    assert slots_that_fit(GPU, 10, GIB) == 35  # 0.7 of 50
    assert slots_that_fit(GPU, 10, GIB, GIB) == 17
    assert slots_that_fit(GPU, 1 << 13, GIB) == 4  # the GPU is busy with fewer
    assert slots_that_fit(GPU, 10, 100 * GIB) == 1


def test_graphs_need_as_much_again_and_keep_what_they_have(gpu: None) -> None:
    assert slots_that_fit(GPU, 10, GIB, graphs=True) == 14  # 0.7 of 40, halved


def test_memory_that_runs_out_is_known_by_its_error() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60)
    assert ran_out(found.value)
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory"))
    assert not ran_out(RuntimeError("shapes can't be multiplied"))
