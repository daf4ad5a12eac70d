"""Takes edits back: to the state before any request, or as if one had never been made."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from baft.runs.context import RunContext
from baft.runs.folder import RunFolder
from baft.runs.sequential import SequentialRun

__all__ = ["Cost", "cost_of_drop", "cost_of_rollback", "drop", "is_waiting", "leave_out", "roll_back"]


@dataclass(frozen=True)
class Cost:
    """What taking edits back takes: so many edits are made again, which once took so many seconds.

    Attributes:
        kept: edits before the first that is taken back.
        taken: edits that are taken back, and not made again.
        checkpoint: edits in the checkpoint that it starts from.
        edits: edits to be made again.
        seconds: what they took, and the settling rounds too where the run settles again.
    """

    kept: int
    taken: int
    checkpoint: int
    edits: int
    seconds: float


def cost_of_rollback(folder: RunFolder, position: int) -> Cost:
    """What going back to before the request at ``position`` takes.

    Raises:
        ValueError: if no such request has been edited, and it isn't one that going back to broke off.
    """
    return _cost(folder, position, after=[], retried=folder.journal.cut_at())


def cost_of_drop(folder: RunFolder, position: int) -> Cost:
    """What leaving out the request at ``position`` takes: all that came after it is edited again.

    Raises:
        ValueError: if no such request has been edited.
    """
    journal = folder.journal
    cost = _cost(folder, position, after=[p for p in journal.positions() if p > position])
    return replace(cost, seconds=cost.seconds + sum(curve.seconds for curve in journal.settling()))


def roll_back(context: RunContext, folder: RunFolder | None, position: int) -> None:
    """Go back to the state before the request at ``position``: that, and what came after it, is as if never made.

    Broken off, it can be asked for again.

    Args:
        folder: the run's, in the process of ``context.world`` that writes; None in the others.

    Raises:
        ValueError: if no such request has been edited.
    """
    kept = context.world.first_ones(cost_of_rollback(folder, position).kept if folder else 0)
    _cut(context, folder, position, kept)
    _make_again(context, folder, up_to=kept)


def drop(context: RunContext, folder: RunFolder | None, position: int) -> None:
    """Leave the request at ``position`` out, and edit again what came after it.

    Broken off, it is a run like others that ``baft run --resume`` goes on with.

    Args:
        folder: the run's, in the process of ``context.world`` that writes; None in the others.

    Raises:
        ValueError: if no such request has been edited.
    """
    kept = context.world.first_ones(cost_of_drop(folder, position).kept if folder else 0)
    done = len(context.journal.positions())
    _cut(context, folder, position, kept, drop=True)
    _make_again(context, folder, up_to=done - 1)


def is_waiting(folder: RunFolder, position: int) -> bool:
    """Whether the request at ``position`` is still to be edited."""
    journal = folder.journal
    known = position in journal.positions() or position in journal.dropped()
    return not known and 0 <= position < journal.description()["requests"]


def leave_out(folder: RunFolder, position: int) -> None:
    """Leave out the request at ``position``, which ``is_waiting``: nothing is to be made again.

    Raises:
        ValueError: if it isn't waiting.
    """
    if not is_waiting(folder, position):
        raise ValueError(f"request: expected the number of one that is still to be edited, got {position}")
    folder.journal.leave_out(position)


def _cut(context: RunContext, folder: RunFolder | None, position: int, kept: int, *, drop: bool = False) -> None:
    """Take back the request at ``position``, before which there are ``kept`` edits, and all that came after it."""
    if folder:
        assert context.checkpoints is not None
        folder.reopen()
        context.checkpoints.cut(kept)  # first: a checkpoint is never of more edits than the journal
    context.journal.cut(position, drop=drop)


def _make_again(context: RunContext, folder: RunFolder | None, up_to: int) -> None:
    run = SequentialRun(context)
    context.begin_session()
    run.restore()
    run.edit(up_to)
    if folder:
        context.editor.save_pretrained(folder.adapter)


def _cost(folder: RunFolder, position: int, after: list[int], *, retried: int | None = None) -> Cost:
    """The cost of keeping what is before ``position``, and making again what was ``after`` it.

    Args:
        retried: a position that all is gone from already.
    """
    journal = folder.journal
    done = journal.positions()
    if position not in done and position != retried:
        edited = f"{done[0]} to {done[-1]}" if done else "none"
        gone = ", which is left out already" if position in journal.dropped() else ""
        raise ValueError(f"request: expected the number of one that was edited ({edited}), got {position}{gone}")
    kept = bisect_left(done, position)
    checkpoint = max((count for count in folder.checkpoints().counts() if count <= kept), default=0)
    again = {*done[checkpoint:kept], *after}
    seconds = sum(r.seconds for r in journal.records(measures=False) if r.index in again)
    return Cost(kept, len(done) - kept - len(after), checkpoint, len(again), seconds)
