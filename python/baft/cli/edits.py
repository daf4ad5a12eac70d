"""``baft edits``: what a run has edited, and how to take it back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from baft.cli.endings import command, edits_are, ending_with
from baft.cli.options import Json
from baft.console import Console

if TYPE_CHECKING:
    from baft.distributed import World
    from baft.runs.context import RunContext
    from baft.runs.folder import RunFolder
    from baft.runs.start import RunWords
    from baft.runs.undo import Cost

    TakeBack = Callable[[RunContext, RunFolder | None, int], None]

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Look at a run's edits, or take them back.")

Folder = Annotated[Path, typer.Argument(help="A sequential run's folder.", metavar="DIR")]
Number = Annotated[int, typer.Argument(help="An edit's number, as `baft edits list` shows it.", metavar="NUMBER")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it, instead of saying what it takes.")]

_NOTHING_DONE = "Nothing was changed; --yes does it."


@app.command("list")
def list_edits(
    folder: Folder,
    first: Annotated[int, typer.Option(help="Number of the first one.", min=0)] = 0,
    limit: Annotated[int | None, typer.Option(help="At most so many.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Each edit: number, prompt, target, and whether it held at once and at the end. Works while the run goes on."""
    from baft.runs.results import superseded

    journal = _journal(folder)
    records = journal.records(first, limit)
    if as_json:
        for record in records:
            typer.echo(json.dumps(record.as_json(), ensure_ascii=False))
    else:
        Console().edits(records, superseded(journal))


@app.command()
def show(folder: Folder, number: Number, as_json: Json = False) -> None:
    """All that is known of one edit: how it trained, and every text."""
    from baft.runs.results import superseded

    journal = _journal(folder)
    record = next(journal.records(number, 1), None)
    if record is None or record.index != number:
        raise ValueError(f"{folder}: expected the number of a request that was edited, got {number}")
    if as_json:
        typer.echo(json.dumps(record.as_json(), ensure_ascii=False))
    else:
        Console().edit(record, superseded=number in superseded(journal))


@app.command()
def rollback(folder: Folder, number: Number, yes: Yes = False) -> None:
    """Go back to the state before an edit, exactly: that one and all after it are as if never made."""
    from baft.runs.undo import cost_of_rollback, roll_back

    with _sequential_run(folder) as run, ending_with(lambda error: run.way_on("rollback", number, error)):
        if run.place:
            run.say_cost(cost_of_rollback(run.place, number))
        run.take_back(number, yes, roll_back, "makes those taken back again")


@app.command()
def drop(folder: Folder, number: Number, yes: Yes = False) -> None:
    """Leave one request out, as if it had never been asked for: all edits after it are made again.

    One that is still to be edited is passed over when its turn comes.
    """
    from baft.runs.undo import cost_of_drop, is_waiting, leave_out
    from baft.runs.undo import drop as drop_edit

    with _sequential_run(folder) as run, ending_with(lambda error: run.way_on("drop", number, error)):
        waiting = run.world.first_ones(is_waiting(run.place, number) if run.place else False)
        if not waiting:
            if run.place:
                run.say_cost(cost_of_drop(run.place, number))
            run.take_back(number, yes, drop_edit, "goes on from there")
            return
        run.console.say(f"Request {number} hasn't been edited yet: nothing is to be made again.")
        if not yes:
            run.console.say(_NOTHING_DONE)
        elif run.place:
            leave_out(run.place, number)
            resume = command("run", "--resume", "--out", folder)
            run.console.say(f"It is left out; {resume} goes on without it.")


def _journal(folder: Path) -> Any:
    from baft.runs.folder import JOURNAL
    from baft.runs.journal import Journal

    path = folder / JOURNAL
    if not path.exists():
        raise ValueError(f"{folder}: expected a run's folder, found no {JOURNAL} in it")
    return Journal(path, read_only=True)


@dataclass(frozen=True)
class _SequentialRun:
    """A sequential run of which something is to be taken back.

    Attributes:
        words: what it was started with.
        world: the processes that do it together.
        place: the run's folder, in the one that writes.
        console: prints in that one.
    """

    words: RunWords
    world: World
    place: RunFolder | None
    console: Console

    def say_cost(self, cost: Cost) -> None:
        """Say what taking back takes; of the process that writes."""
        assert self.place is not None
        done = len(self.place.journal.positions())
        gone = "; results, report and adapter of the finished run go with that" if self.place.done else ""
        self.console.say(f"{cost.taken} of {edits_are(done)} to be taken back{gone}.")
        again = f"{edits_are(cost.edits)} to be made again from the checkpoint after {cost.checkpoint}"
        self.console.say(f"{again}: {cost.seconds:.0f} s.")

    def take_back(self, number: int, yes: bool, do: TakeBack, resumed: str) -> None:
        """Take back an edit, if that is to be done.

        Args:
            do: takes it back.
            resumed: what resuming the run does then.
        """
        from baft.runs.logs import open_log
        from baft.runs.run import open_context
        from baft.runs.start import start

        words, place = self.words, self.place
        if not yes:
            self.console.say(_NOTHING_DONE)
            return
        with self.console.progress() as watcher:
            started = start(words, place, on_training=watcher.training, world=self.world)
            log = open_log(words.log, place.path) if words.log and place else None
            try:
                context = open_context(
                    started.editor,
                    started.requests,
                    plan=started.plan,
                    folder=place,
                    watcher=watcher,
                    log=log,
                    world=self.world,
                )
                do(context, place, number)
                context.close()
            finally:
                if log:
                    log.close()
        if place:
            left = edits_are(len(place.journal.positions()))
            resume = command("run", "--resume", "--out", place.path)
            self.console.say(f"{left} in {place.adapter}; {resume} {resumed}.")

    def way_on(self, doing: str, number: int, ended: BaseException) -> str:
        """How far ``doing`` so to an edit had come when something ended it, and how it is gone on with."""
        from baft.runs.sequential import RequestError

        if self.place is None or isinstance(ended, RequestError):  # which says itself how to go on
            return ""
        when = "" if isinstance(ended, KeyboardInterrupt) else "once that is mended, "
        again = when + command("edits", doing, self.place.path, number, "--yes")
        try:
            if number in self.place.journal.dropped():
                resume = command("run", "--resume", "--out", self.place.path)
                return f"request {number} is left out: {when}{resume} goes on from there"
            if self.place.journal.cut_at() == number:
                return f"the edits before {number} are kept: {again} goes on from there"
            return f"no edit was taken back: {again} does it"
        except (OSError, ValueError):  # of the same cause
            return f"{again} goes on from there"


@contextmanager
def _sequential_run(folder: Path) -> Iterator[_SequentialRun]:
    """The sequential run in a folder, which no other command is at meanwhile."""
    from baft.distributed import launched
    from baft.runs.folder import RunFolder
    from baft.runs.start import RunWords

    with launched() as world, RunFolder(folder, begun=True) if world.writes else nullcontext() as place:
        words = world.first_ones(RunWords(**place.started_with()) if place else None)
        assert words is not None
        if words.mode != "sequential":
            raise ValueError(
                f"{folder}: expected a sequential run, got a {words.mode} one, whose edits don't follow each other"
            )
        world = replace(world, one_model=words.tensor_parallel)
        yield _SequentialRun(words, world, place, Console(silent=not world.writes))
