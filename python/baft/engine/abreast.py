"""Single edits abreast: each trains a parameter set of its own, and all share every pass through the frozen model."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from baft.engine.encoding import Encoded
from baft.engine.ending import Ending
from baft.engine.graphs import Graphs
from baft.engine.history import Chunks
from baft.engine.schedule import Curve, OnStep, Progress
from baft.engine.sets import ParameterSets
from baft.engine.slots import ran_out, slots_that_fit
from baft.engine.step import Lesson, TrainingStep
from baft.engine.surroundings import WRITTEN_AHEAD
from baft.engine.trainer import Abreast, Trainer
from baft.placement import device_of
from baft_kernels import GroupedBaftIntervention

__all__ = ["EditsAbreast", "Finished"]


@dataclass(frozen=True)
class Finished:
    """A single edit that has ended: the number of its request, how it trained, and the state that it ended in.

    That has no moments of the optimiser: they are two thirds of what a set takes, and of thousands of edits hardly one
    is edited on.
    """

    request: int
    curve: Curve
    state: dict[str, Tensor]


@dataclass
class _Slot:
    """A parameter set's place, and the request that is being trained there."""

    request: int
    generator: torch.Generator
    progress: Progress
    start: float = field(default_factory=time.perf_counter)


class _Taken(NamedTuple):
    """A step: who took part, how many edits the lesson of each had, the losses of these, and the bytes that it took."""

    busy: list[tuple[int, _Slot]]
    edits: list[int]
    losses: list[float]
    nbytes: int


