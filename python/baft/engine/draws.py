"""What is drawn by number: rows of a step, rounds through a history, a sample that keeps up with one that grows.

All of it comes of torch's generator alone, and what continues it is tensors: a run that goes on draws as it would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Reservoir", "Stretch", "Walk", "draw_indices"]

# Below it a permutation of everything is as quick as anything.
_FEW = 4096


def draw_indices(population: int, size: int, generator: torch.Generator) -> list[int]:
    """``size`` different indices below ``population``, or all of them if there are fewer, in random order.

    Of a large population it takes time by ``size``, and none by ``population``.
    """
    if population <= max(_FEW, 2 * size):
        return torch.randperm(population, generator=generator)[:size].tolist()
    drawn: dict[int, None] = {}
    while len(drawn) < size:  # what comes twice is drawn anew, which leaves every selection equally likely
        more = torch.randint(population, (size - len(drawn),), generator=generator)
        drawn.update(dict.fromkeys(more.tolist()))
    return list(drawn)


@dataclass(frozen=True)
class Stretch:
    """Rows to visit together, by number, and whether they are the first, the last ones of a round seen whole."""

    rows: list[int]
    first: bool
    last: bool


class Walk:
    """Visits all rows of a history round by round, breadth first: each once a round, in an order drawn for each round.

    A walk goes on where it stopped. Rows that came meanwhile are visited first, ahead of the rest of the round.
    """

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.int64)  # of the round, in the order of visits; never written to
        self._count = 0
        self._whole = False

    def join(self, count: int, generator: torch.Generator) -> None:
        """Let rows up to ``count`` take part; those that aren't there any more don't."""
        new = torch.arange(min(self._count, count), count)
        new = new[torch.randperm(len(new), generator=generator)]
        self._left = torch.cat((new, self._left[self._left < count]))
        self._count = count
        # Who goes on in the middle of a round doesn't see it whole.
        self._whole = len(self._left) == count

    def next(self, size: int, generator: torch.Generator) -> Stretch:
        """The next rows, at most ``size``: all of one round."""
        if not len(self._left):
            self._left = torch.randperm(self._count, generator=generator)
            self._whole = True
        first = len(self._left) == self._count
        rows, self._left = self._left[:size], self._left[size:]
        return Stretch(rows.tolist(), first, self._whole and not len(self._left))

    def mark(self) -> tuple[Tensor, bool]:
        """Where the walk is, for ``back_to``."""
        return self._left, self._whole

    def back_to(self, mark: tuple[Tensor, bool]) -> None:
        """Take back the visits since ``mark``."""
        self._left, self._whole = mark

    @property
    def count(self) -> int:
        """How many rows take part."""
        return self._count

    def state(self) -> dict[str, Tensor]:
        return {"walk.left": self._left.clone(), "walk.count": torch.tensor(self._count)}

    def load_state(self, state: Mapping[str, Tensor], *, whole: bool = False) -> None:
        """Go on from what ``state`` returned.

        Args:
            whole: what was visited of the round counts as seen.
        """
        self._left = state["walk.left"].cpu().clone()
        self._count = int(state["walk.count"])
        self._whole = whole


class Reservoir:
    """A sample of at most ``size`` rows of a history, each as likely in it as any other (Vitter 1985, algorithm R).

    Args:
        size: of the sample.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._count = 0
        self.rows: list[int] = []

    def join(self, count: int, generator: torch.Generator) -> None:
        """Let rows up to ``count`` have their chance; those that aren't there any more leave."""
        if count < self._count:
            self.rows = [row for row in self.rows if row < count]
        for row in range(self._count, count):
            if len(self.rows) < self._size:
                self.rows.append(row)
                continue
            place = int(torch.randint(row + 1, (), generator=generator))
            if place < self._size:
                self.rows[place] = row
        self._count = count

    def state(self) -> dict[str, Tensor]:
        rows = torch.tensor(self.rows, dtype=torch.int64)
        return {"reservoir.rows": rows, "reservoir.count": torch.tensor(self._count)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.rows = state["reservoir.rows"].tolist()
        self._count = int(state["reservoir.count"])
