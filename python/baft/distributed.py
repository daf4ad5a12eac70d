"""The processes that share a run: who does which part, and how the parts come together again.

``torchrun --nproc-per-node N -m baft.cli run ...`` starts N of them, each with a model of its own. Everything here is
torch.distributed's; a run that isn't launched so is a world of one, for which nothing here communicates.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "World", "launched"]

T = TypeVar("T")

# A process that waits so long for another gives up. One that ends takes the others with it at once.
_PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """Processes that do a piece of work together; all of them make the same calls.

    Attributes:
        rank: the number of this process.
        size: how many there are.
        one_model: each holds a part of one model (tensor parallelism), and not the whole: work isn't shared then, but
            done in step by all.
    """

    rank: int = 0
    size: int = 1
    one_model: bool = False

    @property
    def writes(self) -> bool:
        """Whether this process prints and writes files, which is one's business."""
        return self.rank == 0

    @property
    def parts(self) -> int:
        """How many parts work is shared in."""
        return 1 if self.one_model else self.size

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of ``items``: every n-th one, so that the parts are alike in kind and number."""
        return items if self.parts == 1 else items[self.rank :: self.size]

    def gathered(self, value: T) -> list[T]:
        """What each process has for its part, in the order of the processes; all get all of it."""
        values = [value] * self.parts
        if self.parts > 1:
            with _hearing_others():
                dist.all_gather_object(values, value)
        return values

    def merged(self, share: Sequence[T]) -> list[T]:
        """What the processes made of their shares, one result for each item, in the items' order; all get all of it."""
        shares = self.gathered(share)
        items = [result for results in shares for result in results]
        for part, results in enumerate(shares):
            items[part :: len(shares)] = results
        return items

    def first_ones(self, value: T) -> T:
        """``value`` as the first process has it."""
        values = [value]
        if self.size > 1:
            with _hearing_others():
                dist.broadcast_object_list(values)
        return values[0]

    def each_of_the_first_ones(self, values: Iterable[T]) -> Iterator[T]:
        """``values`` as the first process has them, none of which is None; a process holds one of them at a time."""
        left = iter(values)
        while (value := self.first_ones(next(left, None))) is not None:
            yield value

    @torch.no_grad()
    def copy_first_(self, tensors: Sequence[Tensor]) -> None:
        """Make ``tensors`` what they are in the first process."""
        if self.size > 1:
            for tensor in tensors:
                received = tensor.clone()
                with _hearing_others():
                    dist.broadcast(received, 0)
                tensor.copy_(received)  # which autograd notices, and with it what is packed by a parameter's version

    @torch.no_grad()
    def add_(self, tensors: Sequence[Tensor]) -> None:
        """Make each of ``tensors`` its sum over the parts, bitwise the same in all processes."""
        if self.parts == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten().to(tensors[0].device) for tensor in tensors])
        with _hearing_others():
            dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """The writing process goes through this context before the others: what it leaves on disk, they find."""
        if self.size > 1 and not self.writes:
            _wait_for_others()
        yield
        if self.size > 1 and self.writes:
            _wait_for_others()


ALONE = World()
"""One process, and no other."""


@contextmanager
def launched() -> Iterator[World]:
    """The world that torchrun has started, or ``ALONE``; CPU tensors go by gloo, GPU tensors by NCCL.

    A process that fails leaves without a word to the others: they see the connection break, and torchrun ends them.

    Raises:
        ValueError: for more processes than GPUs on a machine that has any.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    gpus, here = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if 0 < gpus <= here:
        raise ValueError(f"torchrun: expected at most {gpus} processes on this machine, one for each GPU")
    if gpus:
        torch.cuda.set_device(here)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_PATIENCE)
    yield World(dist.get_rank(), dist.get_world_size())
    _wait_for_others()  # the first to leave takes the meeting point with it
    dist.destroy_process_group()


def _wait_for_others() -> None:
    with _hearing_others():
        dist.barrier()


@contextmanager
def _hearing_others() -> Iterator[None]:
    """Say in what goes wrong between processes that it does: the reason is what another one has said."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first = str(error).split(". ")[0]
        raise RuntimeError(f"another process of this run has ended, or can't be reached ({first})") from error
