"""Runs whose requests don't follow one another: each alone, or all in one batch."""

from __future__ import annotations

import time

from baft.editing import EditOutcome
from baft.runs.context import RunContext, in_groups
from baft.runs.records import EditRecord

__all__ = ["edit_in_one_batch", "edit_singly"]

# Single edits whose answers are generated in the same batches.
_MEASURED_TOGETHER = 32


def edit_singly(context: RunContext) -> None:
    """Each request alone, several at a time; those that are done are measured side by side, and written down."""
    done = set(context.journal.positions())
    left = [position for position in context.order() if position not in done]
    context.watcher.stage("editing", len(left) + len(done), len(done))
    for group in in_groups(left):
        context.evaluator.record_base(context.at(group))
    began = time.perf_counter()
    unmeasured: list[EditOutcome] = []

    def keep() -> None:
        nonlocal began
        # Several were trained at a time: each has its share of the time.
        seconds = (time.perf_counter() - began) / len(unmeasured)
        requests = [outcome.request for outcome in unmeasured]
        states = [outcome.state for outcome in unmeasured if outcome.state is not None]
        measured = context.evaluator.measure(requests, states=states)
        records = [
            EditRecord(left[outcome.index], outcome.request, outcome.curve, seconds, outcome.curve.steps, immediate)
            for outcome, immediate in zip(unmeasured, measured, strict=True)
        ]
        context.journal.add(*records)
        for record in records:
            context.watcher.advance(f"loss {record.curve.losses[-1]:.3f}" if record.curve.losses else "")
        unmeasured.clear()  # and let their states go
        began = time.perf_counter()

    for outcome in context.editor.edit_each(context.at(left)):
        unmeasured.append(outcome)
        if len(unmeasured) == _MEASURED_TOGETHER:
            keep()
    if unmeasured:
        keep()


def edit_in_one_batch(context: RunContext) -> None:
    """All requests together; what was broken off before its end begins anew."""
    order, checkpoints = context.order(), context.checkpoints
    if context.journal.positions():
        assert checkpoints is not None
        known = checkpoints.newest(len(order))
        if known is None:
            raise ValueError(f"{checkpoints.folder}: expected the edited state, found {checkpoints.damaged or 'none'}")
        context.editor.load_state(known.state)
        context.editor.edits = context.at(order)
        return
    for group in in_groups(order):
        context.evaluator.record_base(context.at(group))
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
