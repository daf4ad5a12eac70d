"""Runs a function in several processes that can talk to each other, and never waits for them for long."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from baft.distributed import World

_PATIENCE = 300.0  # seconds; on a busy machine it takes a process one minute to import torch


def in_processes(function: Callable[..., None], folder: Path, *arguments: object, count: int = 2) -> None:
    """Call ``function(world, folder, *arguments)`` in ``count`` new processes, of which each is one of the world.

    It is found by its name in its module, as the processes start anew. A process that fails fails the test, with its
    own traceback; those that take too long are ended, and fail it too.
    """
    started = torch.multiprocessing.spawn(_enter, (function, str(folder), arguments, count), nprocs=count, join=False)
    deadline = time.monotonic() + _PATIENCE
    try:
        while not started.join(timeout=1.0):
            if time.monotonic() > deadline:
                pytest.fail(f"{function.__name__}: expected its processes to end within {_PATIENCE:.0f} s")
    finally:
        for process in started.processes:
            process.kill()


def _enter(rank: int, function: Callable[..., None], folder: str, arguments: tuple[object, ...], count: int) -> None:
    torch.set_num_threads(1)
    with process_group(rank, count, folder):
        function(World(rank, count), Path(folder), *arguments)


@contextmanager
def process_group(rank: int, count: int, folder: str) -> Iterator[None]:
    """A group of ``count`` processes that meet in ``folder``."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if os.path.exists("/sys/class/net/lo") else ""  # no look-up of host names
    if not os.environ["GLOO_SOCKET_IFNAME"]:
        del os.environ["GLOO_SOCKET_IFNAME"]
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=count, timeout=timedelta(seconds=_PATIENCE)
    )
    yield
    dist.barrier()  # or the first to leave takes the meeting place with it
    dist.destroy_process_group()
