"""Runs whose requests don't follow one another: each alone, or all in one batch."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence

from baft.editing import EditOutcome
from baft.runs.context import RunContext, in_groups
from baft.runs.records import EditRecord

__all__ = ["edit_in_one_batch", "edit_singly"]

# Single edits whose answers are generated in the same batches.
_MEASURED_TOGETHER = 32


def edit_singly(context: RunContext) -> None:
    """Each request alone, several at a time; those that are done are measured side by side, and written down."""
    world, done = context.world, set(context.journal.positions())
    left = [position for position in context.order() if position not in done]
    _record_base(context, left)
    context.watcher.stage("editing", len(left) + len(done), len(done))
    own = world.share(left)
    began = time.perf_counter()
    # A process without any of them still makes ready with the others, which they do together.
    outcomes = context.editor.edit_each(context.at(own)) if left else iter(())
    # One process may have an edit more than another: all come here as often as the one with the most.
    for _ in range(0, math.ceil(len(left) / world.parts), _MEASURED_TOGETHER):
        finished = list(itertools.islice(outcomes, _MEASURED_TOGETHER))
        for records in world.gathered(_measured(context, own, finished, time.perf_counter() - began)):
            context.journal.add(*records)
            for record in records:
                context.watcher.advance(f"loss {record.curve.losses[-1]:.3f}" if record.curve.losses else "")
        began = time.perf_counter()


def _record_base(context: RunContext, positions: Sequence[int]) -> None:
    """What the unedited model answers to all that will be asked."""
    context.watcher.stage("asking the unedited model", len(positions))
    for group in in_groups(positions):
        context.evaluator.record_base(context.at(group))
        context.watcher.advance(units=len(group))


def _measured(
    context: RunContext, positions: Sequence[int], outcomes: Sequence[EditOutcome], seconds: float
) -> list[EditRecord]:
    """Records of single edits that took so long together: as they were trained at a time, each has its share of it."""
    if not outcomes:
        return []
    requests = [outcome.request for outcome in outcomes]
    states = [outcome.state for outcome in outcomes if outcome.state is not None]
    return [
        EditRecord(
            positions[outcome.index],
            outcome.request,
            outcome.curve,
            seconds / len(outcomes),
            outcome.curve.steps,
            asked,
        )
        for outcome, asked in zip(outcomes, context.evaluator.measure(requests, states=states), strict=True)
    ]


def edit_in_one_batch(context: RunContext) -> None:
    """All requests together; what was broken off before its end begins anew."""
    order, checkpoints = context.order(), context.checkpoints
    if context.journal.positions():
        known = context.checkpoint(len(order))
        if known is None:
            damaged = checkpoints.damaged if checkpoints else []
            raise ValueError(f"checkpoints: expected the edited state, found {', '.join(damaged) or 'none'}")
        context.editor.load_state(known.state)
        context.editor.edits = context.at(order)
        return
    _record_base(context, order)
    steps = 0

    def count(step: int, at_most: int, loss: float) -> None:
        nonlocal steps
        steps = step
        if step == 1:
            context.watcher.stage("editing, step by step", at_most)
        context.watcher.advance(f"loss {loss:.3f}")

    began = time.perf_counter()
    outcomes = context.editor.edit(context.at(order), "batch", on_step=count)
    seconds = (time.perf_counter() - began) / len(order)
    if checkpoints:
        checkpoints.write(len(order), context.editor.state())
    # The batch's steps are nobody's own: the first record has them, so that the sum is right.
    context.journal.add(
        *(
            EditRecord(position, outcome.request, outcome.curve, seconds, steps if number == 0 else 0)
            for number, (position, outcome) in enumerate(zip(order, outcomes, strict=True))
        )
    )
