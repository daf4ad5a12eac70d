"""Runs a function in several processes that can talk to each other, and never waits for them for long."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

__all__ = ["LOOPBACK", "PATIENCE", "in_processes"]

PATIENCE = 300.0
"""Seconds to wait for processes; on a busy machine it takes one a minute to import torch."""

# Without it gloo looks the machine's name up, and may be told an address that nothing answers at.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {}


def in_processes(function: Callable[[int, int, Path], None], folder: Path, *, count: int = 2) -> None:
    """Call ``function(rank, count, folder)`` in ``count`` new processes, of which each is one of a group.

    It is found by its name in its module, as the processes start anew. A process that fails fails the test, with its
    own traceback; those that take too long are ended, and fail it too.
    """
    started = torch.multiprocessing.spawn(_enter, (function, count, folder), nprocs=count, join=False)
    deadline = time.monotonic() + PATIENCE
    try:
        while not started.join(timeout=1.0):
            if time.monotonic() > deadline:
                pytest.fail(f"{function.__name__}: expected its processes to end within {PATIENCE:.0f} s")
    finally:
        for process in started.processes:
            process.kill()


def _enter(rank: int, function: Callable[[int, int, Path], None], count: int, folder: Path) -> None:
    os.environ |= LOOPBACK
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=patience)
    function(rank, count, folder)
    dist.barrier()  # or the first to leave takes the meeting place with it
    dist.destroy_process_group()
