"""One training step: edits and unrelated texts in one forward pass, the losses of both, one optimiser step.

It has two halves. *Arranging* is the host's: which tokens lie where, which belong together. *Computing* is the
device's: nothing in it depends on a value that the host would have to wait for, so that it runs ahead of the host, or
is captured in a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from baft import objective
from baft.config import BaftConfig
from baft.distributed import ALONE, World
from baft.engine.buckets import rounded_up
from baft.engine.encoding import Encoded
from baft.engine.ending import Ending, Watch
from baft.engine.parallel import Part
from baft.engine.passes import Passed, Passes, PassInputs
from baft.engine.sets import ParameterSets
from baft.transfer import sent

__all__ = ["Found", "Lesson", "StepInputs", "TrainingStep"]


@dataclass(frozen=True)
class Lesson:
    """What one parameter set is trained on in a step.

    Attributes:
        edits: prompts with their targets.
        unrelated: texts whose continuations shall stay.
        set: the number of the parameter set.
    """

    edits: Sequence[Encoded]
    unrelated: Sequence[Encoded]
    set: int = 0


@dataclass(frozen=True)
class StepInputs:
    """All that a step needs to know of its lessons, on the device.

    Sizes of groups end with one more group, of what is padding: nothing that is computed of it reaches a loss.

    Attributes:
        texts: where they lie.
        wanted: the token of each answer cell, [M].
        answers: how many of them each edit has, [E + 1].
        edits: how many edits each lesson has, [L + 1].
        edit_tokens, unrelated_tokens: how many tokens of edits and of unrelated texts each lesson has, [L + 1].
        rates: learning rates, as ``ParameterSets.rates`` has them.
        watch: which losses end the edit; None where the host decides.
        part: what part of the lessons all this is, where other processes have the rest; else None.
        sets: the parameter set of each lesson.
    """

    texts: PassInputs
    wanted: Tensor
    answers: Tensor
    edits: Tensor
    edit_tokens: Tensor
    unrelated_tokens: Tensor
    rates: Tensor
    watch: Watch | None
    part: Part | None
    sets: tuple[int, ...]

    @property
    def edit_share(self) -> Tensor | None:
        return None if self.part is None else self.part.edit_share

    @property
    def unrelated_share(self) -> Tensor | None:
        return None if self.part is None else self.part.unrelated_share


class Found(NamedTuple):
    """What a step finds: each edit's loss before it, [E], whose last ones may be padding; all that it lowers, [];
    and how far each basis went from an orthonormal one, as ``ParameterSets.update`` returns it."""

    per_edit: Tensor
    loss: Tensor
    distances: Tensor


class TrainingStep:
    """The step, and what it carries from one to the next: parameters, optimiser moments, gate usage.

    Args:
        passes: forward passes of the model under edit.
        sets: what is trained.
        config: weights and rates.
        usage: by layer the sum of w over the tokens of all finished edits, [r]: the constant part of load balancing.
        ending: ends edits on the device where a step's losses are watched, and puts steps on hold; None does neither.
        world: processes that take each step together; all are given the same lessons.
    """

    def __init__(
        self,
        passes: Passes,
        sets: ParameterSets,
        config: BaftConfig,
        usage: Mapping[int, Tensor] | None = None,
        ending: Ending | None = None,
        world: World = ALONE,
    ) -> None:
        self.passes = passes
        self.sets = sets
        self.config = config
        self.usage = dict(usage or sets.new_usage())
        self.ending = ending
        self.world = world

    def __call__(
        self,
        lessons: Sequence[Lesson],
        compute: Callable[[StepInputs], Found] | None = None,
        *,
        few_shapes: bool = False,
    ) -> Tensor:
        """Train each lesson's set once on it, and wait for it.

        Args:
            lessons: at most one for each set.
            compute: takes the place of ``self.compute``.
            few_shapes: as ``arrange`` takes it.

        Returns:
            Each edit's loss before the step, in order, and perhaps more behind them, on the model's device. A graph's
            next replay overwrites them.
        """
        inputs = self.arrange(lessons, few_shapes=few_shapes)
        found = (compute or self.compute)(inputs)
        # A set that isn't finite any more has diverged, which its loss says; the others are to go on.
        distances = [distance if math.isfinite(distance) else 0.0 for distance in found.distances.tolist()]
        self.sets.retract_far(inputs.sets, distances)
        return found.per_edit

    def arrange(
        self,
        lessons: Sequence[Lesson],
        *,
        rate: float = 1.0,
        watched: tuple[int, bool, bool] | None = None,
        few_shapes: bool = False,
    ) -> StepInputs:
        """Lay a step's lessons out for ``compute``.

        Args:
            lessons: at most one for each set.
            rate: factor on the learning rates.
            watched: how many of the first edits end the whole by their losses, and whether the step is the first and
                the last one of its stretch: see ``Watch``.
            few_shapes: pad so that different lessons come out in the same shapes.
        """
        whole, lessons = lessons, [self._own(lesson) for lesson in lessons]
        edits = [text for lesson in lessons for text in lesson.edits]
        unrelated = [text for lesson in lessons for text in lesson.unrelated]
        of_edits = [lesson.set for lesson in lessons for _ in lesson.edits]
        of_unrelated = [lesson.set for lesson in lessons for _ in lesson.unrelated]
        texts = self.passes.arrange(
            edits,
            unrelated,
            [*of_edits, *of_unrelated],
            predictions=bool(unrelated) and self.config.locality_loss == "kl",
            few_shapes=few_shapes,
        )
        device = texts.answer_cells.device
        count = rounded_up(len(edits), parts=1) if few_shapes else len(edits)

        def sizes(of_groups: Sequence[int], all_of_them: int) -> Tensor:
            return sent([*of_groups, all_of_them - sum(of_groups)], device)

        wanted = [token for text in edits for token in text.ids[text.answer_start :]]
        answers = [len(text.ids) - text.answer_start for text in edits]
        part = None
        if self.world.parts > 1:
            part = Part.of(
                self.world,
                [len(lesson.edits) for lesson in whole],
                [(_tokens(own.unrelated), _tokens(full.unrelated)) for own, full in zip(lessons, whole, strict=True)],
                device,
            )
        watch = None
        if watched is not None:
            first_edits, first, last = watched
            flags = [k < first_edits for k in range(count if part is None else part.edits)]
            watch = Watch(*(sent(value, device, torch.bool) for value in (flags, first, last)))
        return StepInputs(
            texts=texts,
            wanted=sent(wanted + [0] * (len(texts.answer_cells) - len(wanted)), device),
            answers=sizes(answers + [0] * (count - len(edits)), len(texts.answer_cells)),
            edits=sizes([len(lesson.edits) for lesson in lessons], count),
            edit_tokens=sizes([_tokens(lesson.edits) for lesson in lessons], len(texts.edit_cells)),
            unrelated_tokens=sizes([_tokens(lesson.unrelated) for lesson in lessons], len(texts.unrelated_cells)),
            rates=self.sets.rates(rate),
            watch=watch,
            part=part,
            sets=tuple(lesson.set for lesson in lessons),
        )

    def _own(self, lesson: Lesson) -> Lesson:
        """This process's part of a lesson; never one without an edit, from which there would be nothing to run."""
        if self.world.parts == 1:
            return lesson
        edits = self.world.share(lesson.edits) or lesson.edits[:1]
        return replace(lesson, edits=edits, unrelated=self.world.share(lesson.unrelated))

    def compute(self, inputs: StepInputs) -> Found:
        """Train on what was arranged."""
        per_edit, loss = self._differentiate(inputs)
        if inputs.part is not None:
            per_edit, loss = inputs.part.gathered(per_edit, loss, self.sets.gradients())
        left_out = None
        if inputs.watch is not None:
            assert self.ending is not None
            left_out = self.ending.judge(per_edit, loss, inputs.watch)
        elif self.ending is not None and self.ending.by_host:
            left_out = self.ending.held
        distances = self.sets.update(inputs.sets, inputs.rates, left_out)
        if inputs.watch is not None:
            assert self.ending is not None
            self.ending.await_retraction(distances)
        return Found(per_edit, loss, distances)

    def _differentiate(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Give the parameters the gradients of the lessons' losses; returns each edit's loss, and the sum of all."""
        config = self.config
        self.sets.drop_gradients()  # those of a step that was broken off
        unrelated = len(inputs.texts.unrelated_cells) > 0
        by_update = unrelated and config.locality_loss == "update"
        with self.passes.run(
            inputs.texts, grouped=self.sets.grouped, records=by_update or config.balance_weight > 0
        ) as passed:
            wanted = inputs.wanted.to(passed.answers.device)
            per_edit = _means(objective.answer_nll(passed.answers, wanted), inputs.answers)
            taught = per_edit
            if config.smoothing > 0:
                smoothed = objective.smoothed_nll(passed.answers, wanted, config.smoothing, config.stop_below)
                taught = _means(smoothed, inputs.answers)
            loss = _means(taught, inputs.edits, inputs.edit_share)
            if config.balance_weight > 0:
                loss = loss + config.balance_weight * self._balance(passed, inputs)
            if passed.divergence is not None:
                changes = _means(passed.divergence, inputs.unrelated_tokens, inputs.unrelated_share)
                loss = loss + config.locality_weight * changes
            if by_update:
                loss = loss + config.locality_weight * self._relative_update(passed, inputs)
            total = loss.sum()
            total.backward()
        return per_edit.detach(), total.detach()

    def _balance(self, passed: Passed, inputs: StepInputs) -> Tensor:
        """Of each lesson, the mean over layers, [lessons]."""
        usages: dict[int, Tensor] = {}
        for layer, record in passed.records.items():
            here = record.weights.device
            weights = record.weights.flatten(0, 1).index_select(0, inputs.texts.edit_cells.to(here))
            usages[layer] = objective.sum_of(weights, inputs.edit_tokens.to(here))[:-1]
        constant: Mapping[int, Tensor] = self.usage
        if inputs.part is not None:
            usages = {layer: inputs.part.counted(usage) for layer, usage in usages.items()}
            others = zip(usages, inputs.part.of_others(list(usages.values())), strict=True)
            constant = {layer: self.usage[layer] + usage for layer, usage in others}
        terms = [objective.balance(constant[layer], usage) for layer, usage in usages.items()]
        mean = torch.stack([term.to(passed.answers.device) for term in terms]).mean(0)
        return mean if inputs.part is None else inputs.part.once(mean)

    def _relative_update(self, passed: Passed, inputs: StepInputs) -> Tensor:
        """Likewise, over the unrelated texts."""
        terms = []
        for record in passed.records.values():
            cells = inputs.texts.unrelated_cells.to(record.update.device)
            change = objective.relative_update(
                record.update.flatten(0, 1).index_select(0, cells),
                record.squared_norm.flatten().index_select(0, cells),
                self.config.locality_margin,
            )
            means = _means(change, inputs.unrelated_tokens, inputs.unrelated_share)
            terms.append(means.to(passed.answers.device))
        return torch.stack(terms).mean(0)

    def count_usage(self, edits: Sequence[Encoded]) -> None:
        """Add the gate weights on the tokens of finished edits to the usage that load balancing, if any, looks at."""
        if self.config.balance_weight == 0:
            return
        for layer, usage in self.usage_of(edits).items():
            self.usage[layer] += usage

    @torch.no_grad()
    def usage_of(self, edits: Sequence[Encoded], set: int = 0) -> dict[int, Tensor]:
        """By layer the sum of w over the tokens of ``edits``, under a parameter set, [r]."""
        texts = self.passes.arrange(edits, [], [set] * len(edits), predictions=False)
        with self.passes.run(texts, grouped=self.sets.grouped, records=True) as passed:
            return {
                layer: record.weights.flatten(0, 1)[texts.edit_cells.to(record.weights.device)].sum(0)
                for layer, record in passed.records.items()
            }


def _means(values: Tensor, sizes: Tensor, share: Tensor | None = None) -> Tensor:
    """``objective.mean_of``, but for the last group, which is padding.

    Where a process has only a ``share`` of each group, [L], it is what that adds to the mean over all.
    """
    means = objective.mean_of(values, sizes.to(values.device))[:-1]
    return means if share is None else means * share.to(means.device)


def _tokens(texts: Sequence[Encoded]) -> int:
    return sum(len(text.ids) for text in texts)
