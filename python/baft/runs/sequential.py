"""One request after another, each on the disk before the next begins; broken off anywhere, it goes on from there.

What is on the disk is the journal, up to the last edit, and the editor's state of some edits ago. Going on, the edits
in between are made again. All that an edit depends on is in the state, so that the same bits come out; the journal's
losses tell whether they did. So it is with the settling rounds that follow the last edit.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from baft.editing import LooksAhead, Settling
from baft.engine.learner import DivergedError
from baft.engine.rounds import Round
from baft.engine.schedule import Curve
from baft.engine.slots import ran_out
from baft.requests import numbered
from baft.runs.checkpoints import Checkpoints
from baft.runs.conflicts import can_hold
from baft.runs.context import RunContext
from baft.runs.records import EditRecord
from baft.runs.retention import sample

__all__ = ["RequestError", "SequentialRun"]

# The unedited model is asked about so many requests at a time, ahead of their edits.
_ASKED_AHEAD = 64

# So many requests in a row that have to be given up, and it isn't the requests.
_GIVEN_UP_AT_MOST = 3

# So many edits are told once more to the log of a run that goes on: what it keeps to itself for a while may be lost.
_LOGGED_AGAIN = 1000


class RequestError(RuntimeError):
    """A run has ended at a request that it can't get past.

    Args:
        request: what it is called.
        position: its own.
        reason: why.
        folder: the run's, if it has one.
    """

    def __init__(self, request: str, position: int, reason: Exception, folder: Path | None) -> None:
        run = shlex.quote(str(folder))  # to be pasted
        way_on = f"; to go on without it: baft edits drop {run} {position} --yes, then baft run --resume --out {run}"
        super().__init__(f"{request}: {reason}{way_on if folder else ''}")


class SequentialRun:
    """The editing of a sequential run.

    Args:
        context: what it works with; what the journal holds was done before.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._given_up_in_a_row = 0
        # How many settling rounds the editor's state has had, and whether it is in the middle of another.
        self._settled = 0
        self._in_a_round = False
        # Of the edits that this process made: how many, and how many were answered rightly at once.
        self._made = self._right = 0
        # What asking ahead took, for each of the requests asked about.
        self._ahead_seconds = 0.0

    # -- going on --------------------------------------------------------------------------------------------------

    def restore(self) -> int:
        """Bring the editor to where the journal ends; returns how many edits that took to make again."""
        context, journal = self._context, self._context.journal
        done, given_up = journal.positions(), journal.given_up()
        known = context.checkpoint(len(done) + len(journal.settling()))
        if journal.dropped():  # with it went the texts that were written in its company
            order = context.order()
            for first in range(0, len(done), _ASKED_AHEAD):
                self._ask_ahead(order, first)
        for damage in context.checkpoints.damaged if context.checkpoints else ():
            context.say(f"{damage}; going on from {min(known.done, len(done)) if known else 'no'} edits")
        edits = 0
        if known:
            edits, self._settled = min(known.done, len(done)), max(known.done - len(done), 0)
            self._in_a_round = Round.of_state(known.state) is not None
            context.editor.load_state(known.state)
            context.editor.edits = context.at([p for p in done[:edits] if p not in given_up])
        again, other = done[edits:], 0
        if again:
            context.watcher.stage("going on: the edits since the checkpoint", len(again))
        for record in journal.records(again[0], measures=False) if again else ():
            if not record.curve.out_of_memory:  # of which there may be more now
                curve, _ = self._train(record.index, again=True)
                other += not self._compare(f"edit {record.index}", curve, record.curve, aloud=not other)
            context.watcher.advance()
        if other > 1:
            context.say(f"so did {other - 1} more of the {len(again)} edits that were made again")
        self._given_up_in_a_row = len([*takewhile(given_up.__contains__, reversed(done))])
        return len(again)

    def _compare(self, what: str, curve: Curve, earlier: Curve, *, aloud: bool = True) -> bool:
        """Whether it came out as before, bit for bit; said ``aloud`` if not."""
        alike = _alike(curve.losses, earlier.losses)
        if not alike and aloud:
            self._context.say(
                f"{what} came out otherwise than before, with losses {curve.losses} instead of {earlier.losses}: "
                "the earlier process had another machine, or another number of threads or processes"
            )
        return alike

    # -- editing ---------------------------------------------------------------------------------------------------

    def edit(self, up_to: int | None = None) -> None:
        """Edit what is left, and settle when nothing is.

        Args:
            up_to: how many requests shall be done in the end; by default all, with a look back at them before they
                settle and one after it.

        Raises:
            RequestError: if a request can't be edited, or several in a row had no finite loss, or not the memory.
            OSError: if something can't be written; what was written before is kept.
        """
        context = self._context
        everything = context.order()
        order = everything[:up_to]
        done = len(context.journal.positions())
        context.watcher.stage("editing", len(order), done)
        self._log_again(order[:done])
        for number in range(done, len(order)):
            if number == done or number % _ASKED_AHEAD == 0:
                self._ask_ahead(everything, number - number % _ASKED_AHEAD)
            self._look_back(order, number)
            record = self._edit(order[number])
            context.journal.add(record)
            self._save(number + 1)
            self._tell(record, number + 1)
        if not self._settled:
            self._save(len(order), last=True)
            if up_to is None and not self._in_a_round:
                self._look_back(order, len(order), last=True)
        if order == everything:
            self._settle(len(order))
        if up_to is None:
            self._look_back(order, len(order), last=True)

    def _ask_ahead(self, order: Sequence[int], first: int) -> None:
        """Have in the journal what the unedited model says: to what will be measured, and about the subjects.

        The same requests always come together, wherever a run goes on and however far, so that what they train on is
        the same text.

        Args:
            order: of all that are to be edited.
            first: the place there of the first that is asked about.
        """
        context, editor = self._context, self._context.editor
        requests = context.at(order[first : first + _ASKED_AHEAD])
        context.journal.asked_until = first + _ASKED_AHEAD
        context.evaluator.record_base(requests)
        if isinstance(editor, LooksAhead):
            began = time.perf_counter()
            editor.look_ahead(requests)
            self._ahead_seconds = (time.perf_counter() - began) / len(requests)

    def _edit(self, position: int) -> EditRecord:
        context, request = self._context, self._context.requests[position]
        began = time.perf_counter()
        with self._blaming(position):
            curve, steps = self._train(position)
        seconds = time.perf_counter() - began + self._ahead_seconds
        immediate = context.evaluator.measure([request])[0]
        if curve.diverged or curve.out_of_memory:
            why = "had no finite loss" if curve.diverged else "needs more memory than there is"
            name = numbered(position, request, "edit")
            context.say(f"{name} {why}: it is left out, and the editor as it was before it")
        return EditRecord(position, request, curve, seconds, steps, immediate)

    @contextmanager
    def _blaming(self, position: int) -> Iterator[None]:
        """Name the request in an error that comes of it."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if isinstance(error, RuntimeError) and not (isinstance(error, DivergedError) or ran_out(error)):
                raise
            checkpoints = self._context.checkpoints
            name = numbered(position, self._context.requests[position])
            raise RequestError(name, position, error, checkpoints.folder.parent if checkpoints else None) from error

    def _train(self, position: int, *, again: bool = False) -> tuple[Curve, int]:
        """Edit a request; one that has to be given up leaves the editor as it was.

        Args:
            again: it was edited before, and is to come out alike.
        """
        steps, losses = 0, []

        def count(_: int, __: int, loss: float) -> None:
            nonlocal steps
            steps += 1
            losses.append(loss)

        try:
            (outcome,) = self._context.editor.edit([self._context.requests[position]], "sequential", on_step=count)
        except RuntimeError as error:
            diverged = isinstance(error, DivergedError)
            # Of several processes one alone may run out of memory, and the others would wait for it.
            may_run_out = not again and self._context.world.size == 1
            if not (diverged or (may_run_out and ran_out(error))):
                raise
            self._given_up_in_a_row += 1
            if self._given_up_in_a_row == _GIVEN_UP_AT_MOST:
                raise
        else:
            self._given_up_in_a_row = 0
            return outcome.curve, steps
        if diverged:
            return Curve([*losses, math.nan], steps + 1, diverged=True), steps + 1
        return Curve(losses, steps, out_of_memory=True), steps

    def _settle(self, edits: int) -> None:
        """The settling rounds, if this method has any: those that the editor's state hasn't had."""
        context, editor, journal = self._context, self._context.editor, self._context.journal
        if not isinstance(editor, Settling):
            return
        known = journal.settling()
        if known and self._settled == len(known) and (known[-1].converged or known[-1].diverged):
            return
        if self._settled < editor.config.settling_rounds:
            context.watcher.stage("settling: all edits once more", editor.config.settling_rounds, self._settled)
        began = time.perf_counter()

        def note(curve: Curve) -> None:
            nonlocal began
            again = self._settled < len(known) and self._compare(
                f"settling round {self._settled + 1}", curve, known[self._settled]
            )
            if not again:
                journal.add_settling(self._settled, curve)
                del known[self._settled :]  # what came after another round is no longer true
            self._settled += 1
            self._save(edits + self._settled, last=True)  # a round is more than many edits
            began = time.perf_counter()
            context.watcher.advance(f"loss {curve.losses[-1]:.3f}")

        try:
            editor.settle(done=self._settled, on_round=note, on_part=lambda: self._keep_part(edits))
        except DivergedError as error:
            context.say(f"settling ended, the edits being as they were before its last round, or part of one: {error}")
            note(Curve([math.nan], diverged=True, seconds=time.perf_counter() - began))

    def _look_back(self, order: Sequence[int], done: int, *, last: bool = False) -> None:
        """Measure what was edited earlier, if it is time to and it hasn't been done."""
        context = self._context
        if not done or not (last or context.retention.due(done)):
            return
        if context.journal.has_retention(done, self._settled):
            return
        standing = can_hold(context.conflicts, order[:done], context.journal.given_up())
        chosen = context.at(sample(standing, context.retention.size))
        seconds = context.journal.totals()["seconds"] + sum(curve.seconds for curve in context.journal.settling())
        point = context.retention.measure(context.editor, chosen, done, self._settled, seconds)
        context.journal.add_retention(point)
        settled = ", settled" if self._settled else ""
        said = ", ".join(f"{measure} {value:.3f}" for measure, value in _measures(point))
        context.watcher.say(f"after {done} edit{'s' if done > 1 else ''}{settled}: {said}")
        self._log_point(point)

    def _save(self, done: int, *, last: bool = False) -> None:
        checkpoints = self._context.checkpoints
        if checkpoints and (last or checkpoints.due(done)) and done not in checkpoints.counts():
            self._write(checkpoints, done)

    def _keep_part(self, edits: int) -> None:
        """Keep the state in the middle of a settling round in the place of that before the round."""
        if self._context.checkpoints:
            self._write(self._context.checkpoints, edits + self._settled)

    def _write(self, checkpoints: Checkpoints, done: int) -> None:
        began = time.perf_counter()
        checkpoints.write(done, self._context.editor.state())
        self._context.journal.charge(time.perf_counter() - began)

    def _tell(self, record: EditRecord, edits: int) -> None:
        loss = record.curve.losses[-1] if record.curve.losses else math.nan
        self._made += 1
        self._right += all(r.generation for r in record.immediate if r.question.measure == "reliability")
        self._context.watcher.advance(f"loss {loss:.3f}, {self._right / self._made:.0%} right at once")
        self._log_edit(record, edits)

    # -- figures for those who watch from elsewhere ------------------------------------------------------------------

    def _log_again(self, done: Sequence[int]) -> None:
        """Bring the log to where the journal is: a process may have died between the one and the other."""
        context = self._context
        if not context.log or not done:
            return
        first = max(0, len(done) - _LOGGED_AGAIN)
        points = [point for point in context.journal.retention() if point["edits"] > first]
        for edits, record in enumerate(context.journal.records(done[first]), first + 1):
            self._log_edit(record, edits)
            for point in points:
                if point["edits"] == edits:
                    self._log_point(point)

    def _log_edit(self, record: EditRecord, edits: int) -> None:
        if not self._context.log:
            return
        loss = record.curve.losses[-1] if record.curve.losses else math.nan
        figures = {"loss": loss, "steps": float(record.steps), "seconds": record.seconds}
        for measure in ("reliability", "locality"):
            right = [result.generation for result in record.immediate if result.question.measure == measure]
            if right:
                figures[f"immediate {measure}"] = sum(right) / len(right)
        self._context.log.log(edits, figures)

    def _log_point(self, point: Mapping[str, Any]) -> None:
        if self._context.log:
            what = "settled" if point["settled"] else "retained"
            self._context.log.log(point["edits"], {f"{what} {name}": value for name, value in _measures(point)})


def _measures(point: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What stands in the foreground of a look back."""
    return [(name, point[name]["generation"]) for name in ("reliability", "generality", "locality") if point[name]]


def _alike(losses: Sequence[float], others: Sequence[float]) -> bool:
    """Whether two curves are equal, bit for bit; NaN equals NaN."""
    return len(losses) == len(others) and all(
        a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(losses, others, strict=True)
    )
