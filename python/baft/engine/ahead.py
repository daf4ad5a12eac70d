"""Takes steps one after the other, each begun before it is known whether it should have been.

The device itself ends an edit (``Ending``): steps that were begun too many change nothing there. What is left to undo
is what the host drew for them.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Protocol

import torch

from baft.engine.graphs import Graphs
from baft.engine.learner import DivergedError, Ended, Plan, Planned
from baft.engine.step import TrainingStep
from baft.transfer import Reading
from baft_kernels.stiefel import NEAR

__all__ = ["take_steps"]


class StepTaker(Protocol):
    """What takes the steps, ``ahead`` of them ahead of what is known: a ``Trainer``."""

    step: TrainingStep
    graphs: Graphs
    ahead: int

    def mark(self) -> object: ...
    def back_to(self, mark: Any) -> None: ...


class _Begun:
    """A step that the device is at.

    Args:
        trainer: takes it.
        planned: the step.
        before: the trainer's mark before the step was planned.
    """

    def __init__(self, trainer: StepTaker, planned: Planned, before: object) -> None:
        self._planned = planned
        self._trainer = trainer
        self.before = before
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


def take_steps(trainer: StepTaker, plan: Plan, ended: Ended) -> None:
    """Take planned steps until one ends the edit or none is left.

    Args:
        trainer: takes them.
        plan: says which.
        ended: agrees with the trainer's ``Ending``.

    Raises:
        DivergedError: if a step's loss is no finite number any more, and then it changed nothing; or if what it learned
            isn't.
        ValueError: if the rows of a basis have become dependent.
    """
    step = trainer.step
    assert step.ending is not None
    step.ending.release()
    begun: deque[_Begun] = deque()
    number = known = 0
    left = True
    while left or begun:
        if left:
            before = trainer.mark()
            planned = plan(number)
            if planned is None:
                left = False
            else:
                begun.append(_Begun(trainer, planned, before))
                number += 1
        if left and len(begun) <= trainer.ahead:
            continue
        if not begun:
            break
        loss, losses, distances = begun.popleft().found()
        over = not math.isfinite(loss) or ended(losses)
        if not all(map(math.isfinite, distances)):
            loss, over = math.nan, True
        elif not all(distance <= NEAR for distance in distances):
            step.sets.retract_far((0,), distances)
            if not over:  # those begun since were on hold
                step.ending.release()
                for later in begun:
                    later.take()
        known += 1
        if over and begun:
            trainer.back_to(begun[0].before)
        if not math.isfinite(loss):
            raise DivergedError(loss, known)
        if over:
            return
