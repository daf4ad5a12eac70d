"""How many single edits to train at a time: by what memory is free, and by what the processor is filled with."""

from __future__ import annotations

import torch

__all__ = ["FIRST_SLOTS", "ran_out", "slots_that_fit"]

FIRST_SLOTS = 2
"""Slots of the first step on a GPU, whose memory tells what the others will take."""

# Cells of a grid beyond which a pass gets no faster by the cell. On a CPU larger passes even get slower: their tensors
# leave the cache, and are given back to the system after each use (bench/edit_throughput.py --slots has the curve).
_CELLS = {"cpu": 2048, "cuda": 32768}

# Of the free memory, so much is planned with; fragments and the allocator's rounding take from the rest.
_SHARE = 0.7


def ran_out(error: RuntimeError) -> bool:
    """Whether it says that there is no more memory: of a CPU's torch has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def slots_that_fit(
    device: torch.device, cells: int, lesson_bytes: int | None = None, set_bytes: int = 0, *, graphs: bool = False
) -> int:
    """How many lessons to train in one pass, at least 1.

    Args:
        device: where the model is.
        cells: of the grid, that one lesson takes.
        lesson_bytes: what a pass was seen to take for each lesson, on a GPU; None before the first pass.
        set_bytes: what each parameter set takes for itself, with its gradients and moments.
        graphs: whether steps are captured. Graphs hold memory of their own, as much as a step takes, while other steps
            run without.
    """
    filling = max(1, _CELLS[device.type if device.type in _CELLS else "cuda"] // max(1, cells))
    if device.type != "cuda":
        return filling
    if lesson_bytes is None:
        return min(filling, FIRST_SLOTS)
    # What torch has reserved and doesn't use is as good as free.
    free, _ = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    share = _SHARE * (free / 2 if graphs else free + reusable)  # what graphs have reserved isn't anybody else's
    return max(1, min(filling, int(share / (lesson_bytes + set_bytes))))
