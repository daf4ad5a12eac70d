"""What learns edits: it draws the lessons of a step and takes steps; ``schedule`` says which and how many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from baft.config import BaftConfig
from baft.engine.draws import Reservoir, Walk, draw_indices
from baft.engine.encoding import Encoded
from baft.engine.retellings import Retellings
from baft.engine.rounds import Round
from baft.engine.step import Lesson
from baft.engine.surroundings import Surroundings
from baft.engine.unrelated import UnrelatedPool
from baft.positions import Positions

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
"""The step with a number from 0, all that it draws being the learner's; None behind the last."""

Ended = Callable[[Sequence[float]], bool]
"""Told the losses that each step found of its edits, in order; says whether that ends the edit."""


class Learner(ABC):
    """Learns edits, whatever it is that is trained.

    Args:
        config: how to train.
        unrelated: what the locality loss looks at.
        surroundings: what the unedited model says of the edits' own subjects.

    Attributes:
        generator: of all that is drawn.
        walk: how far consolidation is through the history.
        round: the settling round that isn't over; None between two of them.
    """

    def __init__(self, config: BaftConfig, unrelated: UnrelatedPool, surroundings: Surroundings) -> None:
        self.config = config
        self.unrelated = unrelated
        self.surroundings = surroundings
        self.generator = torch.Generator().manual_seed(config.seed)
        self._from_the_end = Positions(config.positions).from_the_end
        self.walk = Walk()
        self.round: Round | None = None
        self._reservoir = None if config.rehearsal_buffer is None else Reservoir(config.rehearsal_buffer)

    def lesson(
        self,
        new: Sequence[Encoded],
        past: Sequence[Encoded] = (),
        *,
        known: Sequence[Encoded] | None = None,
        generator: torch.Generator | None = None,
        set: int = 0,
    ) -> Lesson:
        """``new`` requests with earlier ones, as many as are rehearsed, and unrelated texts, as configured.

        An earlier one that asks a new one's prompt isn't rehearsed: it wants the same, or what shall no longer be. What
        is new brings some of its retellings with it, behind it; what was learned before comes in other words half the
        time, if there are any.

        Args:
            new: what the step is about: a request, or its chunks.
            past: what may be rehearsed.
            known: all edits that there are, where ``new`` are some of them that are gone through again.
        """
        self.surroundings.know(*((past, new) if known is None else (known,)))
        generator = generator or self.generator
        asked = {row.asked for row in new}
        rehearsed: list[Encoded] = []
        if past:
            sample = range(len(past)) if self._reservoir is None else self._reservoir.rows
            drawn = [past[sample[i]] for i in draw_indices(len(sample), self.config.rehearsal, generator)]
            rehearsed = [row for row in drawn if row.asked not in asked]
        requests = max(1, sum(not row.given for row in (*new, *rehearsed)))  # and not the later chunks of one
        enough = self.config.unrelated_per_edit * requests
        wanted = min(self.config.unrelated_per_step, enough) if self.config.locality_weight > 0 else 0
        near = self._near(new, rehearsed, wanted // 2, generator)
        told = self._told(new, generator) if known is None else [self._in_some_words(row, generator) for row in new]
        again = [self._in_some_words(row, generator) for row in rehearsed]
        edits = [*told, *(row for row in again if row.asked not in asked)]
        unrelated = [*near, *self.unrelated.draw(wanted - len(near), generator)]
        return Lesson(edits, [self._as_prompt(text, generator) for text in unrelated], set)

    def _as_prompt(self, text: Encoded, generator: torch.Generator) -> Encoded:
        """A text that shall stay as it is. Where edits are at a prompt's end, it ends anywhere in its second half.

        There, where what it tells begins, a question about it would end; at the text's own end nobody asks.
        """
        if not self._from_the_end:
            return text
        length = len(text.ids)
        return replace(text, prompt_length=int(torch.randint((length + 1) // 2, length + 1, (), generator=generator)))

    def _near(
        self, new: Sequence[Encoded], rehearsed: Sequence[Encoded], at_most: int, generator: torch.Generator
    ) -> list[Encoded]:
        """Texts about the subjects of a lesson: all that there are of a single new request, one of each other."""
        texts = [self.surroundings.of(row) for row in (*new, *rehearsed)]
        alone: Sequence[Encoded] = texts.pop(0) if len(new) == 1 else ()
        if len(alone) > at_most:
            alone = [alone[i] for i in draw_indices(len(alone), at_most, generator)]
        others = [of[int(torch.randint(len(of), (), generator=generator))] for of in texts if of]
        return [*alone, *others][:at_most]

    def _told(self, new: Sequence[Encoded], generator: torch.Generator) -> list[Encoded]:
        retold = [(words, k) for row in new for words in [self._retold(row)] for k in range(len(words))]
        drawn = [retold[i] for i in draw_indices(len(retold), self.config.retellings, generator)]
        return [*new, *(words[k] for words, k in drawn)]

    def _in_some_words(self, row: Encoded, generator: torch.Generator) -> Encoded:
        retold = self._retold(row)
        if not retold:
            return row
        drawn = int(torch.randint(2 * len(retold), (), generator=generator))
        return retold[drawn] if drawn < len(retold) else row

    def _retold(self, row: Encoded) -> Retellings:
        told = self.surroundings.retold(row) if self.config.retellings else ()
        behind = partial(self.unrelated.behind, seed=self.config.seed)
        return Retellings(row, told, self.config.contexts, behind)

    def remember(self, past: Sequence[Encoded]) -> None:
        """Let all of ``past`` be rehearsed from now on, or have their chance of it."""
        if self._reservoir is not None:
            self._reservoir.join(len(past), self.generator)

    def mark(self) -> object:
        """What has been drawn so far, for ``back_to``."""
        return self.generator.get_state(), self.walk.mark()

    def back_to(self, mark: Any) -> None:
        """Take back what was drawn since ``mark``."""
        generator, walk = mark
        self.generator.set_state(generator)
        self.walk.back_to(walk)

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

    def state(self) -> dict[str, Tensor]:
        """What continuing after a save and load needs besides the parameters, as copies."""
        return {**self.moments(), **self.course()}

    @abstractmethod
    def moments(self) -> dict[str, Tensor]:
        """Of that, the optimiser's part."""

    def course(self) -> dict[str, Tensor]:
        """And the rest: the random generator, and what was drawn by it and is still to be used."""
        reservoir = self._reservoir.state() if self._reservoir else {}
        round_ = self.round.state() if self.round else {}
        return {**self.walk.state(), **reservoir, **round_, "generator": self.generator.get_state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what ``state`` returned."""
        self.generator.set_state(state["generator"].cpu())
        if "walk.left" in state:  # else a state from before there were walks: this one begins anew
            self.walk.load_state(state)
        self.round = Round.of_state(state)
        if self._reservoir:
            self._reservoir.load_state(state)
