"""Single edits abreast: each trains a parameter set of its own, and all share every pass through the frozen model."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baft.engine.encoding import Encoded
from baft.engine.schedule import Curve, OnStep
from baft.engine.sets import ParameterSets
from baft.engine.step import TrainingStep
from baft.engine.trainer import Trainer
from baft_kernels import GroupedBaftIntervention

__all__ = ["EditsAbreast", "Finished"]


@dataclass(frozen=True)
class Finished:
    """A single edit that has ended: the number of its request, how it trained, and the state it ended in."""

    request: int
    curve: Curve
    state: dict[str, Tensor]


@dataclass
class _Slot:
    """A parameter set's place, and the request that is being trained there."""

    request: int
    generator: torch.Generator
    curve: Curve = field(default_factory=Curve)
    start: float = field(default_factory=time.perf_counter)


class EditsAbreast:
    """Edits every request alone, from where the trainer stands, some of them at a time.

    A request gets the next free slot, and leaves it as soon as its own loss is low enough or its steps are used up. It
    is drawn the same rehearsed and unrelated texts, and takes the same steps, as if it were the only one: results are
    equal within rounding.

    Args:
        trainer: where each edit starts; it isn't changed.
        requests: what is edited.
        past: what had been edited before, to rehearse.
        slots: how many at a time.
    """

    def __init__(self, trainer: Trainer, requests: Sequence[Encoded], past: Sequence[Encoded], slots: int) -> None:
        self._trainer = trainer
        self._requests = requests
        self._past = past
        self._waiting = deque(range(len(requests)))
        self._origin: Mapping[str, Tensor] = {**trainer.step.sets.state(), **trainer.course()}
        self._slots: list[_Slot | None] = [None] * min(slots, len(requests))
        config, own = trainer.config, trainer.passes.attachment.interventions
        interventions = {layer: GroupedBaftIntervention(i, len(self._slots)) for layer, i in own.items()}
        self._step = TrainingStep(trainer.passes, ParameterSets(interventions, config), config, trainer.step.usage)

    @property
    def left(self) -> bool:
        """Whether any request is still to be edited, or being edited."""
        return bool(self._waiting) or any(self._slots)

    def advance(self, on_step: OnStep | None = None) -> list[Finished]:
        """Take one step with every slot's request; returns those that are finished by it."""
        self._fill()
        busy = [(number, slot) for number, slot in enumerate(self._slots) if slot is not None]
        lessons = [
            self._trainer.lesson([self._requests[slot.request]], self._past, generator=slot.generator, set=number)
            for number, slot in busy
        ]
        losses = self._step(lessons).tolist()
        finished, first = [], 0
        for (number, slot), lesson in zip(busy, lessons, strict=True):
            ended = slot.curve.add(losses[first], self._trainer.config)
            first += len(lesson.edits)
            if on_step:
                on_step(slot.curve.steps, self._trainer.config.max_steps, slot.curve.losses[-1])
            if ended:
                finished.append(self._leave(number, slot))
        return finished

    def _fill(self) -> None:
        for number, slot in enumerate(self._slots):
            if slot is None and self._waiting:
                generator = torch.Generator()
                generator.set_state(self._origin["generator"])
                self._step.sets.load(self._origin, number)
                self._slots[number] = _Slot(self._waiting.popleft(), generator)

    def _leave(self, number: int, slot: _Slot) -> Finished:
        slot.curve.seconds = time.perf_counter() - slot.start
        self._slots[number] = None
        state = {**self._origin, **self._step.sets.state(number), "generator": slot.generator.get_state()}
        return Finished(slot.request, slot.curve, state)
