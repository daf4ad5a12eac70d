"""What the parts of a run share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from baft.distributed import ALONE, World
from baft.editing import Editor, LooksAhead
from baft.evaluation.measures import Evaluator
from baft.requests import EditRequest
from baft.runs.checkpoints import Checkpoint, Checkpoints
from baft.runs.environment import in_place_of, machine
from baft.runs.journal import Journal
from baft.runs.logs import MetricsLog
from baft.runs.retention import Retention
from baft.runs.watcher import Nobody, Watcher

__all__ = ["RunContext"]

# Requests whose questions are put to the model in the same batches, where nothing else says how many.
_TOGETHER = 64


@dataclass
class RunContext:
    """What the parts of a run share.

    Attributes:
        editor: edits.
        requests: all that are asked for; a request's position is its place here.
        journal: remembers.
        evaluator: asks; the unedited model's answers are in the journal.
        checkpoints: of the editor's state; None for a run that writes nothing.
        retention: asks whether earlier edits still hold.
        watcher: is told how it goes on.
        log: gets the figures as they come.
        final: edits that are asked about at the end, at most; None asks about all.
        tasks: of lm-eval, for general ability.
        conflicts: requests for the same thing, as ``baft.runs.conflicts`` finds them.
        world: the processes that share the run. Each has an editor and a journal, and all of them are alike but for
            single edits; what is on the disk is one's.
    """

    editor: Editor
    requests: Sequence[EditRequest]
    journal: Journal
    evaluator: Evaluator
    retention: Retention
    checkpoints: Checkpoints | None = None
    watcher: Watcher = field(default_factory=Nobody)
    log: MetricsLog | None = None
    final: int | None = None
    tasks: Sequence[str] = ()
    conflicts: list[dict[str, Any]] = field(default_factory=list)
    world: World = ALONE

    def order(self) -> list[int]:
        """Positions of the requests that are to be edited, in order."""
        dropped = self.journal.dropped()
        return [position for position in range(len(self.requests)) if position not in dropped]

    def at(self, positions: Sequence[int]) -> list[EditRequest]:
        return [self.requests[position] for position in positions]

    def checkpoint(self, done: int) -> Checkpoint | None:
        """The newest one of no more than so many edits and settling rounds."""
        return self.world.first_ones(self.checkpoints.newest(done) if self.checkpoints and done else None)

    def close(self) -> None:
        """Let the editor be as it is without a run."""
        if isinstance(self.editor, LooksAhead):
            self.editor.keep_written_in(None)

    def begin_session(self) -> None:
        """Begin a session in the journal; where the machine is another than the last one's, say so."""
        here, sessions = machine(self.world.size), self.journal.sessions()
        self.journal.begin_session(len(self.journal.positions()), here)
        if sessions and (different := in_place_of(sessions[-1]["machine"], here)):
            self.say(f"goes on with {different}: the same within rounding, not bit for bit")

    def say(self, text: str) -> None:
        """Say something aloud, and keep it."""
        self.watcher.say(text)
        self.journal.note(text)


def in_groups(positions: Sequence[int], size: int = _TOGETHER) -> Iterator[Sequence[int]]:
    return (positions[first : first + size] for first in range(0, len(positions), size))
