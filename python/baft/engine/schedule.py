"""The loops around the step: editing a batch, editing the next of a sequence, consolidating what came before."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baft.config import BaftConfig
from baft.engine.encoding import Encoded
from baft.engine.learner import Learner, Planned
from baft.engine.unrelated import draw_indices

__all__ = ["Curve", "OnStep", "consolidate", "edit_batch", "edit_next"]

OnStep = Callable[[int, int, float], None]
"""Called after every step with (step, steps at most, mean loss of the step's edits)."""


@dataclass
class Curve:
    """How an edit trained.

    Attributes:
        losses: the edit loss before each step; of a batch, its mean over each pass.
        steps: optimiser steps taken.
        converged: whether it stopped because the loss was low enough, and not because the steps were used up.
        diverged: whether it stopped because the loss was no finite number any more.
        seconds: wall-clock time.
    """

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    converged: bool = False
    diverged: bool = False
    seconds: float = 0.0

    def add(self, loss: float, config: BaftConfig) -> bool:
        """Note the loss that a step of a single request found; returns whether the edit ends with this step."""
        self.steps += 1
        self.losses.append(loss)
        self.converged = loss < config.stop_below
        self.diverged = not math.isfinite(loss)
        return self.converged or self.diverged or self.steps == config.max_steps


def edit_next(trainer: Learner, new: Encoded, past: Sequence[Encoded], on_step: OnStep | None = None) -> Curve:
    """Edit one more request: at most ``max_steps`` steps on it, each together with some earlier ones (rehearsal).

    It stops early at the first step that finds the request's loss below ``stop_below``.

    Raises:
        RuntimeError: if the loss is no finite number any more; what that step would have changed is as it was.
    """
    config, start, curve = trainer.config, time.perf_counter(), Curve()

    def plan(step: int) -> Planned | None:
        return Planned(trainer.lesson([new], past), watched=1) if step < config.max_steps else None

    def ended(losses: Sequence[float]) -> bool:
        over = curve.add(losses[0], config)
        if on_step:
            on_step(curve.steps, config.max_steps, curve.losses[-1])
        return over

    trainer.take_steps(plan, ended)
    trainer.count_usage([new])
    curve.seconds = time.perf_counter() - start
    return curve


def edit_batch(trainer: Learner, edits: Sequence[Encoded], on_step: OnStep | None = None) -> Curve:
    """Edit many requests together: up to ``batch_passes`` passes over them, learning rates falling along a cosine."""
    curve = _passes(trainer, edits, trainer.config.batch_passes, on_step)
    trainer.count_usage(edits)
    return curve


def consolidate(trainer: Learner, past: Sequence[Encoded], on_step: OnStep | None = None) -> Curve:
    """Go over all past requests again, ``consolidation_passes`` times at most."""
    return _passes(trainer, past, trainer.config.consolidation_passes, on_step)


def _passes(trainer: Learner, edits: Sequence[Encoded], passes: int, on_step: OnStep | None) -> Curve:
    """Passes over ``edits`` in drawn order, until no edit of a whole pass had a loss of ``stop_below`` or more."""
    config, start, curve = trainer.config, time.perf_counter(), Curve()
    per_pass = math.ceil(len(edits) / config.batch_size)
    order: list[int] = []
    found: list[float] = []

    def plan(step: int) -> Planned | None:
        number, of_pass = divmod(step, per_pass)
        if number == passes:
            return None
        if of_pass == 0:
            order[:] = draw_indices(len(edits), len(edits), trainer.generator)
        chosen = [edits[i] for i in order[of_pass * config.batch_size : (of_pass + 1) * config.batch_size]]
        return Planned(
            trainer.lesson(chosen),
            rate=0.5 * (1 + math.cos(math.pi * step / (passes * per_pass))),
            watched=len(chosen),
            first=of_pass == 0,
            last=of_pass == per_pass - 1,
        )

    def ended(losses: Sequence[float]) -> bool:
        if curve.steps % per_pass == 0:
            found.clear()
        found.extend(losses)
        curve.steps += 1
        if on_step:
            on_step(curve.steps, passes * per_pass, sum(found) / len(found))
        if curve.steps % per_pass == 0:
            curve.losses.append(sum(found) / len(found))
            curve.converged = max(found) < config.stop_below
        return curve.converged

    trainer.take_steps(plan, ended)
    curve.seconds = time.perf_counter() - start
    return curve
