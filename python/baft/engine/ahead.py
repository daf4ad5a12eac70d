"""Takes steps one after the other, each begun before it is known whether it should have been.

The device itself ends an edit (``Ending``): steps that were begun too many change nothing there. What is left to undo
is what the host drew for them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baft.engine.step import Lesson
from baft.engine.trainer import Trainer
from baft.engine.transfer import Reading
from baft_kernels.stiefel import NEAR

__all__ = ["DivergedError", "Planned", "take_steps"]


class DivergedError(RuntimeError):
    """A loss is no finite number any more."""


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


class _Begun:
    """A step that the device is at.

    Args:
        trainer: takes it.
        planned: the step.
        generator: the random generator's state before the step was planned.
    """

    def __init__(self, trainer: Trainer, planned: Planned, generator: Tensor) -> None:
        self._planned = planned
        self._trainer = trainer
        self.generator = generator
        self.take()

    def take(self) -> None:
        """Begin it, for the first time or, if it was on hold, anew."""
        planned = self._planned
        inputs = self._trainer.step.arrange(
            [planned.lesson],
            rate=planned.rate,
            watched=(planned.watched, planned.first, planned.last),
            few_shapes=self._trainer.graphs.used,
        )
        per_edit, loss, distances = self._trainer.graphs(inputs)
        self._reading = Reading(torch.cat((loss.view(1).float(), per_edit.float(), distances.to(loss.device))))
        self._edits = len(per_edit)

    def found(self) -> tuple[float, list[float], list[float]]:
        """What it found: all that it lowers, each edit's loss, and how far each basis went; this waits for it."""
        loss, *rest = self._reading.values()
        return loss, rest[: len(self._planned.lesson.edits)], rest[self._edits :]


def take_steps(
    trainer: Trainer, plan: Callable[[int], Planned | None], ended: Callable[[Sequence[float]], bool]
) -> None:
    """Take planned steps until one ends the edit or none is left.

    Args:
        trainer: takes them, ``trainer.ahead`` of them ahead of what is known.
        plan: the step with a number from 0, drawn by the trainer's generator; None behind the last.
        ended: told the losses of each step's edits in order; says whether the edit has ended, as ``Ending`` has.

    Raises:
        DivergedError: if a step's loss is no finite number any more; that step changed nothing.
        ValueError: if a basis has become one that can't be retracted.
    """
    step = trainer.step
    assert step.ending is not None
    step.ending.release()
    begun: deque[_Begun] = deque()
    number = known = 0
    left = True
    while left or begun:
        if left:
            generator = trainer.generator.get_state()
            planned = plan(number)
            if planned is None:
                left = False
            else:
                begun.append(_Begun(trainer, planned, generator))
                number += 1
        if left and len(begun) <= trainer.ahead:
            continue
        if not begun:
            break
        loss, losses, distances = begun.popleft().found()
        over = not math.isfinite(loss) or ended(losses)
        if not all(distance <= NEAR for distance in distances):
            step.sets.retract_far((0,), distances)
            if not over:  # those begun since were on hold
                step.ending.release()
                for later in begun:
                    later.take()
        known += 1
        if over and begun:
            trainer.generator.set_state(begun[0].generator)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the edit loss became {loss} after {known} steps; expected a finite one: lower learning_rate"
            )
        if over:
            return