class EditsAbreast:
    """Edits every request alone, from where the trainer stands, some of them at a time.

    A request gets the next free slot, and leaves it as soon as its own loss is low enough (after ``min_steps`` at the
    earliest) or its steps are used up; by default both is after 20. It is drawn the same rehearsed and unrelated texts,
    and takes the same steps, as if it were the only one: results are equal within rounding, and bit for bit with one
    slot.

    Long requests go first, so that what memory is planned with is the most that is needed, but for targets in chunks,
    of which later steps have more. Where it runs out all the same, the requests being trained go back to wait, and half
    as many are trained at a time.

    Steps with a request in every slot are captured in graphs, if any are, as soon as it is planned how many slots there
    are and a shape comes for the second time. The last steps, with fewer and fewer, would each be a shape of its own.
    Losses are read before the next step is arranged: who leaves and who enters depends on them, and with many edits
    abreast there is always somebody.

    Args:
        trainer: where each edit starts; it isn't changed.
        requests: what is edited.
        past: what had been edited before, to rehearse.
        slots: how many at a time; None plans it.
    """

    def __init__(
        self, trainer: Trainer, requests: Sequence[Chunks], past: Sequence[Encoded], slots: int | None
    ) -> None:
        self._trainer = trainer
        self._requests = requests
        self._past = past
        # Requests of like length are trained at the same time, which need little padding.
        self._waiting = deque(sorted(range(len(requests)), key=self._length, reverse=True))
        self._typical = self._waiting[len(requests) // 2]
        self._origin: Mapping[str, Tensor] = trainer.step.sets.state()
        self._course: Mapping[str, Tensor] = trainer.course()
        self._from_identity = trainer.step.sets.are_identity()
        self._device = device_of(trainer.passes.model)
        self._planned = slots is not None
        self._slots: list[_Slot | None] = []
        self._step: TrainingStep | None = None
        self._graphs: Graphs | None = None
        self._written = 0  # of those that wait, the first have their texts
        self._lesson_bytes: int | None = None
        self.slots = min(slots or self._first_plan(), len(requests))

    @property
    def left(self) -> bool:
        """Whether any request is still to be edited, or being edited."""
        return bool(self._waiting) or any(self._slots)

    def advance(self, on_step: OnStep | None = None) -> list[Finished]:
        """Take one step with every slot's request; returns those that are finished by it.

        Raises:
            torch.OutOfMemoryError: if not even one request fits.
        """
        try:
            taken = self._take_step()
        except RuntimeError as error:
            if not ran_out(error):
                raise
            taken = None
        if taken is None:  # out here, where the error no longer holds what the step had
            self._halve()
            return []
        finished, first = [], 0
        for (number, slot), edits in zip(taken.busy, taken.edits, strict=True):
            progress = slot.progress
            progress.add(taken.losses[first : first + len(progress.taught)])
            first += edits
            if on_step:
                on_step(progress.curve.steps, progress.steps, progress.curve.losses[-1])
            if progress.over:
                finished.append(self._leave(number, slot))
        if not self._planned and all(slot.progress.curve.steps > 1 for _, slot in taken.busy):
            self._plan(len(taken.busy), taken.nbytes)
        if not self.left:
            self._close()
        return finished

    def _take_step(self) -> _Taken:
        """One step of all that are in training, with those that enter."""
        if self._step is None:
            self._open()
        assert self._step is not None and self._graphs is not None
        self._fill()
        busy = [(number, slot) for number, slot in enumerate(self._slots) if slot is not None]
        lessons = [self._lesson(number, slot) for number, slot in busy]
        before = self._memory(reset=not self._planned)
        captured = self._planned and len(busy) == self.slots and self._graphs.used
        losses = self._step(lessons, self._graphs if captured else None, few_shapes=captured).tolist()
        return _Taken(busy, [len(lesson.edits) for lesson in lessons], losses, self._memory() - before)

    # -- slots -----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Make the parameter sets, and what trains them."""
        own, config = self._trainer.passes.attachment.interventions, self._trainer.config
        interventions = {layer: GroupedBaftIntervention(i, self.slots) for layer, i in own.items()}
        sets = ParameterSets(interventions, config)
        ending = Ending(config.stop_below, self._device)
        self._step = TrainingStep(self._trainer.passes, sets, config, self._trainer.step.usage, ending)
        self._graphs = self._trainer.graphs_for(self._step, at_first=False)
        self._slots = [None] * self.slots

    def _close(self) -> None:
        """Give the parameter sets up; what is in training will start anew, before what waits."""
        if self._graphs is not None:
            self._trainer.abreast = Abreast(self.slots, self._lesson_bytes, self._graphs.report())
        running = [slot.request for slot in self._slots if slot]
        self._waiting.extendleft(sorted(running, key=self._length))
        self._written = 0
        self._slots, self._step, self._graphs = [], None, None

    def _fill(self) -> None:
        assert self._step is not None
        for number, slot in enumerate(self._slots):
            if slot is None and self._waiting:
                generator = torch.Generator()
                generator.set_state(self._course["generator"])
                self._step.sets.load(self._origin, number)
                self._write_ahead()
                request = self._waiting.popleft()
                progress = Progress(self._requests[request], self._trainer.config, alone=True)
                self._slots[number] = _Slot(request, generator, progress)

    def _write_ahead(self) -> None:
        """Have texts about the subjects of those that come next; with one slot each has its own written by itself."""
        if self._written == 0 and self.slots > 1:
            following = list(islice(self._waiting, WRITTEN_AHEAD))
            self._trainer.surroundings.write_ahead([self._requests[request][0] for request in following])
            self._written = len(following)
        self._written = max(0, self._written - 1)

    def _length(self, request: int) -> int:
        return len(self._requests[request][-1].ids)

    def _lesson(self, number: int, slot: _Slot) -> Lesson:
        taught = slot.progress.taught
        lesson = self._trainer.lesson(taught, self._past, generator=slot.generator, set=number)
        if slot.progress.curve.steps == 0 and self._from_identity:
            # The model is still the unedited one, where the locality losses have their minimum: no gradient.
            return replace(lesson, unrelated=())
        return lesson

    def _leave(self, number: int, slot: _Slot) -> Finished:
        assert self._step is not None
        slot.progress.curve.seconds = time.perf_counter() - slot.start
        self._slots[number] = None
        own = self._step.sets.parameters(number)
        state = {**self._course, **own, "generator": slot.generator.get_state()}
        if self._trainer.config.balance_weight > 0:
            for layer, usage in self._step.usage_of(self._requests[slot.request][-1:], number).items():
                state[f"usage.{layer}"] = state[f"usage.{layer}"] + usage
        # Beside the model there would soon be no room for thousands.
        state = {name: value.cpu() for name, value in state.items()}
        if not all(bool(state[name].isfinite().all()) for name in own):
            # The last loss was finite, but the step that it belongs to made parameters that aren't.
            slot.progress.curve.converged, slot.progress.curve.diverged = False, True
        return Finished(slot.request, slot.progress.curve, state)

    # -- how many --------------------------------------------------------------------------------------------------

    def _first_plan(self) -> int:
        return slots_that_fit(self._device, self._cells())

    def _plan(self, busy: int, taken: int) -> None:
        """Plan anew by what a step of ``busy`` requests was seen to take."""
        self._planned = True
        self._lesson_bytes = taken // busy if self._device.type == "cuda" else None
        set_bytes = 4 * sum(value.nbytes for value in self._trainer.step.sets.parameters().values())
        graphs = self._graphs is not None and self._graphs.used
        planned = slots_that_fit(self._device, self._cells(), self._lesson_bytes, set_bytes, graphs=graphs)
        if min(planned, len(self._requests)) > self.slots:
            self._close()
            self.slots = min(planned, len(self._requests))

    def _cells(self) -> int:
        """Cells of the grid that a request's lesson takes, about."""
        generator = torch.Generator()
        generator.set_state(self._course["generator"])
        lesson = self._trainer.lesson(self._requests[self._typical], self._past, generator=generator)
        return sum(len(text.ids) for text in (*lesson.edits, *lesson.unrelated))

    def _memory(self, *, reset: bool = False) -> int:
        """Bytes in use at most since the last reset, on a GPU."""
        if self._device.type != "cuda":
            return 0
        if reset:
            torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.max_memory_allocated(self._device)

    def _halve(self) -> None:
        if self.slots == 1:
            raise torch.OutOfMemoryError(
                "a single edit needs more memory than there is: lower unrelated_per_edit, rehearsal or rank"
            )
        self._close()
        self.slots //= 2
        self._planned = True
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(f"memory ran out: going on with {self.slots} edits at a time", RuntimeWarning, stacklevel=3)
