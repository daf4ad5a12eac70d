"""What learns edits: it draws the lessons of a step and takes steps; ``schedule`` says which and how many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baft.config import BaftConfig
from baft.engine.encoding import Encoded
from baft.engine.step import Lesson
from baft.engine.unrelated import UnrelatedPool, draw_indices

__all__ = ["DivergedError", "Ended", "Learner", "Plan", "Planned"]


class DivergedError(RuntimeError):
    """A loss, after so many steps, is no finite number.

    Args:
        loss: what it is.
        steps: after how many steps.
    """

    def __init__(self, loss: float, steps: int) -> None:
        super().__init__(f"the edit loss became {loss} after {steps} steps; expected a finite one: lower learning_rate")


@dataclass(frozen=True)
class Planned:
    """A step to take.

    Attributes:
        lesson: what is trained.
        rate: factor on the learning rates.
        watched: how many of the lesson's first edits end the whole by their losses.
        first, last: whether the step is the first, the last one of a stretch: see ``baft.engine.ending.Watch``.
    """

    lesson: Lesson
    rate: float = 1.0
    watched: int = 1
    first: bool = True
    last: bool = True


Plan = Callable[[int], Planned | None]
"""The step with a number from 0, drawn by the learner's generator; None behind the last."""

Ended = Callable[[Sequence[float]], bool]
"""Told the losses that each step found of its edits, in order; says whether that ends the edit."""


class Learner(ABC):
    """Learns edits, whatever it is that is trained.

    Args:
        config: how to train.
        unrelated: what the locality loss looks at.

    Attributes:
        generator: of all that is drawn.
    """

    def __init__(self, config: BaftConfig, unrelated: UnrelatedPool) -> None:
        self.config = config
        self.unrelated = unrelated
        self.generator = torch.Generator().manual_seed(config.seed)

    def lesson(
        self,
        new: Sequence[Encoded],
        past: Sequence[Encoded] = (),
        *,
        generator: torch.Generator | None = None,
        set: int = 0,
    ) -> Lesson:
        """``new`` requests with earlier ones, as many as are rehearsed, and unrelated texts, as configured."""
        generator = generator or self.generator
        rehearsed = [past[i] for i in draw_indices(len(past), self.config.rehearsal, generator)] if past else []
        wanted = self.config.unrelated_per_step if self.config.locality_weight > 0 else 0
        return Lesson([*new, *rehearsed], self.unrelated.draw(wanted, generator), set)

    @abstractmethod
    def take_steps(self, plan: Plan, ended: Ended) -> None:
        """Take planned steps until one ends the edit or none is left.

        The step that ends it still trains.

        Raises:
            DivergedError: if a step's loss is no finite number any more; that step changed nothing.
        """

    @abstractmethod
    def count_usage(self, edits: Sequence[Encoded]) -> None:
        """Be told which edits are done, in case it matters what they used."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What continuing after a save and load needs besides the parameters, as copies."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what ``state`` returned."""
