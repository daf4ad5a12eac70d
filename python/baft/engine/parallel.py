"""A step that several processes take together: each goes through its part of the lessons, and all update alike.

Losses are means over all edits and all unrelated tokens of a lesson. So each process weighs the mean over its part by
the part's size, and the sum over the processes is the mean over all, as one process would have it, within rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baft.distributed import World
from baft.transfer import sent

__all__ = ["Part"]


@dataclass(frozen=True)
class Part:
    """What part of a step's lessons is this process's.

    Attributes:
        world: the processes.
        edits: how many edits there are in all.
        places: the number, among them, of each edit that this process goes through, [E]. One without an edit of its
            own goes through another's, and puts it behind the last.
        edit_share, unrelated_share: of each lesson's edits and unrelated tokens, the share that is this process's, [L].
    """

    world: World
    edits: int
    places: Tensor
    edit_share: Tensor
    unrelated_share: Tensor

    @classmethod
    def of(cls, world: World, edits: Sequence[int], unrelated: Sequence[tuple[int, int]], device: torch.device) -> Part:
        """The part of this process of ``world``.

        Args:
            edits: how many each lesson has in all; this process's are ``world.share`` of them.
            unrelated: unrelated tokens of each lesson, this process's and in all.
        """
        places: list[int] = []
        first = 0
        for count in edits:
            places += world.share(range(first, first + count)) or [sum(edits)]
            first += count
        shares = [len(world.share(range(count))) / count for count in edits]
        return cls(
            world=world,
            edits=first,
            places=sent(places, device),
            edit_share=sent(shares, device, torch.float32),
            unrelated_share=sent([own / max(full, 1) for own, full in unrelated], device, torch.float32),
        )

    def counted(self, usage: Tensor) -> Tensor:
        """Gate usage by lesson, [L, r], less that on edits of others."""
        return usage * (self.edit_share > 0).to(usage).unsqueeze(-1)

    def once(self, value: Tensor) -> Tensor:
        """A value that all processes have alike, such that it counts once in the sum; its gradient stays."""
        return value if self.world.rank == 0 else value - value.detach()

    def of_others(self, usages: Sequence[Tensor]) -> list[Tensor]:
        """What the other processes have of such tensors, together: a constant here, as its gradient is theirs."""
        own = [usage.detach() for usage in usages]
        totals = [usage.clone() for usage in own]
        self.world.add_(totals)
        return [total - usage for total, usage in zip(totals, own, strict=True)]

    def gathered(self, per_edit: Tensor, loss: Tensor, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Add up what the processes found; ``gradients`` become those of all lessons.

        Args:
            per_edit: this process's edits' losses, [E].
            loss: its part of all that is to be lowered, [].

        Returns:
            The losses of all edits, in the lessons' order, and all that is to be lowered.
        """
        all_edits = per_edit.new_zeros(self.edits + 1).index_copy_(0, self.places.to(per_edit.device), per_edit)[:-1]
        total = loss.clone()
        self.world.add_([all_edits, total, *gradients])
        return all_edits, total
