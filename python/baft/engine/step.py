"""One training step: edits and unrelated texts in one forward pass, the losses of both, one optimiser step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baft import objective
from baft.config import BaftConfig
from baft.engine.encoding import Encoded
from baft.engine.passes import Passed, Passes
from baft.engine.sets import ParameterSets

__all__ = ["Lesson", "TrainingStep"]


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


class TrainingStep:
    """The step, and what it carries from one to the next: parameters, optimiser moments, gate usage.

    Args:
        passes: forward passes of the model under edit.
        sets: what is trained.
        config: weights and rates.
        usage: by layer the sum of w over the tokens of all finished edits, [r]: the constant part of load balancing.
    """

    def __init__(
        self, passes: Passes, sets: ParameterSets, config: BaftConfig, usage: Mapping[int, Tensor] | None = None
    ) -> None:
        self.passes = passes
        self.sets = sets
        self.config = config
        self.usage = usage or sets.new_usage()

    def __call__(self, lessons: Sequence[Lesson], rate: float = 1.0) -> Tensor:
        """Train each lesson's set once on it.

        Args:
            lessons: at most one for each set.
            rate: factor on the learning rates.

        Returns:
            Each edit's loss before the step, in order, on the model's device.
        """
        per_edit = self._differentiate(lessons)
        self.sets.update([lesson.set for lesson in lessons], rate)
        return per_edit

    def _differentiate(self, lessons: Sequence[Lesson]) -> Tensor:
        """Add the gradients of the lessons' losses to the parameters'; returns each edit's loss."""
        config = self.config
        edits = [text for lesson in lessons for text in lesson.edits]
        unrelated = [text for lesson in lessons for text in lesson.unrelated]
        of_edits = [lesson.set for lesson in lessons for _ in lesson.edits]
        of_unrelated = [lesson.set for lesson in lessons for _ in lesson.unrelated]
        by_kl = bool(unrelated) and config.locality_loss == "kl"
        by_update = bool(unrelated) and config.locality_loss == "update"
        with self.passes.run(
            edits,
            unrelated,
            [*of_edits, *of_unrelated],
            grouped=self.sets.grouped,
            predictions=by_kl,
            records=by_update or config.balance_weight > 0,
        ) as passed:
            device = passed.answers.device
            wanted = torch.tensor([token for text in edits for token in text.ids[text.prompt_length :]]).to(device)
            answer_lengths = [len(text.ids) - text.prompt_length for text in edits]
            per_edit = objective.mean_of(objective.answer_nll(passed.answers, wanted), _counts(answer_lengths, device))
            loss = objective.mean_of(per_edit, _counts([len(lesson.edits) for lesson in lessons], device))
            if config.balance_weight > 0:
                loss = loss + config.balance_weight * self._balance(passed, lessons)
            if by_kl:
                assert passed.edited is not None and passed.unedited is not None
                change = objective.kl_to_base(passed.edited, passed.unedited)
                loss = loss + config.locality_weight * objective.mean_of(change, _unrelated_tokens(lessons, device))
            if by_update:
                loss = loss + config.locality_weight * self._relative_update(passed, lessons)
            loss.sum().backward()
        return per_edit.detach()

    def _balance(self, passed: Passed, lessons: Sequence[Lesson]) -> Tensor:
        """Of each lesson, the mean over layers, [lessons]."""
        edits = [text for lesson in lessons for text in lesson.edits]
        terms = []
        for layer, record in passed.records.items():
            cells = _all_cells(passed, edits, 0).to(record.weights.device)
            counts = _counts([sum(len(t.ids) for t in lesson.edits) for lesson in lessons], cells.device)
            usage = objective.sum_of(record.weights.flatten(0, 1).index_select(0, cells), counts)
            terms.append(objective.balance(self.usage[layer], usage).to(passed.answers.device))
        return torch.stack(terms).mean(0)

    def _relative_update(self, passed: Passed, lessons: Sequence[Lesson]) -> Tensor:
        """Likewise, over the unrelated texts."""
        unrelated = [text for lesson in lessons for text in lesson.unrelated]
        terms = []
        for record in passed.records.values():
            cells = _all_cells(passed, unrelated, sum(len(lesson.edits) for lesson in lessons)).to(record.update.device)
            change = objective.relative_update(
                record.update.flatten(0, 1).index_select(0, cells),
                record.squared_norm.flatten().index_select(0, cells),
                self.config.locality_margin,
            )
            terms.append(objective.mean_of(change, _unrelated_tokens(lessons, cells.device)).to(passed.answers.device))
        return torch.stack(terms).mean(0)

    @torch.no_grad()
    def count_usage(self, edits: Sequence[Encoded]) -> None:
        """Add the gate weights on the tokens of finished edits to the usage that load balancing looks at."""
        if self.config.balance_weight <= 0:
            return
        with self.passes.run(edits, [], [0] * len(edits), predictions=False, records=True) as passed:
            for layer, record in passed.records.items():
                weights = record.weights.flatten(0, 1)
                self.usage[layer] += weights[_all_cells(passed, edits, 0).to(weights.device)].sum(0)


def _counts(sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(sizes).to(device)


def _unrelated_tokens(lessons: Sequence[Lesson], device: torch.device) -> Tensor:
    return _counts([sum(len(text.ids) for text in lesson.unrelated) for lesson in lessons], device)


def _all_cells(passed: Passed, texts: Sequence[Encoded], first: int) -> Tensor:
    """The cells of all tokens of ``texts``, the first of which has number ``first`` on the grid."""
    return torch.tensor([c for k, text in enumerate(texts, first) for c in passed.grid.cells(k, 0, len(text.ids))])
