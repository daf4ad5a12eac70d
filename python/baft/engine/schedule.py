"""The loops around the step: editing a batch, or the next of a sequence; going through what came before once more."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from baft.config import BaftConfig
from baft.engine.draws import Stretch, Walk
from baft.engine.encoding import Encoded
from baft.engine.history import Chunks
from baft.engine.learner import Learner, Planned
from baft.engine.rounds import Round

__all__ = ["Curve", "OnStep", "Progress", "consolidate", "edit_batch", "edit_next", "settle"]

# Steps of a settling round that are made at a time, and are lost if the process dies: some minutes of a large model.
_PART = 256

OnStep = Callable[[int, int, float], None]
"""Called after every step with (step, steps at most, mean loss of the step's edits)."""


@dataclass
class Curve:
    """How an edit trained.

    Attributes:
        losses: the edit loss before each step, chunk after chunk; of a batch, its mean over each pass.
        steps: optimiser steps taken.
        converged: whether it stopped because the loss was low enough, and not because the steps were used up.
        diverged: whether it stopped because the loss was no finite number any more.
        out_of_memory: whether it stopped because the device had no more memory.
        seconds: wall-clock time.
    """

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    converged: bool = False
    diverged: bool = False
    seconds: float = 0.0
    out_of_memory: bool = False


class Progress:
    """How far the edit of one request is: which chunk of its target is trained, together with those before it.

    Args:
        chunks: of the request.
        config: how long each is trained.
        alone: whether it is a single edit.

    Attributes:
        curve: how it went so far.
        least, most: optimiser steps that a chunk takes.
        steps: that all of them take at most.
    """

    def __init__(self, chunks: Chunks, config: BaftConfig, *, alone: bool = False) -> None:
        self.curve = Curve()
        self.least, self.most = config.steps_of_an_edit(alone=alone)
        self.steps = self.most * len(chunks)
        self._chunks = chunks
        self._stop_below = config.stop_below
        self._chunk = self._steps = 0

    @property
    def taught(self) -> list[Encoded]:
        """The chunk in training, then the earlier ones."""
        return [self._chunks[self._chunk], *self._chunks[: self._chunk]]

    @property
    def over(self) -> bool:
        """Whether nothing is left to train."""
        return self._chunk == len(self._chunks)

    def add(self, losses: Sequence[float]) -> bool:
        """Note the losses that a step found of what is ``taught``; returns whether that chunk ends with this step."""
        curve = self.curve
        curve.steps += 1
        curve.losses.append(losses[0])
        curve.diverged = not all(map(math.isfinite, losses))
        self._steps += 1
        curve.converged = max(losses) < self._stop_below and self._steps >= self.least
        ended = curve.converged or curve.diverged or self._steps == self.most
        if ended:
            self._chunk = len(self._chunks) if curve.diverged else self._chunk + 1
            self._steps = 0
        return ended


def edit_next(
    trainer: Learner, new: Chunks, past: Sequence[Encoded], on_step: OnStep | None = None, *, alone: bool = False
) -> Curve:
    """Edit one more request: at most ``max_steps`` steps on each chunk, each together with earlier ones (rehearsal).

    A chunk ends early at the first step that finds its loss, and those of the chunks before it, below ``stop_below``;
    that of a single edit, which is ``alone``, not before ``min_steps``.

    Raises:
        RuntimeError: if the loss is no finite number any more; what that step would have changed is as it was.
    """
    start, progress = time.perf_counter(), Progress(new, trainer.config, alone=alone)

    def ended(losses: Sequence[float]) -> bool:
        over = progress.add(losses[:watched])
        if on_step:
            on_step(progress.curve.steps, progress.steps, progress.curve.losses[-1])
        return over

    while not progress.over:
        taught = progress.taught
        watched = len(taught)

        def plan(step: int, taught: Sequence[Encoded] = taught) -> Planned | None:
            if step == progress.most:
                return None
            last = step + 1 >= progress.least
            return Planned(trainer.lesson(taught, past), watched=len(taught), last=last)

        trainer.take_steps(plan, ended)
    trainer.count_usage(new[-1:])
    progress.curve.seconds = time.perf_counter() - start
    return progress.curve


def edit_batch(
    trainer: Learner, edits: Sequence[Chunks], past: Sequence[Encoded], on_step: OnStep | None = None
) -> Curve:
    """Edit many requests together: up to ``batch_passes`` passes over them, learning rates falling along a cosine."""
    rows = [chunk for chunks in edits for chunk in chunks]
    steps, walk = range(trainer.config.batch_passes * _steps_of_a_round(trainer, rows)), Walk()
    walk.join(len(rows), trainer.generator)
    curve = _go(trainer, rows, walk, steps, len(steps), on_step, known=[*past, *rows])
    trainer.count_usage([chunks[-1] for chunks in edits])
    return curve


def consolidate(trainer: Learner, past: Sequence[Encoded], on_step: OnStep | None = None) -> Curve:
    """Go on through all past requests, those that came since the last time first: ``consolidation_steps`` at most."""
    steps = range(trainer.config.consolidation_steps)
    trainer.walk.join(len(past), trainer.generator)
    return _go(trainer, past, trainer.walk, steps, len(steps), on_step, known=past)


def settle(trainer: Learner, past: Sequence[Encoded], number: int, on_step: OnStep | None = None) -> Curve | None:
    """Go on with the settling round of a number from 0: through all past requests once.

    Over all ``settling_rounds`` the learning rates fall along one cosine. A long round is made in parts, one at a call;
    ``trainer.round`` says how far it is.

    Returns:
        How the round trained; None if it isn't over.
    """
    each = _steps_of_a_round(trainer, past)
    if trainer.round is None or not trainer.round.is_of(number, len(past)):
        trainer.round = Round.begun(number, len(past), trainer.generator)
    at = trainer.round
    steps = range(number * each + at.steps, number * each + min(at.steps + _PART, each))
    of = trainer.config.settling_rounds * each

    def tell(step: int, _: int, loss: float) -> None:
        if on_step:
            on_step(at.steps + step, each, loss)

    curve = _go(trainer, past, at.walk, steps, of, tell, known=past, found=at.losses)
    at.steps, at.seconds = at.steps + curve.steps, at.seconds + curve.seconds
    if at.steps < each:
        return None
    trainer.round = None
    return replace(curve, steps=at.steps, seconds=at.seconds)


def _steps_of_a_round(trainer: Learner, rows: Sequence[Encoded]) -> int:
    return math.ceil(len(rows) / trainer.config.batch_size)


def _go(
    trainer: Learner,
    rows: Sequence[Encoded],
    walk: Walk,
    steps: range,
    of: int,
    on_step: OnStep | None,
    *,
    known: Sequence[Encoded],
    found: list[float] | None = None,
) -> Curve:
    """Train on ``rows`` of all that are ``known``, along ``walk``: those ``steps``, of so many along a cosine.

    Until no row of a whole round, told in its own or in other words, had a loss of ``stop_below`` or more.

    Args:
        found: the losses of this round so far, which is added to.
    """
    config, start, curve = trainer.config, time.perf_counter(), Curve()
    visited: deque[Stretch] = deque()
    found = [] if found is None else found

    def plan(step: int) -> Planned | None:
        if step == len(steps):
            return None
        stretch = walk.next(config.batch_size, trainer.generator)
        visited.append(stretch)
        return Planned(
            trainer.lesson([rows[i] for i in stretch.rows], known=known),
            rate=0.5 * (1 + math.cos(math.pi * steps[step] / of)),
            watched=len(stretch.rows),
            first=stretch.first,
            last=stretch.last,
        )

    def ended(losses: Sequence[float]) -> bool:
        stretch = visited.popleft()
        if stretch.first:
            found.clear()
        found.extend(losses)
        curve.steps += 1
        if on_step:
            on_step(curve.steps, len(steps), sum(found) / len(found))
        if stretch.last:
            curve.losses.append(sum(found) / len(found))
            curve.converged = max(found) < config.stop_below
        return curve.converged

    trainer.take_steps(plan, ended)
    curve.seconds = time.perf_counter() - start
    return curve
