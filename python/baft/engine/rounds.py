"""A round through all edits that is made in parts: how far it is, in tensors, so that it can be gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baft.engine.draws import Walk

__all__ = ["Round"]

# In what a round is named in a state.
_NAME = "round."


@dataclass
class Round:
    """A round that isn't over.

    Attributes:
        number: which one it is, from 0.
        walk: what is left to visit.
        losses: of the rows that were visited.
        steps: that it has taken.
        seconds: that these took.
    """

    number: int
    walk: Walk
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0

    @classmethod
    def begun(cls, number: int, rows: int, generator: torch.Generator) -> Round:
        """A round through so many rows, none of which was visited."""
        walk = Walk()
        walk.join(rows, generator)
        return cls(number, walk)

    def is_of(self, number: int, rows: int) -> bool:
        """Whether it is the round of that number, through so many rows."""
        return (self.number, self.walk.count) == (number, rows)

    def state(self) -> dict[str, Tensor]:
        own = {
            "number": torch.tensor(self.number),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "steps": torch.tensor(self.steps),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
        }
        return {_NAME + name: value for name, value in {**self.walk.state(), **own}.items()}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Round | None:
        """That of a state, if one had begun."""
        own = {name.removeprefix(_NAME): value for name, value in state.items() if name.startswith(_NAME)}
        if not own:
            return None
        walk = Walk()
        walk.load_state(own, whole=True)
        return cls(
            int(own["number"]), walk, own["losses"].tolist(), steps=int(own["steps"]), seconds=float(own["seconds"])
        )
